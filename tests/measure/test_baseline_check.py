"""Test the check of compiled baselines: it detects wrong compilers and accepts rounding."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import nn

from pytest_int8bench.measure import baseline_check
from pytest_int8bench.measure.baseline_check import BaselineError, check
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.point import Throughput
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from toys import compilers
from toys.compilers import RIGHT, WRONG, Rotary
from toys.models import make_workload, normal, time_rounds

BF16 = RunParams(
    gpu_type="cpu", compile_mode="default", attention="auto", batch_size=8, model_size="nano",
    benchmark_interval_s=0.01,
)  # fmt: skip
W8A8 = BF16.replace(int8_enabled=True)
SHAPE = (6, 16)
UNCHECKED = "the compiled baseline could not be checked against eager: "


def same(module: Any) -> Any:
    return module.forward


def ready(build: Callable[[], nn.Module], params: RunParams = BF16) -> Model:
    """Return a warm baseline."""
    model = ModelPool().get(make_workload(build, inputs=normal(*SHAPE)), params)
    model.ready()
    return model


# -- wrong and right ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_detects_wrong_code(wrong: compilers.Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    compilers.use(monkeypatch, wrong)
    with pytest.raises(BaselineError) as raised:
        check(ready(Rotary))
    assert str(raised.value) == (
        f"workload 'toy' at {BF16.run_name}: the baseline compiled by torch "
        f"{version('torch')} is wrong: its outputs differ from eager outputs by more than "
        "rounding explains; try other versions or compile_mode=off"
    )


@pytest.mark.parametrize("right", RIGHT.values(), ids=RIGHT)
def test_accepts_rounding_differences(
    right: compilers.Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers.use(monkeypatch, right)
    for params in (BF16, BF16.replace(bf16=False)):
        check(model := ready(Rotary, params))
        assert model.unchecked is None


def test_detects_wrong_fp32_code(monkeypatch: pytest.MonkeyPatch) -> None:
    compilers.use(monkeypatch, WRONG["slice"])
    with pytest.raises(BaselineError):
        check(ready(Rotary, BF16.replace(bf16=False)))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)


class Casts(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.float16):
            h = self.fc1(x)
        return self.fc2(h.bfloat16()) + torch.zeros_like(h, dtype=torch.bfloat16)


class Signs(Layers):
    """Rounding changes some of its decisions, which changes outputs far more than rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.where(self.fc1(x) > 0, 1.0, -1.0).to(x.dtype))


class Cancels(Layers):
    """Subtract two equal numbers, which eager forwards do without any error."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc1(x)
        return self.fc2(h).tanh() + (3 * h - (h + h + h))


class Largest(Layers):
    """Logits so large that softmax selects one of them; fully masked rows are NaN."""

    def forward(self, x: torch.Tensor) -> Any:
        logits = 300 * self.fc1(x) @ x.mT
        logits[:, 2] = -torch.inf
        return self.fc2(logits.softmax(-1) @ x), logits.argmax(-1)


@pytest.mark.parametrize(
    ("build", "right"),
    [
        (Signs, RIGHT["split"]),
        (Cancels, compilers.unrounded),
        (Largest, RIGHT["split"]),
        (Largest, RIGHT["reversed"]),
        (Casts, RIGHT["same"]),
    ],
)
def test_accepts_decisions_changed_by_rounding(
    build: Callable[[], nn.Module], right: compilers.Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers.use(monkeypatch, right)
    check(model := ready(build))
    assert model.unchecked is None


# -- what cannot be checked ---------------------------------------------------------------------


class Insists(Layers):
    """Run only in the dtype of the point."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            raise TypeError("BF16 only")
        return self.fc2(self.fc1(x))


class Reseeds(Layers):
    """Draw the same numbers at each call, which compiled code need not reproduce."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x)) + torch.rand(x.shape, dtype=x.dtype)


class NoNumber(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x) / 0)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Insists, "TypeError: BF16 only"),
        (Reseeds, "the model draws random numbers"),
        (NoNumber, "its eager outputs contain no finite number"),
    ],
)  # fmt: skip
def test_reports_what_cannot_be_checked(
    build: Callable[[], nn.Module], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers.use(monkeypatch, same)
    check(model := ready(build))
    assert model.unchecked is not None
    assert model.unchecked.startswith(UNCHECKED + why)


def test_reports_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    compilers.use(monkeypatch, same)
    model = ready(Rotary)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(baseline_check, "_cast_to_fp32", fail)
    check(model)
    assert model.unchecked == f"{UNCHECKED}out of memory"


def test_does_not_check_uncompiled_models() -> None:
    check(model := ready(Insists, BF16.replace(compile_mode="off")))
    assert model.unchecked is None


# -- side effects -------------------------------------------------------------------------------


class Tables(Layers):
    """Keep a table in the dtype of the last call, a running mean, and the number of calls."""

    mean: torch.Tensor
    table: torch.Tensor | None = None
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or self.table.dtype != x.dtype:
            self.table = torch.ones(16, dtype=x.dtype)
        self.mean.lerp_(x.mean((0, 1)), 0.5)
        return self.fc2(self.fc1(x) * self.table) - self.mean


def test_leaves_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    compilers.use(monkeypatch, WRONG["half"])  # the longest path through the check
    model = ready(Tables)
    before = {name: t.clone() for name, t in model.eager.state_dict().items()}
    memory = [t.data_ptr() for t in model.eager.state_dict().values()]
    table, graphs, drawn = model.eager.table, len(model.compiled.graphs), torch.get_rng_state()
    with pytest.raises(BaselineError):
        check(model)
    assert model.eager.table is table
    assert [t.data_ptr() for t in model.eager.state_dict().values()] == memory
    assert all(torch.equal(t, before[name]) for name, t in model.eager.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    model.ready()
    assert len(model.compiled.graphs) == graphs


# -- points -------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [BF16, W8A8], ids=["baseline", "candidate"])
def test_wrong_baseline_gives_no_figures(
    params: RunParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers.use(monkeypatch, WRONG["one row"])
    throughput = Throughput(ModelPool())
    workload = make_workload(Rotary, inputs=normal(*SHAPE))
    for again in (False, True):
        if again:  # it does not run again
            monkeypatch.setattr(baseline_check, "_Check", None)
        with pytest.raises(BaselineError, match="'toy' at "):
            throughput.measure(workload, params, time_rounds, nodeid="test_it.py::test_it")


@pytest.mark.parametrize("params", [BF16, W8A8], ids=["baseline", "candidate"])
def test_results_report_what_was_not_checked(
    params: RunParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers.use(monkeypatch, same)
    throughput = Throughput(ModelPool(), with_evidence=False)
    workload = make_workload(NoNumber, inputs=normal(*SHAPE))
    result = throughput.measure(workload, params, time_rounds, nodeid="test_it.py::test_it")
    assert f"{UNCHECKED}its eager outputs contain no finite number" in result.reason
