"""Measure the cost of feeding a model from the host."""

from __future__ import annotations

import dataclasses

from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.speedup import alternate, median_and_interval
from pytest_int8bench.measure.timing import Timer, synchronization_cost, time_singly
from pytest_int8bench.results.parts import Feeding, FeedingCost


class FeedWatch:
    """Watches how long the host waits for the loader. Create it just before the rounds.

    All methods return None for a model whose inputs stay on the device.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        if model.feed is not None:
            self._batches, self._wait_s = model.feed.batches, model.feed.wait_s

    def waited(self) -> Feeding | None:
        """Return how long the host waited for the loader, per batch since the start."""
        feed = self._model.feed
        if feed is None:
            return None
        wait_s = (feed.wait_s - self._wait_s) / max(feed.batches - self._batches, 1)
        return Feeding(feed.workers, wait_s)


def with_cost(feeding: Feeding, model: Model, timer: Timer, interval_s: float) -> Feeding:
    """Add the time of a copy alone and the extra time of a batch fed from the host over one
    already on the device, measured in alternating blocks.

    Raises:
        CompileError: if something was compiled while the clock ran.
    """
    feed, compiled = model.feed, model.compiled
    if feed is None:
        return feeding
    copies = time_singly(feed.copy_again, timer)
    copy_s, _ = synchronization_cost(feed.copy_again, timer, copies)
    with compiled.entered(), compiled.no_compilation():
        pairs = alternate(model.run, model.run_again, timer, interval_s=interval_s)
    differences = [fed_s - on_device_s for fed_s, on_device_s in pairs]
    cost = FeedingCost(copy_s, *median_and_interval(differences))
    return dataclasses.replace(feeding, cost=cost)
