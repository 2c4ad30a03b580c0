"""Feed batches from the host: a DataLoader, pinned memory, and copies that overlap compute."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pytest_int8bench.clock import untraced
from pytest_int8bench.errors import ClearError, WorkloadError
from pytest_int8bench.tensors import map_tensors

#: Batches that each worker prefetches.
PREFETCH = 2
#: CPUs per worker. With two or fewer CPUs there are none: the main process would wait for them.
CPUS_PER_WORKER, MAX_WORKERS = 4, 4
#: Most distinct batches to cycle through, and most bytes that they take together.
MAX_VARIANTS, VARIANT_BYTES = 4, 1 << 30
#: Seconds to wait for a worker to exit.
WORKER_END_S = 5.0
#: Fraction of free shared memory that batches in transit may take.
SHARED_PART = 0.5
# Alignment in bytes of tensors in the block of memory that holds a batch.
_ALIGNMENT = 64
_SHARED_MEMORY = "/dev/shm"


class FeedError(ClearError, RuntimeError):
    """The loader failed to deliver batches."""


class HostFeed:
    """Copies batches from the host to a device, endlessly.

    A DataLoader copies each batch from the workload's inputs in worker processes and pins its
    memory. The batch is then copied into one of two fixed sets of tensors on the device: while
    the model reads one set, a separate stream fills the other. Shapes, dtypes, strides and
    addresses repeat, so nothing recompiles.

    Workers send whole batches, not samples: collating would measure Python, and workloads need not
    declare which tensors hold samples. Batch ``n`` is the inputs with rows rotated by ``n`` modulo
    :attr:`variants` if each tensor has one row per sample, else the unchanged inputs.

    A batch may be read until the next one is requested, by work submitted to the stream that was
    current when it was handed out. Iterating starts the workers; :meth:`close`, garbage collection
    or the end of the process stops them.

    Args:
        inputs: one batch in any containers that ``map_tensors`` takes, in the dtypes and layout of
            the model.
        device: device of the batches. On CUDA, copies overlap compute; elsewhere they do not.
        samples: samples in a batch.
        workers: number of loader processes; chosen for the machine by default.
        clock: returns seconds, for :attr:`wait_s`.

    Raises:
        WorkloadError: for tensors that are not dense.
    """

    def __init__(
        self,
        inputs: Any,
        device: torch.device,
        *,
        samples: int,
        workers: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = device
        self.batches = 0
        """Number of batches requested from the loader."""
        self.wait_s = 0.0
        """Seconds that the host waited for all these batches."""
        self._inputs = inputs
        self._clock = clock
        self._tensors = _tensors_in(inputs)
        self._parts = _layout(self._tensors)
        self._batch_bytes = self._parts[-1].end if self._parts else 0
        rows = all(t.dim() > 0 and len(t) == samples for t in self._tensors)
        self._rolls = rows and samples > 1
        fitting = VARIANT_BYTES // max(self._batch_bytes, 1)
        self.variants = max(1, min(MAX_VARIANTS, fitting))
        """Number of distinct batches."""
        self.workers = workers
        """Number of loader processes; None before they are first started."""
        self._loader: Iterator[torch.Tensor] | None = None
        self._side: torch.cuda.Stream | None = None
        self._slots: tuple[_Slot, _Slot] | None = None
        self._end: Callable[[], Any] = lambda: None
        self._turn = 0  # slot to hand out next

    @property
    def nbytes(self) -> int:
        """Bytes on the device; 0 before the first batch."""
        if self._slots is None:
            return 0
        return sum(tensor.nbytes for slot in self._slots for tensor in slot.tensors)

    @property
    def current(self) -> Any:
        """The batch handed out last, valid until the next one is requested."""
        return self._opened()[1 - self._turn].inputs

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        slots = self._opened()
        ready, other = slots[self._turn], slots[1 - self._turn]
        # Submit the copy before the model's own work so that they overlap.
        self._fill(other)
        ready.hand_out(self.device)
        self._turn = 1 - self._turn
        return ready.inputs

    def copy_again(self) -> None:
        """Copy the next batch to the device again, to time the copy alone."""
        slot = self._opened()[self._turn]
        slot.copy(self._side)

    def open(self) -> None:
        """Start the workers and wait for the first batch, if not already open."""
        self._opened()

    def close(self) -> None:
        """Stop the workers and free the device tensors. The next request reopens the feed."""
        self._end()
        self._end = lambda: None
        self._loader = self._side = self._slots = None
        self._turn = 0

    def _opened(self) -> tuple[_Slot, _Slot]:
        if self._slots is not None:
            return self._slots
        try:
            return self._open()
        except BaseException:
            self.close()
            raise

    @untraced()  # pinning threads would otherwise keep the tracer
    def _open(self) -> tuple[_Slot, _Slot]:
        if self.workers is None:
            self.workers = workers_for(
                self._batch_bytes,
                self.variants,
                cpus=_cpus(),
                shared_bytes=_free_shared_bytes(),
            )
        # Create normal tensors even if the caller is in inference mode: Dynamo distinguishes the
        # two, and only normal ones can be filled both inside and outside inference mode.
        with torch.inference_mode(False):
            sources = [self._packed(index) for index in range(self.variants)]
            slots = _Slot(self), _Slot(self)
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            self._side = torch.cuda.Stream(self.device)
            # Pending work of a previous owner may still use the slots' memory.
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        self._loader = _loader(sources, self.workers, pin_memory=on_cuda)
        self._end = weakref.finalize(self, _shut_down, self._loader, self._side)
        self._slots = slots
        self._fill(slots[0])
        return slots

    def _packed(self, variant: int) -> torch.Tensor:
        """Pack one of the distinct batches into a block of host memory."""
        block = torch.empty(self._batch_bytes, dtype=torch.uint8)
        for tensor, part in zip(self._tensors, self._parts, strict=True):
            source = tensor.roll(variant, 0) if self._rolls else tensor
            part.of(block).copy_(source)
        return block

    def _fill(self, slot: _Slot) -> None:
        """Get a batch from the loader and start copying it into ``slot``."""
        slot.wait_for_copy()
        begin = self._clock()
        block = self._next_block()
        self.wait_s += self._clock() - begin
        self.batches += 1
        slot.block = block
        slot.copy(self._side)

    def _next_block(self) -> torch.Tensor:
        assert self._loader is not None
        try:
            return next(self._loader)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            why = str(error).strip().splitlines()[-1]  # the worker's traceback precedes it
            raise FeedError(
                f"the loader failed: {why}; batches of {self._batch_bytes:,} bytes pass through "
                f"shared memory; check that {_SHARED_MEMORY} is large enough (docker: --shm-size)"
            ) from error


@dataclass(frozen=True)
class _Part:
    """The location of a tensor in its batch's block."""

    begin: int
    end: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """Return the tensor, a view of ``block``."""
        flat = block[self.begin : self.end].view(self.dtype)
        return flat.as_strided(self.size, self.stride, flat.storage_offset())


class _Slot:
    """One of the two sets of tensors on the device.

    Two events synchronize it: ``copied`` lets the model start once the batch has arrived, and
    ``read`` lets the next copy start once the model has finished with this batch.
    """

    def __init__(self, feed: HostFeed) -> None:
        self._parts = feed._parts
        self.tensors = [
            torch.empty_strided(part.size, part.stride, dtype=part.dtype, device=feed.device)
            for part in self._parts
        ]
        mine = iter(self.tensors)
        self.inputs = map_tensors(lambda _: next(mine), feed._inputs)
        self.block: torch.Tensor | None = None
        """The batch in host memory, kept alive while a copy may be reading it."""
        self._copied = torch.cuda.Event() if feed.device.type == "cuda" else None
        self._reader: torch.cuda.Stream | None = None
        """The stream that may still be reading the tensors."""

    def wait_for_copy(self) -> None:
        """Make the host wait for the last copy. Otherwise it would run ever further ahead of the
        device and pin memory for every batch in transit."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy(self, side: torch.cuda.Stream | None) -> None:
        """Copy the block here on ``side``, after pending reads of these tensors."""
        if side is None or self._copied is None:
            self._copy()
            return
        if self._reader is not None:
            read = torch.cuda.Event()
            read.record(self._reader)
            side.wait_event(read)
            self._reader = None
        with torch.cuda.stream(side):
            self._copy()
        self._copied.record(side)

    def hand_out(self, device: torch.device) -> None:
        """Make later work on the current stream wait for the batch."""
        if self._copied is not None:
            self._reader = torch.cuda.current_stream(device)
            self._reader.wait_event(self._copied)

    def _copy(self) -> None:
        assert self.block is not None
        for tensor, part in zip(self.tensors, self._parts, strict=True):
            tensor.copy_(part.of(self.block), non_blocking=True)


class _Batches(Dataset[torch.Tensor]):
    """Copies one of several batches into new memory for each item."""

    def __init__(self, sources: Sequence[torch.Tensor]) -> None:
        self._sources = list(sources)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._sources[index].clone()


def workers_for(batch_bytes: int, variants: int, *, cpus: int, shared_bytes: int | None) -> int:
    """Return the number of loader processes; 0 means that the main process loads.

    Args:
        batch_bytes: bytes of one batch.
        variants: batches that the workers copy from.
        cpus: CPUs that this process may use.
        shared_bytes: free shared memory, through which batches are sent; None if unknown. The
            system kills a worker that finds it full.
    """
    if cpus <= 2 or multiprocessing.current_process().daemon:  # daemons cannot have children
        return 0
    wanted = min(math.ceil(cpus / CPUS_PER_WORKER), MAX_WORKERS)
    if shared_bytes is None:
        return wanted
    batches = int(SHARED_PART * shared_bytes) // max(batch_bytes, 1) - variants
    return max(0, min(wanted, batches // (PREFETCH + 1)))


def _loader(
    sources: list[torch.Tensor], workers: int, *, pin_memory: bool
) -> Iterator[torch.Tensor]:
    """Return an endless iterator over new copies of ``sources`` in turn."""
    processes: dict[str, Any] = {}
    if workers:
        # fork is unsafe: a forked child inherits an unusable CUDA context and possibly held locks
        # of this process's threads (CUDA, OpenMP, Inductor, memory pinning). forkserver leaks:
        # torch's workers end when their parent does, but there the parent is the server, which
        # lives as long as its workers, so all of them would survive if this process were killed.
        # With spawn, each worker imports torch once, before the timer starts.
        processes = {
            "multiprocessing_context": "spawn",
            "persistent_workers": True,
            "prefetch_factor": PREFETCH,
            "worker_init_fn": _ignore_interrupt,
        }
    loader: DataLoader[torch.Tensor] = DataLoader(
        _Batches(sources),
        batch_size=None,
        sampler=itertools.cycle(range(len(sources))),
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its seed would come from torch's own generator
        **processes,
    )
    return iter(loader)


def _ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C to the main process, which stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _shut_down(loader: Any, side: torch.cuda.Stream | None) -> None:
    """Stop the workers of ``loader`` once no copy is in flight."""
    if side is not None:
        with contextlib.suppress(RuntimeError):  # a failed device copies nothing
            side.synchronize()
    # torch has no public way to end persistent workers but to drop the last reference to the
    # iterator, and a traceback may hold one.
    end = getattr(loader, "_shutdown_workers", None)
    if end is None:
        return
    try:
        end()
    except RuntimeError:
        # A worker that aborts while it ends (seen with torch 2.11: "terminate called without an
        # active exception") has already delivered every batch requested from it. torch raises
        # nevertheless, before it has waited for the other workers.
        for worker in loader._workers:
            worker.join(WORKER_END_S)
            if worker.is_alive():
                worker.terminate()


def _tensors_in(inputs: Any) -> list[torch.Tensor]:
    """Return the tensors of ``inputs``, in the order of ``map_tensors``."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is not torch.strided:
            raise WorkloadError(f"feed=host needs dense tensors, got layout {tensor.layout}")
        found.append(tensor)
        return tensor

    map_tensors(keep, inputs)
    return found


def _layout(tensors: Sequence[torch.Tensor]) -> list[_Part]:
    parts = []
    end = 0
    for tensor in tensors:
        # Expanded and sliced tensors get the strides of a fresh copy.
        stride = torch.empty_like(tensor, device="meta").stride()
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = begin + tensor.numel() * tensor.itemsize
        parts.append(_Part(begin, end, tensor.dtype, tuple(tensor.shape), stride))
    return parts


def _cpus() -> int:
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def _free_shared_bytes() -> int | None:
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return None
