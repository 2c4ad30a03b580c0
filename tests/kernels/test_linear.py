"""Int8Linear, and putting it in the place of linear layers."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from pytest_int8bench.kernels.linear import Int8Linear, Quantized, replace_linears

K = 16


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def quantized(n: int, k: int = K, *, bias: bool = True, seed: int = 0, **given: Any) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    scale = torch.rand(n, generator=generator) / 128
    there = torch.randn(n, generator=generator) if bias else None
    dtype = given.get("dtype", torch.float32)
    return Quantized(weight, scale, given.get("bias_tensor", there), given.get("factor"), dtype)


def alone(tensors: Quantized) -> Int8Linear:
    """Return the layer that shares its tensors with no other."""
    model = nn.Sequential(nn.Linear(*tensors.weight.shape[::-1]))
    replace_linears(model, {"0": tensors})
    layer = model[0]
    assert isinstance(layer, Int8Linear)
    return layer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.q, self.v = nn.Linear(K, 3), nn.Linear(K, 8), nn.Linear(K, 5)
        self.proj = nn.Linear(8, K)
        self.norm = nn.LayerNorm(K)


TENSORS = {
    "q": quantized(8, seed=1),
    "k": quantized(3, seed=2),
    "v": quantized(5, seed=3),
    "proj": quantized(K, 8, seed=4),
}


@pytest.fixture
def attention() -> Any:
    model = Attention()
    replace_linears(model, TENSORS)
    return model


def parts(model: Any, name: str) -> list[torch.Tensor]:
    """Return the tensors of the layers that share an input, in the order of the parent."""
    return [getattr(getattr(model, layer), name) for layer in ("k", "q", "v")]


def adjacent(tensors: list[torch.Tensor]) -> bool:
    """Say whether tensors lie one after another in one storage."""
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    follow = [tensor.data_ptr() for tensor in tensors[1:]] == ends[:-1]
    return follow and len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def exact(x: torch.Tensor, tensors: Quantized) -> torch.Tensor:
    """The layer in FP64, of an input that is not quantized."""
    x = x.double() if tensors.factor is None else x.double() * tensors.factor.double()
    weight = tensors.weight.double() * tensors.weight_scale.double()[:, None]
    bias = None if tensors.bias is None else tensors.bias.double()
    return nn.functional.linear(x, weight, bias)


def close(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Rounding rows to INT8 costs about half a percent, and more where few values are large."""
    return bool((out.double() - expected).norm() <= 0.02 * expected.norm())


# -- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(K,), (4, K), (2, 3, K), (0, K)])
def test_a_layer_is_a_linear_layer(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    tensors = quantized(5, bias=bias)
    layer = alone(tensors)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    out = layer(x)
    assert (out.shape, out.dtype) == ((*shape[:-1], 5), dtype)
    assert close(out, exact(x, tensors))


def test_a_factor_multiplies_the_input() -> None:
    factor = torch.exp2(torch.randint(-3, 4, (K,)).float())
    tensors = quantized(5, factor=factor)
    x = torch.randn(4, K)
    out = alone(tensors)(x)
    assert close(out, exact(x, tensors))
    assert not close(alone(quantized(5))(x), exact(x, tensors))


def test_a_layer_tells_its_sizes_and_learns_nothing() -> None:
    layer = alone(quantized(5, bias=False))
    assert layer.extra_repr() == "in_features=16, out_features=5, bias=False"
    assert isinstance(layer, nn.Linear)
    assert (layer.bias, layer.factor) == (None, None)
    assert {name: held.dtype for name, held in layer.named_buffers()} == {
        "block.weight": torch.int8,
        "block.scale": torch.float32,
    }
    assert not list(layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_code_that_reads_the_weight_gets_it_in_the_dtype_it_had(dtype: torch.dtype) -> None:
    tensors = quantized(5, dtype=dtype)
    weight = alone(tensors).weight
    assert weight.dtype == dtype
    exactly = tensors.weight.double() * tensors.weight_scale.double()[:, None]
    assert (weight.double() - exactly).abs().max() <= torch.finfo(dtype).eps * exactly.abs().max()


# -- replacing ----------------------------------------------------------------------------------


def test_layers_are_replaced_with_their_own_tensors(attention: Any) -> None:
    for name, tensors in TENSORS.items():
        layer = getattr(attention, name)
        assert isinstance(layer, Int8Linear)
        for part, expected in vars(tensors).items():
            if part == "dtype":
                continue
            held = getattr(layer, "int8_weight" if part == "weight" else part)
            assert held is expected if expected is None else torch.equal(held, expected)
    assert type(attention.norm) is nn.LayerNorm
    assert list(attention._modules) == ["k", "q", "v", "proj", "norm"]


@pytest.mark.parametrize("name", ["int8_weight", "weight_scale", "bias"])
def test_layers_that_may_share_an_input_are_neighbours(attention: Any, name: str) -> None:
    together = parts(attention, name)
    block = getattr(attention.k.block, name.removeprefix("int8_").removeprefix("weight_"))
    assert torch.equal(block, torch.cat(together))
    assert adjacent(together)
    assert not adjacent([together[0], getattr(attention.proj, name)])


def test_neighbours_share_a_block(attention: Any) -> None:
    # Regions that are compiled once take no two inputs of one storage.
    first, *others = parts(attention, "block")
    assert all(other is first for other in others)
    assert attention.proj.block is not first
    assert len(list(attention.buffers())) == 2 * 3


def test_neighbours_outlive_each_other() -> None:
    model = Attention()
    replace_linears(model, TENSORS)
    last = model.v
    del model
    assert torch.equal(last.int8_weight, TENSORS["v"].weight)


@pytest.mark.parametrize(
    "other",
    [
        quantized(3, 8),
        quantized(3, bias=False),
        quantized(3, bias_tensor=torch.zeros(3, dtype=torch.bfloat16)),
    ],
    ids=["width", "bias", "dtype"],
)
def test_layers_of_other_kinds_are_no_neighbours(other: Quantized) -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(K, 4), "b": nn.Linear(K, 3)})
    replace_linears(model, {"a": quantized(4), "b": other})
    assert not adjacent([model["a"].int8_weight, model["b"].int8_weight])
    bias = model["b"].bias
    assert bias is other.bias or bias.dtype == other.bias.dtype


def test_layers_with_one_factor_are_neighbours() -> None:
    factor, other = torch.full((K,), 2.0), torch.full((K,), 2.0)
    model: Any = nn.ModuleDict({name: nn.Linear(K, 4) for name in "abcd"})
    given = {"a": factor, "b": other, "c": factor, "d": None}
    replace_linears(model, {name: quantized(4, factor=each) for name, each in given.items()})
    assert model["a"].block is model["c"].block
    assert model["a"].factor is factor
    assert len({id(model[name].block) for name in "abd"}) == 3
    assert model["b"].factor is other
    assert model["d"].factor is None
    twin = copy.deepcopy(model).to(torch.float64)
    assert twin["a"].factor is twin["c"].factor
    assert twin["a"].factor.dtype == torch.float64


def test_layers_of_two_parents_are_no_neighbours() -> None:
    model: Any = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(K, 4)}) for _ in range(2))
    replace_linears(model, {"0.a": quantized(4), "1.a": quantized(4)})
    assert not adjacent([part["a"].int8_weight for part in model])


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
def test_a_layer_of_two_names_stays_one(names: list[str]) -> None:
    shared = nn.Linear(K, 4)
    model: Any = nn.ModuleDict({"first": shared, "inner": nn.ModuleDict(), "second": shared})
    model["inner"]["third"] = shared
    replace_linears(model, {name: quantized(4) for name in names})
    assert isinstance(model["first"], Int8Linear)
    assert model["second"] is model["first"]
    assert model["inner"]["third"] is model["first"]


def test_a_parent_of_two_names_is_replaced_once() -> None:
    inner: Any = nn.ModuleDict({"a": nn.Linear(K, 4), "b": nn.Linear(K, 4)})
    model: Any = nn.ModuleList([inner, inner])
    replace_linears(model, {"0.a": quantized(4), "0.b": quantized(4)})
    assert model[0] is model[1]
    assert isinstance(inner["a"], Int8Linear)
    assert adjacent([inner["a"].int8_weight, inner["b"].int8_weight])


def test_layers_that_could_learn_are_replaced() -> None:
    model = Attention()
    layers: Any = {name: getattr(model, name) for name in ("q", "k")}
    given = {
        name: quantized(layer.out_features, bias_tensor=layer.bias)
        for name, layer in layers.items()
    }
    replace_linears(model, given)
    assert torch.equal(model.q.bias, layers["q"].bias)
    assert not model.q.bias.requires_grad
    assert adjacent([model.k.bias, model.q.bias])


def test_nothing_to_replace_changes_nothing() -> None:
    model = Attention()
    before = dict(model.named_modules())
    replace_linears(model, {})
    assert dict(model.named_modules()) == before


# -- copying and moving -------------------------------------------------------------------------


def same(model: Any, twin: Any) -> None:
    x = torch.randn(4, K)
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(model, name)(x), getattr(twin, name)(x))


def test_a_copy_computes_the_same_with_memory_of_its_own(attention: Any) -> None:
    twin = copy.deepcopy(attention)
    same(attention, twin)
    for one, other in itertools.product(attention.buffers(), twin.buffers()):
        assert one.data_ptr() != other.data_ptr()
    assert adjacent(parts(twin, "int8_weight"))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_a_model_that_is_moved_computes_the_same(attention: Any, dtype: torch.dtype | None) -> None:
    twin = copy.deepcopy(attention).to("cpu", dtype)
    assert twin.q.int8_weight.dtype == torch.int8
    assert adjacent(parts(twin, "int8_weight"))
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(3))
    for name in ("q", "k", "v"):
        before, after = getattr(attention, name)(x), getattr(twin, name)(x)
        assert after.dtype == torch.float32
        assert (before - after).norm() < 0.01 * before.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_stay_as_they_are_where_a_model_is_cast(attention: Any, dtype: torch.dtype) -> None:
    twin = copy.deepcopy(attention).to(dtype)
    assert twin.q.bias.dtype == dtype
    assert twin.q.weight_scale.dtype == torch.float32
    assert torch.equal(twin.q.weight_scale, attention.q.weight_scale)
    assert twin.q.block is twin.k.block


def test_a_backward_pass_is_an_error(attention: Any) -> None:
    x = torch.randn(4, K, requires_grad=True)
    out = attention.q(x)  # a forward pass is none
    with pytest.raises(RuntimeError, match="support inference only and have no gradient"):
        out.sum().backward()


def test_a_state_dict_goes_there_and_back(attention: Any) -> None:
    file = io.BytesIO()
    torch.save(attention.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh: Any = Attention()
    replace_linears(fresh, {name: quantized(*t.weight.shape) for name, t in TENSORS.items()})
    fresh.load_state_dict(state)
    same(attention, fresh)
    assert adjacent(parts(fresh, "int8_weight"))
