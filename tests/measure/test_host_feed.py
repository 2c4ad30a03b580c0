"""Test batches from the host: they arrive intact, in order and in place, and all processes end."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure import host_feed
from pytest_int8bench.measure.host_feed import MAX_VARIANTS, FeedError, HostFeed, workers_for

CPU = torch.device("cpu")
SAMPLES = 6
DEADLINE_S = 60


def pixels() -> torch.Tensor:
    return torch.arange(SAMPLES * 5.0).reshape(SAMPLES, 5)


def feed_of(inputs: Any, **options: Any) -> HostFeed:
    return HostFeed(inputs, CPU, **{"samples": SAMPLES, "workers": 0, **options})


class Pair(NamedTuple):
    left: Any
    right: Any


# -- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_rotate_and_shift_their_rows(workers: int) -> None:
    mask = torch.arange(SAMPLES).remainder(2).bool()
    inputs = {"x": pixels(), "rest": [Pair(mask, "text"), None, 3]}
    before = set(multiprocessing.active_children())
    feed = feed_of(inputs, workers=workers)
    for index, batch in enumerate(itertools.islice(feed, 3 * MAX_VARIANTS)):
        assert type(batch) is dict
        [pair, *others] = batch["rest"]
        assert (type(pair), pair.right, others) == (Pair, "text", [None, 3])
        assert torch.equal(batch["x"], pixels().roll(index % MAX_VARIANTS, 0))
        assert torch.equal(pair.left, mask.roll(index % MAX_VARIANTS, 0))
    assert (feed.workers, feed.variants) == (workers, MAX_VARIANTS)
    assert len(set(multiprocessing.active_children()) - before) == workers
    iterator = feed._loader  # as a traceback may keep it alive
    del feed
    gc.collect()
    assert set(multiprocessing.active_children()) <= before
    assert iterator is not None


@pytest.mark.parametrize(
    "other",
    [torch.zeros(3), torch.tensor(1.5), torch.zeros(0)],
    ids=["other rows", "no dimension", "empty"],
)
def test_does_not_shift_rows_that_are_not_samples(other: torch.Tensor) -> None:
    feed = feed_of((pixels(), other))
    for x, kept in itertools.islice(feed, 5):
        assert torch.equal(x, pixels())
        assert torch.equal(kept, other)


def test_reuses_one_batch_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_feed, "VARIANT_BYTES", 2 * pixels().nbytes + 100)
    assert feed_of((pixels(),)).variants == 2
    monkeypatch.setattr(host_feed, "VARIANT_BYTES", 10)
    feed = feed_of((pixels(),))
    assert feed.variants == 1
    assert all(torch.equal(batch[0], pixels()) for batch in itertools.islice(feed, 3))


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "plain": pixels,
    "bfloat16": lambda: pixels().bfloat16(),
    "int64": lambda: torch.arange(SAMPLES),
    "uint8": lambda: torch.arange(SAMPLES * 3, dtype=torch.uint8).reshape(SAMPLES, 3),
    "transposed": lambda: torch.arange(12.0).reshape(2, SAMPLES).t(),
    "channels last": lambda: (
        torch.arange(SAMPLES * 24.0)
        .reshape(SAMPLES, 2, 3, 4)
        .contiguous(memory_format=torch.channels_last)
    ),
    "expanded": lambda: torch.arange(5.0).expand(SAMPLES, 5),
    "cut": lambda: torch.arange(SAMPLES * 8.0).reshape(SAMPLES, 8)[:, 1:4],
}


@pytest.mark.parametrize("name", TENSORS)
def test_dtypes_shapes_strides_and_addresses_repeat(name: str) -> None:
    odd = torch.zeros(SAMPLES, dtype=torch.bool)  # the tensor after it must still be aligned
    feed = feed_of([odd, TENSORS[name]()])
    kept = TENSORS[name]().clone()  # dense, with the same layout if there is one
    seen = []
    for index, (_, batch) in enumerate(itertools.islice(feed, 8)):
        assert (batch.dtype, batch.shape, batch.stride()) == (kept.dtype, kept.shape, kept.stride())
        assert torch.equal(batch, kept.roll(index % MAX_VARIANTS, 0))
        seen.append(batch.data_ptr())
    assert len(set(seen)) == 2
    assert seen == seen[:2] * 4
    assert feed.nbytes == 2 * (odd.nbytes + kept.nbytes)


def test_compiles_a_model_once() -> None:
    feed = feed_of((pixels().bfloat16(), torch.ones(SAMPLES)))
    graphs = 0

    def count(graph: Any, example_inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    model = torch.compile(lambda x, y: x.sum(1) + y, backend=count, dynamic=False, fullgraph=True)
    with torch.inference_mode():  # as in a measurement, though the first batch may arrive before it
        outputs = [model(*next(feed)).clone() for _ in range(6)]
    first, second = (model(*next(feed)) for _ in range(2))
    assert torch.equal(outputs[1], outputs[5])
    assert (first.shape, second.shape) == ((SAMPLES,), (SAMPLES,))
    assert not any(tensor.is_inference() for tensor in next(feed))
    # One graph in inference mode and one outside, as with any inputs.
    assert graphs == 2


def test_keeps_the_last_batch_until_the_next_request() -> None:
    feed = feed_of((pixels(),))
    for index in range(5):
        batch = next(feed)
        assert feed.current is batch
        feed.copy_again()
        assert torch.equal(batch[0], pixels().roll(index % MAX_VARIANTS, 0))


def test_does_not_change_torchs_generator() -> None:
    before = torch.random.get_rng_state()
    next(feed_of((pixels(),)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_rejects_non_dense_tensors() -> None:
    sparse = torch.eye(SAMPLES).to_sparse()
    with pytest.raises(
        WorkloadError, match=r"^feed=host needs dense tensors, got layout torch\.sparse_coo$"
    ):
        feed_of((sparse,))


# -- the order of copies and reads --------------------------------------------------------------


class Device:
    """Streams that run work later, in any order that their waits allow."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.compute, self.side = Stream(self), Stream(self)
        self.now = self.compute

    def work(self, steps: int) -> None:
        for _ in range(steps):
            ready = [stream for stream in (self.compute, self.side) if stream.is_ready]
            if not ready:
                return
            self._random.choice(ready).work()

    def some_work(self) -> None:
        self.work(self._random.randrange(8))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


class Stream:
    def __init__(self, device: Device) -> None:
        self.device = device
        self._queue: deque[Callable[[], bool]] = deque()

    @property
    def is_ready(self) -> bool:
        return bool(self._queue) and self._queue[0]()

    def work(self) -> None:
        self._queue.popleft()

    def submit(self, work: Callable[[], object]) -> None:
        # The work runs when the entry reaches the front, because only then is it polled.
        self._queue.append(once(work))

    def wait_event(self, event: Event) -> None:
        mark = event.mark
        self._queue.append(lambda: mark is None or mark.done)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.device)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        while self._queue:
            self.device.work(1)


class Mark:
    done = False


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device
        self.mark: Mark | None = None

    def record(self, stream: Stream) -> None:
        mark = self.mark = Mark()
        stream.submit(lambda: setattr(mark, "done", True))

    def synchronize(self) -> None:
        while self.mark is not None and not self.mark.done:
            self._device.work(1)


def once(work: Callable[[], object]) -> Callable[[], bool]:
    pending = [work]

    def ask() -> bool:
        while pending:
            pending.pop()()
        return True

    return ask


def simulated(seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[HostFeed, Device]:
    """Return a feed to a simulated CUDA device with tensors on the CPU."""
    device = Device(seed)
    empty_strided, loader = torch.empty_strided, host_feed._loader
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(device))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: device.side)
    monkeypatch.setattr(torch.cuda, "stream", device.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.now)
    monkeypatch.setattr(torch, "empty_strided", lambda *a, device, **k: empty_strided(*a, **k))
    monkeypatch.setattr(
        host_feed, "_loader", lambda *args, pin_memory: loader(*args, pin_memory=not pin_memory)
    )

    def submit(slot: Any) -> None:
        block = slot.block
        for tensor, part in zip(slot.tensors, slot._parts, strict=True):
            device.now.submit(lambda tensor=tensor, part=part: tensor.copy_(part.of(block)))

    monkeypatch.setattr(host_feed._Slot, "_copy", submit)
    inputs = (pixels(), torch.arange(SAMPLES))
    return HostFeed(inputs, torch.device("cuda"), samples=SAMPLES, workers=0), device


@given(st.integers(0, 2**32))
def test_does_not_overwrite_a_batch_in_use(seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        feed, device = simulated(seed, monkeypatch)
        seen: list[list[torch.Tensor]] = []
        for index in range(12):
            batch = next(feed)
            read: list[torch.Tensor] = []
            seen.append(read)
            for tensor in (*batch, *batch):  # read twice, with time between
                device.compute.submit(lambda t=tensor, read=read: read.append(t.clone()))
                device.some_work()
            if index % 5 == 4:
                feed.copy_again()
        device.compute.synchronize()
        feed.close()  # waits for the copy ahead
        assert not device.side._queue
    for index, read in enumerate(seen):
        x, ids = (t.roll(index % MAX_VARIANTS, 0) for t in (pixels(), torch.arange(SAMPLES)))
        for got, wanted in zip(read, (x, ids, x, ids), strict=True):
            assert torch.equal(got, wanted)


def test_copies_the_next_batch_during_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    feed, device = simulated(0, monkeypatch)
    for _ in range(4):
        next(feed)
        device.compute.submit(lambda: None)  # the computation that reads it
        while len(device.compute._queue) > 1 or device.side._queue:
            ready = [s for s in (device.side, device.compute) if s.is_ready]
            assert ready[0] is device.side or len(device.compute._queue) > 1
            ready[0].work()
        # The next batch has arrived, and this one is still unread.
        assert len(device.compute._queue) == 1


def test_the_host_does_not_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    feed, device = simulated(0, monkeypatch)
    read: list[int] = []
    for index in range(20):
        next(feed)
        device.compute.submit(lambda index=index: read.append(index))
        # Pinned memory holds every batch in flight.
        assert index - len(read) < 4
    assert len(read) > 10


# -- waiting for the loader ---------------------------------------------------------------------


def test_sums_the_wait_for_the_loader() -> None:
    clock = iter([0.0, 1.0, 10.0, 10.25, 20.0, 20.5])
    feed = feed_of((pixels(),), clock=lambda: next(clock))
    feed.open()
    assert (feed.batches, feed.wait_s) == (1, 1.0)
    next(feed)
    next(feed)
    assert (feed.batches, feed.wait_s) == (3, 1.75)


@pytest.mark.parametrize(
    ("cpus", "batch_bytes", "shared_bytes", "expected"),
    [
        (1, 1, None, 0),
        (2, 1, None, 0),
        (3, 1, None, 1),
        (4, 1, None, 1),
        (8, 1, None, 2),
        (16, 1, None, 4),
        (128, 1, None, 4),
        (16, 100, 10_000, 4),
        (16, 100, 2 * (4 + 3 * 3) * 100, 3),
        (16, 100, 2 * (4 + 3 * 1) * 100, 1),
        (16, 100, 2 * (4 + 3 * 1) * 100 - 200, 0),
        (16, 100, 0, 0),
        (16, 0, 0, 0),
    ],
)
def test_number_of_workers_fits_cpus_and_shared_memory(
    cpus: int, batch_bytes: int, shared_bytes: int | None, expected: int
) -> None:
    assert workers_for(batch_bytes, 4, cpus=cpus, shared_bytes=shared_bytes) == expected


def test_uses_the_number_of_workers_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_feed, "_cpus", lambda: 16)
    monkeypatch.setattr(host_feed, "_free_shared_bytes", lambda: 0)
    feed = feed_of((pixels(),), workers=None)
    assert feed.workers is None
    next(feed)
    assert feed.workers == 0


# -- the end ------------------------------------------------------------------------------------


def test_closed_feed_frees_everything_and_can_restart() -> None:
    feed = feed_of((pixels(),))
    next(feed)
    next(feed)
    feed.close()
    feed.close()
    assert feed.nbytes == 0
    assert torch.equal(next(feed)[0], pixels())


def test_reports_a_dead_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> Iterator[torch.Tensor]:
        yield torch.zeros(SAMPLES * 5 * 4, dtype=torch.uint8)
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    monkeypatch.setattr(host_feed, "_loader", lambda *args, **kwargs: die())
    feed = feed_of((pixels(),))
    feed.open()
    message = (
        "the loader failed: DataLoader worker (pid(s) 7) exited unexpectedly; batches of 120 bytes "
        "pass through shared memory; check that /dev/shm is large enough (docker: --shm-size)"
    )
    with pytest.raises(FeedError, match=f"^{re.escape(message)}$"):
        next(feed)
    assert feed.nbytes == 0


def test_loader_errors_propagate_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Iterator[torch.Tensor]:
        raise RuntimeError("CUDA out of memory")
        yield

    monkeypatch.setattr(host_feed, "_loader", lambda *args, **kwargs: fail())
    feed = feed_of((pixels(),))
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        next(feed)
    assert feed.nbytes == 0


FEEDING = """
import itertools
import torch
from pytest_int8bench.measure.host_feed import HostFeed

if __name__ == "__main__":
    feed = HostFeed((torch.ones(4, 4),), torch.device("cpu"), samples=4, workers=1)
    for number in itertools.count():
        next(feed)
        if number == 3:
            print("fed", flush=True)
"""


@pytest.mark.slow
def test_leaves_no_process_behind(tmp_path: Path) -> None:
    script = tmp_path / "feeding.py"
    script.write_text(FEEDING)
    interrupted, killed = (
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for _ in range(2)
    )
    with interrupted, killed:
        for process in (interrupted, killed):
            assert process.stdout is not None
            assert process.stdout.readline() == "fed\n"
        os.killpg(interrupted.pid, signal.SIGINT)  # like a terminal
        killed.kill()
        # The pipes close when the last process that holds them ends.
        errors = [process.communicate(timeout=DEADLINE_S)[1] for process in (interrupted, killed)]
    assert interrupted.returncode == -signal.SIGINT
    # Only the main process reports Ctrl-C.
    assert [error.count("KeyboardInterrupt") for error in errors] == [1, 0]
