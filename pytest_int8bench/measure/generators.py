"""Save, seed and restore the process's random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def generator_states() -> list[Any]:
    """Return the states of the generators of torch, numpy and Python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), *cuda]


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of torch, numpy and Python."""
    # torch.manual_seed would also seed GPUs for later if CUDA is not initialized yet.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the generators of torch, numpy and Python on exit.

    Measuring draws from them: workloads' callables, Inductor, which times kernels on random inputs,
    and libraries when they are imported.
    """
    python, arrays, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(cpu)
        _restore_cuda(cuda)


def _restore_cuda(states: list[torch.Tensor] | None) -> None:
    if not torch.cuda.is_initialized():
        return
    try:
        if states is not None:
            torch.cuda.set_rng_state_all(states)
            return
        # CUDA was initialized inside, so nothing had been drawn before.
        for generator in torch.cuda.default_generators:
            generator.manual_seed(generator.initial_seed())
    except torch.AcceleratorError:  # the device failed; show the original error instead
        return
