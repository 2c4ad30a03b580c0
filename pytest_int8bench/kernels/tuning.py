"""Time tiles, and save the fastest ones on disk.

Importing this module does not load torch; :mod:`.dispatch` says why.
"""

from __future__ import annotations

import functools
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_int8bench.files import cache_folder, replace_text
from pytest_int8bench.kernels.tile_types import Product

if TYPE_CHECKING:
    import torch

    from pytest_int8bench.kernels.launch import Launch, Operands

#: Environment variable that names the folder of the tuning file.
CACHE_VARIABLE = "INT8BENCH_TUNING_DIR"
_FILE = "int8-products.json"


def seconds(operands: Operands, launch: Launch) -> float:
    """Return how long a launch of a matmul takes in seconds, infinite if its tiles do not fit."""
    import torch
    from triton.errors import TritonError
    from triton.testing import do_bench

    try:
        # During compilation of a graph, any device may be current.
        with torch.cuda.device_of(operands[0]):
            milliseconds = do_bench(
                lambda: launch(*operands), warmup=5, rep=20, return_mode="median"
            )
    except TritonError:  # too large for this GPU, or the GPU cannot compile it
        return math.inf
    return float(milliseconds) / 1e3


def tuning_file() -> Path:
    """Return the path of the file with the tuned tiles of every kernel and device."""
    folder = os.environ.get(CACHE_VARIABLE)
    return (Path(folder) if folder else cache_folder()) / _FILE


def _section(kernel: str, device: torch.device) -> str:
    import torch
    import triton

    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {kernel}"


@functools.cache
def load_tuned(kernel: str, device: torch.device) -> dict[str, Product]:
    """Return the saved tiles of a kernel on a device, by :attr:`.tile_types.Problem.key`.

    The dictionary is cached, and callers add to it.
    """
    with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        saved = json.loads(tuning_file().read_text())[_section(kernel, device)]
        return {key: Product(**value) for key, value in saved.items()}
    return {}


def save_tuned(kernel: str, device: torch.device, known: dict[str, Product]) -> None:
    """Write the fastest tiles atomically. If that fails, the next process tunes again."""
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home directory
        path = tuning_file()
        contents: Any = {}
        with suppress(OSError, ValueError):
            contents = json.loads(path.read_text())
        if not isinstance(contents, dict):
            contents = {}
        section = _section(kernel, device)
        saved = contents.get(section)
        # Keep tiles that another process has saved in the meantime.
        others = saved if isinstance(saved, dict) else {}
        contents[section] = others | {key: asdict(tile) for key, tile in known.items()}
        replace_text(path, json.dumps(contents, indent=1, sort_keys=True))
