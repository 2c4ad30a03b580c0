"""Simulate a disk that is full or broken for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class _File:
    """A file that accepts some bytes and then fails."""

    def __init__(self, file: Any, room: int, number: int, *, keeps_half: bool) -> None:
        self._file, self._room, self._number = file, room, number
        self._keeps_half = keeps_half

    def write(self, data: Any) -> int:
        if self._room <= 0:
            raise OSError(self._number, os.strerror(self._number))
        part = bytes(data)[: self._room]
        self._room -= len(part)
        return int(self._file.write(part))

    def truncate(self, size: int) -> None:
        if self._keeps_half:
            raise OSError(self._number, os.strerror(self._number))
        self._file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def failing(room: int, number: int, *, keeps_half: bool = False) -> Iterator[None]:
    """For a while, let each new or appended file accept ``room`` bytes and then fail with an error.

    Replacing a file fails immediately.

    Args:
        room: bytes that a file still accepts.
        number: the error.
        keeps_half: whether truncating a partial line fails, too.
    """
    opened = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = opened(path, mode, *args, **options)
        if mode not in ("ab", "xb"):
            return file
        return _File(file, room, number, keeps_half=keeps_half)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        patch.setattr("tempfile.mkstemp", _failure(number))
        yield


def _failure(number: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
