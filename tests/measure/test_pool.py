"""Test building models and inputs, and which of them the pool holds."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import random
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from pytest_int8bench.errors import QuantizationError, WorkloadError
from pytest_int8bench.measure import attention_auto
from pytest_int8bench.measure.building import DeviceError, build_eager, find_device
from pytest_int8bench.measure.model import AttentionError, Model
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import apply_int8_quant, coverage, weight_storage
from pytest_int8bench.tensors import map_tensors, tensors_of
from pytest_int8bench.workloads import Workload
from toys import stateful

CPU = torch.device("cpu")
BF16 = RunParams(
    gpu_type="cpu", compile_mode="off", batch_size=4, model_size="nano", benchmark_interval_s=0.01
)
FP32 = BF16.replace(bf16=False)
W8A8 = BF16.replace(int8_enabled=True)
W8 = BF16.replace(int8_enabled=True, int8_mode="w8")


class Toy(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.fc1 = nn.Linear(16, width)
        self.fc2 = nn.Linear(width, 16)
        self.register_buffer("shift", torch.rand(16))
        self.register_buffer("index", torch.arange(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(self.norm(x) + self.shift))


def toy_inputs(p: RunParams, device: torch.device) -> tuple[torch.Tensor]:
    return (torch.randn(p.batch_size, 16, device=device),)


def make_workload(**changes: Any) -> Workload:
    return Workload(**{"name": "toy", "build": lambda p: Toy(), "inputs": toy_inputs, **changes})


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load host-fed batches in this process on every machine."""
    monkeypatch.setattr("pytest_int8bench.measure.host_feed._cpus", lambda: 1)


class Counting:
    """A workload that counts how often its model is built."""

    def __init__(self, **changes: Any) -> None:
        self.built = 0
        self.workload = make_workload(build=self.build, **changes)

    def build(self, p: RunParams) -> nn.Module:
        self.built += 1
        return Toy()


# -- building -----------------------------------------------------------------------------------


def test_weights_repeat_without_changing_the_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_eager(make_workload(), BF16, CPU)
    assert torch.equal(torch.rand(3), expected)
    second = build_eager(make_workload(), BF16, CPU)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_a_model_is_built_for_inference() -> None:
    model = build_eager(make_workload(), BF16, CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_bf16_weights_and_buffers_are_bf16() -> None:
    model = build_eager(make_workload(), BF16, CPU)
    plain = build_eager(make_workload(), FP32, CPU)
    for name, tensor in plain.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32
            tensor = tensor.to(torch.bfloat16)
        assert torch.equal(model.state_dict()[name], tensor)
        assert model.state_dict()[name].dtype == tensor.dtype
    assert isinstance(model.fc1.weight, nn.Parameter)


def test_modules_kept_in_fp32_are_not_rounded() -> None:
    workload = make_workload(keep_fp32=lambda module, name: name == "norm")
    model = build_eager(workload, BF16, CPU)
    plain = build_eager(workload, FP32, CPU)
    for name, tensor in plain.norm.state_dict().items():
        assert torch.equal(model.norm.state_dict()[name], tensor)
        assert model.norm.state_dict()[name].dtype == tensor.dtype
    assert model.fc1.weight.dtype == torch.bfloat16
    assert model.shift.dtype == torch.bfloat16


def test_keeps_children_of_fp32_modules_in_fp32() -> None:
    workload = make_workload(
        build=lambda p: nn.Sequential(nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 16)),
        keep_fp32=lambda module, name: name == "0",
    )
    model = build_eager(workload, BF16, CPU)
    assert model[0][0].weight.dtype == torch.float32
    assert model[1].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("built", [None, Toy])
def test_build_must_return_a_module(built: Any) -> None:
    message = f"workload 'toy': build must return a torch.nn.Module, got {built!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_eager(make_workload(build=lambda p: built), BF16, CPU)


def test_callables_see_the_axes_of_the_workload() -> None:
    seen: list[dict[str, Any]] = []

    def build(p: RunParams) -> nn.Module:
        seen.append(dict(p.extra))
        return Toy()

    def inputs(p: RunParams, device: torch.device) -> tuple[torch.Tensor]:
        seen.append(dict(p.extra))
        return toy_inputs(p, device)

    workload = make_workload(build=build, inputs=inputs, axes={"width": 16, "depth": 2})
    ModelPool().get(workload, BF16.replace(extra={"width": 8}))
    assert seen == [{"width": 8, "depth": 2}] * 2


def test_rejects_missing_device() -> None:
    assert find_device(BF16) == CPU
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    cuda = BF16.replace(gpu_type="cuda")
    message = (
        "gpu_type=cuda, but torch sees no CUDA device; "
        "use --int8-preset=smoke or --int8-set gpu_type=cpu"
    )
    counting = Counting()
    for ask in (find_device, lambda p: ModelPool().get(counting.workload, p)):
        with pytest.raises(DeviceError, match=f"^{re.escape(message)}$"):
            ask(cuda)
    assert counting.built == 0


# -- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "dtype"), [(BF16, torch.bfloat16), (FP32, torch.float32)], ids=["bf16", "fp32"]
)
def test_casts_only_floating_point_inputs(params: RunParams, dtype: torch.dtype) -> None:
    def inputs(p: RunParams, device: torch.device) -> dict[str, Any]:
        return {
            "x": torch.randn(p.batch_size, 16, dtype=torch.float64),
            "mask": torch.ones(p.batch_size, dtype=torch.bool),
            "ids": torch.arange(p.batch_size),
            "scale": 2.0,
        }

    batch = ModelPool().batch(make_workload(inputs=inputs), params)
    assert batch["x"].dtype == dtype
    assert batch["mask"].dtype == torch.bool
    assert batch["ids"].dtype == torch.int64
    assert batch["scale"] == 2.0


def test_inputs_repeat_and_are_shared_by_baseline_and_candidate() -> None:
    workload = make_workload()
    pool = ModelPool()
    batch = pool.batch(workload, W8A8)
    assert pool.batch(workload, BF16) is batch
    assert pool.get(workload, BF16).inputs is batch
    assert pool.get(workload, W8A8).inputs is batch
    assert torch.equal(ModelPool().batch(workload, BF16)[0], batch[0])
    other = pool.batch(workload, BF16.replace(batch_size=2))
    assert other[0].shape == (2, 16)


@pytest.mark.parametrize(
    ("returned", "kind"),
    [(torch.ones(2), "Tensor"), (None, "NoneType"), ((1, 2), "tuple"), ({}, "dict")],
)
def test_inputs_must_be_a_tuple_or_mapping_with_tensors(returned: Any, kind: str) -> None:
    message = f"workload 'toy': inputs must return a tuple or a mapping with tensors, got {kind}"
    workload = make_workload(inputs=lambda p, device: returned)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ModelPool().batch(workload, BF16)


def test_a_mask_of_the_lowest_number_stays_finite_in_bf16() -> None:
    lowest = torch.finfo(torch.float32).min
    mask = torch.tensor([[0.0, lowest, -torch.inf, torch.nan]]).expand(4, 4)

    class Masked(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", mask.clone())

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + mask.sum() * 0

    pool = ModelPool()
    workload = make_workload(
        build=lambda p: Masked(), inputs=lambda p, device: (torch.randn(4, 16), mask)
    )
    bf16 = torch.finfo(torch.bfloat16).min
    expected = torch.tensor([0.0, bf16, -torch.inf, torch.nan], dtype=torch.bfloat16)
    for found in (pool.batch(workload, BF16)[1], pool.get(workload, BF16).eager.mask):
        torch.testing.assert_close(found[0], expected, equal_nan=True)
    assert pool.batch(workload, FP32)[1][0, 1] == lowest


def test_inputs_fed_from_the_host_give_the_same_output() -> None:
    workload = make_workload()
    host = BF16.replace(feed="host")
    fed, resident = ModelPool().get(workload, host), ModelPool().get(workload, BF16)
    expected = resident.run()
    assert torch.equal(resident.run_again(), expected)
    assert torch.equal(fed.run(), expected)
    assert torch.equal(fed.run_again(), expected)
    # The next batch has the same rows in another order.
    assert torch.allclose(fed.run(), expected.roll(1, 0), atol=1e-2)
    assert not torch.equal(fed.run_again(), expected)


def test_baseline_and_candidate_share_one_feed() -> None:
    workload = make_workload()
    pool = ModelPool()
    baseline, candidate = (pool.get(workload, p.replace(feed="host")) for p in (BF16, W8A8))
    feed = baseline.feed
    assert feed is not None
    assert candidate.feed is feed
    assert pool.variant(workload, candidate.params).feed is feed
    assert feed.nbytes == 0  # starts lazily
    baseline.run()
    candidate.run()
    batch_bytes = sum(t.nbytes for t in baseline.inputs)
    assert (feed.batches, feed.nbytes) == (3, 2 * batch_bytes)
    pool.evict("candidate")
    assert feed.nbytes == 2 * batch_bytes
    pool.clear()
    assert feed.nbytes == 0


def test_host_inputs_have_the_strides_of_device_inputs() -> None:
    workload = make_workload(
        inputs=lambda p, device: (torch.randn(p.batch_size, 32)[:, :16], torch.zeros(1).expand(4))
    )
    model = ModelPool().get(workload, FP32.replace(feed="host"))
    assert model.feed is not None
    arrived = next(model.feed)
    assert [t.stride() for t in arrived] == [t.stride() for t in model.inputs] == [(16, 1), (1,)]


def test_different_inputs_have_separate_feeds() -> None:
    workload = make_workload()
    pool = ModelPool()
    host = BF16.replace(feed="host")
    first = pool.get(workload, host)
    first.run()
    second = pool.get(workload, host.replace(batch_size=2))
    assert first.feed is not None
    assert second.feed is not first.feed
    assert first.feed.nbytes == 0
    assert pool.get(workload, BF16).feed is None


# -- tensors in containers ----------------------------------------------------------------------


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Record:
    tensor: Any
    other: Any = None


A, B = torch.zeros(1), torch.ones(2)
CONTAINERS: list[Any] = [
    pytest.param(lambda a, b: (a, b), id="tuple"),
    pytest.param(lambda a, b: [a, b], id="list"),
    pytest.param(lambda a, b: {"a": a, "n": 1, "b": b}, id="dict"),
    pytest.param(lambda a, b: Pair(a, b), id="namedtuple"),
    pytest.param(lambda a, b: Record(a, b), id="dataclass"),
    pytest.param(lambda a, b: [{"a": (a,)}, "text", None, Pair(1, [b])], id="nested"),
    pytest.param(lambda a, b: (Record({"a": a}), b), id="dataclass in tuple"),
]


@pytest.mark.parametrize("wrap", CONTAINERS)
def test_finds_tensors_in_order(wrap: Callable[[Any, Any], Any]) -> None:
    found = list(tensors_of(wrap(A, B)))
    assert len(found) == 2
    assert found[0] is A
    assert found[1] is B


@pytest.mark.parametrize("wrap", CONTAINERS)
def test_maps_tensors_inside_containers(wrap: Callable[[Any, Any], Any]) -> None:
    names = {id(A): "a", id(B): "b"}
    assert map_tensors(lambda tensor: names[id(tensor)], wrap(A, B)) == wrap("a", "b")


def test_a_tensor_is_its_own_container() -> None:
    assert list(tensors_of(A)) == [A]
    assert map_tensors(lambda tensor: tensor + 1, A).item() == 1
    assert list(tensors_of("text")) == []


def test_types_are_not_containers() -> None:
    assert list(tensors_of(Record)) == []
    assert map_tensors(lambda tensor: tensor, Record) is Record


# -- getting ready ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "outputs"),
    [
        (lambda x: x, (((4, 16), torch.bfloat16),)),
        (lambda x: (x, x[:1].float()), (((4, 16), torch.bfloat16), ((1, 16), torch.float32))),
        (lambda x: {"x": x, "n": 3}, (((4, 16), torch.bfloat16),)),
        (lambda x: Record(x, x.argmax(-1)), (((4, 16), torch.bfloat16), ((4,), torch.int64))),
    ],
    ids=["tensor", "tuple", "dict", "dataclass"],
)
def test_ready_describes_the_outputs(wrap: Callable[[torch.Tensor], Any], outputs: Any) -> None:
    class Wrapped(Toy):
        def forward(self, x: torch.Tensor) -> Any:
            return wrap(super().forward(x))

    workload = make_workload(build=lambda p: Wrapped())
    model = ModelPool().get(workload, BF16)
    ready = model.ready()
    assert ready.outputs == outputs
    assert ready.finite is True
    assert ready.tokens is None
    assert ready.compile_s is None
    assert ready.peak_memory_bytes is None
    assert ready.warm_up.calls >= 6
    assert model.ready() is ready


def test_ready_counts_tokens_from_the_output() -> None:
    workload = make_workload(tokens=lambda output: output.shape[0] * 7)
    assert ModelPool().get(workload, BF16).ready().tokens == 28


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ready_detects_non_finite_values(bad: float) -> None:
    class Broken(Toy):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x * bad

    assert ModelPool().get(make_workload(build=lambda p: Broken()), BF16).ready().finite is False


def test_rejects_model_that_returns_no_tensor() -> None:
    class Nothing(Toy):
        def forward(self, x: torch.Tensor) -> Any:
            return {"count": 3}

    model = ModelPool().get(make_workload(build=lambda p: Nothing()), BF16)
    with pytest.raises(ValueError, match=r"^workload 'toy': the model returned no tensor$"):
        model.ready()


def test_too_few_rows_for_the_cuda_matmul_suggest_a_remedy() -> None:
    class Few(Toy):
        def forward(self, x: torch.Tensor) -> Any:
            raise RuntimeError("self.size(0) needs to be greater than 16, but got 4")

    model = ModelPool().get(make_workload(build=lambda p: Few()), BF16)
    message = (
        "an INT8 matmul on CUDA must have more than 16 rows, got 4: "
        "use a larger batch or int8_mode=w8"
    )
    with pytest.raises(QuantizationError, match=f"^{re.escape(message)}$"):
        model.ready()


# -- the pool -----------------------------------------------------------------------------------


def test_builds_a_point_once() -> None:
    counting = Counting()
    pool = ModelPool()
    baseline = pool.get(counting.workload, BF16)
    assert pool.get(counting.workload, BF16) is baseline
    # Measuring fields do not affect the model.
    assert pool.get(counting.workload, BF16.replace(benchmark_interval_s=3.0)) is baseline
    candidate = pool.get(counting.workload, W8A8)
    assert pool.get(counting.workload, W8A8) is candidate
    assert pool.get(counting.workload, BF16) is baseline
    # Once for each.
    assert counting.built == 2


def test_a_candidate_has_the_exact_weights_of_its_baseline() -> None:
    count = 0

    def build(p: RunParams) -> nn.Module:
        nonlocal count
        count += 1
        torch.manual_seed(count)  # does not repeat itself
        return Toy()

    class Holder:
        """Keep the counter out of the closure that identifies the workload."""

        def __call__(self, p: RunParams) -> nn.Module:
            return build(p)

    workload = make_workload(build=Holder(), filter_fn=lambda module, name: name == "fc1")
    pool = ModelPool()
    baseline = pool.get(workload, BF16)
    weights = copy.deepcopy(baseline.eager.state_dict())
    for point in (W8A8, W8):
        candidate = pool.get(workload, point)
        assert torch.equal(candidate.eager.fc2.weight, weights["fc2.weight"])
        assert [layer.name for layer in coverage(candidate.eager).converted] == ["fc1"]
    # The baseline is not quantized with its copies.
    assert coverage(baseline.eager).converted == ()
    assert pool.get(workload, BF16) is baseline
    for name, tensor in baseline.eager.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_holds_at_most_one_baseline_and_one_candidate() -> None:
    workload = make_workload()
    pool = ModelPool()
    alive: weakref.WeakSet[Model] = weakref.WeakSet()
    for batch_size in (1, 2):
        for point in (BF16, W8A8, W8):
            alive.add(pool.get(workload, point.replace(batch_size=batch_size)))
            gc.collect()
            held = sorted(model.params.int8_enabled for model in alive)
            assert held in ([False], [False, True])
            assert {model.params.batch_size for model in alive} == {batch_size}
    pool.clear()
    gc.collect()
    assert len(alive) == 0


def test_a_new_baseline_drops_the_models_of_the_old_one() -> None:
    workload = make_workload()
    pool = ModelPool()
    old = [weakref.ref(pool.get(workload, point)) for point in (BF16, W8A8)]
    pool.get(workload, BF16.replace(batch_size=2))
    gc.collect()
    assert [ref() for ref in old] == [None, None]


def test_a_baseline_after_its_candidate_keeps_the_candidate() -> None:
    counting = Counting()
    pool = ModelPool()
    candidate = pool.get(counting.workload, W8A8)
    baseline = pool.get(counting.workload, BF16)
    assert pool.get(counting.workload, W8A8) is candidate
    assert pool.get(counting.workload, BF16) is baseline
    assert counting.built == 2
    assert torch.equal(candidate.eager.norm.weight, baseline.eager.norm.weight)


def test_candidate_of_another_baseline_drops_both_models() -> None:
    workload = make_workload()
    pool = ModelPool()
    old = [weakref.ref(pool.get(workload, point)) for point in (BF16, W8A8)]
    pool.get(workload, W8A8.replace(batch_size=2))
    gc.collect()
    assert [ref() for ref in old] == [None, None]


def test_evicting_frees_one_model() -> None:
    workload = make_workload()
    pool = ModelPool()
    baseline, candidate = (weakref.ref(pool.get(workload, point)) for point in (BF16, W8A8))
    pool.evict("candidate")
    assert candidate() is None
    assert baseline() is not None
    pool.evict("candidate")  # has no effect


def test_baseline_does_not_depend_on_the_filter() -> None:
    pool = ModelPool()
    one, other = (
        make_workload(filter_fn=lambda module, name, kept=kept: name == kept)
        for kept in ("fc1", "fc2")
    )
    baseline = pool.get(one, W8A8.baseline())
    first = pool.get(one, W8A8)
    assert pool.get(other, W8A8) is not first
    assert [layer.name for layer in coverage(pool.get(other, W8A8).eager).converted] == ["fc2"]
    assert pool.get(other, W8A8.baseline()) is baseline


def test_variant_has_the_baselines_weights_and_is_not_cached() -> None:
    pool, workload = ModelPool(), make_workload()
    kept = pool.get(workload, W8A8)
    variant = pool.variant(workload, W8A8.replace(int8_mode="w8"))
    assert coverage(variant.eager).mode == "w8"
    assert variant.compiled.mode == "off"
    assert pool.get(workload, W8A8) is kept
    own, baseline = variant.eager.fc1.bias, pool.get(workload, W8A8.baseline()).eager.fc1.bias
    assert torch.equal(own, baseline)


@pytest.mark.parametrize("own", [True, False], ids=["own", "batch"])
def test_smoothquant_calibrates_on_the_workloads_inputs_or_the_batch(own: bool) -> None:
    asked: list[RunParams] = []

    def calibration(p: RunParams, device: torch.device) -> list[Any]:
        asked.append(p)
        return [(torch.full((2, 16), 3.0, dtype=torch.bfloat16),)]

    workload = make_workload(calibration=calibration if own else None)
    point = W8A8.replace(int8_smoothquant=True)
    model = ModelPool().get(workload, point)
    assert model.eager.fc1.weight.act_pre_scale is not None
    assert asked == ([point] if own else [])


def test_calibration_batches_do_not_count_as_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def calibration(p: RunParams, device: torch.device) -> list[Any]:
        batch = torch.full((2, 16), 3.0, dtype=torch.bfloat16)
        batches.append(weakref.ref(batch))
        return [(batch,)]

    def allocated_bytes(device: torch.device) -> int:
        held.append(sum(batch() is not None for batch in batches))
        return 0

    monkeypatch.setattr("pytest_int8bench.measure.pool.allocated_bytes", allocated_bytes)
    ModelPool().get(make_workload(calibration=calibration), W8A8.replace(int8_smoothquant=True))
    assert (len(batches), held[-1]) == (1, 0)


# -- equality of workloads ----------------------------------------------------------------------


def remake(**changes: Any) -> Workload:
    """Return a workload of new but equal objects, like a function-scoped fixture."""
    return Workload(
        name="toy",
        build=lambda p: Toy(),
        inputs=lambda p, device: (torch.ones(p.batch_size, 16),),
        units=lambda p: {"samples": p.batch_size},
        **changes,
    )


def test_a_workload_made_again_is_the_same() -> None:
    pool = ModelPool()
    assert pool.get(remake(), BF16) is pool.get(remake(), BF16)
    assert pool.batch(remake(), BF16) is pool.batch(remake(), BF16)


def test_a_workload_with_axes_made_again_is_the_same() -> None:
    pool = ModelPool()
    assert pool.get(remake(axes={"width": 3}), BF16) is pool.get(remake(axes={"width": 3}), BF16)


# Shared by the workloads below, so that they differ in one thing only.
AXES: dict[str, Any] = {}


def test_different_closures_make_different_workloads() -> None:
    def wide(width: int) -> Workload:
        return make_workload(build=lambda p: Toy(width), axes=AXES)

    pool = ModelPool()
    narrow = pool.get(wide(16), BF16)
    assert narrow.eager.fc1.out_features == 16
    assert pool.get(wide(32), BF16).eager.fc1.out_features == 32


def test_different_defaults_make_different_workloads() -> None:
    def positional(width: int) -> Workload:
        return make_workload(build=lambda p, width=width: Toy(width), axes=AXES)

    def keyword(width: int) -> Workload:
        return make_workload(build=lambda p, *, width=width: Toy(width), axes=AXES)

    for make in (positional, keyword):
        pool = ModelPool()
        assert pool.get(make(16), BF16).eager.fc1.out_features == 16
        assert pool.get(make(32), BF16).eager.fc1.out_features == 32


def test_the_same_text_in_two_files_makes_two_workloads() -> None:
    """The two conftests differ only in a module constant."""

    def load(width: int) -> Workload:
        namespace: dict[str, Any] = {"Toy": Toy, "WIDTH": width}
        exec(compile("build = lambda p: Toy(WIDTH)", "conftest.py", "exec"), namespace)
        return make_workload(build=namespace["build"], axes=AXES)

    pool = ModelPool()
    assert pool.get(load(16), BF16).eager.fc1.out_features == 16
    assert pool.get(load(32), BF16).eager.fc1.out_features == 32


def test_different_names_make_different_workloads() -> None:
    counting = Counting()
    other = dataclasses.replace(counting.workload, name="other")
    pool = ModelPool()
    assert pool.get(counting.workload, BF16) is not pool.get(other, BF16)
    assert counting.built == 2


def test_build_must_return_a_new_module_each_time() -> None:
    kept = Toy()
    pool = ModelPool()
    workload = make_workload(build=lambda p: kept)
    pool.get(workload, BF16)
    message = (
        "workload 'toy': build must return a new module each time, got one that it returned "
        "before; return copy.deepcopy(model)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pool.get(workload, BF16.replace(batch_size=BF16.batch_size + 1))


def test_without_bf16_models_are_fp32() -> None:
    workload = make_workload(build=lambda p: Toy().half())
    model = build_eager(workload, BF16.replace(bf16=False), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_calibration_is_cast_and_seeded() -> None:
    seen = []

    def calibration(p: RunParams, device: torch.device) -> Any:
        seen.append(torch.rand(1).item())
        return [toy_inputs(p, device)]  # FP32

    workload = make_workload(calibration=calibration)
    params = BF16.replace(int8_enabled=True, int8_smoothquant=True)
    for _ in range(2):
        ModelPool().get(workload, params)
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_compile_time_is_the_first_call_whoever_makes_it() -> None:
    pool = ModelPool()
    model = pool.get(make_workload(), BF16.replace(compile_mode="default"))
    model.run()
    first = model.compiled.first_call_s
    assert first is not None
    assert model.ready().compile_s == first


def test_peak_memory_excludes_other_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated device holds 1000 other bytes, the inputs, then the weights, then a peak."""
    weights, inputs, activations = 500, sum(t.nbytes for t in toy_inputs(BF16, CPU)) // 2, 77
    allocated = iter([1000 + inputs, 1000 + inputs + weights, 1000 + inputs + weights])
    for module in ("pool", "model"):
        monkeypatch.setattr(
            f"pytest_int8bench.measure.{module}.allocated_bytes", lambda device: next(allocated)
        )

    @contextlib.contextmanager
    def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
        yield lambda: 1000 + inputs + weights + activations

    monkeypatch.setattr("pytest_int8bench.measure.model.peak_memory", peak_memory)
    ready = ModelPool().get(make_workload(), BF16).ready()
    assert ready.peak_memory_bytes == weights + inputs + activations


def test_peak_memory_includes_both_batches_of_a_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs, activations = 500, sum(t.nbytes for t in toy_inputs(BF16, CPU)) // 2, 77
    held = 1000 + weights
    allocated = iter([1000, held, held + 2 * inputs])
    for module in ("pool", "model"):
        monkeypatch.setattr(
            f"pytest_int8bench.measure.{module}.allocated_bytes", lambda device: next(allocated)
        )

    @contextlib.contextmanager
    def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
        yield lambda: held + 2 * inputs + activations

    monkeypatch.setattr("pytest_int8bench.measure.model.peak_memory", peak_memory)
    ready = ModelPool().get(make_workload(), BF16.replace(feed="host")).ready()
    assert ready.peak_memory_bytes == weights + 2 * inputs + activations


def test_seeds_numpy_and_python_generators() -> None:
    def inputs(p: RunParams, device: torch.device) -> tuple[torch.Tensor]:
        drawn = [random.random(), float(np.random.rand())]
        return (torch.tensor(drawn).repeat(p.batch_size, 8),)

    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    first, second = (ModelPool().get(make_workload(inputs=inputs), FP32).inputs[0] for _ in "ab")
    assert torch.equal(first, second)
    assert (random.random(), np.random.rand()) == expected


# -- models that come quantized ---------------------------------------------------------------


def test_a_model_that_is_quantized_already_is_measured_as_it_is() -> None:
    def build(p: RunParams) -> nn.Module:
        model = Toy().bfloat16()
        return apply_int8_quant(model, mode=p.int8_mode) if p.int8_enabled else model

    workload, pool = make_workload(build=build, prequantized=True), ModelPool()
    baseline = pool.get(workload, BF16)
    candidate = pool.get(workload, W8A8)
    assert weight_storage(baseline.eager) == (0, 0)
    assert weight_storage(candidate.eager) == (2, 2)
    assert len(coverage(candidate.eager).converted) == 2
    assert candidate.ready().outputs == baseline.ready().outputs
    candidate.evidence()


def test_a_prequantized_workload_must_quantize() -> None:
    with pytest.raises(QuantizationError) as caught:
        ModelPool().get(make_workload(prequantized=True), W8A8)
    assert str(caught.value) == (
        "workload 'toy' is prequantized, but build returned a model without layers "
        f"quantized by torchao at {W8A8.run_name}"
    )


# -- invalid workloads ------------------------------------------------------------------------


class Shrinks(Toy):
    """Return one row fewer after the third call."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)[: len(x) - (self.calls > 3)]


def test_rejects_output_whose_shape_changes() -> None:
    workload = make_workload(build=lambda p: Shrinks())
    with pytest.raises(WorkloadError) as caught:
        ModelPool().get(workload, BF16).ready()
    assert str(caught.value) == (
        "workload 'toy': the same inputs gave [4, 16] torch.bfloat16 at the first call "
        "and [3, 16] torch.bfloat16 at a later one"
    )


def test_rejects_inputs_without_data() -> None:
    workload = make_workload(inputs=lambda p, device: (torch.ones(2, 4, device="meta"),))
    with pytest.raises(WorkloadError) as caught:
        ModelPool().get(workload, BF16)
    assert str(caught.value) == (
        "workload 'toy': inputs must hold data, got a tensor on the device meta"
    )


@pytest.mark.parametrize("part", ["build", "inputs", "calibration"])
def test_workload_errors_name_their_origin(part: str) -> None:
    def fails(*args: Any) -> Any:
        raise KeyError("no such thing")

    workload = make_workload(**{part: fails})
    params = W8A8.replace(int8_smoothquant=True)
    with pytest.raises(KeyError) as caught:
        ModelPool().get(workload, params)
    assert caught.value.__notes__ == [f"raised by {part} of workload 'toy' at {params.run_name}"]


def test_holds_tells_which_models_are_cached() -> None:
    pool, workload = ModelPool(), make_workload()
    assert not pool.holds(workload, BF16)
    model = pool.get(workload, BF16)
    assert pool.holds(workload, BF16)
    assert not pool.holds(workload, W8A8)
    assert not model.is_ready
    model.ready()
    assert model.is_ready


@pytest.mark.parametrize("wanted", [True, False])
def test_channels_last_applies_to_4d_weights_and_inputs(wanted: bool) -> None:
    workload = Workload(
        name="convolution",
        build=lambda p: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 8)),
        inputs=lambda p, device: (torch.ones(p.batch_size, 3, 4, 4, device=device),),
        channels_last=wanted,
    )
    model: Any = ModelPool().get(workload, BF16)
    layout = torch.channels_last
    assert model.inputs[0].is_contiguous(memory_format=layout) is wanted
    assert model.eager[0].weight.is_contiguous(memory_format=layout) is wanted
    assert model.eager[2].weight.is_contiguous()


class Attends(Toy):
    """Attention after the layers; on the CPU, flash does not support its dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)[None, None]
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout)


def test_auto_chooses_one_attention_backend_for_a_baseline_and_its_candidates() -> None:
    workload = make_workload(build=lambda p: Attends(dropout=0.5))
    auto = BF16.replace(attention="auto")
    for points in (
        [auto, W8A8.replace(attention="auto"), W8.replace(attention="auto")],
        [W8A8.replace(attention="auto"), auto],  # chosen by the candidate, before it is quantized
    ):
        pool = ModelPool()
        models = [pool.get(workload, point) for point in points]
        assert [model.compiled.attention for model in models] == ["math"] * len(points)
        models[0].ready()
        assert models[0].evidence().attention_kernel == "math"
    assert pool.variant(workload, points[0]).compiled.attention == "math"


def test_auto_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fastest(calls: Any, **options: Any) -> str:
        asked.append(len(calls))
        return "flash"

    monkeypatch.setattr(attention_auto, "fastest_backend", fastest)
    workload, pool = make_workload(build=lambda p: Attends()), ModelPool()
    points = [point.replace(attention="auto") for point in (BF16, W8A8, BF16, W8)]
    assert {pool.get(workload, point).compiled.attention for point in points} == {"flash"}
    assert pool.get(workload, BF16.replace(attention="math")).compiled.attention == "math"
    assert asked == [1]


@pytest.mark.parametrize(
    "build", [lambda p: Toy(), lambda p: Attends(dropout=2.0)], ids=["no attention", "an error"]
)
def test_auto_stays_auto_without_attention_calls(build: Any) -> None:
    model = ModelPool().get(make_workload(build=build), BF16.replace(attention="auto"))
    assert model.compiled.attention == "auto"


def test_uses_the_given_compile_cache(tmp_path: Path) -> None:
    point = FP32.replace(compile_mode="default")
    found = []
    for _ in range(2):
        found.append(ModelPool(cache_dir=tmp_path).get(make_workload(), point).ready())
    assert [ready.compile_cache for ready in found] == ["cold", "warm"]


def test_reports_unsupported_attention_backend_in_one_line() -> None:
    class Refuses(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("No available kernel. Aborting execution.")

    with pytest.raises(AttentionError) as caught:
        ModelPool().get(make_workload(build=lambda p: Refuses()), BF16).ready()
    assert str(caught.value) == (
        "attention=flash cannot run the attention of workload 'toy' on cpu (masks, head sizes and "
        "dtypes differ by backend): use attention=auto, efficient or math"
    )


@pytest.mark.parametrize("attention", ["math", "auto"])
@pytest.mark.parametrize("apart", [False, True], ids=["from baseline", "apart"])
@pytest.mark.parametrize("kind", stateful.IN_BUFFERS, ids=lambda kind: kind.__name__)
def test_calibration_does_not_change_model_state(kind: Any, apart: bool, attention: str) -> None:
    pool, bf16 = ModelPool(), BF16.replace(attention=attention)
    wl = make_workload(build=lambda p: kind(), filter_fn=lambda module, name: "fc" in name)
    if not apart:
        pool.get(wl, bf16)
    candidate = pool.get(wl, bf16.replace(int8_enabled=True, int8_smoothquant=True))
    baseline = pool.get(wl, bf16)
    for name, buffer in baseline.eager.named_buffers():
        assert torch.allclose(buffer, candidate.eager.get_buffer(name))
    assert coverage(candidate.eager).smoothed_runtime == ("fc1", "fc2")


def test_keeps_lazily_filled_tables_after_calibration() -> None:
    class Table(stateful.Counter):
        filled = False

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(16))

        def forward(self, x: torch.Tensor) -> Any:
            if not self.filled:
                self.table.fill_(1.0)
                self.filled = True
            return super().forward(x) * self.table

    wl = make_workload(build=lambda p: Table(), filter_fn=lambda module, name: "fc" in name)
    candidate = ModelPool().get(wl, W8A8.replace(int8_smoothquant=True))
    assert candidate.eager.get_buffer("table").min() == 1
    assert candidate.eager.get_buffer("calls") == 0


@pytest.mark.parametrize("kind", stateful.IN_BUFFERS, ids=lambda kind: kind.__name__)
def test_warm_up_does_not_change_model_state(kind: Any) -> None:
    wl = make_workload(build=lambda p: kind(), filter_fn=lambda module, name: "fc" in name)
    model = ModelPool().get(wl, BF16)
    assert model.ready().remark is not None
    fresh = dict(kind().named_buffers())
    for name, buffer in model.eager.named_buffers():
        assert torch.equal(buffer, fresh[name].to(buffer.dtype))


def test_int8_attention_needs_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "the fused kernels need sm80 or later, this is sm75"
    monkeypatch.setattr("pytest_int8bench.measure.pool.attention_problem", lambda device: why)
    with pytest.raises(QuantizationError, match=f"^int8_attention=True: {why}$"):
        ModelPool().get(make_workload(), W8A8.replace(int8_attention=True))
