"""Which GPUs a process may use, and giving it one of them. Nothing here starts CUDA."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
_UUIDS = ("GPU-", "MIG-")


def visible(environ: Mapping[str, str] | None = None) -> list[str] | None:
    """Return the GPUs that a process may use, each as ``CUDA_VISIBLE_DEVICES`` would name it.

    Where that variable is set, what it names, read as CUDA reads it: up to the first entry that is
    no device, and nothing if one is named twice. Else the UUID of each GPU or, of a GPU with MIG
    on, of each of its instances: CUDA alone would show a process the first one only.

    Returns:
        The names, or None where only CUDA itself knows: NVML does not answer, and the variable is
        not set.
    """
    environ = os.environ if environ is None else environ
    there = _uuids()
    asked = environ.get(VISIBLE)
    if asked is None:
        return None if there is None else [uuid for part in there for uuid in part]
    names: list[str] = []
    for entry in map(str.strip, asked.split(",")):
        is_same_kind = not names or _kind(entry) == _kind(names[0])
        if not is_same_kind or not _is_device(entry, there):
            break
        if entry in names:
            return []
        names.append(entry)
    return names


def described(names: list[str], environ: Mapping[str, str] | None = None) -> str:
    """Say how many GPUs there are, and where that comes from."""
    environ = os.environ if environ is None else environ
    where = f"{VISIBLE} names" if VISIBLE in environ else "this machine has"
    return f"{where} {len(names)} GPU{'s' * (len(names) != 1)}"


def pin(number: int, environ: MutableMapping[str, str] | None = None) -> str | None:
    """Leave a process one GPU of those it may use, before it starts CUDA.

    Args:
        number: which one, from 0.
        environ: where to say so; ``os.environ`` by default.

    Returns:
        Its name in ``CUDA_VISIBLE_DEVICES``, or None, with nothing changed, if there are fewer.
    """
    environ = os.environ if environ is None else environ
    names = visible(environ)
    if names is not None and number >= len(names):
        return None
    name = str(number) if names is None else names[number]
    environ[VISIBLE] = name
    return name


def seen_by_cuda() -> int:
    """Return how many GPUs CUDA shows this process. Loads torch, and starts CUDA."""
    import torch

    if not torch.cuda.is_available():
        return 0
    # Not device_count(), which asks NVML and reads the variable anew: what was true when CUDA
    # was started holds.
    return int(torch._C._cuda_getDeviceCount())


def _kind(entry: str) -> str:
    return entry[:4] if entry.startswith(_UUIDS) else "index"


def _is_device(entry: str, there: list[list[str]] | None) -> bool:
    if entry.startswith(_UUIDS):  # the start of one is enough
        return there is None or any(uuid.startswith(entry) for part in there for uuid in part)
    return entry.isdecimal() and (there is None or int(entry) < len(there))


def _uuids() -> list[list[str]] | None:
    """Return the UUID of each GPU, or those of its MIG instances; None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return [_of_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
    except Exception:  # NVML is missing, or refuses (containers, WSL)
        return None


def _of_gpu(pynvml: Any, handle: Any) -> list[str]:
    try:
        is_split = bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:  # a GPU that cannot be split
        is_split = False
    if not is_split:
        return [_text(pynvml.nvmlDeviceGetUUID(handle))]
    found = []
    for i in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i)
        except pynvml.NVMLError:  # a place that no instance takes
            continue
        found.append(_text(pynvml.nvmlDeviceGetUUID(instance)))
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
