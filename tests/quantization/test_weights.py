"""Every reader of a quantized weight gets the correct values on every backend."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear
from torch.profiler import profile
from torchao.quantization import (
    Float8Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    PerRow,
    quantize_,
)

from pytest_int8bench.compiler.fusion import passes
from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.kernels import dispatch
from pytest_int8bench.kernels.schema import READ_OPERATOR
from pytest_int8bench.quantization.api import apply_int8_quant, coverage
from pytest_int8bench.quantization.weights import Float8Weight, Int8Weight, make_readable
from toys.readers import MATMULS, PYTHON_READS, READS, Reader

BACKENDS = [("w8a8", "torchao"), ("w8a8", "fused"), ("w8", "torchao")]
ROWS, WIDTH, OUTLIER = 8, 64, 3


def any_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def made(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(*layers).eval().requires_grad_(False).to(dtype)


def batch() -> torch.Tensor:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    x[:, OUTLIER] *= 30
    return x


@pytest.fixture(params=BACKENDS, ids=lambda given: "-".join(given))
def quantize(request: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    mode, backend = request.param
    if mode == "w8a8":
        monkeypatch.setattr(dispatch, "fused_problem", lambda device: None)

    def quantized(model: nn.Module, smoothed: bool = False) -> Any:
        given = {"smoothquant": True, "calibration": [batch()]} if smoothed else {}
        return apply_int8_quant(model, mode=mode, backend=backend, filter_fn=any_layer, **given)

    quantized.dynamic = mode == "w8a8"  # type: ignore[attr-defined]
    return quantized


def sqnr_db(reference: torch.Tensor, output: torch.Tensor) -> float:
    assert (output.shape, output.dtype, type(output)) == (
        reference.shape,
        reference.dtype,
        torch.Tensor,
    )
    reference, output = reference.double(), output.double()
    noise = (reference - output).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise))


def observed(run: Callable[..., torch.Tensor], *args: Any) -> tuple[torch.Tensor, set[str]]:
    """Return the output of a call, and the operators that ran in it."""
    with profile() as profiler:
        out = run(*args)
    return out, {row.key for row in profiler.key_averages()}


# -- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_matmuls_of_the_layer_run_quantized(
    quantize: Any, context: Callable[[], AbstractContextManager[None]]
) -> None:
    baseline, x = made(), batch()
    for smoothed in (False, True):
        layer = quantize(made(), smoothed)[0]
        for name, reader in MATMULS.items():
            with context():
                out, ran = observed(reader, layer, x)
            assert sqnr_db(reader(baseline[0], x), out) > 28, name
            assert READ_OPERATOR not in ran, name
            int8 = {"aten::_int_mm", "int8bench::linear"} & ran
            assert len(int8) == quantize.dynamic, name


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_other_operators_read_dequantized_values(
    quantize: Any, context: Callable[[], AbstractContextManager[None]]
) -> None:
    baseline, x = made(), batch()
    for smoothed in (False, True):
        layer = quantize(made(), smoothed)[0]
        for name, reader in {**READS, **PYTHON_READS}.items():
            with context():
                out, ran = observed(reader, layer, x)
            assert sqnr_db(reader(baseline[0], x), out) > 36, name
            assert READ_OPERATOR in ran, name


def every(readers: dict[str, Reader]) -> Callable[[Any, torch.Tensor], list[torch.Tensor]]:
    return lambda layer, x: [reader(layer, x) for reader in readers.values()]


SOME = ("bias=", "t", "chunk", "einsum", "norm")


@pytest.mark.parametrize(
    ("backend", "names"),
    [("eager", (*MATMULS, *READS)), ("aot_eager", SOME)],
    ids=["dynamo", "aot"],
)
def test_readers_compile_to_one_graph(quantize: Any, backend: str, names: tuple[str, ...]) -> None:
    layer, x = quantize(made(), smoothed=True)[0], batch()
    run = every({name: {**MATMULS, **READS}[name] for name in names})
    with torch.no_grad():
        compiled = torch.compile(run, backend=backend, fullgraph=True)(layer, x)
    for name, before, out in zip(names, run(made()[0], x), compiled, strict=True):
        assert sqnr_db(before, out) > 28, name


def test_smoothed_weight_shared_by_two_layers_is_correct_for_both(quantize: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(self.inner(x), self.inner[0].weight.t() + 0)

    baseline, x = Tied(), batch()
    model = Tied()
    quantize(model.inner, smoothed=True)
    assert sqnr_db(baseline(x), model(x)) > 28


@pytest.mark.parametrize("shape", [(0, WIDTH), (2, 0, WIDTH), (WIDTH,), (2, 1, 3, WIDTH)])
def test_supports_any_number_of_rows(quantize: Any, shape: tuple[int, ...]) -> None:
    baseline, layer = made()[0], quantize(made())[0]
    x = torch.ones(shape)
    for reader in (MATMULS["layer"], MATMULS["bias="]):
        before, out = reader(baseline, x), reader(layer, x)
        assert (out.shape, out.dtype) == (before.shape, before.dtype)
        assert torch.allclose(out, before, atol=0.05)


@pytest.mark.parametrize("width", [WIDTH - 1, 0])
def test_wrong_input_width_raises_torchs_error(quantize: Any, width: int) -> None:
    layer = quantize(made())[0]
    for x in (torch.ones(2, width), torch.ones(0, width)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(x, layer.weight)


def test_autocast_applies_to_quantized_layers(quantize: Any) -> None:
    baseline, model, x = made(), quantize(made()), batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert sqnr_db(baseline(x), model(x)) > 28
        assert linear(x, model[0].weight, bias=model[0].bias).dtype == torch.bfloat16
        assert (x @ model[0].weight.t()).dtype == torch.bfloat16


# -- the tensor ---------------------------------------------------------------------------------


def test_weight_keeps_the_attributes_of_the_original(quantize: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = quantize(made(dtype))[0].weight
        before = made(dtype)[0].weight
        for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad"):
            assert getattr(weight, name) == getattr(before, name), name
        for name in ("numel", "size", "stride", "dim", "is_contiguous", "element_size"):
            assert getattr(weight, name)() == getattr(before, name)(), name


def test_cache_key_depends_on_everything_but_values(quantize: Any) -> None:
    weight, other = (quantize(made())[at].weight for at in (0, 2))
    key = weight._stable_hash_for_caching()
    assert key == other._stable_hash_for_caching()
    assert " at 0x" not in key  # the same in another process
    same_tensors = type("Other", (type(weight),), {}).__tensor_unflatten__(
        {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]},
        weight.__tensor_flatten__()[1],
        weight.shape,
        weight.stride(),
    )
    others = [weight[:8], weight.bfloat16(), weight.t(), quantize(made(), True)[0].weight]
    if type(same_tensors) is not type(weight):  # FusedWeight makes its own
        others.append(same_tensors)
    keys = {each._stable_hash_for_caching() for each in others} | {key}
    assert len(keys) == len(others) + 1


def test_weights_have_distinct_addresses(quantize: Any) -> None:
    model = quantize(made())
    assert len({0, *(model[i].weight.data_ptr() for i in (0, 2))}) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_casts_its_weights(quantize: Any, dtype: torch.dtype) -> None:
    x = batch()
    model = quantize(made(), smoothed=True).to(dtype)
    assert model[0].weight.dtype == dtype
    before = made().to(dtype)
    assert sqnr_db(before[0].weight.clone(), model[0].weight + 0) > 36
    assert sqnr_db(before(x.to(dtype)), model(x.to(dtype))) > 28


def saved(value: Any, **given: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **given)


def loaded(model: Any, quantize: Any) -> Any:
    fresh = quantize(nn.Sequential(*map(copy.deepcopy, made().double().float())), smoothed=True)
    for parameter in fresh.buffers():
        parameter.zero_()
    fresh.load_state_dict(saved(model.state_dict(), weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "again",
    [
        lambda model, quantize: copy.deepcopy(model),
        lambda model, quantize: pickle.loads(pickle.dumps(model)),
        lambda model, quantize: saved(model, weights_only=False),
        lambda model, quantize: copy.deepcopy(model).share_memory(),
        loaded,
    ],
    ids=["deepcopy", "pickle", "save", "share_memory", "state_dict"],
)
def test_copy_computes_the_same(quantize: Any, again: Callable[[Any, Any], Any]) -> None:
    model, x = quantize(made(), smoothed=True), batch()
    other = again(model, quantize)
    assert type(other[0].weight) is type(model[0].weight)
    assert torch.equal(model(x), other(x))
    assert torch.equal(model[0].weight + 0, other[0].weight + 0)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.zero_(),
        lambda weight: weight.__setitem__(0, 0.0),
        lambda weight: weight.copy_(torch.ones(WIDTH, WIDTH)),
        lambda weight: weight.t().add_(1),
        lambda weight: torch.mul(torch.ones(WIDTH, WIDTH), 2, out=weight),
        lambda weight: setattr(weight, "data", torch.ones(WIDTH, WIDTH)),
        nn.init.normal_,
    ],
    ids=["mul_", "zero_", "setitem", "copy_", "transposed", "out=", "data", "init"],
)
def test_rejects_writing_to_a_weight(quantize: Any, write: Callable[[Any], Any]) -> None:
    model, x = quantize(made()), batch()
    before = model(x)
    with pytest.raises(QuantizationError, match=r"cannot write to a quantized weight \(64x64\)"):
        write(model[0].weight)
    assert torch.equal(model(x), before)


# -- models of torch ----------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, batch_first=True, **given)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor, **masks: Any) -> torch.Tensor:
        out: torch.Tensor = self.encoder(x, **masks)
        return out


PADDING = {"src_key_padding_mask": torch.arange(5).expand(3, 5) >= torch.tensor([[5], [4], [5]])}
CAUSAL = {"mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True}


@pytest.mark.parametrize(
    ("given", "masks"),
    [
        ({}, {}),
        ({"norm_first": True}, PADDING),
        ({"activation": "gelu"}, CAUSAL),
        ({"norm_first": True, "activation": "gelu"}, {**PADDING, **CAUSAL}),
    ],
    ids=["plain", "padding", "causal", "both"],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype", "ignore:enable_nested")
@pytest.mark.filterwarnings("ignore:Converting mask without torch.bool")
def test_quantizes_torchs_encoder(given: Any, masks: Any) -> None:
    baseline = Encoder(**given).eval().requires_grad_(False)
    model = apply_int8_quant(copy.deepcopy(baseline), filter_fn=any_layer)
    assert len(coverage(model).converted) == 4
    x = torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        before = baseline(x, **masks)
        assert sqnr_db(before[:, :4], model(x, **masks)[:, :4]) > 35
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(x, **masks)
        out, ran = observed(lambda: compiled(x, **masks))
    assert sqnr_db(before[:, :4], out[:, :4]) > 35
    assert "aten::_int_mm" in ran
    assert READ_OPERATOR not in ran


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_may_quantize_parts_of_torchs_attention(
    context: Callable[[], AbstractContextManager[None]],
) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True).eval().requires_grad_(False)
    model = copy.deepcopy(attention)
    part = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    part[0].weight = model.out_proj.weight
    apply_int8_quant(part, filter_fn=any_layer)
    model.out_proj.weight = part[0].weight
    x = torch.randn(2, 5, WIDTH)
    with context():
        assert sqnr_db(attention(x, x, x)[0], model(x, x, x)[0]) > 35
        compiled = torch.compile(model, backend="aot_eager")
        assert sqnr_db(attention(x, x, x)[0], compiled(x, x, x)[0]) > 35


class Attention(nn.Module):
    """Read one weight directly, like timm's Eva and SwinV2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = linear(self.norm(x), self.qkv.weight, bias=self.qkv.bias).chunk(3, -1)
        out: torch.Tensor = x + self.proj(q * k + v)
        return out


def test_fused_weight_in_explicit_matmul_stays_int8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "fused_problem", lambda device: None)
    baseline, x = Attention().eval().requires_grad_(False), batch()
    model = apply_int8_quant(copy.deepcopy(baseline), filter_fn=any_layer)
    assert len(coverage(model).fused) == 2

    def fused(module: Any, inputs: Any) -> Any:
        return passes.fuse(module).forward

    for run in (model, torch.compile(model, backend=fused, fullgraph=True)):
        with torch.no_grad():
            run(x)
            with profile() as profiler:
                out = run(x)
        ran = {row.key: row.count for row in profiler.key_averages()}
        assert sqnr_db(baseline(x), out) > 30
        assert (ran["int8bench::linear"], READ_OPERATOR in ran) == (2, False)


# -- TorchAO's own matmul -----------------------------------------------------------------------


def graph(layer: nn.Module) -> str:
    code: str = make_fx(lambda x: layer(x))(batch()).code
    return code


@pytest.mark.parametrize(
    "config",
    [
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        Int8WeightOnlyConfig(set_inductor_config=False),
    ],
    ids=["w8a8", "w8"],
)
def test_layer_call_traces_to_the_graph_of_torchao(config: Any) -> None:
    theirs, ours = made(), made()
    quantize_(theirs, config)
    quantize_(ours, config)
    make_readable(ours)
    assert (type(theirs[0].weight), type(ours[0].weight)) == (Int8Tensor, Int8Weight)
    assert graph(ours[0]) == graph(theirs[0])


def test_fp8_weight_can_be_read() -> None:
    model, x = made(torch.bfloat16), batch().to(torch.bfloat16)
    fp8 = Float8Tensor.from_hp(model[0].weight, granularity=PerRow())
    model[0].weight = nn.Parameter(fp8, requires_grad=False)
    make_readable(model)
    assert type(model[0].weight) is Float8Weight
    for name, reader in READS.items():
        if name != "dequantize":
            assert sqnr_db(reader(made(torch.bfloat16)[0], x), reader(model[0], x)) > 25, name
