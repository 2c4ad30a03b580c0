"""Test W8 layers in plain tensors: their values, and how graphs join them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.fusion import nodes, passes
from pytest_int8bench.kernels import dispatch, ops, reference
from pytest_int8bench.kernels.linear import WeightOnlyLinear, replace_linears
from pytest_int8bench.measure.building import build_eager
from pytest_int8bench.measure.evidence import profile_forward
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import apply_int8_quant, coverage, weight_storage
from pytest_int8bench.quantization.lowering import dequantize
from pytest_int8bench.quantization.weights import DequantizedInt8Weight
from pytest_int8bench.workloads import Workload
from toys.models import Attention, quantized

triton = pytest.importorskip("triton")
launch = pytest.importorskip("pytest_int8bench.kernels.cuda")
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1, set where no GPU is"
)

DIM = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attn = Attention(DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.fc2(F.gelu(self.fc1(x)))


LAYERS = ["attn.q", "attn.k", "attn.v", "attn.proj", "fc1", "fc2"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def weight_only(model: nn.Module) -> Any:
    """Quantize a model to W8 and make it dequantize whole weights, as on CUDA."""
    apply_int8_quant(model.eval().requires_grad_(False), mode="w8")
    if next(model.parameters()).device.type == "cpu":
        dequantize(model, coverage(model).layers)
    return model


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one.double() - other.double()).norm() <= 1e-5 * other.double().norm())


# -- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_multiplies_with_torchao_weight(dtype: torch.dtype, bias: bool) -> None:
    model: Any = nn.ModuleDict({"fc1": nn.Linear(DIM, 24, bias=bias, dtype=dtype)})
    apply_int8_quant(model.requires_grad_(False), mode="w8")
    weight, vector = model["fc1"].weight.dequantize(dtype), model["fc1"].bias
    dequantize(model, coverage(model).layers)
    layer = model["fc1"]
    assert type(layer) is WeightOnlyLinear
    assert torch.equal(layer.weight, weight)
    for shape in ((DIM,), (4, DIM), (2, 3, DIM), (0, DIM)):
        x = torch.randn(shape, dtype=dtype)
        out = layer(x)
        assert out.dtype == dtype
        assert torch.equal(out, F.linear(x, weight, vector))


def test_factor_multiplies_the_input() -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(DIM, 8)}).requires_grad_(False)
    factor = torch.exp2(torch.randint(-3, 4, (DIM,)).float())
    plain = F.linear(torch.eye(DIM), quantized(model["a"]).weight.float())
    replace_linears(model, {"a": quantized(model["a"], factor)}, WeightOnlyLinear)
    out = model["a"](torch.eye(DIM)) - model["a"].bias
    assert same(out, plain * factor[:, None] * model["a"].weight_scale)


def test_casting_a_model_rounds_weights_once() -> None:
    model = weight_only(nn.ModuleDict({"fc1": nn.Linear(DIM, 8)}))
    layer = model["fc1"]
    exact = layer.int8_weight.double() * layer.weight_scale.double()[:, None]
    model.bfloat16()
    x = torch.eye(DIM, dtype=torch.bfloat16)
    layer.block.bias.zero_()
    assert torch.equal(layer(x), exact.T.to(torch.bfloat16))


def test_operators_pass_opcheck() -> None:
    x, weight = torch.randn(3, DIM), torch.randint(-128, 128, (8, DIM)).to(torch.int8)
    scale, bias = torch.rand(8), torch.randn(8)
    torch.library.opcheck(nodes.DEQUANTIZED, (x, weight, scale, bias))
    torch.library.opcheck(nodes.DEQUANTIZE, ([weight, weight[:3]], [scale, scale[:3]], DTYPES[1]))
    torch.library.opcheck(nodes.DEQUANTIZE, ([weight.t()], [torch.rand(DIM)], DTYPES[0]))


SIZES = st.tuples(st.integers(0, 70), st.integers(0, 300))


@interpreted
@given(st.lists(SIZES, min_size=1, max_size=6), st.sampled_from(DTYPES), st.booleans())
@example([(16, 256)], DTYPES[1], False)  # whole tiles
@example([(2, 2**9), (70, 3), (0, 5), (3, 0), (1, 1), (17, 257), (4, 8)], DTYPES[0], True)
@settings(deadline=None, max_examples=30)
def test_one_launch_dequantizes_several_weights(
    sizes: list[tuple[int, int]], dtype: torch.dtype, transposed: bool
) -> None:
    weights, scales = [], []
    for n, k in sizes:
        weight = torch.randint(-128, 128, (n, k)).to(torch.int8)
        weights.append(weight.t().contiguous().t() if transposed else weight)
        scales.append(torch.rand(2 * n)[::2])
    outs = launch.dequantize(weights, scales, dtype)
    assert len(outs) == len(sizes)
    for weight, scale, out in zip(weights, scales, outs, strict=True):
        exact = weight.double() * scale.double()[:, None]
        assert (out.dtype, out.shape) == (dtype, weight.shape)
        assert out.is_contiguous()
        # The interpreter rounds to shorter dtypes towards zero.
        assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()


@interpreted
def test_prepares_launches_of_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    make = dispatch.weights_launch
    monkeypatch.setattr(launch, "_kept", {})
    monkeypatch.setattr(
        dispatch, "weights_launch", lambda sizes, device: made.append(sizes) or make(sizes, device)
    )
    weight, scale = torch.ones(3, 5, dtype=torch.int8), torch.ones(3)
    for _ in range(2):
        launch.dequantize([weight, weight], [scale, scale], torch.float32)
    launch.dequantize([weight], [scale], torch.float32)
    launch.dequantize([weight], [scale], torch.bfloat16)
    launch.dequantize([weight.new_empty(0, 5)], [scale[:0]], torch.float32)
    assert made == [((3, 5), (3, 5)), ((3, 5),), ((3, 5),)]


# -- which layers -------------------------------------------------------------------------------


def test_replaced_layers_report_torchao_quantization() -> None:
    model = weight_only(Block())
    assert {type(model.get_submodule(name)) for name in LAYERS} == {WeightOnlyLinear}
    assert model.attn.q.block is model.attn.proj.block
    assert weight_storage(model) == (6, 6)
    covered = coverage(model)
    assert (len(covered.converted), covered.backend, covered.fused) == (6, "torchao", ())


def test_layer_that_cannot_be_replaced_still_dequantizes() -> None:
    model: Any = nn.ModuleDict({"fc1": nn.Linear(DIM, 8), "fc2": nn.Linear(DIM, 8)})
    model["fc1"].register_forward_hook(lambda module, inputs, output: None)
    weight_only(model)
    assert type(model["fc1"].weight) is DequantizedInt8Weight
    assert type(model["fc2"]) is WeightOnlyLinear
    assert weight_storage(model) == (2, 2)


def test_does_not_replace_parts_of_torchs_attention() -> None:
    model: Any = nn.ModuleDict({"attn": nn.MultiheadAttention(DIM, 4), "fc1": nn.Linear(DIM, DIM)})
    weight_only(model)
    assert type(model["fc1"]) is WeightOnlyLinear
    assert [layer.name for layer in coverage(model).left_out] == ["attn.in_proj", "attn.out_proj"]


def test_replaced_layer_keeps_its_attributes() -> None:
    model: Any = nn.ModuleDict({"fc1": nn.Linear(DIM, 8)})
    model["fc1"].gain = 3.0
    weight_only(model)
    assert type(model["fc1"]) is WeightOnlyLinear
    assert model["fc1"].gain == 3.0


def test_the_weight_follows_a_cast() -> None:
    layer = weight_only(nn.ModuleDict({"fc1": nn.Linear(DIM, 8)}))["fc1"]
    assert layer.weight.dtype == torch.float32
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    x = torch.randn(3, DIM, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_prequantized_model_keeps_fp32_scales() -> None:
    workload = Workload(
        name="toy",
        build=lambda p: weight_only(
            nn.ModuleDict({"fc1": nn.Linear(DIM, 8), "attn": Attention(DIM)})
        ),
        inputs=lambda p, device: (torch.randn(p.batch_size, DIM),),
        prequantized=True,
    )
    model: Any = build_eager(workload, RunParams(gpu_type="cpu"), torch.device("cpu"))
    assert model["fc1"].weight_scale.dtype == torch.float32
    assert model["attn"].q.weight_scale.dtype == torch.float32


def test_does_not_replace_unquantized_layers() -> None:
    model: Any = nn.ModuleDict({"fc1": nn.Linear(DIM, 8), "head": nn.Linear(DIM, 8)})
    weight_only(model)
    assert type(model["head"]) is nn.Linear


# -- in a graph ---------------------------------------------------------------------------------


def calls(part: fx.GraphModule) -> Counter[str]:
    """Count matmuls by number of layers and by what dequantizes their weights, and dequantization
    passes by number of weights."""
    assert not part.graph.find_nodes(op="call_function", target=nodes.DEQUANTIZED)
    found: Counter[str] = Counter()
    for node in part.graph.find_nodes(op="call_function", target=F.linear):
        weight, user = node.args[1], next(iter(node.users))
        layers = len(user.args[1]) if user.target is torch.split else 1
        where = "alone" if weight.target == "to" else "before"
        found[f"product of {layers}, dequantized {where}"] += 1
    for node in part.graph.find_nodes(op="call_function", target=nodes.DEQUANTIZE):
        found[f"pass over {len(node.args[0])}"] += 1
    return found


def joined(model: nn.Module, *inputs: torch.Tensor) -> Counter[str]:
    """Return the content of a model's graph, and compare its values with eager ones."""
    parts: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        parts.append(passes.fuse(module))
        return module.forward

    with torch.inference_mode():
        out = torch.compile(model, fullgraph=True, backend=backend)(*inputs)
        assert same(out, model(*inputs))
    return calls(parts[0])


def test_joins_layers_of_one_input_and_dequantizes_together() -> None:
    found = joined(weight_only(Block()), torch.randn(2, 5, DIM))
    assert found == {
        "pass over 3": 1,  # of q, k, v and proj, of fc1, and of fc2
        "product of 3, dequantized before": 1,
        "product of 1, dequantized before": 3,
    }


def test_joins_smoothed_layers_of_one_input() -> None:
    x = torch.randn(2, 5, DIM)
    model: Any = Block().eval().requires_grad_(False)
    apply_int8_quant(model, mode="w8", smoothquant=True, calibration=[x])
    dequantize(model, coverage(model).layers)
    assert model.attn.q.factor is model.attn.v.factor
    found = joined(model, x)
    assert found == {
        "pass over 4": 1,  # of q, k and v, of proj, of fc1, and of fc2
        "product of 3, dequantized before": 1,
        "product of 1, dequantized before": 3,
    }


def test_keeps_smoothed_inputs_with_other_readers() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.fc1(x) + m.fc2(x) + m.kept(x * m.fc1.factor)

    model: Any = Two(forward).eval().requires_grad_(False)
    model.kept = nn.Identity()
    factor = torch.exp2(torch.randint(-3, 4, (DIM,)).float())
    layers = {name: quantized(getattr(model, name), factor) for name in ("fc1", "fc2", "fc3")}
    replace_linears(model, layers, WeightOnlyLinear)
    found = joined(model, torch.randn(3, DIM))
    assert found == {"product of 2, dequantized alone": 1}


def test_dequantizes_large_weights_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.weight_only, "_MAX_ELEMENTS", 4 * DIM * DIM)
    found = joined(weight_only(Block()), torch.randn(2, 5, DIM))
    assert found == {
        "pass over 1": 1,  # of q, k, v and proj
        "product of 3, dequantized before": 1,
        "product of 1, dequantized before": 3,
        "pass over 2": 1,
    }


def test_large_blocks_dequantize_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.weight_only, "_MAX_ELEMENTS", 4 * DIM * DIM - 1)
    found = joined(weight_only(Block()), torch.randn(2, 5, DIM))
    assert found == {"product of 3, dequantized alone": 1, "product of 1, dequantized alone": 3}


class Two(nn.Module):
    def __init__(self, forward: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(DIM, DIM) for _ in range(3))
        self.written = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.written(self, x)


def test_partly_used_block_dequantizes_by_layer() -> None:
    found = joined(weight_only(Two(lambda m, x: m.fc3(m.fc1(x)))), torch.randn(3, DIM))
    assert found == {"product of 1, dequantized alone": 2}


def test_dequantizes_reused_layer_once() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.fc3(m.fc2(m.fc1(m.fc1(x))))

    found = joined(weight_only(Two(forward)), torch.randn(3, DIM))
    assert found == {"pass over 1": 1, "product of 1, dequantized before": 4}


def test_leaves_a_single_matmul_to_the_compiler() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.fc1(x) * m.fc3(x) + m.fc2(x)

    found = joined(weight_only(Two(forward)), torch.randn(3, DIM))
    assert found == {"product of 3, dequantized alone": 1}


def test_block_written_to_in_between_dequantizes_by_layer() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.fc2(m.fc1(x))
        m.fc3.block.scale.mul_(2.0)
        z = m.fc3(y)
        m.fc3.block.scale.mul_(0.5)
        return z

    with torch.inference_mode():
        model = weight_only(Two(forward))  # tensors that may be written to
    assert joined(model, torch.randn(3, DIM)) == {"product of 1, dequantized alone": 3}


def test_dequantizes_layers_of_different_dtypes_separately() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Module(), nn.Module()
            self.one.fc1, self.one.fc2 = (nn.Linear(DIM, DIM) for _ in range(2))
            self.other.fc1, self.other.fc2 = (
                nn.Linear(DIM, DIM, dtype=torch.bfloat16) for _ in range(2)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other.fc2(self.other.fc1(self.one.fc2(self.one.fc1(x)).bfloat16()))

    found = joined(weight_only(Mixed()), torch.randn(3, DIM))
    assert found == {"pass over 1": 2, "product of 1, dequantized before": 4}


@pytest.mark.slow
def test_repeated_blocks_compile_once_to_library_matmuls() -> None:
    from torch._inductor.utils import run_and_get_code

    model = weight_only(nn.Sequential(Block(), Block()).bfloat16())
    x = torch.randn(2, 5, DIM).bfloat16()
    with torch.inference_mode():
        expected = model(x)
    compiled = compile_for_a100(model, mode="default", attention="math")
    out, code = run_and_get_code(compiled, x)
    assert (compiled.regions, compiled.regions_refused) == (2, None)
    assert "_weight_int8pack_mm" not in "".join(code)
    assert (out.float() - expected.float()).norm() < 0.02 * expected.float().norm()


class Pair(nn.Module):
    """Return columns of a joined matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(self.fc1(x)), self.fc2(x)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            one, other = block(x)
            x = one + other
        return x


@pytest.mark.parametrize("rows", [1, 5])
def test_columns_that_leave_a_region_are_separate_tensors(rows: int) -> None:
    model = weight_only(Pairs())
    x = torch.randn(rows, DIM)
    compiled = compile_for_a100(model, mode="default")
    out = compiled(x)
    assert (compiled.regions, compiled.regions_refused) == (2, None)
    with torch.inference_mode():
        assert same(out, model(x))


@pytest.mark.parametrize("layers", [LAYERS, ["fc2"]], ids=["all", "one"])
@pytest.mark.slow
def test_autocast_applies_to_matmuls_of_regions(layers: list[str]) -> None:
    model = nn.Sequential(Block(), Block()).eval().requires_grad_(False)
    apply_int8_quant(
        model, mode="w8", filter_fn=lambda module, name: name.partition(".")[2] in layers
    )
    dequantize(model, coverage(model).layers)
    x = torch.randn(2, 5, DIM)
    with torch.inference_mode():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = model(x)
    compiled = compile_for_a100(
        model, mode="default", attention="math", autocast_dtype=torch.bfloat16
    )
    out = compiled(x)
    assert (compiled.regions, compiled.regions_refused) == (2, None)
    assert out.dtype == expected.dtype
    rounding = (expected.double() - exact.double()).norm()
    assert 0 < (out.double() - exact.double()).norm() < 2 * rounding
    assert (out.double() - exact.double()).norm() > rounding / 2


# -- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_repeated_blocks_run_library_matmuls(mode: str) -> None:
    model = weight_only(nn.Sequential(Block(), Block()).to("cuda", torch.bfloat16))
    assert {type(model[0].get_submodule(name)) for name in LAYERS} == {WeightOnlyLinear}
    x = torch.randn(64, 40, DIM, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(x)
    compiled = compile_for_a100(model, mode=mode)
    for _ in range(3):
        out = compiled(x)
    assert (compiled.regions, compiled.regions_refused) == (2, None)
    assert (out.float() - expected.float()).norm() < 0.02 * expected.float().norm()
    evidence = profile_forward(lambda: compiled(x), torch.device("cuda"))
    calls = {kernel.name: kernel.calls for kernel in evidence.kernels}
    assert calls["dequantize"] == 2
    assert not evidence.int8_products
    assert not [k.name for k in evidence.kernels if "int8pack" in k.name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_matches_the_reference(dtype: torch.dtype) -> None:
    sizes = [(768, 768), (3072, 768), (17, 257), (1, 1), (768, 3072), (0, 4)]
    weights = [torch.randint(-128, 128, s, dtype=torch.int8, device="cuda") for s in sizes]
    scales = [torch.rand(n, device="cuda") for n, _ in sizes]
    for _ in range(2):
        outs = ops.dequantize(weights, scales, dtype)
        for weight, scale, out in zip(weights, scales, outs, strict=True):
            assert torch.equal(out, reference.dequantized(weight, scale, dtype))
