"""Provide facts about this machine that several checks need, each read once, on first use."""

from __future__ import annotations

import functools

from pytest_int8bench import nvml
from pytest_int8bench.cli.checks import torch_probe


class Machine:
    """The machine that is being checked."""

    @functools.cached_property
    def torch(self) -> torch_probe.TorchReport:
        """The report of torch, which is loaded in a separate process."""
        return torch_probe.ask()

    @functools.cached_property
    def gpus(self) -> list[tuple[nvml.Gpu, list[str]]] | None:
        """The GPUs, each with its UUID or those of its MIG instances; None without NVML."""
        return nvml.whole_gpus()
