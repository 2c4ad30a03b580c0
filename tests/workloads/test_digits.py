"""Test the handwritten-digits workload, and the script that trains its weights."""

from __future__ import annotations

import copy
import importlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import apply_int8_quant, coverage
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.workloads.weights import WeightsError

digits = pytest.importorskip("pytest_int8bench.workloads.digits", exc_type=ImportError)
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

CPU = torch.device("cpu")
POINT = RunParams(gpu_type="cpu", batch_size=4, compile_mode="off")
WORKLOAD = digits.digits()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: small matmuls gain nothing from more and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """Return the module that trains the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("train_digits")


def shipped() -> dict[str, torch.Tensor]:
    return load_file(digits.WEIGHTS)


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def right_of(count: str) -> int:
    """Return the number of correct images in a header's count such as 793/797."""
    return int(count.partition("/")[0])


def forward_of(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([model(part.bfloat16()).float() for part in images.split(100)])

    return forward


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_splits_are_disjoint_and_cover_the_data() -> None:
    splits = digits.splits()
    assert {name: len(split.ids) for name, split in splits.items()} == {
        "train": 800,
        "selection": 200,
        "certification": 797,
    }
    together = np.concatenate([split.ids for split in splits.values()])
    assert sorted(together) == list(range(1797))


def test_splits_are_stratified() -> None:
    splits = digits.splits()
    whole = torch.cat([split.labels for split in splits.values()]).bincount(minlength=10) / 1797
    for split in splits.values():
        counts = split.labels.bincount(minlength=10)
        assert (counts - whole * len(split.ids)).abs().max() <= 1.5


def test_images_match_the_data() -> None:
    data = digits.load_digits()
    for split in digits.splits().values():
        assert split.images.shape == (len(split.ids), 1, 8, 8)
        assert torch.equal((split.images[:, 0] + 1) * 8, torch.tensor(data.images[split.ids]))
        assert torch.equal(split.labels, torch.tensor(data.target[split.ids]))
        assert torch.equal(split.images.bfloat16().float(), split.images)


def test_bf16_reaches_97_percent_on_the_certification_split() -> None:
    ids, scores = WORKLOAD.evaluation.scores(forward_of(WORKLOAD.build(POINT).bfloat16()))
    assert list(ids) == list(digits.splits()["certification"].ids)
    assert scores.shape == (797,)
    assert set(scores) <= {0.0, 1.0}
    assert scores.mean() >= 0.97


@pytest.mark.parametrize("smoothquant", [False, True])
def test_w8a8_loses_at_most_1_5_points(smoothquant: bool) -> None:
    baseline = WORKLOAD.build(POINT).bfloat16()
    batches = [(images.bfloat16(),) for (images,) in WORKLOAD.calibration(POINT, CPU)]
    candidate = apply_int8_quant(
        copy.deepcopy(baseline), mode="w8a8", smoothquant=smoothquant, calibration=batches
    )
    assert len(coverage(candidate).converted) == 16
    for scores in (WORKLOAD.evaluation.scores, WORKLOAD.evaluation.selection):
        ids, before = scores(forward_of(baseline))
        again, after = scores(forward_of(candidate))
        assert list(ids) == list(again)
        assert abs(after.mean() - before.mean()) <= 0.015


def test_selection_and_calibration_exclude_certification_images() -> None:
    seen = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.zeros(len(images), 10)

    ids, _ = WORKLOAD.evaluation.selection(forward)
    splits = digits.splits()
    assert list(ids) == list(splits["selection"].ids)
    assert torch.equal(seen[0], splits["selection"].images)
    calibration = torch.cat([images for (images,) in WORKLOAD.calibration(POINT, CPU)])
    assert torch.equal(calibration, splits["train"].images[:256])


def test_scores_mark_correct_images() -> None:
    labels = digits.splits()["certification"].labels

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.one_hot(labels, 10).float()
        logits[0] = logits[0].roll(1)
        logits[torch.nonzero(labels == 0)[0]] = torch.nan  # argmax would give 0
        return logits

    _, scores = WORKLOAD.evaluation.scores(forward)
    wrong = {0, int(torch.nonzero(labels == 0)[0])}
    assert set(np.flatnonzero(scores == 0)) == wrong


def test_default_filter_selects_attention_and_mlp() -> None:
    model = digits.VisionTransformer()
    chosen = {name for name, part in model.named_modules() if is_transformer_linear(part, name)}
    leaves = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert chosen == {f"blocks.{n}.{leaf}" for n in range(4) for leaf in leaves}
    for name in chosen:  # supported by CUDA's INT8 matmul
        linear: Any = model.get_submodule(name)
        assert linear.in_features % 8 == linear.out_features % 8 == 0


def test_model_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model = digits.VisionTransformer().eval()
    images = digits.splits()["train"].images[:2]
    with torch.inference_mode():
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize("batch_size", [1, 4, 2000])
def test_inputs_are_repeated_training_images(batch_size: int) -> None:
    params = POINT.replace(batch_size=batch_size)
    (images,) = WORKLOAD.inputs(params, CPU)
    assert images.shape == (batch_size, 1, 8, 8)
    train = digits.splits()["train"].images
    assert torch.equal(images, train.repeat(3, 1, 1, 1)[:batch_size])
    assert dict(WORKLOAD.units(params)) == {"samples": batch_size, "tokens": 16 * batch_size}
    with torch.inference_mode():
        assert digits.VisionTransformer().eval()(images).shape == (batch_size, 10)


def test_build_returns_new_modules_with_the_same_weights() -> None:
    first, second = WORKLOAD.build(POINT), WORKLOAD.build(POINT)
    assert same(first.state_dict(), second.state_dict())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert same(second.state_dict(), WORKLOAD.build(POINT).state_dict())
    assert not same(first.state_dict(), second.state_dict())


def test_workloads_share_their_models() -> None:
    pool = ModelPool()
    assert pool.key(digits.digits(), POINT) == pool.key(digits.digits(), POINT)


def test_build_loads_the_shipped_weights_in_any_grad_mode() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            model = WORKLOAD.build(POINT)
            assert torch.is_inference_mode_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
    state = model.state_dict()
    assert state.keys() == shipped().keys()
    for name, value in shipped().items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], value)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert not model.training


def test_building_does_not_change_global_state() -> None:
    def state() -> tuple[Any, ...]:
        numpy = np.random.get_state()[1]
        return (torch.get_rng_state().tolist(), list(numpy), random.getstate())

    before = state()
    digits.splits.__wrapped__()
    WORKLOAD.build(POINT)
    assert state() == before


# -- the shipped file -----------------------------------------------------------------------------


def test_shipped_file_is_under_1_mb() -> None:
    assert digits.WEIGHTS.stat().st_size < 1e6


def test_shipped_weights_have_the_accuracy_in_their_header(script: Any) -> None:
    header = header_of(digits.WEIGHTS)
    found = script.right_images(WORKLOAD.build(POINT))
    for split in ("selection", "certification"):
        recorded = header[f"right.{split}"]
        assert found[split].partition("/")[2] == recorded.partition("/")[2]
        # On another CPU, a borderline image may be classified differently.
        assert right_of(found[split]) >= right_of(recorded) - 1


def test_shipped_weights_come_from_the_training_script(script: Any) -> None:
    recipe = {k: v for k, v in header_of(digits.WEIGHTS).items() if k.startswith("recipe.")}
    assert recipe == {
        k: v for k, v in script.header(script.Recipe(), {}).items() if k.startswith("recipe.")
    }


def spoil(kind: str, path: Path) -> str:
    """Write a file that is not a valid weights file; return the expected error."""
    whole, header = digits.WEIGHTS.read_bytes(), header_of(digits.WEIGHTS)
    weights = shipped()
    damaged = "must be a file of torch.save or safetensors: it is damaged, or something else"
    foreign = (
        "must come from benchmarks/train_digits.py, trained on the splits that the installed "
        "scikit-learn gives"
    )
    if kind == "half":
        path.write_bytes(whole[: len(whole) // 2])
        return damaged
    if kind == "text":
        path.write_text("not weights")
        return damaged
    if kind == "empty":
        path.write_bytes(b"")
        return damaged
    if kind == "missing":
        return f"cannot be read: No such file or directory: {path}"
    if kind == "no header":
        save_file(weights, path)
        return foreign
    if kind == "other splits":
        save_file(weights, path, {**header, "splits_sha256": "0" * 64})
        return foreign
    if kind == "other names":
        save_file({"a": torch.ones(1)}, path, header)
        names = "pos_embed, patch_embed.0.weight, patch_embed.0.bias"
        return f"do not fit the model: keys 59 missing ({names} …); 1 unexpected (a)"
    weights["head.bias"] = torch.ones(9)
    save_file(weights, path, header)
    return "do not fit the model: keys 1 of another shape (head.bias (9,) for (10,))"


@pytest.mark.parametrize(
    "kind",
    ["half", "text", "empty", "missing", "no header", "other splits", "other names", "other shape"],
)
def test_rejects_damaged_or_foreign_file_in_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "digits.safetensors"
    problem = spoil(kind, path)
    monkeypatch.setattr(digits, "WEIGHTS", path)
    with pytest.raises(WeightsError) as caught:
        WORKLOAD.build(POINT)
    assert str(caught.value) == f"weights {path} {problem}"


# -- the script that trains -----------------------------------------------------------------------


def test_builds_from_a_file_of_the_script(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.safetensors"
    assert script.main(["--steps=2", f"--output={path}"]) == 0
    monkeypatch.setattr(digits, "WEIGHTS", path)
    model = WORKLOAD.build(POINT)
    trained = script.train(script.Recipe(steps=2))
    assert same(model.state_dict(), trained.state_dict())
    right = script.right_images(model)
    header = header_of(path)
    assert header == script.header(script.Recipe(steps=2), right)
    assert header["torch"] == torch.__version__
    assert (header["recipe.steps"], header["recipe.seed"]) == ("2", "0")
    assert capsys.readouterr().out == (
        f"selection: {right['selection']} correct\n"
        f"certification: {right['certification']} correct\n"
        f"wrote {path}\n"
    )


def test_training_is_deterministic(script: Any) -> None:
    def state(**recipe: int) -> dict[str, torch.Tensor]:
        return dict(script.train(script.Recipe(**recipe)).state_dict())

    weights = state(steps=3)
    assert same(weights, state(steps=3))
    assert not same(weights, state(steps=3, seed=1))
    assert not same(weights, state(steps=4))


def test_augmented_images_keep_their_range(script: Any) -> None:
    images = digits.splits()["train"].images[:50]
    moved = script.augment(images, torch.Generator().manual_seed(0), script.Recipe())
    assert moved.shape == images.shape
    assert -1 - 1e-5 <= float(moved.min()) <= float(moved.max()) <= 1 + 1e-5
    assert not any(torch.equal(one, other) for one, other in zip(images, moved, strict=True))
