"""Test weights from files and hubs, and mismatched weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads import Workload
from pytest_int8bench.workloads.weights import (
    WeightsError,
    check_not_pointer,
    load_state_dict,
    read_state_dict,
)

POINT = RunParams(gpu_type="cpu", compile_mode="off", batch_size=2)
WORKLOAD = Workload(
    name="mlp",
    build=lambda p: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)),
    inputs=lambda p, device: (torch.randn(p.batch_size, 4, device=device),),
    filter_fn=lambda module, name: True,
)


def saved(folder: Path, values: object, name: str = "weights.pth") -> Path:
    torch.save(values, folder / name)
    return folder / name


def ones() -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(v) for name, v in WORKLOAD.build(POINT).state_dict().items()}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_loads_a_torch_file(tmp_path: Path, wrapper: str | None) -> None:
    path = saved(tmp_path, ones() if wrapper is None else {wrapper: ones(), "epoch": 3})
    pool = ModelPool(weights=str(path))
    for params in (POINT, POINT.replace(int8_enabled=True)):
        model = pool.get(WORKLOAD, params).eager
        assert torch.equal(model[0].bias, torch.ones(8, dtype=torch.bfloat16))
    # Ones through INT8: 4 inputs and a bias, then 8 times that and a bias.
    inputs = torch.ones(2, 4, dtype=torch.bfloat16)
    output = pool.get(WORKLOAD, POINT.replace(int8_enabled=True)).compiled(inputs)
    assert torch.allclose(output, torch.full_like(output, 41), rtol=0.02)


def test_loads_a_safetensors_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(ones(), tmp_path / "weights.safetensors")
    read = read_state_dict(tmp_path / "weights.safetensors")
    assert read.keys() == ones().keys()
    assert all(bool((value == 1).all()) for value in read.values())


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
IS_POINTER = "is a pointer of Git LFS, not the file itself: run git lfs pull"


@pytest.mark.parametrize("name", ["weights.pth", "model.safetensors", "weights"])
def test_names_a_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(LFS)
    with pytest.raises(WeightsError) as error:
        read_state_dict(path)
    assert str(error.value) == f"weights {path} {IS_POINTER}"


def test_names_a_git_lfs_pointer_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "deeper").mkdir()
    check_not_pointer(tmp_path)
    check_not_pointer(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_text(LFS)
    with pytest.raises(WeightsError) as error:
        check_not_pointer(tmp_path)
    assert str(error.value) == f"weights {tmp_path / 'model.safetensors'} {IS_POINTER}"


def test_workload_loads_its_own_weights() -> None:
    asked = []

    def load(params: RunParams, weights: str) -> nn.Module:
        asked.append((params.batch_size, weights))
        return WORKLOAD.build(params)

    own = Workload(name="own", build=WORKLOAD.build, load=load, inputs=WORKLOAD.inputs)
    ModelPool(weights="hub").get(own, POINT)
    assert asked == [(2, "hub")]


def test_reports_workload_without_hub_weights() -> None:
    with pytest.raises(WeightsError) as caught:
        ModelPool(weights="hub").get(WORKLOAD, POINT)
    assert str(caught.value) == (
        "--int8-weights=hub: workload 'mlp' has no weights on a hub; "
        "give the path of a file, or load them in build"
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"0.bias": None, "1.bias": None}, "2 missing (0.bias, 1.bias)"),
        ({"head.weight": torch.ones(1)}, "1 unexpected (head.weight)"),
        ({"0.bias": torch.ones(9)}, "1 of another shape (0.bias (9,) for (8,))"),
        (
            {
                "0.weight": None,
                "0.bias": None,
                "1.weight": None,
                "1.bias": None,
                "x": torch.ones(1),
            },
            "4 missing (0.weight, 0.bias, 1.weight …); 1 unexpected (x)",
        ),
    ],
)
def test_rejects_weights_that_do_not_fit(
    changes: dict[str, torch.Tensor | None], problem: str
) -> None:
    state = {name: value for name, value in {**ones(), **changes}.items() if value is not None}
    model = WORKLOAD.build(POINT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_state_dict(model, state, source="w.pth")
    assert str(caught.value) == f"weights w.pth do not fit the model: keys {problem}"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rejects_file_without_a_state_dict(tmp_path: Path) -> None:
    path = saved(tmp_path, [torch.ones(1)])
    with pytest.raises(WeightsError) as caught:
        read_state_dict(path)
    assert str(caught.value) == f"weights {path} must hold a state dict, got list"


@pytest.mark.parametrize(
    ("values", "got"), [({0: torch.ones(1)}, "Tensor under 0"), ({"step": 3}, "int under 'step'")]
)
def test_rejects_state_dict_without_named_tensors(tmp_path: Path, values: object, got: str) -> None:
    path = saved(tmp_path, values)
    with pytest.raises(WeightsError) as caught:
        read_state_dict(path)
    assert str(caught.value) == (
        f"weights {path} must hold a state dict of tensors by name, got {got}"
    )


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from a file ran')",))


def test_does_not_run_code_in_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": Code()})
    with pytest.raises(WeightsError) as caught:
        read_state_dict(path)
    assert str(caught.value) == (
        f"weights {path} must hold a state dict of tensors, got exec, which is not loaded "
        "as it can run code: save model.state_dict() instead"
    )


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"not weights", b"", b"PK\x03\x04", b"\x80\x02}", bytes(99)])
def test_reports_damaged_file_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_state_dict(path)
    assert str(caught.value) == (
        f"weights {path} must be a file of torch.save or safetensors: it is damaged, or something "
        "else"
    )


def test_reports_unreadable_file_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"pth cannot be read: No such file or directory$"):
        read_state_dict(tmp_path / "weights.pth")
