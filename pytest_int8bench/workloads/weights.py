"""Read and check model weights from files."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pytest_int8bench.errors import ClearError
from pytest_int8bench.git_lfs import POINTER, is_pointer

RANDOM, HUB = "random", "hub"
_SHOWN = 3
#: Keys under which training scripts commonly save the state dict.
_WRAPPERS = ("state_dict", "model")
#: Matches the name of the object that torch refused to load.
_FORBIDDEN = re.compile(r"GLOBAL (\S+)")


class WeightsError(ClearError, ValueError):
    """The weights cannot be loaded or do not fit the model."""


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict written by ``torch.save`` or safetensors, without running code from it.

    Raises:
        WeightsError: one line, if the file does not hold a readable state dict.
    """
    check_not_pointer(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        values: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"weights {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch's own message advises letting the file run code
        raise WeightsError(_unreadable(path, error)) from None
    for wrapper in _WRAPPERS:
        if isinstance(values, Mapping) and isinstance(values.get(wrapper), Mapping):
            values = values[wrapper]
    if not isinstance(values, Mapping) or not values:
        raise WeightsError(f"weights {path} must hold a state dict, got {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"weights {path} must hold a state dict of tensors by name, got "
                f"{type(value).__name__} under {name!r}"
            )
    return dict(values)


def check_not_pointer(path: Path) -> None:
    """Reject Git LFS pointers, whose weights were not downloaded.

    Args:
        path: a file, or a model's folder, in which all files are checked.

    Raises:
        WeightsError: one line that names the first such file.
    """
    with contextlib.suppress(OSError):  # loading it reports the error
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file() and is_pointer(_start(file)):
                raise WeightsError(f"weights {file} {POINTER}")


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(100)


def _unreadable(path: Path, error: Exception) -> str:
    if match := _FORBIDDEN.search(str(error)):
        return (
            f"weights {path} must hold a state dict of tensors, got {match[1]}, which is not "
            "loaded as it can run code: save model.state_dict() instead"
        )
    return (
        f"weights {path} must be a file of torch.save or safetensors: it is damaged, or something "
        "else"
    )


def load_state_dict(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], *, source: str
) -> None:
    """Load ``state`` into ``model``; their keys and shapes must match exactly.

    Raises:
        WeightsError: one line that names missing, unexpected or wrongly shaped keys.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise WeightsError(f"weights {source} do not fit the model: keys {'; '.join(problems)}")
    model.load_state_dict(dict(state))
