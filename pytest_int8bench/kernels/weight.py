"""Quantized weights that any code can read.

A linear layer's weight is read in more ways than the layer's own forward: models call ``F.linear``
with it, multiply by its transpose or by some of its rows, or normalize it. A
:class:`QuantizedWeight` runs the quantized matmul wherever that is plainly what is called, and
gives its values everywhere else, by the operator ``int8bench::read_weight``: where that shows in a
profile, something ran on dequantized values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn import functional as F

from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.kernels import encoder_layer
from pytest_int8bench.kernels import ops as _ops  # noqa: F401  registers torch.ops.int8bench

#: What quantized matmuls multiply.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_W = TypeVar("_W", bound="QuantizedWeight")
aten = torch.ops.aten


class _Readable:
    """Tensor subclass that computes with the values it stands for."""

    __slots__ = ()

    def plain(self) -> torch.Tensor:
        """Return the values as a plain tensor."""
        raise NotImplementedError

    def _stable_hash_for_caching(self) -> str:
        """Return what stands for this tensor in the key of AOTAutograd's cache.

        Torch 2.13 to 2.15 calls it, warns where it is missing, and leaves out the class then
        (``_default_stable_hash_for_caching`` in torch/_functorch/_aot_autograd/autograd_cache.py):
        two classes that hold the same tensors would run each other's code.
        """
        this: Any = self
        names, context = this.__tensor_flatten__()
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        held = [_cache_key(getattr(self, name)) for name in names]
        return repr((kind, _description(this), context, names, held))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            return _FUNCTIONS[func](*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == encoder_layer.NAME:
            return encoder_layer.forward(*args, **kwargs)
        if name in _FOR_PYTHON:
            return func(*_plain(args), **_plain(kwargs))
        # As in "Extending torch" of torch's documentation: the operators come to
        # __torch_dispatch__.
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_inference_mode_enabled() and name not in _OF_THE_OBJECT:
                args, kwargs = _mapped(_for_inference, args), _mapped(_for_inference, kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OPERATORS:
            out = _OPERATORS[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func.decompose(*args, **kwargs)  # in inference mode, operators come whole
        if out is not NotImplemented:
            return out
        _check_only_read(func, args, kwargs)
        return func(*_plain(args), **_plain(kwargs))


class QuantizedWeight(_Readable):
    """Weight (N, K) of a linear layer. Mixed into a tensor subclass that holds it.

    The tensor must flatten (``__tensor_flatten__``) to the tensors that hold the weight.
    """

    factor: torch.Tensor | None
    """(K,) that the input is multiplied by (SmoothQuant)."""

    def quantized_matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the matmul of ``x`` (..., K) with the quantized weight."""
        raise NotImplementedError

    def scaled(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values (N, K) that multiply an input scaled by ``factor``."""
        raise NotImplementedError

    def rows(self: _W, start: int, stop: int) -> _W:
        """Return the weight of the outputs from ``start`` to ``stop``, or ``NotImplemented``."""
        raise NotImplementedError

    def cast(self: _W, dtype: torch.dtype) -> _W:
        """Return the weight with values of another dtype."""
        raise NotImplementedError

    def mapped(self: _W, change: Callable[[torch.Tensor], torch.Tensor]) -> _W:
        """Return the weight with each tensor that holds it changed."""
        this: Any = self
        names, context = this.__tensor_flatten__()
        held = {name: change(getattr(self, name)) for name in names}
        out: _W = type(this).__tensor_unflatten__(held, context, this.shape, this.stride())
        return out

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values (N, K) that multiply an input as it is, by default in the weight's
        dtype."""
        this: Any = self
        values = self.scaled(dtype or this.dtype)
        out: torch.Tensor = torch.ops.int8bench.read_weight.default(values, self.factor)
        return out

    def plain(self) -> torch.Tensor:
        return self.dequantize()


class _Transposed(_Readable, torch.Tensor):  # type: ignore[misc]
    """The transpose (K, N) of a weight: ``x @ weight.t()`` is the layer's matmul too."""

    weight: Any

    @staticmethod
    def __new__(cls, weight: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls, (weight.shape[1], weight.shape[0]), dtype=weight.dtype, device=weight.device
        )

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def plain(self) -> torch.Tensor:
        out: torch.Tensor = self.weight.dequantize().t()
        return out

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["weight"], None

    @staticmethod
    def __tensor_unflatten__(held: Any, context: Any, size: Any, stride: Any) -> _Transposed:
        return _Transposed(held["weight"])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.weight!r}.t()"


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that ``F.linear`` would compute an input in."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in DTYPES:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _cache_key(tensor: Any) -> Any:
    if isinstance(tensor, _Readable):
        return tensor._stable_hash_for_caching()
    return type(tensor).__qualname__, _description(tensor)


def _description(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what compiled code may rely on, and not the values."""
    place = tensor.device, tensor.layout, tensor.stride()
    kind = tensor.dtype, tensor.requires_grad, tensor.is_inference(), tensor.is_conj()
    return tuple(tensor.shape), place, kind


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return arguments of a function with its weights changed."""
    if isinstance(value, _Readable):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, item) for item in value])
    if isinstance(value, dict):
        return {key: _mapped(change, item) for key, item in value.items()}
    return value


def _plain(value: Any) -> Any:
    """Return arguments of a function with plain tensors for weights."""
    return _mapped(lambda weight: weight.plain(), value)


def _for_inference(weight: Any) -> Any:
    """Return a weight made in inference mode: one made outside can have no views in it, unless they
    share its memory."""
    made_outside = isinstance(weight, QuantizedWeight) and not weight.is_inference()  # type: ignore[attr-defined]
    return _alias(weight) if made_outside else weight


def _check_only_read(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise if an operator writes to a weight: the values it would write to are a copy."""
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, _Readable):
            raise _unwritable(value, str(func))


def _unwritable(weight: Any, how: str) -> QuantizationError:
    shape = "x".join(map(str, weight.shape))
    return QuantizationError(
        f"a quantized weight ({shape}) cannot be written to, and {how} does: leave the layer out "
        "(filter_fn or --int8-filter)"
    )


# -- functions ----------------------------------------------------------------------------------


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, QuantizedWeight) and not isinstance(input, _Readable):
        return _product(input, weight, _plain(bias))
    return F.linear(_plain(input), _plain(weight), _plain(bias))


def _product(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    dtype = autocast_dtype(x)
    x = x.to(dtype)
    if dtype not in DTYPES or x.is_nested or x.shape[-1:] != weight.shape[-1:]:
        # Another dtype, or an error, as of a plain weight.
        return F.linear(x, weight.dequantize(dtype), bias)
    if guard_or_false(x.numel() == 0):
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    out: torch.Tensor = weight.quantized_matmul(x, bias)
    return out


def _set_data(weight: Any, value: Any) -> None:
    """Set ``weight.data``."""
    if type(value) is not type(weight):
        raise _unwritable(weight, "setting its data")
    with torch._C.DisableTorchFunctionSubclass():
        weight.data = value
    for name in (*vars(value), *vars(weight)):
        setattr(weight, name, getattr(value, name, None))


def _set_item(weight: Any, *_: Any) -> None:
    raise _unwritable(weight, "setting a part of it")


def _held(weight: Any) -> list[torch.Tensor]:
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def _share_memory(weight: Any) -> Any:
    for tensor in _held(weight):
        tensor.share_memory_()
    return weight


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    # Code that looks for tied weights compares addresses.
    torch.Tensor.data_ptr: lambda weight: _held(weight)[0].data_ptr(),
    torch.Tensor.share_memory_: _share_memory,
    torch.Tensor.is_shared: lambda weight: all(tensor.is_shared() for tensor in _held(weight)),
}
# Functions that are about a tensor as an object, not about its values.
_OF_THE_OBJECT = {"__deepcopy__", "__reduce_ex__", "__get__", "__set__", "requires_grad_"}
# Methods that take values out of torch.
_FOR_PYTHON = {"numpy", "tolist", "item", "__array__", "__dlpack__", "__dlpack_device__"}


# -- operators ----------------------------------------------------------------------------------


def _transpose(weight: Any, first: int = 0, second: int = 1) -> Any:
    if first % 2 == second % 2:
        return NotImplemented
    # Not the weight itself: autograd takes a view for another tensor than what it is a view of.
    return _alias(weight.weight) if isinstance(weight, _Transposed) else _Transposed(weight)


def _permute(weight: Any, dims: Sequence[int]) -> Any:
    return _transpose(weight, *dims) if len(dims) == 2 else NotImplemented


def _slice(weight: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if not isinstance(weight, QuantizedWeight) or dim not in (0, -2) or step != 1:
        return NotImplemented
    this: Any = weight
    begin, stop, _ = slice(start, end).indices(this.shape[0])
    return weight.rows(begin, max(begin, stop))


def _split(weight: Any, size: int, dim: int = 0) -> Any:
    if not isinstance(weight, QuantizedWeight) or size < 1:
        return NotImplemented
    this: Any = weight
    count = this.shape[0]
    sizes = [min(size, count - start) for start in range(0, count, size)]
    return _split_with_sizes(weight, sizes, dim)


def _split_with_sizes(weight: Any, sizes: Sequence[int], dim: int = 0) -> Any:
    if not isinstance(weight, QuantizedWeight) or dim not in (0, -2):
        return NotImplemented
    this: Any = weight
    if sum(sizes) != this.shape[0]:
        return NotImplemented
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    parts = [weight.rows(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return NotImplemented if NotImplemented in parts else parts


def _matmul(x: Any, weight: Any) -> Any:
    if isinstance(x, _Readable) or not isinstance(weight, _Transposed):
        return NotImplemented
    return _product(x, weight.weight, None)


def _addmm(bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if isinstance(bias, _Readable) or bias.dim() != 1 or (beta, alpha) != (1, 1):
        return NotImplemented
    if isinstance(x, _Readable) or not isinstance(weight, _Transposed):
        return NotImplemented
    return _product(x, weight.weight, bias if len(bias) > 1 else bias.expand(weight.shape[1]))


def _each(func: Any) -> Callable[..., Any]:
    """Return an operator that applies to each tensor that holds a weight."""

    def apply(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(weight, _Transposed):
            return _Transposed(apply(weight.weight, *args, **kwargs))
        return weight.mapped(lambda tensor: func(tensor, *args, **kwargs))

    return apply


def _alias(weight: Any, *_: Any) -> Any:
    """Return another weight of the same tensors, not of views of them: layers that share a factor
    are known by it."""
    if isinstance(weight, _Transposed):
        return _Transposed(weight.weight)
    return weight.mapped(lambda tensor: tensor)


def _to_copy(weight: Any, *, dtype: Any = None, **kwargs: Any) -> Any:
    if isinstance(weight, _Transposed):
        return _Transposed(_to_copy(weight.weight, dtype=dtype, **kwargs))
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    kwargs.pop("layout", None)
    copy = weight.mapped(lambda tensor: aten._to_copy.default(tensor, **kwargs))
    return copy if dtype in (None, weight.dtype) else copy.cast(dtype)


def _copy(weight: Any, source: Any, non_blocking: bool = False) -> Any:
    """Copy a weight of the same kind into a weight, as ``load_state_dict`` does."""
    if not isinstance(weight, QuantizedWeight):
        return NotImplemented
    this: Any = weight
    names, _ = this.__tensor_flatten__()
    theirs, _ = getattr(source, "__tensor_flatten__", lambda: ([], None))()
    if theirs != names or this.shape != source.shape:
        raise _unwritable(weight, f"a copy of {type(source).__name__}")
    for name in names:
        getattr(weight, name).copy_(getattr(source, name), non_blocking)
    return weight


_OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.is_pinned.default: lambda weight, *_: all(tensor.is_pinned() for tensor in _held(weight)),
    **{
        func: _each(func)
        for func in (aten.clone.default, aten.contiguous.default, aten._pin_memory.default)
    },
    **dict.fromkeys((aten.detach.default, aten.alias.default, aten.lift_fresh.default), _alias),
}
