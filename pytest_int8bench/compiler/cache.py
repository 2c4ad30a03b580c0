"""A folder of compiled code that outlives the process, and may be copied to another machine.

It holds a folder for each thing that compiled code depends on and the compilers' own keys leave
out: machine and versions (:func:`pytest_int8bench.environment.compiled_for`), and the attention
backend, without which AOTAutograd takes a graph compiled under another one for the same
(pytorch/pytorch#185449). A JSON file beside each folder says what it is for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch._dynamo
import torch._functorch.config

from pytest_int8bench.compiler.torch_workarounds.inductor import inductor_folder
from pytest_int8bench.environment import compiled_for
from pytest_int8bench.errors import ClearError
from pytest_int8bench.files import is_noexec, is_plain, plain_path, replace_text

# Where torch and Triton look, at each use.
_INDUCTOR, _TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"


class CompileCacheError(ClearError, OSError):
    """The folder of the compile cache cannot be written."""


@dataclass(frozen=True)
class CompileCache:
    """Compiled code of one attention backend on this machine."""

    root: Path
    """Folder that is shared by all machines and backends; made when it is first used."""
    attention: str

    @property
    def folder(self) -> Path:
        """Folder of the compiled code."""
        return self.root / self._digest

    def is_empty(self) -> bool:
        """Return whether nothing was ever compiled for this machine and backend."""
        return not (self.folder.is_dir() and any(self.folder.iterdir()))

    @contextlib.contextmanager
    def emptied(self) -> Iterator[None]:
        """Start with an empty folder. What was in it is dropped on leaving, or, after an error,
        is there again: it was not to blame."""
        aside = self.folder.with_suffix(f".{os.getpid()}-aside")
        self.folder.rename(aside)
        self._make()
        try:
            yield
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            aside.rename(self.folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let torch and Triton keep compiled code in the folder, also whole graphs of AOTAutograd.

        Raises:
            CompileCacheError: one line, if the folder cannot be made.
        """
        self._make()
        before = {name: os.environ.get(name) for name in (_INDUCTOR, _TRITON)}
        with _named(self.root):
            folder = plain_path(self.folder)
        try:
            os.environ[_INDUCTOR] = str(folder)
            os.environ[_TRITON] = str(folder / "triton")
            with torch._functorch.config.patch(enable_autograd_cache=True):
                yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    @property
    def _key(self) -> dict[str, Any]:
        return {"attention": self.attention, **_compiled_for()}

    @property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:16]

    def _make(self) -> None:
        if is_noexec(self.root):
            raise CompileCacheError(
                f"the compile cache {self.root} is on a file system mounted noexec, from which no "
                "compiled code can be loaded: choose another folder (--int8-compile-cache)"
            )
        if self.folder.is_dir():
            return
        description = self.folder.with_suffix(".json")
        with _named(self.root):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(description, json.dumps(self._key, indent=2) + "\n")


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into one line."""
    try:
        yield
    except OSError as error:
        raise CompileCacheError(
            f"the compile cache cannot be written: {error.strerror}: {error.filename or folder}"
        ) from None


def check_temporary_folder(device_type: str) -> None:
    """Refuse a folder for temporary files that Inductor's C++ compiler cannot take: Inductor keeps
    precompiled headers there, and puts their path into a command without quotes.

    Raises:
        CompileCacheError: one line.
    """
    folder = tempfile.gettempdir()
    if device_type == "cpu" and not is_plain(folder):
        raise CompileCacheError(
            f"the folder for temporary files must have a path without spaces and quotes, got "
            f"{folder!r}: torch.compile cannot pass it to the C++ compiler; set TMPDIR to another"
        )


def default_folder() -> Path:
    """Return where torch keeps compiled code if it is not told otherwise."""
    return Path(os.environ.get(_INDUCTOR) or inductor_folder())


@contextlib.contextmanager
def usable_default() -> Iterator[None]:
    """Let torch keep compiled code where it always does, by a path that its C++ compiler can take.

    Raises:
        CompileCacheError: one line, if no code can be loaded from there.
    """
    given = os.environ.get(_INDUCTOR)
    folder = default_folder()
    if is_noexec(folder):
        raise CompileCacheError(
            f"{folder}, where torch keeps compiled code, is on a file system mounted noexec, from "
            f"which none can be loaded: choose another folder (--int8-compile-cache or {_INDUCTOR})"
        )
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        plain = plain_path(folder.absolute())
    if str(plain) == str(folder):
        yield
        return
    os.environ[_INDUCTOR] = str(plain)
    try:
        yield
    finally:
        os.environ.pop(_INDUCTOR)
        if given is not None:
            os.environ[_INDUCTOR] = given


@functools.cache
def _compiled_for() -> dict[str, Any]:
    return compiled_for()


def lookups() -> tuple[int, int]:
    """Return how many graphs this process has found in compile caches so far, and how many not."""
    graphs = torch._dynamo.utils.counters["aot_autograd"]
    kernels = torch._dynamo.utils.counters["inductor"]
    found = graphs["autograd_cache_hit"] + kernels["fxgraph_cache_hit"]
    missed = graphs["autograd_cache_miss"] + kernels["fxgraph_cache_miss"]
    # A graph that AOTAutograd bypasses is looked up by its kernels.
    return int(found), int(missed + kernels["fxgraph_cache_bypass"])
