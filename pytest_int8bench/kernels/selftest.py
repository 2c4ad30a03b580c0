"""Check the warp-specialized kernel against the TMA kernel, bit for bit, once per process."""

from __future__ import annotations

import math
import os
import warnings

import torch

from pytest_int8bench.errors import first_line
from pytest_int8bench.kernels import device as kernels_device
from pytest_int8bench.kernels import tiles as kernels_tiles
from pytest_int8bench.kernels.launch import (
    ceil,
    of_product,
    operands_like,
)
from pytest_int8bench.kernels.override import KERNEL_VARIABLE
from pytest_int8bench.kernels.tile_types import (
    SPECIALIZED_FROM,
    SPECIALIZED_TILE,
    Problem,
)

#: Versions of Triton with which the kernel whose warps have roles has passed its tests on a GPU.
#: The language it is written in is experimental: with others it has to prove itself first.
_PROVED_WITH = ("3.6.",)
_proved: dict[torch.device, bool] = {}


def is_specialized_proved(device: torch.device, *, may_try: bool) -> bool:
    """Say whether warps with roles are known to compute what the other kernels do."""
    import triton

    if triton.__version__.startswith(_PROVED_WITH) or os.environ.get(KERNEL_VARIABLE):
        return True
    if device not in _proved and may_try:
        try:
            problem = None if _have_equal_bits(device) else "they give other bits"
        except Exception as error:  # whatever comes of another language
            problem = first_line(error)
        _proved[device] = problem is None  # before the warning, which may be an error
        if problem is not None:
            warnings.warn(
                f"INT8 products by warps with roles are off with triton {triton.__version__}: "
                f"{problem}",
                stacklevel=2,
            )
    return _proved.get(device, False)


def _have_equal_bits(device: torch.device) -> bool:
    """Say whether the kernel whose warps have roles gives the bits of the one without, in each of
    its forms."""
    columns, multiprocessors = 6, kernels_device.multiprocessors(device)
    tiles = ceil(SPECIALIZED_FROM * multiprocessors, columns)
    for depth, residual in ((768, False), (768, True), (2048, True)):
        n = SPECIALIZED_TILE * columns
        problem = Problem(SPECIALIZED_TILE * tiles - 5, n, depth, 2, residual)
        shared_out = kernels_tiles.specialized(problem, multiprocessors)
        if shared_out is None:
            raise RuntimeError(f"nothing to compare on {multiprocessors} multiprocessors")
        tiles_of = {
            "tma": kernels_tiles.product(problem, "tma", device, None),
            "specialized": shared_out,
        }
        with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):
            a, b, c, *rest = operands_like(problem, True, False, torch.bfloat16, device)
            outs = []
            for kernel, tile in tiles_of.items():
                out = torch.full_like(c, math.nan)
                stride = n if residual else 0
                launch = of_product(problem, True, False, kernel, stride, tile, device)
                launch(a, b, out, *rest)
                outs.append(out)
            if not torch.equal(*outs):
                return False
    return True
