"""Run a compiled model on any number of samples, in batches of the compiled size."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.repeats import has_nan
from pytest_int8bench.tensors import call, cast, map_tensors, refilled, tensors_of


class Forward:
    """Callable that takes a model's inputs, with any number of samples in the first dimension.

    It moves tensors to the device, casts floating-point ones to the model's dtype, and splits the
    samples into batches of the compiled shape. It pads a partial last batch with copies of its
    last sample and drops their outputs.

    Args:
        model: a compiled and warm model. Only a weak reference is kept, so that an evaluation that
            stores this object does not keep the model on the device.
    """

    def __init__(self, model: Model) -> None:
        self._reference = weakref.ref(model)
        self.has_nan = False
        """Whether any output so far contained NaN."""

    @property
    def _model(self) -> Model:
        model = self._reference()
        if model is None:
            raise RuntimeError("forward() was called after its model was freed")
        return model

    @property
    def device(self) -> torch.device:
        """Device of the model and its outputs."""
        return self._model.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs for all samples.

        Floating-point outputs are FP32; all are copies that later calls do not overwrite.

        Raises:
            WorkloadError: if the arguments differ from the workload's inputs in structure, kind of
                dtype, or shape beyond the first dimension.
        """
        if args and kwargs:
            raise self._error(
                "forward must be called with positional or keyword arguments, like the workload's "
                "inputs, not with both"
            )
        given: Any = kwargs or args
        if isinstance(given, dict) and isinstance(self._model.inputs, Mapping):
            given = {k: given[k] for k in self._model.inputs if k in given} | given
        pairs = self._pairs(given)
        batch, samples = self._sizes(pairs)
        if samples is None:
            return self._run(given, pairs, slice(None), None, batch)
        parts = []
        for start in range(0, samples, batch):
            rows = slice(start, min(start + batch, samples))
            parts.append(self._run(given, pairs, rows, samples, batch))
        joined = [iter(tensors_of(part)) for part in parts]
        return map_tensors(lambda _: torch.cat([next(tensors) for tensors in joined]), parts[0])

    def _pairs(self, given: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pair each tensor of ``given`` with its counterpart in the workload's inputs."""
        mine, own = list(tensors_of(given)), list(tensors_of(self._model.inputs))
        if len(mine) != len(own):
            raise self._error(f"forward must get {len(own)} tensors, got {len(mine)}")
        for index, (tensor, like) in enumerate(zip(mine, own, strict=True)):
            if tensor.dim() != like.dim() or tensor.shape[1:] != like.shape[1:]:
                raise self._error(
                    f"tensor {index} of forward must have shape {_shape(like)} beyond the first "
                    f"dimension, got {_shape(tensor)}"
                )
            if tensor.is_floating_point() != like.is_floating_point():
                raise self._error(
                    f"tensor {index} of forward must be {like.dtype}, got {tensor.dtype}"
                )
        return list(zip(mine, own, strict=True))

    def _sizes(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, int | None]:
        """Return the compiled batch size and the number of samples; ``(0, None)`` if equal."""
        differing = {(len(like), len(t)) for t, like in pairs if t.shape != like.shape}
        if not differing:
            return 0, None
        [(batch, _), *_] = differing
        # A tensor that kept the compiled batch size while others changed has a different number
        # of samples.
        kept = any(t.shape == like.shape and len(like) == batch for t, like in pairs if t.dim())
        if len(differing) > 1 or kept:
            raise self._error(
                "all tensors of forward must have the same number of samples, got "
                + ", ".join(str(len(tensor)) for tensor, _ in pairs)
            )
        [(batch, samples)] = differing
        if samples == 0:
            raise self._error("forward needs at least one sample, got 0")
        return batch, samples

    def _run(
        self,
        given: Any,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        rows: slice,
        samples: int | None,
        batch: int,
    ) -> Any:
        placed = [self._place(tensor, like, rows) for tensor, like in pairs]
        self._model.restore()
        output = call(self._model.compiled, refilled(given, placed))
        kept = None if samples is None else rows.stop - rows.start
        self.has_nan = self.has_nan or has_nan(
            tensor if kept is None or tensor.dim() == 0 else tensor[:kept]
            for tensor in tensors_of(output)
        )
        if kept is None:
            return map_tensors(_copy, output)

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() == 0 or len(tensor) != batch:
                raise self._error(
                    f"forward can only run whole batches of {batch} samples, because an output has "
                    f"shape {_shape(tensor)}, without a first dimension of {batch}"
                )
            return _copy(tensor[:kept])

        return map_tensors(cut, output)

    def _place(self, tensor: torch.Tensor, like: torch.Tensor, rows: slice) -> torch.Tensor:
        if tensor.is_floating_point():
            tensor = cast(tensor, like.dtype)
        # Other strides would trigger a recompilation.
        strides = like.stride() if 0 not in like.stride() else like.contiguous().stride()
        made = torch.empty_strided(like.shape, strides, dtype=like.dtype, device=self.device)
        if tensor.shape == like.shape:
            return made.copy_(tensor)
        part = tensor[rows]
        made[: len(part)] = part.to(self.device)
        if len(part) < len(made):
            made[len(part) :] = made[len(part) - 1 : len(part)].clone()
        return made

    def _error(self, text: str) -> WorkloadError:
        return WorkloadError(f"workload {self._model.workload.name!r}: {text}")


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
