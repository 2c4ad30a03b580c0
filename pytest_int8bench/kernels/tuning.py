"""Remember tuned tiles on disk."""

from __future__ import annotations

import functools
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pytest_int8bench.files import cache_folder, replace_text
from pytest_int8bench.kernels.tile_types import Product

#: Environment variable with the folder where tuning is kept.
CACHE_VARIABLE = "INT8BENCH_TUNING_DIR"
_FILE = "int8-products.json"


def tuning_file() -> Path:
    """Return the file that tuning is kept in."""
    folder = os.environ.get(CACHE_VARIABLE)
    return (Path(folder) if folder else cache_folder()) / _FILE


def _section(kernel: str, device: torch.device) -> str:
    import triton

    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {kernel}"


@functools.cache
def load_tuned(kernel: str, device: torch.device) -> dict[str, Product]:
    """Return what is known of a device; the dictionary is kept and grows."""
    with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        saved = json.loads(tuning_file().read_text())[_section(kernel, device)]
        return {key: Product(**value) for key, value in saved.items()}
    return {}


def save_tuned(kernel: str, device: torch.device, known: dict[str, Product]) -> None:
    """Write what is known, whole or not at all; without it the next process tunes again."""
    with suppress(OSError, RuntimeError):  # the latter where there is no home
        path = tuning_file()
        everything: Any = {}
        with suppress(OSError, ValueError):
            everything = json.loads(path.read_text())
        if not isinstance(everything, dict):
            everything = {}
        section = _section(kernel, device)
        there = everything.get(section)
        # Another process may have tuned something else meanwhile.
        others = there if isinstance(there, dict) else {}
        everything[section] = others | {key: asdict(tile) for key, tile in known.items()}
        replace_text(path, json.dumps(everything, indent=1, sort_keys=True))
