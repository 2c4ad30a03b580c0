"""Test plan_smoothing: what it observes, which layers share a scale, and what stays unchanged."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.quantization.smoothquant import (
    MAX_EXPONENT,
    Smoothing,
    multiply_weight,
    plan_smoothing,
)
from pytest_int8bench.tensors import call

DIM, LENGTH = 32, 6


class Block(nn.Module):
    """A transformer block with norms before (``pre``) or after the residual sum."""

    def __init__(self, *, pre: bool = True, fused: bool = False) -> None:
        super().__init__()
        self.pre = pre
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        if fused:
            self.qkv = nn.Linear(DIM, 3 * DIM)
        else:
            self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.fused = fused
        self.proj = nn.Linear(DIM, DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        heads = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        return self.proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu(self.fc1(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


def prepared(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Return ``model`` with distinct weights, biases and norms, and with outliers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(DIM))
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 1:
                weight.add_(1)
                weight[5] = 40
    return model.eval().requires_grad_(False).to(dtype)


def batches(count: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, LENGTH, DIM)
    return [*torch.randn(shape, generator=generator).to(dtype)]


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def plan(
    model: nn.Module,
    chosen: Iterable[str] | None = None,
    calibration: Iterable[Any] | None = None,
    alpha: float = 0.5,
) -> Smoothing:
    chosen = linears(model) if chosen is None else [*chosen]
    calibration = batches() if calibration is None else calibration
    return plan_smoothing(model, chosen, calibration, call=call, alpha=alpha)


def smoothed(model: nn.Module, smoothing: Smoothing) -> nn.Module:
    """Return a smoothed copy that scales the inputs of its layers."""
    model = copy.deepcopy(model)
    smoothing.apply(model)

    def scale(factor: torch.Tensor, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        return (x * factor.to(x.dtype),), {}

    for name, factor in smoothing.factors.items():
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(partial(scale, factor), with_kwargs=True)
    return model


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pre", [True, False], ids=["pre-norm", "post-norm"])
@torch.no_grad()
def test_smoothed_model_is_bitwise_equal(dtype: torch.dtype, pre: bool) -> None:
    model = prepared(nn.Sequential(Block(pre=pre), Block(pre=pre)), dtype)
    smoothing = plan(model, calibration=batches(dtype=dtype))
    other = smoothed(model, smoothing)
    for name in linears(model):
        assert not torch.equal(
            model.get_submodule(name).weight, other.get_submodule(name).weight
        ), name
    x = torch.randn(2, 9, DIM).to(dtype)
    assert torch.equal(other(x), model(x))


@torch.no_grad()
def test_smoothing_evens_out_the_inputs_of_a_layer() -> None:
    model = prepared(Block())
    peak = model.norm1(torch.cat(batches())).abs().amax((0, 1))
    peaks = (peak, peak * plan(model).factors["q"])
    spans = [(peak.max() / peak.median()).item() for peak in peaks]
    assert spans[0] > 10
    assert spans[1] < spans[0] / 3


def test_replaces_parameters_without_changing_shared_ones() -> None:
    model = prepared(Block())
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    smoothing = plan(model)
    assert all(before[name][0] is p for name, p in model.named_parameters())
    smoothing.apply(model)
    changed = {name for name, p in model.named_parameters() if p is not before[name][0]}
    assert changed == {f"{name}.weight" for name in linears(model)}
    assert all(torch.equal(p, value) for p, value in before.values())


@pytest.mark.parametrize("requires_grad", [True, False])
def test_scaled_weight_stays_a_parameter(requires_grad: bool) -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=torch.bfloat16).requires_grad_(requires_grad)
    before = layer.weight.detach().clone()
    multiply_weight(layer, torch.tensor([1.0, 2.0, 4.0]))
    assert isinstance(layer.weight, nn.Parameter)
    assert (layer.weight.dtype, layer.weight.requires_grad) == (torch.bfloat16, requires_grad)
    assert torch.equal(layer.weight[:, 2], before[:, 2] * 4)


# -- joint scales -------------------------------------------------------------------------------


def joint(smoothing: Smoothing) -> list[tuple[str, ...]]:
    """Return the layers that share a scale and a factor."""
    groups: dict[tuple[int, int], list[str]] = {}
    factors = smoothing.factors
    for name, scale in smoothing.scales.items():
        groups.setdefault((id(scale), id(factors[name])), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


@pytest.mark.parametrize("pre", [True, False], ids=["pre-norm", "post-norm"])
def test_layers_of_one_input_share_a_scale_from_their_largest_weights(pre: bool) -> None:
    model = prepared(Block(pre=pre))
    smoothing = plan(model)
    assert list(smoothing.scales) == list(smoothing.factors) == linears(model)
    assert joint(smoothing) == [("q", "k", "v")]
    with torch.no_grad():
        x = torch.cat(batches())
        x = (model.norm1(x) if pre else x).abs().amax((0, 1))
        w = torch.cat([model.q.weight, model.k.weight, model.v.weight]).abs().amax(0)
    expected = (x.sqrt() / w.sqrt()).log2().round().exp2()
    assert torch.equal(smoothing.scales["q"], expected)
    assert torch.equal(smoothing.factors["k"], 1 / expected)


class Reads(nn.Module):
    """Two layers whose inputs ``use`` determines."""

    def __init__(self, use: Callable[..., Any]) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
        self.other = nn.Linear(DIM, DIM)
        self.inner = nn.ModuleDict({"fc": nn.Linear(DIM, DIM)})
        self.use = use

    def forward(self, x: torch.Tensor) -> Any:
        return self.use(self, x, self.norm(x))


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x, h: m.fc(h) + m.other(h),
        lambda m, x, h: m.fc(h) + m.other(input=h) + h,
        lambda m, x, h: m.fc(x) + m.fc(h) + m.other(x) + m.other(h),
        lambda m, x, h: m.fc(h) + m.other(h.to(h.dtype)),
        lambda m, x, h: m.fc(h) + m.other(h) + m.fc(x[:0]).sum(),
    ],
    ids=["same", "residual", "twice", "same-dtype", "nothing"],
)
@torch.no_grad()
def test_layers_that_read_the_same_tensors_share_a_scale(use: Callable[..., Any]) -> None:
    model = prepared(Reads(use))
    smoothing = plan(model, chosen=["fc", "other"])
    assert joint(smoothing) == [("fc", "other")]
    x = torch.randn(3, LENGTH, DIM)
    assert torch.equal(smoothed(model, smoothing)(x), model(x))


@pytest.mark.parametrize(
    ("use", "other"),
    [
        (lambda m, x, h: m.fc(h) + m.other(x), "other"),
        (lambda m, x, h: m.fc(h) + m.other(h.clone()), "other"),
        (lambda m, x, h: m.fc(h) + m.fc(x) + m.other(h), "other"),
        (lambda m, x, h: m.fc(h) + m.other(h if x.shape[1] == LENGTH else x), "other"),
        (lambda m, x, h: m.fc(h) + m.inner["fc"](h), "inner.fc"),
    ],
    ids=["input", "clone", "more", "one-batch", "other-parent"],
)
@torch.no_grad()
def test_other_layers_have_separate_scales(use: Callable[..., Any], other: str) -> None:
    model = prepared(Reads(use))
    smoothing = plan(model, ["fc", other], [*batches(), batches()[0][:, :2]])
    assert joint(smoothing) == []
    x = torch.randn(3, LENGTH, DIM)
    assert torch.equal(smoothed(model, smoothing)(x), model(x))


def test_distinguishes_tensors_at_reused_addresses() -> None:
    """CPython may reuse the memory, and so the id, of a freed tensor."""
    ids: list[int] = []

    def use(model: Any, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        for layer in (model.fc, model.other):
            fresh, others = h + 1, []
            while ids and id(fresh) != ids[0] and len(others) < 10_000:
                others.append(fresh)  # kept, so that the next one uses other memory
                fresh = h + 1
            ids.append(id(fresh))
            layer(fresh)
            del fresh, others
        return h

    for _ in range(20):  # something else may have reused the memory
        ids.clear()
        smoothing = plan(prepared(Reads(use)), ["fc", "other"], batches()[:1])
        if len(set(ids)) == 1:
            break
    assert len(set(ids)) == 1
    assert joint(smoothing) == []


def test_olmoearth_encoder_shares_scales_of_q_k_and_v() -> None:
    pytest.importorskip("olmoearth_pretrain_minimal")
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.quantization.filters import is_transformer_linear
    from pytest_int8bench.workloads.olmoearth import build, inputs

    params = RunParams(
        model_size="nano",
        image_size=8,
        num_timesteps=1,
        batch_size=2,
        gpu_type="cpu",
        compile_mode="off",
        bf16=False,
    )
    model = build(params).eval().requires_grad_(False)
    batch = inputs(params, torch.device("cpu"))
    chosen = [n for n, module in model.named_modules() if is_transformer_linear(module, n)]
    smoothing = plan(model, chosen, [batch])
    assert [*smoothing.scales] == chosen
    assert joint(smoothing) == [
        tuple(f"encoder.blocks.{index}.attn.{leaf}" for leaf in "qkv") for index in range(4)
    ]
    with torch.no_grad():
        [before] = call(model, batch).values()
        [after] = call(smoothed(model, smoothing), batch).values()
    assert torch.equal(after, before)


# -- observation --------------------------------------------------------------------------------


def layer(features: int = DIM, weight: float = 1.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(features, 4))
    nn.init.constant_(model[0].weight, weight)
    return model.eval().requires_grad_(False)


def test_uses_inputs_of_any_length_rank_and_layout() -> None:
    rows = torch.randn(40, DIM)
    rows[0, 3], rows[11, 4], rows[30, 5], rows[39, 6] = 200, -300, 400, -500
    calibration = [
        rows[0],
        rows[1:13].reshape(3, 4, DIM),
        rows[13:29].reshape(2, 2, 4, DIM).transpose(0, 2),
        rows[29:].T.contiguous().T,
        torch.empty(0, 7, DIM),
    ]
    assert not calibration[3].is_contiguous()
    scale = plan(layer(), calibration=calibration, alpha=1).scales["0"]
    assert torch.equal(scale, rows.abs().amax(0).log2().round().exp2())
    assert scale[[3, 4, 5, 6]].tolist() == [256, 256, 512, 512]  # rounded on a log scale


def test_inputs_are_not_kept() -> None:
    model = prepared(Block())
    living: list[weakref.ref[Any]] = []
    model.fc2.register_forward_pre_hook(
        lambda module, args: living.append(weakref.ref(args[0].untyped_storage()))
    )

    def calibration() -> Iterator[torch.Tensor]:
        for batch in batches(4):
            assert not [ref for ref in living if ref() is not None]
            yield batch

    smoothing = plan(model, calibration=calibration())
    assert len(living) == 4
    assert {tuple(scale.shape) for scale in smoothing.scales.values()} == {(DIM,), (2 * DIM,)}


def test_inputs_in_bf16_are_measured_in_fp32() -> None:
    model = layer().to(torch.bfloat16)
    smoothing = plan(model, calibration=batches(dtype=torch.bfloat16))
    assert smoothing.scales["0"].dtype == torch.float32


def test_alpha_0_smooths_weights_and_alpha_1_smooths_inputs() -> None:
    model = layer(2)
    model[0].weight.copy_(torch.tensor([[0.25, -2.0]]).expand(4, 2))
    x = torch.tensor([[3.9, -20.0]])
    scales = [plan(model, calibration=[x], alpha=alpha).scales["0"] for alpha in (0, 0.5, 1)]
    assert scales[0].tolist() == [4, 0.5]
    assert scales[1].tolist() == [4, 4]  # nearest to sqrt(3.9 / 0.25) and sqrt(20 / 2)
    assert scales[2].tolist() == [4, 16]


@given(
    x=st.floats(2**-10, 2**13, width=32),
    w=st.floats(2**-10, 8, width=32),
    alpha=st.floats(0, 1),
)
def test_a_scale_is_the_nearest_power_of_two(x: float, w: float, alpha: float) -> None:
    model = layer(1, weight=w)
    [scale] = plan(model, calibration=[torch.tensor([[-x]])], alpha=alpha).scales["0"].tolist()
    mantissa, _ = math.frexp(scale)
    assert mantissa == 0.5
    exact = x**alpha / w ** (1 - alpha)
    assert 1 / math.sqrt(2) <= scale / exact * (1 + 1e-5)
    assert scale / exact * (1 - 1e-5) <= math.sqrt(2)


def test_dead_features_are_left_alone() -> None:
    x = torch.tensor([[0.0, 100.0, 4.0, 1.0]])
    for alpha in (0, 0.5, 1):
        scale = plan(layer(4, weight=4.0), calibration=[x], alpha=alpha).scales["0"]
        assert scale[0] == 1
        assert scale[3] == 4 ** -(1 - alpha)


def test_outlier_that_no_weight_reads_is_scaled_away() -> None:
    model = layer(4, weight=4.0)
    model[0].weight[:, 1] = 0
    x = torch.tensor([[1.0, 1000.0, 4.0, 1.0]])
    smoothing = plan(model, calibration=[x], alpha=0.5)
    assert (x / smoothing.scales["0"]).argmax() == 2
    smoothing.apply(model)
    assert model[0].weight.isfinite().all()


def test_scales_are_kept_within_bounds() -> None:
    x = torch.tensor([[1e30, 1e-30, 1.0]])
    scale = plan(layer(3), calibration=[x], alpha=1).scales["0"]
    assert scale.tolist() == [2**MAX_EXPONENT, 2**-MAX_EXPONENT, 1]


# -- errors and side effects --------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_input_names_the_layer(value: float) -> None:
    model = prepared(Block())
    [first, second] = batches()
    model.fc2.register_forward_pre_hook(
        lambda module, args: (args[0].clone().index_fill_(0, torch.tensor([1]), value),)
    )
    message = "during calibration, the input of fc2 contains NaN or infinity"
    with pytest.raises(QuantizationError, match=f"^{message}$"):
        plan(model, calibration=[first, second])


@pytest.mark.parametrize("calibration", [[], [torch.empty(0, LENGTH, DIM)]], ids=["none", "empty"])
def test_rejects_calibration_without_data(calibration: list[Any]) -> None:
    with pytest.raises(QuantizationError) as caught:
        plan(prepared(Block()), calibration=calibration)
    assert str(caught.value) == (
        "calibration did not run 6 of 6 layers (first: q): "
        "it must have at least one batch that runs every layer"
    )


def test_names_layer_that_never_ran() -> None:
    model = prepared(Reads(lambda m, x, h: m.fc(h)))
    with pytest.raises(
        QuantizationError, match=r"^calibration did not run 1 of 2 layers \(first: other"
    ):
        plan(model, ["fc", "other"])


@pytest.mark.parametrize("where", ["calibration", "model", "nothing"])
def test_removes_hooks_and_changes_after_an_error(where: str) -> None:
    model = prepared(Block())
    model.fc1.register_forward_hook(lambda *_: None)
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    def calibration() -> Iterator[torch.Tensor]:
        yield batches()[0]
        if where == "calibration":
            raise RuntimeError("no more")
        yield torch.zeros(1, 2, DIM + (where == "model"))

    if where == "nothing":
        plan(model, calibration=calibration())
    else:
        with pytest.raises(RuntimeError):
            plan(model, calibration=calibration())
    assert hooks_of(model) == 1
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_observes_layers_inside_compiled_submodules() -> None:
    compiled = torch.compile(lambda layer, x: layer(x), backend="eager", fullgraph=True)
    model = prepared(Reads(lambda m, x, h: compiled(m.fc, h) + m.other(h)))
    assert joint(plan(model, ["fc", "other"])) == [("fc", "other")]


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x, h: m.fc(h) + linear(h, m.other.weight, m.other.bias),
        lambda m, x, h: m.fc(h) + linear(input=h, weight=m.other.weight),
        lambda m, x, h: m.fc(h) + linear(h, m.other.weight, bias=m.other.bias).relu(),
    ],
    ids=["positional", "weight=", "bias="],
)
@torch.no_grad()
def test_observes_weight_used_in_other_matmuls(use: Callable[..., Any]) -> None:
    assert joint(plan(prepared(Reads(use)), ["fc", "other"])) == [("fc", "other")]


@pytest.mark.parametrize(
    "use",
    [
        lambda weight, bias, h: h @ weight.t() + bias,
        lambda weight, bias, h: torch.matmul(h, weight.mT) + bias,
        lambda weight, bias, h: torch.addmm(bias, h.reshape(-1, DIM), weight.T),
        lambda weight, bias, h: linear(h.float(), weight.float()) + bias,
        lambda weight, bias, h: [linear(h, part) for part in weight.chunk(2)],
        lambda weight, bias, h: linear(h, weight[: DIM // 2], bias[: DIM // 2]),
        lambda weight, bias, h: linear(h, weight.to(h.device, h.dtype).detach()),
    ],
    ids=["@", "matmul", "addmm", "float", "chunk", "rows", "to"],
)
@torch.no_grad()
def test_calibration_observes_quantized_matmuls(use: Callable[..., Any]) -> None:
    def forward(m: Any, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        used = use(m.other.weight, m.other.bias, h)
        parts = used if isinstance(used, list) else [used]
        return m.fc(h) + sum(part.mean() for part in parts)

    model = prepared(Reads(forward))
    model.other.weight = nn.Parameter(model.fc.weight.clone())
    weights = dict(model.named_parameters())
    inputs = batches()
    expected = [model(x) for x in inputs]
    seen = []

    def call(m: Any, x: torch.Tensor) -> None:
        seen.append(m(x))

    scales = plan_smoothing(model, ["fc", "other"], inputs, call=call).scales
    assert torch.equal(scales["fc"], scales["other"])
    assert all(map(torch.equal, seen, expected))
    assert all(p is weights[name] for name, p in model.named_parameters())


@torch.no_grad()
def test_observes_matmul_operands_rather_than_layer_inputs() -> None:
    class Halved(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input / 1024)

    model = prepared(nn.ModuleDict({"fc": nn.Linear(DIM, DIM), "other": Halved(DIM, DIM)}))
    model["other"].weight = nn.Parameter(model["fc"].weight.clone())
    smoothing = plan_smoothing(
        model,
        ["fc", "other"],
        batches(),
        call=lambda m, x: m["fc"](x) + m["other"](x),
    )
    assert torch.equal(smoothing.scales["fc"], smoothing.scales["other"] * 32)


@torch.no_grad()
def test_observes_layers_that_share_a_weight_separately() -> None:
    model = prepared(Reads(lambda m, x, h: m.fc(h) + m.other(x)))
    model.other.weight = model.fc.weight
    assert joint(plan(model, ["fc", "other"])) == []


def test_does_not_need_torchao() -> None:
    code = (
        "import sys; import pytest_int8bench.quantization.smoothquant; "
        "print([name for name in sys.modules if name.startswith('torchao')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout == "[]\n"
