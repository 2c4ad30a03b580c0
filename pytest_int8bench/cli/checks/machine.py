"""Read facts about this machine that several checks need, each once and on first use."""

from __future__ import annotations

import functools

from pytest_int8bench import nvml
from pytest_int8bench.cli.checks import torch_probe


class Machine:
    """The machine that is being checked."""

    @functools.cached_property
    def torch(self) -> torch_probe.TorchReport:
        """Report from torch, loaded in a separate process."""
        return torch_probe.ask()

    @functools.cached_property
    def gpus(self) -> list[tuple[nvml.Gpu, list[str]]] | None:
        """The GPUs with their UUIDs or the UUIDs of their MIG instances; None without NVML."""
        return nvml.whole_gpus()
