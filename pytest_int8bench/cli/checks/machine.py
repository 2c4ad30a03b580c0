"""Facts about this machine that several checks need, each read lazily and once."""

from __future__ import annotations

import functools

from pytest_int8bench import nvml
from pytest_int8bench.cli.checks import torch_probe


class Machine:
    """This machine."""

    @functools.cached_property
    def torch(self) -> torch_probe.TorchReport:
        """Report from torch, loaded in a separate process."""
        return torch_probe.ask()

    @functools.cached_property
    def gpus(self) -> list[tuple[nvml.Gpu, list[str]]] | None:
        """The GPUs that NVML knows, with their UUIDs or those of their instances; None without."""
        return nvml.whole_gpus()
