"""Test models as build may return them: compiled, exported, scripted, with their own methods."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytest_int8bench.compiler.compiled_model import graphs_compiled
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure.building import build_eager
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import coverage
from pytest_int8bench.workloads import Workload
from toys import rebound
from toys.models import make_workload, normal
from toys.rebound import Blocks

CPU = torch.device("cpu")
BF16 = RunParams(gpu_type="cpu", compile_mode="off", batch_size=4, benchmark_interval_s=0.01)
W8A8 = BF16.replace(int8_enabled=True)
SPARSE_WARNING = "ignore:Sparse CSR tensor support is in beta"
NESTED_WARNING = "ignore:The PyTorch API of nested tensors"


def workload(build: Callable[[], Any], **changes: Any) -> Workload:
    return make_workload(
        build,
        **{
            "inputs": normal(16),
            "filter_fn": lambda module, name: name.endswith(("fc1", "fc2")),
            **changes,
        },
    )


def refused(line: str) -> Any:
    return pytest.raises(WorkloadError, match=f"^workload 'toy': {re.escape(line)}$")


# -- compiled -----------------------------------------------------------------------------------


def whole() -> Any:
    return torch.compile(Blocks(), backend="eager")


def block() -> Any:
    net: Any = Blocks()
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
    return net


def block_in_a_compiled_model() -> Any:
    return torch.compile(block(), backend="eager")


def two_names() -> Any:
    net = block()
    net.last = net.blocks[1]
    return net


def in_place() -> Any:
    net: Any = Blocks()
    net.compile(backend="eager")
    net.blocks[0].compile(backend="eager")
    return net


def method() -> Any:
    net: Any = Blocks()
    for part in net.blocks:
        part.forward = torch.compile(part.forward, backend="eager")
    return net


def other_method() -> Any:
    net: Any = Blocks()
    net.encode = torch.compile(net.forward, backend="eager")
    net.forward = lambda x: net.encode(x)
    return net


def function() -> Any:
    net: Any = Blocks()
    run = torch.compile(rebound.run, backend="eager")
    net.blocks[1].forward = lambda x: run(net.blocks[1], x)
    return net


def decorated() -> Any:
    class Decorated(Blocks):
        forward = torch.compile(Blocks.forward, backend="eager")

    return Decorated()


def in_a_list() -> Any:
    net: Any = Blocks()
    net.steps = [torch.compile(part, backend="eager") for part in net.blocks]
    net.forward = lambda x: net.steps[1](net.steps[0](x))
    return net


@pytest.mark.parametrize(
    "build",
    [
        *(whole, block, block_in_a_compiled_model, two_names, in_place),
        *(method, other_method, function, decorated, in_a_list),
    ],
)
def test_compile_mode_off_compiles_nothing(build: Any) -> None:
    plain, of = ModelPool(), workload(build)
    expected = plain.get(workload(Blocks), W8A8).run()
    graphs, pool = graphs_compiled(), ModelPool()
    baseline, candidate = pool.get(of, BF16), pool.get(of, W8A8)
    baseline.run()
    assert torch.equal(candidate.run(), expected)
    assert torch.equal(pool.variant(of, W8A8).run(), expected)
    assert graphs_compiled() == graphs
    names = [name for name, _ in baseline.eager.named_modules()]
    assert [name for name in names if "_orig_mod" in name] == []
    assert len(coverage(candidate.eager).converted) == 4


def test_other_modes_still_compile_what_compiles_itself() -> None:
    torch.compiler.reset()
    model = ModelPool().get(workload(decorated), BF16)
    with model.compiled.settings():
        pass
    before = graphs_compiled()
    decorated()(torch.ones(2, 16))
    assert graphs_compiled() == before + 1


def test_loads_weights_into_a_compiled_model(tmp_path: Path) -> None:
    saved = Blocks()
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    params = BF16.replace(bf16=False)
    model = build_eager(workload(whole), params, CPU, weights=str(tmp_path / "weights.pt"))
    assert torch.equal(model.get_parameter("blocks.0.fc1.weight"), saved.blocks[0].fc1.weight)


def test_rejects_recompiled_module_returned_before() -> None:
    kept, pool = Blocks(), ModelPool()
    of = workload(lambda: torch.compile(kept, backend="eager"))
    pool.get(of, BF16)
    with refused(
        "build must return a new module each time, got one that it returned before; return "
        "copy.deepcopy(model)"
    ):
        pool.get(of, BF16.replace(batch_size=2))


def test_rejects_compiled_module_with_hooks() -> None:
    def build() -> Any:
        net = block()
        net.blocks[1].register_forward_hook(lambda module, args, out: out * 2)
        return net

    with refused(
        "build must return a torch.nn.Module that is not compiled, got one in which a compiled "
        "Block has hooks"
    ):
        build_eager(workload(build), BF16, CPU)


@pytest.mark.parametrize("what", ["module", "method"])
def test_keeps_torch_compiler_disable(what: str) -> None:
    compiling: list[bool] = []

    class Asks(rebound.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            compiling.append(torch.compiler.is_compiling())
            return super().forward(x)

    def build() -> Any:
        net: Any = Blocks()
        net.blocks[1] = Asks()
        if what == "module":
            net.blocks[1] = torch.compiler.disable(net.blocks[1])
        else:
            net.blocks[1].forward = torch.compiler.disable(net.blocks[1].forward)
        return net

    net = build_eager(workload(build), BF16.replace(bf16=False), CPU)
    assert isinstance(net.get_submodule("blocks.1"), Asks)
    torch.compile(net, backend="eager")(torch.ones(2, 16))
    assert compiling == [False]


# -- not in Python ------------------------------------------------------------------------------

X = (torch.ones(2, 16),)


def exported() -> Any:
    return torch.export.export(Blocks(), X)


def with_part(make: Callable[[nn.Module], Any]) -> Any:
    net: Any = Blocks()
    net.blocks[1] = make(net.blocks[1])
    return net


@pytest.mark.parametrize(
    ("build", "got"),
    [
        (lambda: torch.jit.script(Blocks()), "a scripted or traced one"),
        (lambda: torch.jit.trace(Blocks(), X), "a scripted or traced one"),
        (lambda: with_part(torch.jit.script), "a scripted or traced one (blocks.1)"),
        (lambda: exported().module(), "an exported one"),
        (lambda: torch.export.unflatten(exported()), "an exported one (blocks.0)"),
        (
            lambda: with_part(lambda part: torch.export.export(part, X).module()),
            "an exported one (blocks.1)",
        ),
    ],
    ids=["scripted", "traced", "scripted part", "exported", "unflattened", "exported part"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rejects_models_without_python_layers_in_one_line(build: Any, got: str) -> None:
    why = "it has no layers to quantize" if "exported" in got else "its layers cannot be quantized"
    with refused(
        f"build must return a torch.nn.Module in Python, got {got}: {why}; return the module that "
        "it was made from"
    ):
        build_eager(workload(build), BF16, CPU)


def test_rejects_exported_program_in_one_line() -> None:
    with pytest.raises(WorkloadError) as caught:
        build_eager(workload(exported), BF16, CPU)
    assert str(caught.value).startswith(
        "workload 'toy': build must return a torch.nn.Module, got <torch.export.exported_program."
    )
    assert "\n" not in str(caught.value)


def test_rejects_non_module_in_one_line() -> None:
    with refused("build must return a torch.nn.Module, got an object of <class 'list'>"):
        build_eager(workload(lambda: [Blocks()]), BF16, CPU)


def test_measures_traced_graph_of_layers() -> None:
    of, pool = workload(lambda: torch.fx.symbolic_trace(nn.Sequential(Blocks()))), ModelPool()
    assert pool.get(of, BF16).run().shape == (4, 16)
    assert len(coverage(pool.get(of, W8A8).eager).converted) == 4


# -- methods that return nothing ----------------------------------------------------------------


class Silent(Blocks):
    """A model that returns None from nn.Module methods, like its blocks."""

    def eval(self) -> Any:
        super().eval()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        super().to(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        super().requires_grad_(requires_grad)


@pytest.mark.parametrize("channels_last", [False, True])
def test_model_methods_may_return_none(channels_last: bool) -> None:
    def build() -> nn.Module:
        net: Any = Silent()
        net.blocks[1].train = lambda mode=True: None
        return net

    of, pool = workload(build, channels_last=channels_last), ModelPool()
    baseline, candidate = pool.get(of, BF16), pool.get(of, W8A8)
    baseline.ready()
    candidate.ready()
    assert not baseline.eager.training
    assert {p.dtype for p in baseline.eager.parameters()} == {torch.bfloat16}
    assert len(coverage(candidate.eager).converted) == 4


# -- sparse and nested tensors ------------------------------------------------------------------

ROWS = [torch.ones(1, 16), torch.ones(3, 16)]
KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "sparse_coo": lambda: torch.eye(16).to_sparse(),
    "sparse_csr": lambda: torch.eye(16).to_sparse_csr(),
    "sparse_bsr": lambda: torch.eye(16).to_sparse_bsr((4, 4)),
    "nested": lambda: torch.nested.nested_tensor(ROWS),
    "nested (jagged)": lambda: torch.nested.nested_tensor(ROWS, layout=torch.jagged),
}


@pytest.mark.filterwarnings(SPARSE_WARNING, NESTED_WARNING)
@pytest.mark.parametrize("feed", ["device", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_rejects_sparse_and_nested_inputs_in_one_line(kind: str, feed: str) -> None:
    of = workload(Blocks, inputs=lambda p, device: {"x": torch.ones(4, 16), "m": [KINDS[kind]()]})
    with refused(
        f"inputs must be dense tensors, got a {kind.split()[0]} one; convert it inside the model"
    ):
        ModelPool().get(of, BF16.replace(feed=feed))


@pytest.mark.filterwarnings(SPARSE_WARNING, NESTED_WARNING)
@pytest.mark.parametrize("kind", KINDS)
def test_rejects_sparse_and_nested_outputs_in_one_line(kind: str) -> None:
    def build() -> nn.Module:
        net: Any = Blocks()
        net.register_forward_hook(lambda module, args, out: {"out": out, "m": KINDS[kind]()})
        return net

    of, pool = workload(build), ModelPool()
    baseline, candidate = pool.get(of, BF16), pool.get(of, W8A8)
    for model in (baseline, candidate):
        with refused(
            f"outputs must be dense tensors, got a {kind.split()[0]} one; convert it inside the "
            "model"
        ):
            model.ready()


@pytest.mark.filterwarnings(SPARSE_WARNING)
def test_rejects_sparse_calibration_in_one_line() -> None:
    of = workload(Blocks, calibration=lambda p, device: iter([(KINDS["sparse_csr"](),)]))
    with refused(
        "calibration must be dense tensors, got a sparse_csr one; convert it inside the model"
    ):
        ModelPool().get(of, W8A8.replace(int8_smoothquant=True))


# -- inference mode -----------------------------------------------------------------------------


class Tied(nn.Module):
    """Layers, two of which share a weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.again = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.again.weight = self.fc1.weight
        self.register_buffer("scale", torch.full((16,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.again(self.fc2(self.fc1(x)) * self.scale)


def cast_outside() -> nn.Module:
    with torch.inference_mode():
        model = Tied()
    return model.to(torch.float16)


def one_tensor() -> nn.Module:
    model = Tied()
    with torch.inference_mode():
        model.scale = torch.full((16,), 0.25)
    return model


@pytest.mark.parametrize(
    "build", [torch.inference_mode()(Tied), cast_outside, one_tensor], ids=["all", "cast", "buffer"]
)
@pytest.mark.parametrize("point", [BF16, W8A8, BF16.replace(bf16=False)], ids=lambda p: p.run_name)
def test_measures_models_built_in_inference_mode(build: Any, point: RunParams) -> None:
    wl = workload(build)
    model = build_eager(wl, point, CPU)
    assert model.again.weight is model.fc1.weight
    assert [*model.state_dict()] == [*Tied().state_dict()]
    dtype = torch.bfloat16 if point.bf16 else torch.float32
    with torch.no_grad():
        assert model(torch.ones(4, 16, dtype=dtype)).dtype == dtype
    assert ModelPool().get(wl, point).ready().outputs
