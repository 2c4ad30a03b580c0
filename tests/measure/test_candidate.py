"""A candidate has the baseline's weights, in separate layers."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import coverage
from pytest_int8bench.workloads import Workload
from toys import rebound
from toys.models import make_workload, normal
from toys.rebound import Blocks

BF16 = RunParams(gpu_type="cpu", compile_mode="off", batch_size=4, benchmark_interval_s=0.01)
W8A8 = BF16.replace(int8_enabled=True)


def workload(build: Callable[[], nn.Module], **changes: Any) -> Workload:
    return make_workload(
        build,
        inputs=normal(16),
        filter_fn=lambda module, name: isinstance(module, nn.Linear),
        **changes,
    )


def changed(change: Callable[[nn.Module], object], model: Callable[[], nn.Module] = Blocks) -> Any:
    """Return a build function whose model is modified by ``change``."""

    def build() -> nn.Module:
        net = model()
        change(net)
        return net

    return build


def output(pool: ModelPool, of: Workload, params: RunParams = W8A8) -> torch.Tensor:
    """Return the output of a candidate made from a baseline that ran."""
    pool.get(of, params.baseline()).run()
    out: torch.Tensor = pool.get(of, params).run()
    return out


@pytest.mark.parametrize("mode", ["w8a8", "w8"])
@pytest.mark.parametrize("change", rebound.SAME_NUMBERS, ids=lambda change: change.__name__)
def test_quantizes_layers_reached_in_unusual_ways(change: Any, mode: str) -> None:
    params = W8A8.replace(int8_mode=mode)
    expected = output(ModelPool(), workload(Blocks), params)
    of, pool = workload(changed(change)), ModelPool()
    assert torch.equal(output(pool, of, params), expected)
    assert torch.equal(pool.variant(of, params).run(), expected)
    assert len(coverage(pool.get(of, params).eager).converted) == 4


# -- weights that build does not reproduce ------------------------------------------------------


class Buffers(Blocks):
    """Have state of every kind, all of it random."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.randn(16), persistent=False)
        self.table = torch.randn(16)
        self.blocks[1].fc1.weight = self.blocks[0].fc1.weight
        self.register_parameter("scale", nn.Parameter(torch.randn(16)))
        self.register_buffer("alias", self.scale.detach(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x * self.scale + self.hidden) + self.table + self.alias
        return out


class Unseeded:
    """Build a different model each time, regardless of the seed."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self.build = build
        self.count = 0

    def __call__(self) -> nn.Module:
        self.count += 1
        torch.manual_seed(self.count)
        return self.build()


def in_bf16(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a model as the pool builds it, neither cached nor quantized."""
    return ModelPool().get(workload(build), BF16).eager


def closure_and_lock(net: Any) -> None:
    rebound.closure(net)
    rebound.lock(net)


class Later(Blocks):
    """Create its last layer and its table in the first forward."""

    table: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.randn(16, dtype=x.dtype)
            self.last = nn.Linear(16, 16, dtype=x.dtype)
        out: torch.Tensor = self.last(super().forward(x) + self.table)
        return out


def later_and_closure() -> nn.Module:
    """Return a model that cannot be copied correctly and whose second forward needs the first."""

    class LaterBuffer(Blocks):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.randn(16, dtype=x.dtype), persistent=False)
            out: torch.Tensor = super().forward(x) + self.table
            return out

    net = LaterBuffer()
    rebound.closure(net)
    return net


def scaled_by_chance() -> nn.Module:
    net: Any = Blocks()
    factor = float(torch.rand(())) + 0.5
    net.register_forward_hook(lambda module, args, out: out * factor)
    return net


@pytest.mark.parametrize(
    "build",
    [
        Blocks,
        Buffers,
        changed(rebound.closure),
        changed(closure_and_lock),
        Later,
        later_and_closure,
        scaled_by_chance,
    ],
    ids=[
        "plain",
        "buffers",
        "closure",
        "closure and lock",
        "made later",
        "buffer made later",
        "hidden",
    ],
)
def test_candidate_copies_weights_if_build_is_random(build: Any) -> None:
    of, pool = workload(Unseeded(build)), ModelPool()
    baseline = pool.get(of, BF16)
    baseline.run()
    reference = baseline.run()
    for params in (W8A8, W8A8.replace(int8_mode="w8")):
        out = pool.get(of, params).run()
        error = (out - reference).float().norm() / reference.float().norm()
        assert 0 < error < 0.05
        assert coverage(pool.get(of, params).eager).converted
    assert torch.equal(baseline.run(), reference)


def test_tied_weights_stay_tied() -> None:
    pool = ModelPool()
    of = make_workload(
        Unseeded(Buffers), inputs=normal(16), filter_fn=lambda module, name: name.endswith("fc2")
    )
    baseline = pool.get(of, BF16)
    net: Any = pool.get(of, W8A8).eager
    assert net.blocks[1].fc1.weight is net.blocks[0].fc1.weight
    assert net.blocks[0].fc1.weight is not baseline.eager.blocks[0].fc1.weight
    for name, tensor in baseline.eager.blocks[0].fc1.named_parameters():
        assert torch.equal(net.blocks[0].fc1.get_parameter(name), tensor)


def test_lazy_layers_are_measured() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(64), nn.GELU(), nn.LazyLinear(16))

    pool, of = ModelPool(), workload(Unseeded(build))
    candidate = pool.get(of, W8A8)  # without its baseline first
    assert len(coverage(candidate.eager).converted) == 2
    baseline = pool.get(of, BF16)
    assert {p.dtype for p in baseline.eager.parameters()} == {torch.bfloat16}
    again = pool.variant(of, W8A8)
    assert torch.equal(again.eager[0].bias, baseline.eager[0].bias)


# -- builds that reuse one model -----------------------------------------------------------------


def test_build_may_return_the_same_model_if_copies_are_correct() -> None:
    kept = Blocks()
    expected = output(ModelPool(), workload(lambda: copy.deepcopy(kept)))
    of, pool = workload(lambda: kept), ModelPool()
    assert torch.equal(output(pool, of), expected)
    assert coverage(pool.get(of, BF16).eager).converted == ()


def test_build_may_wrap_the_same_model_if_copies_are_correct() -> None:
    kept = Blocks()
    of, pool = workload(lambda: nn.Sequential(kept, nn.Linear(16, 16))), ModelPool()
    output(pool, of)
    assert len(coverage(pool.get(of, W8A8).eager).converted) == 5
    assert coverage(pool.get(of, BF16).eager).converted == ()


def test_build_may_fail_on_second_call_if_copies_are_correct() -> None:
    models = iter([Blocks()])
    assert output(ModelPool(), workload(lambda: next(models))).isfinite().all()


def test_constants_may_be_shared() -> None:
    table = torch.randn(16, dtype=torch.bfloat16)

    def build() -> nn.Module:
        net: Any = changed(closure_and_lock)()  # cannot be copied
        net.register_buffer("table", table)
        net.scale = nn.Parameter(table)
        net.register_forward_hook(lambda module, args, out: out * module.scale + module.table)
        return net

    pool, of = ModelPool(), workload(build)
    output(pool, of)
    candidate: Any = pool.get(of, W8A8).eager
    assert torch.equal(candidate.table, table)
    assert candidate.table is not table


# -- models that cannot be separated ------------------------------------------------------------

_LINE = (
    "workload 'toy': build must return a new model each time, with the same layers but sharing "
    "none, so that the candidate can get the baseline's weights; the model that build returned "
    "the second time cannot be used: {}; a copy of the baseline cannot be used: {}"
)
CURRENT: dict[str, Any] = {}


class KeptClosure:
    """Return the same model each time, which cannot be copied."""

    def __init__(self, change: Any) -> None:
        self.kept = changed(change)()

    def __call__(self) -> nn.Module:
        return self.kept


def numbered() -> Callable[[], nn.Module]:
    """Return a build function that adds a layer each time to a model that holds a lock."""
    count = iter(range(1, 9))

    def build() -> nn.Module:
        net: Any = nn.Sequential(*(nn.Linear(16, 16) for _ in range(next(count))))
        rebound.lock(net)
        return net

    return build


def forgets(net: Any) -> None:
    """Lose a table when copied and never rebuild it."""
    net.table = torch.randn(16)

    class Forgetful(Blocks):
        def __getstate__(self) -> Any:
            return {**vars(self), "table": torch.zeros(16)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x) + self.table
            return out

    net.__class__ = Forgetful


def first_only(change: Any) -> Callable[[], nn.Module]:
    models = iter([changed(change)()])

    def build() -> nn.Module:
        for model in models:
            return model
        raise KeyError("opened already")

    return build


def copies_itself(net: Any) -> None:
    net.blocks[1].__class__ = type("Single", (rebound.Block,), {"__deepcopy__": lambda s, m: s})


_RETURNED = (
    "WorkloadError: workload 'toy': build must return a new module each time, got one that it "
    "returned before; return copy.deepcopy(model)"
)
_RUNS = "it runs 'blocks.1.fc1.weight' of another model"


@pytest.mark.parametrize(
    ("build", "again", "copied"),
    [
        (KeptClosure(rebound.closure), _RETURNED, _RUNS),
        (KeptClosure(rebound.hook), _RETURNED, _RUNS),
        (KeptClosure(rebound.lock), _RETURNED, "TypeError: cannot pickle '_thread.lock' object"),
        (KeptClosure(copies_itself), _RETURNED, "it shares 'blocks.1' with the baseline"),
        (KeptClosure(forgets), _RETURNED, "its output differs from the baseline's"),
        (first_only(rebound.closure), "KeyError: 'opened already'", _RUNS),
        (
            numbered(),
            "its modules differ from the baseline's, for example '1'",
            "TypeError: cannot pickle '_thread.lock' object",
        ),
        (
            Unseeded(changed(rebound.lock, scaled_by_chance)),
            "its output differs from the baseline's",
            "TypeError: cannot pickle '_thread.lock' object",
        ),
    ],
    ids=["closure", "hook", "lock", "copies itself", "forgets", "fails", "grows", "other numbers"],
)
def test_rejects_model_that_cannot_be_made_twice_in_one_line(
    build: Any, again: str, copied: str
) -> None:
    pool, of = ModelPool(), workload(build)
    baseline = pool.get(of, BF16)
    with pytest.raises(WorkloadError, match=f"^{re.escape(_LINE.format(again, copied))}$"):
        pool.get(of, W8A8)
    with pytest.raises(WorkloadError):
        pool.variant(of, W8A8)
    assert coverage(baseline.eager).converted == ()


def test_rejects_baseline_that_runs_the_candidate_in_one_line() -> None:
    def build() -> nn.Module:
        net: Any = Blocks()
        CURRENT["block"] = net.blocks[1]
        net.blocks[1].forward = lambda x: rebound.run(CURRENT["block"], x)
        return net

    line = (
        "workload 'toy': build must return models that share nothing, but the baseline runs "
        "'blocks.1.fc1.weight' of a model that build returned later"
    )
    pool, of = ModelPool(), workload(build)
    pool.get(of, BF16)
    with pytest.raises(WorkloadError, match=f"^{re.escape(line)}$"):
        pool.get(of, W8A8)


def test_ignores_random_and_failing_forwards() -> None:
    def noisy(net: Any) -> None:
        rebound.lock(net)
        net.register_forward_hook(lambda module, args, out: nn.functional.dropout(out))

    def fails(net: Any) -> None:
        rebound.lock(net)
        net.forward = lambda x: x / None

    for change in (noisy, fails):
        pool, of = ModelPool(), workload(changed(change))
        pool.get(of, BF16)
        assert len(coverage(pool.get(of, W8A8).eager).converted) == 4


def test_activations_may_be_shared() -> None:
    act = nn.GELU()

    def build() -> nn.Module:
        net: Any = nn.Sequential(nn.Linear(16, 64), act, nn.Linear(64, 16))
        rebound.lock(net)
        return net

    output(ModelPool(), workload(build))


# -- baselines and candidates built separately --------------------------------------------------


@pytest.mark.parametrize("first", [BF16, W8A8], ids=["baseline", "candidate"])
def test_rejects_random_weights_if_models_are_built_separately(
    first: RunParams,
) -> None:
    second = W8A8 if first is BF16 else BF16
    pool, of = ModelPool(), workload(Unseeded(Blocks))
    pool.get(of, first)
    pool.evict("baseline")
    pool.evict("candidate")
    line = (
        "workload 'toy': build must return the same weights each time, because baseline and "
        f"candidate may be built separately, got different weights at {second.run_name}; "
        "draw them from torch's, numpy's or Python's own generator"
    )
    with pytest.raises(WorkloadError, match=f"^{re.escape(line)}$"):
        pool.get(of, second)


@pytest.mark.parametrize(
    "change", [rebound.csr_buffer, rebound.lock, rebound.quantized_buffer, rebound.old_weight_norm]
)
def test_repeatable_weights_may_be_built_separately(change: Any) -> None:
    pool, of = ModelPool(), workload(changed(change, Buffers))
    for params in (BF16, W8A8, BF16, W8A8.replace(int8_mode="w8")):
        pool.get(of, params)
        pool.evict("baseline")
        pool.evict("candidate")


def test_build_sees_the_baselines_point() -> None:
    seen: list[tuple[bool, str]] = []

    def build(p: RunParams) -> nn.Module:
        seen.append((p.int8_enabled, p.compile_mode))
        return Blocks()

    point = W8A8.replace(compile_mode="default")
    of = dataclasses.replace(workload(Blocks), build=build)
    pool = ModelPool()
    pool.get(of, point)
    pool.get(of, point.baseline())
    pool.evict("candidate")
    pool.get(of, point)
    assert seen == [(False, "default")] * 3
