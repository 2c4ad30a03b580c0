"""Properties of a CUDA device that decide which kernel and tiles run on it.

Importing this module does not load torch; :mod:`.dispatch` says why.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU, or (0, 0) for any other device."""
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors (SMs) of a GPU, or 1 for any other device."""
    import torch

    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
