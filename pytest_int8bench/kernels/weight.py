"""Quantized weights that work with any code that reads ``layer.weight``.

Models do more with a linear layer's weight than call the layer: they pass it to ``F.linear``,
multiply by its transpose or by some of its rows, or normalize it. A :class:`QuantizedWeight` runs
the quantized matmul for calls that it recognizes, and dequantizes itself for all others with the
operator ``int8bench::read_weight``. If that operator shows in a profile, some code ran on
dequantized values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn import functional as F

from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.kernels import encoder_layer
from pytest_int8bench.kernels import ops as _ops  # noqa: F401  registers torch.ops.int8bench

#: Input dtypes that quantized matmuls support.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_W = TypeVar("_W", bound="QuantizedWeight")
aten = torch.ops.aten


class _Readable:
    """Mixin for tensor subclasses that operators can read as plain tensors."""

    __slots__ = ()

    def plain(self) -> torch.Tensor:
        """Return the values as a plain tensor."""
        raise NotImplementedError

    def _stable_hash_for_caching(self) -> str:
        """Return this tensor's part of the key in AOTAutograd's cache.

        Torch 2.13 to 2.15 calls this method. Without it, torch warns and builds a key without the
        class (``_default_stable_hash_for_caching`` in
        torch/_functorch/_aot_autograd/autograd_cache.py), so two classes with the same inner
        tensors would share compiled code.
        """
        this: Any = self
        names, context = this.__tensor_flatten__()
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        inner = [_cache_key(getattr(self, name)) for name in names]
        return repr((kind, _metadata(this), context, names, inner))

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
        if name in _EXPORT_METHODS:
            return func(*_plain(args), **_plain(kwargs))
        # As in "Extending torch" in torch's documentation: operators reach __torch_dispatch__.
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_inference_mode_enabled() and name not in _OBJECT_METHODS:
                args, kwargs = _mapped(_for_inference, args), _mapped(_for_inference, kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OPERATORS:
            out = _OPERATORS[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        # Inference mode does not decompose composite operators before they get here.
        out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        _check_only_read(func, args, kwargs)
        return func(*_plain(args), **_plain(kwargs))


class QuantizedWeight(_Readable):
    """Mixin for tensor subclasses that hold the quantized weight (N, K) of a linear layer.

    ``__tensor_flatten__`` must name the inner tensors that hold the weight.
    """

    factor: torch.Tensor | None
    """(K,) that multiplies the input (SmoothQuant)."""

    def quantized_matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the matmul of ``x`` (..., K) with the quantized weight."""
        raise NotImplementedError

    def scaled(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantized values (N, K) for an input that ``factor`` has multiplied."""
        raise NotImplementedError

    def rows(self: _W, start: int, stop: int) -> _W:
        """Return the weight of the outputs from ``start`` to ``stop``, or ``NotImplemented``."""
        raise NotImplementedError

    def cast(self: _W, dtype: torch.dtype) -> _W:
        """Return the weight with another dtype for its dequantized values."""
        raise NotImplementedError

    def mapped(self: _W, change: Callable[[torch.Tensor], torch.Tensor]) -> _W:
        """Return the weight with ``change`` applied to each inner tensor."""
        this: Any = self
        names, context = this.__tensor_flatten__()
        inner = {name: change(getattr(self, name)) for name in names}
        out: _W = type(this).__tensor_unflatten__(inner, context, this.shape, this.stride())
        return out

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values (N, K), with ``factor`` folded in, by default in the weight's dtype."""
        this: Any = self
        values = self.scaled(dtype or this.dtype)
        out: torch.Tensor = torch.ops.int8bench.read_weight.default(values, self.factor)
        return out

    def plain(self) -> torch.Tensor:
        return self.dequantize()


class _Transposed(_Readable, torch.Tensor):  # type: ignore[misc]
    """The transpose (K, N) of a weight, so that ``x @ weight.t()`` runs the quantized matmul."""

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
    """Return the dtype in which ``F.linear`` would compute for an input."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in DTYPES:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _cache_key(tensor: Any) -> Any:
    if isinstance(tensor, _Readable):
        return tensor._stable_hash_for_caching()
    return type(tensor).__qualname__, _metadata(tensor)


def _metadata(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return the properties, except the values, that compiled code may depend on."""
    layout = tensor.device, tensor.layout, tensor.stride()
    kind = tensor.dtype, tensor.requires_grad, tensor.is_inference(), tensor.is_conj()
    return tuple(tensor.shape), layout, kind


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return arguments of a function with ``change`` applied to each weight among them."""
    if isinstance(value, _Readable):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, item) for item in value])
    if isinstance(value, dict):
        return {key: _mapped(change, item) for key, item in value.items()}
    return value


def _plain(value: Any) -> Any:
    """Return arguments of a function with weights replaced by plain tensors."""
    return _mapped(lambda weight: weight.plain(), value)


def _for_inference(weight: Any) -> Any:
    """Return the weight, or an alias from inference mode if it was created outside.

    Inference mode rejects views of weights from outside that do not share their memory.
    """
    made_outside = isinstance(weight, QuantizedWeight) and not weight.is_inference()  # type: ignore[attr-defined]
    return _alias(weight) if made_outside else weight


def _check_only_read(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise if an operator writes to a weight: it would only write to a dequantized copy."""
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, _Readable):
            raise _unwritable(value, str(func))


def _unwritable(weight: Any, operation: str) -> QuantizationError:
    shape = "x".join(map(str, weight.shape))
    return QuantizationError(
        f"{operation} cannot write to a quantized weight ({shape}); exclude its layer from "
        "quantization with filter_fn or --int8-filter"
    )


# -- functions ----------------------------------------------------------------------------------


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, QuantizedWeight) and not isinstance(input, _Readable):
        return _quantized_linear(input, weight, _plain(bias))
    return F.linear(_plain(input), _plain(weight), _plain(bias))


def _quantized_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    dtype = autocast_dtype(x)
    x = x.to(dtype)
    if dtype not in DTYPES or x.is_nested or x.shape[-1:] != weight.shape[-1:]:
        # Supports other dtypes, and raises the same error as a plain weight.
        return F.linear(x, weight.dequantize(dtype), bias)
    if guard_or_false(x.numel() == 0):
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    out: torch.Tensor = weight.quantized_matmul(x, bias)
    return out


def _set_data(weight: Any, value: Any) -> None:
    if type(value) is not type(weight):
        raise _unwritable(weight, "an assignment to .data")
    with torch._C.DisableTorchFunctionSubclass():
        weight.data = value
    for name in (*vars(value), *vars(weight)):
        setattr(weight, name, getattr(value, name, None))


def _set_item(weight: Any, *_: Any) -> None:
    raise _unwritable(weight, "an indexed assignment")


def _inner_tensors(weight: Any) -> list[torch.Tensor]:
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def _share_memory(weight: Any) -> Any:
    for tensor in _inner_tensors(weight):
        tensor.share_memory_()
    return weight


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    # Code that looks for tied weights compares addresses.
    torch.Tensor.data_ptr: lambda weight: _inner_tensors(weight)[0].data_ptr(),
    torch.Tensor.share_memory_: _share_memory,
    torch.Tensor.is_shared: lambda weight: all(t.is_shared() for t in _inner_tensors(weight)),
}
# Methods that concern the tensor object, not its values.
_OBJECT_METHODS = {"__deepcopy__", "__reduce_ex__", "__get__", "__set__", "requires_grad_"}
# Methods that export values from torch.
_EXPORT_METHODS = {"numpy", "tolist", "item", "__array__", "__dlpack__", "__dlpack_device__"}


# -- operators ----------------------------------------------------------------------------------


def _transpose(weight: Any, first: int = 0, second: int = 1) -> Any:
    if first % 2 == second % 2:
        return NotImplemented
    # Return an alias, not the weight itself: autograd expects a view to be a different tensor.
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
    ends = list(itertools.accumulate(sizes))
    parts = [weight.rows(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return NotImplemented if NotImplemented in parts else parts


def _matmul(x: Any, weight: Any) -> Any:
    if isinstance(x, _Readable) or not isinstance(weight, _Transposed):
        return NotImplemented
    return _quantized_linear(x, weight.weight, None)


def _addmm(bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if isinstance(bias, _Readable) or bias.dim() != 1 or (beta, alpha) != (1, 1):
        return NotImplemented
    if isinstance(x, _Readable) or not isinstance(weight, _Transposed):
        return NotImplemented
    bias = bias if len(bias) > 1 else bias.expand(weight.shape[1])
    return _quantized_linear(x, weight.weight, bias)


def _each(func: Any) -> Callable[..., Any]:
    """Return a function that applies an operator to each inner tensor of a weight."""

    def apply(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(weight, _Transposed):
            return _Transposed(apply(weight.weight, *args, **kwargs))
        return weight.mapped(lambda tensor: func(tensor, *args, **kwargs))

    return apply


def _alias(weight: Any, *_: Any) -> Any:
    """Return another weight with the same inner tensors, not views of them: layers that share a
    factor are recognized by its identity."""
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
        raise _unwritable(weight, f"copying a {type(source).__name__}")
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
    aten.is_pinned.default: lambda weight, *_: all(t.is_pinned() for t in _inner_tensors(weight)),
    **{
        func: _each(func)
        for func in (aten.clone.default, aten.contiguous.default, aten._pin_memory.default)
    },
    **dict.fromkeys((aten.detach.default, aten.alias.default, aten.lift_fresh.default), _alias),
}
