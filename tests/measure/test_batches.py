"""Every call of baseline and candidate sees the same values, even if models modify them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pytest_int8bench.accuracy.guardrail import Guardrail
from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.sensitivity import SensitivityScan
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure import batches
from pytest_int8bench.measure.batches import WRITES, Batch, BatchRun
from pytest_int8bench.measure.point import Throughput
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.tensors import tensors_of
from pytest_int8bench.workloads import Workload
from toys.models import time_rounds

BF16 = RunParams(
    gpu_type="cpu", compile_mode="off", batch_size=4, model_size="nano", benchmark_interval_s=0.02
)
W8A8 = BF16.replace(int8_enabled=True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_int8bench.measure.host_feed._cpus", lambda: 1)


@dataclass
class Pair:
    """Two tensors."""

    first: torch.Tensor
    second: torch.Tensor


class Cache:
    """Grow at each call, like a decoder's cache."""

    def __init__(self) -> None:
        self.keys = torch.zeros(4, 0)
        self.lock = threading.Lock()

    def update(self, x: torch.Tensor) -> torch.Tensor:
        self.keys = torch.cat([self.keys.to(x), x[:, :1]], dim=1)
        return self.keys


class Writes(nn.Module):
    """Modify its inputs before it computes."""

    def __init__(self, change: Callable[..., Any]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 256), nn.Linear(256, 64)
        self.change = change

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        changed = self.change(x, *others)
        x = x if changed is None else changed
        return self.fc2(nn.functional.gelu(self.fc1(x)))


def rows() -> torch.Tensor:
    return torch.randn(4, 64)


def _standardize(x: torch.Tensor) -> None:
    x.sub_(x.mean()).div_(x.std())


def _pop(x: torch.Tensor, extra: dict[str, torch.Tensor]) -> torch.Tensor:
    return x + extra.pop("shift", x)


def _grow(x: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    kept.append(x + sum(kept))
    return kept[-1]


def _grow_cache(x: torch.Tensor, cache: Cache) -> torch.Tensor:
    return x + cache.update(x).sum(1, keepdim=True)


def _array(x: torch.Tensor, array: np.ndarray[Any, Any]) -> torch.Tensor:
    array *= 0.5
    return x + torch.from_numpy(array).to(x)


def _pair(x: torch.Tensor, pair: Pair) -> torch.Tensor:
    pair.first = pair.first + pair.second
    return x + pair.first


def _nested(x: torch.Tensor, nested: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    return x + nested["a"][0].mul_(0.5)


def _random(x: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    return x + torch.rand(1, generator=source).to(x)


def _queue(x: torch.Tensor, queue: deque[float]) -> torch.Tensor:
    queue.append(queue[-1] + 1)
    return x + queue[-1]


# name -> what the model does to its inputs, and its inputs besides x
CHANGES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "neg": (lambda x: x.neg_(), tuple),
    "mul": (lambda x: x.mul_(0.9), tuple),
    "standardize": (_standardize, tuple),
    "view": (lambda x: x.view(-1)[:64].zero_(), tuple),
    "index": (lambda x: x.__setitem__((slice(None), 0), x[:, 1] + x[:, 0]), tuple),
    "out": (lambda x: torch.add(x, 1, out=x), tuple),
    "resize": (lambda x: x.resize_(2, 64), tuple),
    "transpose": (lambda x: x.t_().clone().t(), tuple),
    "set": (lambda x: x.set_(torch.ones_like(x)), tuple),
    "nested": (_nested, lambda: ({"a": [rows()]},)),
    "pop": (_pop, lambda: ({"shift": rows()},)),
    "grow": (_grow, lambda: ([rows()],)),
    "cache": (_grow_cache, lambda: (Cache(),)),
    "array": (_array, lambda: (np.ones((4, 64), np.float32),)),
    "dataclass": (_pair, lambda: (Pair(rows(), rows()),)),
    "generator": (_random, lambda: (torch.Generator().manual_seed(1),)),
    "deque": (_queue, lambda: (deque([1.0]),)),
}


def workload(name: str, **changes: Any) -> Workload:
    change, others = CHANGES[name]
    toy = {
        "name": name,
        "build": lambda p: Writes(change),
        "inputs": lambda p, device: (rows(), *others()),
        "filter_fn": lambda module, path: isinstance(module, nn.Linear),
    }
    return Workload(**{**toy, **changes})


def output_of(call: Callable[[], Any]) -> torch.Tensor:
    with torch.inference_mode():
        return next(tensors_of(call())).clone()


@pytest.mark.parametrize("name", CHANGES)
def test_every_call_sees_the_same_values(name: str) -> None:
    model = ModelPool().get(workload(name), BF16)
    with torch.inference_mode():
        expected = model.eager(*model.fresh_inputs())
    ready = model.ready()
    assert ready.remark == WRITES
    for _ in range(3):
        assert torch.equal(output_of(model.run), expected)
    model.run.prepare(2)
    for _ in range(3):  # one call more than was prepared
        assert torch.equal(output_of(model.run), expected)
        assert torch.equal(output_of(model.run_again), expected)


@pytest.mark.parametrize("name", ["neg", "standardize", "cache", "pop"])
@pytest.mark.parametrize("feed", ["device", "host"])
def test_measures_model_that_writes_to_its_inputs(name: str, feed: str) -> None:
    pool = ModelPool()
    result = Throughput(pool).measure(
        workload(name), W8A8.replace(feed=feed), time_rounds, nodeid="t"
    )
    assert (result.status, result.reason) == ("ok", WRITES)
    assert result.speedup > 0
    [verdict] = Guardrail(pool, Limit.parse("1%")).check(
        workload(name), W8A8.replace(feed=feed), nodeid="t"
    )
    assert verdict.outcome == "proxy-ok"
    assert verdict.distance["sqnr_db"] > 30


def test_restores_inputs_of_compiled_models() -> None:
    pool = ModelPool()
    written = workload("standardize")
    params = BF16.replace(compile_mode="default")
    expected = output_of(pool.get(written, BF16).run)
    model = pool.get(written, params)
    assert model.ready().remark == WRITES
    model.run.prepare(3)
    with model.compiled.entered(), model.compiled.no_compilation():
        for _ in range(4):
            torch.testing.assert_close(output_of(model.run), expected, atol=0.02, rtol=0.02)


def test_does_not_copy_inputs_of_read_only_models() -> None:
    seen = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.data_ptr())
            return self.fc1(x)

    pool = ModelPool()
    looks = workload("neg", build=lambda p: Looks())
    model = pool.get(looks, BF16)
    assert model.ready().remark is None
    assert model.run.most_calls is None
    assert set(seen) == {pool.batch(looks, BF16)[0].data_ptr()}


def test_calibration_and_sensitivity_see_the_same_values() -> None:
    smooth = W8A8.replace(int8_smoothquant=True)

    def written(times: int) -> Workload:
        batch = (torch.ones(4, 64) * torch.arange(1.0, 65.0),)
        return workload("mul", calibration=lambda p, device: [batch] * times)

    once, twice = (ModelPool().get(written(n), smooth) for n in (1, 2))
    x = once.fresh_inputs()
    assert torch.equal(once.eager(*[t.clone() for t in x]), twice.eager(*[t.clone() for t in x]))

    pool = ModelPool()
    guardrail = Guardrail(pool, Limit.parse("1%"))
    table = SensitivityScan(guardrail, workload("standardize"), W8A8).run(nodeid="t")
    assert all(row["sqnr_db"] > 30 for row in table.layers)


def test_rejects_model_that_starts_writing_later() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(64, 64)
            self.late = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc1(x.neg_() if self.late else x)

    model = Late()

    def rounds(run: Any, plan: Any) -> list[float]:
        model.late = True
        return time_rounds(run, plan)

    with pytest.raises(
        WorkloadError, match=r"^workload 'neg': the model wrote to its inputs while"
    ):
        Throughput(ModelPool()).measure(
            workload("neg", build=lambda p: model), BF16, rounds, nodeid="t"
        )


def test_ignores_writes_of_equal_values() -> None:
    pool = ModelPool()
    model = pool.get(workload("neg", build=lambda p: Writes(lambda x: x.clamp_(-99, 99))), BF16)
    assert model.ready().remark is None
    batches.check_late_writes("neg", model.batch)
    output_of(model.run)
    batches.check_late_writes("neg", model.batch)


def test_copies_are_made_before_a_block_and_fit_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = Batch((torch.ones(4, 64),))
    run = BatchRun(lambda x: x, batch, CPU)
    assert run.most_calls is None
    batch.inputs[0].neg_()
    assert batch.check()
    assert torch.equal(batch.inputs[0], torch.ones(4, 64))
    assert run.most_calls == batches.MAX_COPIES
    monkeypatch.setattr(batches, "COPIES_BYTES", 3 * 4 * 64 * 4 + 1)
    assert run.most_calls == 3
    monkeypatch.setattr(batches, "COPIES_BYTES", 1)
    assert run.most_calls == 1
    run.prepare(2)
    monkeypatch.setattr(batch, "fresh", lambda: pytest.fail("copied under the clock"))
    assert run() is not run()


def test_replaces_inference_tensors_before_compiling() -> None:
    with torch.inference_mode():
        made = torch.ones(2)
    batch = Batch((made,))
    assert not batch.inputs[0].is_inference()
    assert not batch.fresh()[0].is_inference()


# -- the state of a model ------------------------------------------------------------------------


class Counts(nn.Module):
    """Have a buffer that each call changes and a table that the first call fills."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("table", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.table.fill_(0.5)
        return self.fc1(x) + self.calls * self.table


CHANGING = (
    "each call changes buffers of the model (calls); they are restored before outputs are compared "
    "or scored, but not between timed calls"
)


def test_restores_buffers_changed_by_each_call() -> None:
    pool = ModelPool()
    counts = workload("neg", build=lambda p: Counts())
    result = Throughput(pool).measure(counts, W8A8, time_rounds, nodeid="t")
    assert result.reason == CHANGING
    [verdict] = Guardrail(pool, Limit.parse("1%")).check(counts, W8A8, nodeid="t")
    assert verdict.distance["sqnr_db"] > 30
    assert verdict.floor["sqnr_db"] is None  # both eager, so equal
    baseline = pool.get(counts, BF16)
    baseline.restore()
    assert (baseline.eager.calls.item(), baseline.eager.table[0].item()) == (0, 0.5)


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.fc1(x), 0.1, training=True)


class Remembers(nn.Module):
    """Keep state outside of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.last = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.last + self.fc1(x)
        return self.last


@pytest.mark.parametrize("model", [Draws, Remembers])
def test_reports_outputs_that_do_not_repeat(model: type[nn.Module]) -> None:
    ready = ModelPool().get(workload("neg", build=lambda p: model()), BF16).ready()
    assert ready.remark == (
        "two calls with the same inputs gave different outputs: the model draws random numbers or "
        "keeps state, so baseline and candidate cannot be compared"
    )
