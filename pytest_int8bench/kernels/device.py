"""Properties of a CUDA device that the choice of a kernel and of its tiles depends on.

Importing this module does not load torch (see :mod:`.dispatch`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU, (0, 0) elsewhere."""
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU, 1 elsewhere."""
    import torch

    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
