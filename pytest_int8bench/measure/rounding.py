"""Decide whether rounding explains the difference between two computations of the same model.

The model runs in FP32 as the reference, and unchanged and with noise as replicates; noise rounds
the result of each operator differently. Rounding explains another computation of the model, such as
its compiled code, if it is no further from the reference than the replicates are.

Errors are compared slice by slice along each dimension of each output, by their norm and by their
largest element, so that one wrong row or channel is not lost among the others. How much replicates
differ depends on the model: one that routes to the best of several experts will eventually choose
another expert for some token. Each replicate is therefore compared with the others in the same way,
and a slice counts only if it stands out more than the replicates' slices do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pytest_int8bench.tensors import tensors_of

#: The outputs of one forward, as :func:`outputs_of` returns them.
Outputs = Sequence[torch.Tensor]

HALVES = (torch.bfloat16, torch.float16)

# Errors under this part of a tensor's root mean square are none: an output may be exact.
_UNIT = torch.finfo(torch.bfloat16).eps / 2
_MATMULS = re.compile(r"linear|matmul|mm|mv|dot|conv|einsum|attention")


def outputs_of(output: Any) -> list[torch.Tensor]:
    """Return copies of all tensors of an output on the host, real ones in FP64."""
    copies = []
    for tensor in map(real, tensors_of(output)):
        dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
        copies.append(tensor.detach().to("cpu", dtype, copy=True))
    return copies


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Return a complex tensor as a real one, any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def where_finite(reference: Outputs, eager: Outputs) -> list[torch.Tensor]:
    """Return the reference, and NaN where the eager output is not finite, as where FP16
    overflows: there is nothing to compare with."""
    return [
        exact.where(found.isfinite(), math.nan) if exact.is_floating_point() else exact
        for exact, found in zip(reference, eager, strict=True)
    ]


def excess(reference: Outputs, replicates: Sequence[Outputs], other: Outputs) -> float:
    """Return by how many times ``other`` stands out more than the replicates do.

    Args:
        reference: outputs without rounding.
        replicates: outputs with it.
        other: outputs of another way to compute the same.
    """
    return max(
        (
            _excess([_error(exact, tensor) for tensor in (*rounded, found)], _floor(exact))
            for exact, found, *rounded in zip(reference, other, *replicates, strict=True)
            if exact.numel()
        ),
        default=0.0,
    )


def _floor(exact: torch.Tensor) -> float:
    if not exact.is_floating_point():
        return 0.0
    finite = exact[exact.isfinite()]
    return _UNIT * float(finite.square().mean().sqrt()) if len(finite) else 0.0


def _error(exact: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return the error of each element: infinity if only the exact value is finite, and 0 if the
    exact value is not finite."""
    if not exact.is_floating_point():
        return (exact != found).double()
    error = (found - exact).abs().nan_to_num(nan=math.inf)
    return error.where(exact.isfinite(), 0.0)


def _excess(errors: Sequence[torch.Tensor], floor: float) -> float:
    """Return the largest excess of the last of ``errors`` over the others, in any slice."""
    worst = 0.0
    for sizes in zip(*map(_slices, errors), strict=True):
        *known, found = torch.stack(sizes).clamp(max=1e300).unbind()
        least = torch.full_like(found, floor)
        stands_out = _ratio(found, torch.stack([*known, least]).amax(0))
        usual = 1.0
        for index, one in enumerate(known):
            others = [*known[:index], *known[index + 1 :]]
            if others:
                usual = max(usual, _ratio(one, torch.stack([*others, least]).amax(0)))
        worst = max(worst, stands_out / usual)
    return worst


def _ratio(found: torch.Tensor, known: torch.Tensor) -> float:
    return float(torch.where(found > known, found / known, 0.0).max())


def _slices(error: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the root mean square, and the maximum, of the slices along each dimension."""
    error = error.reshape(-1) if error.dim() == 0 else error
    for dim in range(error.dim()):
        rows = error.movedim(dim, 0).reshape(error.shape[dim], -1)
        largest = rows.amax(1)
        scale = largest.clamp(min=1e-300, max=1e300)
        yield (rows / scale[:, None]).clamp(max=1).square().mean(1).sqrt() * scale
        yield largest


class RoundingNoise(TorchDispatchMode):
    """Rounds the result of each operator inside differently: each element by up to a unit in its
    last place, and all of them together by another, as another order of operations may. What
    matmuls return is also off by a unit of its usual size, however small it is: kernels that split
    a sum may round its parts.

    Values stay within the range of the result, so that no index computed from them leaves its
    own; whole numbers stay whole.

    Args:
        seed: of the noise.
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        # A model on a GPU may compute tables, and scalars, on the host.
        self._generators: dict[torch.device, torch.Generator] = {}
        self.saw_generator = False
        """Whether an operator drew from a generator of the model's own."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (torch.Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # the subclass runs operators on the tensors that it wraps
        output = func(*args, **kwargs)
        operands = tree_leaves((args, kwargs))
        self.saw_generator |= any(isinstance(leaf, torch.Generator) for leaf in operands)
        given = {_address(leaf) for leaf in operands if _has_storage(leaf)}
        for leaf in tree_leaves(output):
            if _has_storage(leaf) and leaf.is_floating_point() and _address(leaf) not in given:
                self._disturb(leaf, is_sum=_MATMULS.search(str(func)) is not None)
        return output

    def _disturb(self, tensor: torch.Tensor, *, is_sum: bool) -> None:
        exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        finite = exact.isfinite()
        if tensor.itemsize == 1 or not finite.any() or torch.equal(exact, exact.round()):
            return
        low, high = exact[finite].aminmax()
        device = exact.device
        noise = exact * (self._draw(exact.shape, device) + self._draw((), device))
        if is_sum and exact.dim() > 1:
            noise += _usual_size(exact.where(finite, 0)) * self._draw(exact.shape, device)
        moved = exact + noise * (torch.finfo(tensor.dtype).eps / 2)
        tensor.copy_(torch.where(finite, moved.clamp(low, high), exact))

    def _draw(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return 2 * torch.rand(shape, generator=self._generators[device], device=device) - 1


def _usual_size(values: torch.Tensor) -> torch.Tensor:
    """Return the size that each value may be expected to have by its row and its column."""
    power = values.flatten(0, -2).square()
    rows, columns = power.mean(1, keepdim=True), power.mean(0, keepdim=True)
    return (rows * columns / power.mean()).nan_to_num(nan=0.0).sqrt().reshape(values.shape)


class WithoutCasts(TorchDispatchMode):
    """Makes operators return FP32 although the model itself requests a 16-bit dtype."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "view" not in str(func):  # which reads the same bits as another dtype
            args, kwargs = tree_map(_wide, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _wide(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALVES else value


def _has_storage(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and type(value) in (torch.Tensor, nn.Parameter)
        and value.numel() > 0
    )


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
