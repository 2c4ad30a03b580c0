"""What checks ask of this machine, each at most once and not before it is needed."""

from __future__ import annotations

import functools

from pytest_int8bench import nvml
from pytest_int8bench.cli.checks import torch_probe


class Machine:
    """This machine."""

    @functools.cached_property
    def torch(self) -> torch_probe.TorchReport:
        """What torch says, in a process of its own."""
        return torch_probe.ask()

    @functools.cached_property
    def gpus(self) -> list[tuple[nvml.Gpu, list[str]]] | None:
        """The GPUs that NVML knows, with their UUIDs or those of their instances; None without."""
        return nvml.whole_gpus()
