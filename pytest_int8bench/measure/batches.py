"""Give every call the same batch, even if the model writes to its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pytest_int8bench.compiler.torch_workarounds.eager import version_of
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure.host_feed import HostFeed
from pytest_int8bench.tensors import call, deep_copy, map_tensors, refilled, same_values, tensors_of

#: Most bytes, and most copies, for one block of calls.
COPIES_BYTES, MAX_COPIES = 1 << 28, 512
#: Remark on a result whose model writes to its inputs.
WRITES = (
    "the model writes to its inputs: each call gets a fresh copy, which is made outside the clock"
)


class Batch:
    """The inputs of one batch, and a copy of their original values in host memory.

    Without the copy, a model that writes to its inputs would change the values that later calls,
    and the candidate, receive.

    Args:
        inputs: one batch in any containers.
    """

    def __init__(self, inputs: Any) -> None:
        if any(tensor.is_inference() for tensor in tensors_of(inputs)):
            inputs = deep_copy(inputs)  # fresh copies are none, and would be compiled for again
        self.inputs = inputs
        """The inputs that calls receive until a model writes to them."""
        self.is_written = False
        """Whether a model has written to the inputs; each later call then gets a copy."""
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
        """Return a copy of the original inputs on their original device."""
        return deep_copy(
            self._kept, device_of=lambda tensor: self._devices.get(id(tensor), tensor.device)
        )

    def with_tensors_of(self, other: Any) -> Any:
        """Return a copy of the original inputs with the tensors of another batch."""
        return refilled(self._kept, tensors_of(other))

    def check(self, given: Any = None) -> bool:
        """Return whether a call has written to ``given`` (default: :attr:`inputs`), and remember
        it; the inputs are then recreated."""
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
        """Return whether calls since the last check have written to :attr:`inputs` although earlier
        calls did not. Two writes may have cancelled each other."""
        if self.is_written:
            return False
        harmless = self._is_rewritten
        return self.check() or (self._rewritten and not harmless)


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move inputs, which are on the host with ``feed=host``, to the device."""
    return map_tensors(lambda t: t.to(device, non_blocking=True), inputs)


class BatchRun:
    """Submits one batch per call and returns the model's output.

    Args:
        model: the compiled model.
        batch: its inputs.
        device: device of the inputs.
        feed: source of the batches with ``feed=host``.
        again: resubmit the feed's last batch, which is already on the device.
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
        """Most calls that :meth:`prepare` can prepare; None for any number."""
        if not self._copies_inputs:
            return None
        return max(1, min(MAX_COPIES, COPIES_BYTES // max(1, self._batch.nbytes)))

    def prepare(self, calls: int) -> None:
        """Create the input copies for the next ``calls`` calls before the clock starts."""
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
        # Each batch overwrites an earlier one's tensors, but not their containers.
        return self._batch.with_tensors_of(fed) if self._batch.is_written else fed

    def _fresh(self) -> Any:
        inputs = self._batch.fresh()
        return inputs if self._feed is None else to_device(inputs, self._device)


def check_late_writes(workload: str, batch: Batch) -> None:
    """Check that timed calls have not written to the inputs.

    Raises:
        WorkloadError: if one has, because later calls then saw other values.
    """
    if batch.check_late():
        raise WorkloadError(
            f"workload {workload!r}: the model wrote to its inputs while it was measured, after "
            "its first calls; each call must see the same values"
        )
