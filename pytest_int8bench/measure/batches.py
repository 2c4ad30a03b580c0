"""The batch of a point, the same for every call, also of models that write to their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pytest_int8bench.compiler.torch_workarounds.eager import version_of
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure.host_feed import HostFeed
from pytest_int8bench.tensors import call, deep_copy, map_tensors, refilled, same_values, tensors_of

#: Bytes that the copies for one block of calls may take, and how many they may be.
COPIES_BYTES, MAX_COPIES = 1 << 28, 512
#: What the reader of a result is told.
WRITES = (
    "the model writes to its inputs: each call gets a fresh copy, which is made outside the clock"
)


class Batch:
    """The inputs of one batch, and a copy in host memory of how they were made.

    A model that writes to its inputs would give each later call other values, and the candidate
    other ones than the baseline.

    Args:
        inputs: one batch in any containers.
    """

    def __init__(self, inputs: Any) -> None:
        if any(tensor.is_inference() for tensor in tensors_of(inputs)):
            inputs = deep_copy(inputs)  # fresh copies are none, and would be compiled for again
        self.inputs = inputs
        """What calls get as long as no model writes to it."""
        self.is_written = False
        """Whether a model has written to it: from then on, each call gets a copy."""
        self._versions = [version_of(tensor) for tensor in tensors_of(inputs)]
        self._rewritten = self._is_rewritten = False
        self._devices: dict[int, torch.device] = {}
        self.nbytes = 0
        host = torch.device("cpu")
        self._kept = deep_copy(inputs, device_of=lambda tensor: host, made=self._note)

    def _note(self, tensor: torch.Tensor, kept: torch.Tensor) -> None:
        self._devices[id(kept)] = tensor.device
        self.nbytes += tensor.nbytes

    def fresh(self) -> Any:
        """Return a copy of the inputs as they were made, where they were made."""
        return deep_copy(
            self._kept, device_of=lambda tensor: self._devices.get(id(tensor), tensor.device)
        )

    def with_tensors_of(self, other: Any) -> Any:
        """Return a copy of the inputs as they were made, but with the tensors of another batch."""
        return refilled(self._kept, tensors_of(other))

    def check(self, given: Any = None) -> bool:
        """Return whether a call has written to ``given``, which is :attr:`inputs` by default, and
        remember it: they are made anew then."""
        given = self.inputs if given is None else given
        versions = [version_of(tensor) for tensor in tensors_of(self.inputs)]
        self._rewritten, self._versions = versions != self._versions, versions
        if same_values(given, self._kept):
            self._is_rewritten = self._is_rewritten or self._rewritten
            return False
        self.is_written = True
        if given is self.inputs:
            self.inputs = self.fresh()
        return True

    def check_late(self) -> bool:
        """Return whether calls since the last check have written to :attr:`inputs`, though those
        before it did not. Two of them may have cancelled each other."""
        if self.is_written:
            return False
        harmless = self._is_rewritten
        return self.check() or (self._rewritten and not harmless)


def to_device(inputs: Any, device: torch.device) -> Any:
    """Return inputs that may be on the host, with ``feed=host``, on the device."""
    return map_tensors(lambda t: t.to(device, non_blocking=True), inputs)


class BatchRun:
    """Submits one batch at each call and returns the model's output.

    Args:
        model: the compiled model.
        batch: its inputs.
        device: where they go.
        feed: where the batches come from with ``feed=host``.
        again: submit the last batch of the feed once more, which is on the device.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        batch: Batch,
        device: torch.device,
        feed: HostFeed | None = None,
        *,
        again: bool = False,
    ) -> None:
        self._model = model
        self._batch = batch
        self._device = device
        self._feed = feed
        self._again = again
        self._copies: list[Any] = []
        self._next = 0

    def __call__(self) -> Any:
        return call(self._model, self._inputs())

    @property
    def most_calls(self) -> int | None:
        """Calls that :meth:`prepare` prepares at most; None for any number."""
        if not self._copies_inputs:
            return None
        return max(1, min(MAX_COPIES, COPIES_BYTES // max(1, self._batch.nbytes)))

    def prepare(self, calls: int) -> None:
        """Make what the next ``calls`` calls use up, outside the clock."""
        self._copies, self._next = [], 0
        if self._copies_inputs:
            self._copies = [self._fresh() for _ in range(calls)]

    @property
    def _copies_inputs(self) -> bool:
        return self._batch.is_written and (self._feed is None or self._again)

    def _inputs(self) -> Any:
        if self._copies_inputs:
            if self._next == len(self._copies):
                return self._fresh()
            self._next += 1  # the copy is kept for now: freeing it takes time
            return self._copies[self._next - 1]
        if self._feed is None:
            return self._batch.inputs
        fed = self._feed.current if self._again else next(self._feed)
        # Each batch overwrites the tensors of an earlier one, but not what holds them.
        return self._batch.with_tensors_of(fed) if self._batch.is_written else fed

    def _fresh(self) -> Any:
        inputs = self._batch.fresh()
        return inputs if self._feed is None else to_device(inputs, self._device)


def check_late_writes(workload: str, batch: Batch) -> None:
    """Check that calls under the clock have left the inputs alone.

    Raises:
        WorkloadError: if one wrote to them: the calls after it saw other values.
    """
    if batch.check_late():
        raise WorkloadError(
            f"workload {workload!r}: the model wrote to its inputs at a later call than the first "
            "ones, while it was measured: each call must see the same values"
        )
