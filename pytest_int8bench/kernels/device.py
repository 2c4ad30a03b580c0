"""Properties of the current CUDA device that kernels depend on."""

from __future__ import annotations

import functools

import torch


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU, 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
