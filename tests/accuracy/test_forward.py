"""Running a model on any number of samples."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pytest_int8bench.accuracy.forward import Forward
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads import Workload

BATCH = 4
BF16 = RunParams(gpu_type="cpu", compile_mode="off", batch_size=BATCH, model_size="nano")


class Toy(nn.Module):
    """Count calls, which take rows, a table that all rows share, and an integer per row."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 3)
        self.shapes: list[torch.Size] = []

    def forward(self, x: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
        self.shapes.append(x.shape)
        return {"y": self.fc1(x) + table.sum(), "index": index}


def inputs(p: RunParams, device: torch.device) -> tuple[torch.Tensor, ...]:
    return torch.randn(p.batch_size, 8), torch.ones(2), torch.arange(p.batch_size)


def make(build: Any = Toy, inputs: Any = inputs) -> Model:
    return ModelPool().get(Workload(name="toy", build=lambda p: build(), inputs=inputs), BF16)


MODEL = make()


def rows(samples: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, 8, generator=generator), torch.ones(2), torch.arange(samples)


@settings(max_examples=20)
@given(st.integers(1, 3 * BATCH + 1))
def test_outputs_do_not_depend_on_number_of_samples(samples: int) -> None:
    forward, given_rows = Forward(MODEL), rows(samples)
    MODEL.eager.shapes.clear()
    output = forward(*given_rows)
    assert set(MODEL.eager.shapes) == {(BATCH, 8)}  # always the compiled shape
    assert output["y"].shape == (samples, 3)
    assert output["y"].dtype == torch.float32
    assert torch.equal(output["index"], given_rows[2])
    with torch.no_grad():
        expected = MODEL.eager.fc1(given_rows[0].bfloat16()) + 2
    torch.testing.assert_close(output["y"], expected.float(), rtol=1e-2, atol=1e-2)


def test_outputs_are_copies() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(8, 8)
            self.kept = torch.zeros(BATCH, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept.copy_(x)
            return self.kept

    model = make(Same, lambda p, device: (torch.randn(p.batch_size, 8),))
    forward = Forward(model)
    first = forward(torch.ones(BATCH, 8))
    forward(torch.zeros(BATCH, 8))
    assert first.eq(1).all()
    assert forward(torch.ones(2, 8)).shape == (2, 8)


def test_accepts_keywords_in_any_order() -> None:
    def mapping(p: RunParams, device: torch.device) -> dict[str, torch.Tensor]:
        return dict(zip(("x", "table", "index"), inputs(p, device), strict=True))

    x, table, index = rows(6)
    model = make(inputs=mapping)
    output = Forward(model)(index=index, table=table, x=x)
    assert output["y"].shape == (6, 3)
    assert torch.equal(output["index"], index)


def test_accepts_inputs_of_another_dtype_and_layout() -> None:
    x, table, index = rows(BATCH)
    straight = Forward(MODEL)(x, table, index)
    turned = Forward(MODEL)(x.double().T.contiguous().T, table, index.int())
    assert torch.equal(straight["y"], turned["y"])


X, TABLE, INDEX = rows(6)
BAD = {
    "too few": ((X,), "forward must get 3 tensors, got 1"),
    "width": (
        (X[:, :5], TABLE, INDEX),
        r"tensor 0 of forward must have shape \[4, 8\] beyond the first dimension, got \[6, 5\]",
    ),
    "kind": ((X, TABLE, INDEX.float()), "tensor 2 of forward must be torch.int64, got"),
    "lengths": (
        (X, TABLE, INDEX[:5]),
        "all tensors of forward must have the same number of samples, got 6, 2, 5",
    ),
    "one kept": (
        (X, TABLE, INDEX[:4]),
        "all tensors of forward must have the same number of samples, got 6, 2, 4",
    ),
    "none": ((X[:0], TABLE, INDEX[:0]), "forward needs at least one sample, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_rejects_inputs_unlike_the_workloads(name: str) -> None:
    given_rows, message = BAD[name]
    with pytest.raises(WorkloadError, match=f"^workload 'toy': {message}"):
        Forward(MODEL)(*given_rows)


def test_outputs_without_sample_axis_need_whole_batches() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc1(x).sum(0)

    model = make(Summed, lambda p, device: (torch.randn(p.batch_size, 8),))
    assert Forward(model)(torch.ones(BATCH, 8)).shape == (8,)
    with pytest.raises(WorkloadError, match=r"of 4 samples, because an output has shape \[8\], "):
        Forward(model)(torch.ones(3, 8))


def test_forward_does_not_keep_its_model_alive() -> None:
    model = make()
    forward = Forward(model)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match=r"^forward\(\) was called after its model was freed$"):
        forward(*rows(BATCH))
