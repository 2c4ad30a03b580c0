"""Run a compiled model on any number of samples."""

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
    """Takes what a model takes, with any number of samples in the first dimension.

    Tensors are moved to the device, floating ones cast to the model's dtype. Samples are cut into
    batches of the shape that the model was compiled for; a last, partial one is filled up with
    copies of its last sample, whose outputs are dropped.

    Args:
        model: a model that is ready. It is referred to weakly, so that an evaluation which keeps
            its forward does not keep the model on the device.
    """

    def __init__(self, model: Model) -> None:
        self._reference = weakref.ref(model)
        self.has_nan = False
        """Whether an output held NaN."""

    @property
    def _model(self) -> Model:
        model = self._reference()
        if model is None:
            raise RuntimeError("this forward was kept longer than its model")
        return model

    @property
    def device(self) -> torch.device:
        """The device of the model and its outputs."""
        return self._model.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output for all samples, floating tensors as FP32 copies that later calls do
        not overwrite.

        Raises:
            WorkloadError: one line, if the inputs are not like those of the workload.
        """
        if args and kwargs:
            raise self._error("forward takes positions or keywords, as inputs gives them, not both")
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
        """Pair each tensor of ``given`` with its counterpart in the workload's own inputs."""
        mine, own = list(tensors_of(given)), list(tensors_of(self._model.inputs))
        if len(mine) != len(own):
            raise self._error(f"forward takes {len(own)} tensors, got {len(mine)}")
        for index, (tensor, like) in enumerate(zip(mine, own, strict=True)):
            if tensor.dim() != like.dim() or tensor.shape[1:] != like.shape[1:]:
                raise self._error(
                    f"tensor {index} of forward must be {_shape(like)} but for the first "
                    f"dimension, got {_shape(tensor)}"
                )
            if tensor.is_floating_point() != like.is_floating_point():
                raise self._error(
                    f"tensor {index} of forward must be {like.dtype}, got {tensor.dtype}"
                )
        return list(zip(mine, own, strict=True))

    def _sizes(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, int | None]:
        """Return the compiled batch size and the number of samples, None where it is the batch
        size."""
        differing = {(len(like), len(t)) for t, like in pairs if t.shape != like.shape}
        if not differing:
            return 0, None
        [(batch, _), *_] = differing
        # One that kept its size though its like counts samples does not belong to the others.
        kept = any(t.shape == like.shape and len(like) == batch for t, like in pairs if t.dim())
        if len(differing) > 1 or kept:
            raise self._error(
                "the tensors of forward differ in their number of samples: "
                + ", ".join(str(len(tensor)) for tensor, _ in pairs)
            )
        [(batch, samples)] = differing
        if samples == 0:
            raise self._error("forward needs one sample at least, got 0")
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
                    f"an output of {_shape(tensor)} has no first dimension of {batch} samples: "
                    "forward can only run whole batches of it"
                )
            return _copy(tensor[:kept])

        return map_tensors(cut, output)

    def _place(self, tensor: torch.Tensor, like: torch.Tensor, rows: slice) -> torch.Tensor:
        if tensor.is_floating_point():
            tensor = cast(tensor, like.dtype)
        # With the strides of the compiled batch too: others would be compiled for again.
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
