"""Test layers whose weights cannot be quantized, and errors, which leave the model unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, Int8Tensor, Int8WeightOnlyConfig, PerRow
from torchao.quantization.transform_module import register_quantize_module_handler

from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.kernels import dispatch
from pytest_int8bench.quantization import api
from pytest_int8bench.quantization.api import apply_int8_quant, coverage, is_quantized

WIDTH = 64


def any_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def made(**given: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(WIDTH, WIDTH, **given), nn.GELU(), nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(*layers).eval().requires_grad_(False)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Standardized(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.raw = self._parameters.pop("weight")

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        assert self.raw is not None
        return self.raw - self.raw.mean(1, keepdim=True)


COMPUTED: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "weight_norm": (lambda model: weight_norm(model[0]), "weight_g, weight_v"),
    "spectral_norm": (lambda model: spectral_norm(model[0]), "weight_orig"),
    "pruned": (lambda model: prune.l1_unstructured(model[0], "weight", 0.5), "weight_orig"),
    "parametrized": (
        lambda model: parametrize.register_parametrization(model[0], "weight", Doubled()),
        "parametrizations.weight.original",
    ),
    "orthogonal": (
        lambda model: parametrizations.orthogonal(model[0]),
        "parametrizations.weight.original",
    ),
    "property": (lambda model: model.__setitem__(0, Standardized()), "raw"),
}


@pytest.mark.parametrize("backend", ["torchao", "fused"])
@pytest.mark.parametrize("mode", ["w8a8", "w8"])
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_excludes_only_computed_weights(
    kind: str, mode: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, parameters = COMPUTED[kind]
    monkeypatch.setattr(dispatch, "fused_problem", lambda device: None)
    if (mode, backend) == ("w8", "fused"):
        backend = "auto"
    model = made()
    change(model)
    model.eval().requires_grad_(False)
    x = torch.randn(8, WIDTH)
    with torch.no_grad():
        before = model(x)
        apply_int8_quant(model, mode=mode, backend=backend, filter_fn=any_layer)
        left, converted = coverage(model).layers
        reason = f"weight: computed when the layer is called ({parameters})"
        assert (left.name, left.reason, converted.reason) == ("0", reason, None)
        assert (before - model(x)).norm() < 0.03 * before.norm()
    assert [is_quantized(model[place]) for place in (0, 2)] == [False, True]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.Linear(WIDTH, WIDTH, dtype=torch.complex64), "dtype: complex64"),
        (lambda: nn.Linear(WIDTH, WIDTH, dtype=torch.float64), "dtype: float64"),
        (lambda: nn.Linear(0, WIDTH), "shape: a 0x64 layer has no weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_excludes_unsupported_dtypes_and_shapes(layer: Any, reason: str) -> None:
    model = nn.Sequential(layer(), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    told = coverage(apply_int8_quant(model, filter_fn=any_layer)).layers
    assert [layer.reason for layer in told] == [reason, None]


def test_quantized_layer_computes_its_computed_bias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "fused_problem", lambda device: None)
    model = made()
    parametrize.register_parametrization(model[0], "bias", Doubled())
    apply_int8_quant(model.requires_grad_(False), filter_fn=any_layer)
    first, second = coverage(model).layers
    assert (first.reason, first.fallback) == (None, "bias: computed when the layer is called")
    assert second.fused
    x = torch.zeros(2, WIDTH)
    before = model[0](x)
    model[0].parametrizations.bias.original.data.mul_(3)  # type: ignore[union-attr,operator]
    assert torch.allclose(model[0](x), 3 * before)


def test_model_with_only_computed_weights_is_explained() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    prune.identity(model[0], "weight")
    with pytest.raises(QuantizationError) as caught:
        apply_int8_quant(model, filter_fn=any_layer)
    assert str(caught.value).endswith(
        "left out because: weight: computed when the layer is called (weight_orig)"
    )


# -- errors -------------------------------------------------------------------------------------


class Failing(AOBaseConfig):
    """Quantize one layer and fail at the next."""


_failing: list[nn.Module] = []


@register_quantize_module_handler(Failing)
def _fail(module: Any, config: Failing) -> nn.Module:
    if _failing:
        raise RuntimeError("the second layer")
    _failing.append(module)
    weight = Int8Tensor.from_hp(module.weight, granularity=PerRow())
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.extra_repr = lambda: "quantized"
    return module


def raising(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("on the way")


W8 = Int8WeightOnlyConfig(set_inductor_config=False)
ERRORS: dict[str, dict[str, Any]] = {
    "configuration": {"quant_config": Failing()},
    "smoothed": {"quant_config": Failing(), "smoothquant": True},
    "named": {"quant_config": FqnToConfig({"0": W8, "2": Failing()})},
    "lower": {"mode": "w8"},
    "fuse": {"mode": "w8a8"},
    "fits none": {"quant_config": W8, "backend": "fused"},
}


def state(model: nn.Module) -> list[Any]:
    """Return the parts of a model by identity."""
    return [
        (name, type(module), sorted(vars(module)), [id(part) for part in held])
        for name, module in model.named_modules()
        for held in (
            module._parameters.values(),
            module._buffers.values(),
            module._modules.values(),
            module._forward_pre_hooks.values(),
        )
    ]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_errors_leave_the_model_unchanged(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing[:] = [nn.Identity()] if kind == "named" else []
    monkeypatch.setattr(dispatch, "fused_problem", lambda device: None)
    model, x = made(), torch.randn(4, WIDTH)
    weight_norm(model[2]) if kind == "fuse" else None
    before, values, output = state(model), copy.deepcopy(model.state_dict()), model(x)
    given = {"calibration": [x]} if "smoothquant" in ERRORS[kind] else {}
    with monkeypatch.context() as patched:
        if kind in ("lower", "fuse"):
            patched.setattr(api, "make_readable" if kind == "lower" else "lower", raising)
        with pytest.raises((RuntimeError, QuantizationError)):
            apply_int8_quant(model, filter_fn=any_layer, **ERRORS[kind], **given)
    assert state(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), output)
    assert repr(model) == repr(made()) or kind == "fuse"
    assert not coverage(model).converted
    apply_int8_quant(model, filter_fn=any_layer)  # nothing prevents it now
