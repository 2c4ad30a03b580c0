"""A folder of compiled code that outlives the process and can be copied to another machine.

It has a subfolder for each combination of the dependencies that the compilers' own cache keys lack:
machine and versions (:func:`pytest_int8bench.environment.compiled_for`), and the attention backend,
without which AOTAutograd would return a graph compiled under another one (pytorch/pytorch#185449).
A JSON file next to each subfolder lists its dependencies.
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

# Torch and Triton read these variables whenever they use their caches.
_INDUCTOR, _TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"


class CompileCacheError(ClearError, OSError):
    """A folder for compiled code cannot be used."""


@dataclass(frozen=True)
class CompileCache:
    """The cache of compiled code for one attention backend on this machine."""

    root: Path
    """Folder for all machines and backends, created on first use."""
    attention: str

    @property
    def folder(self) -> Path:
        """Folder for this machine and backend."""
        return self.root / self._digest

    def is_empty(self) -> bool:
        """Return whether the cache holds nothing for this machine and backend."""
        return not (self.folder.is_dir() and any(self.folder.iterdir()))

    @contextlib.contextmanager
    def emptied(self) -> Iterator[None]:
        """Start with an empty folder. Delete the previous contents on exit, or restore them after
        an error, which they did not cause."""
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
        """Let torch and Triton keep compiled code in the folder, including AOTAutograd's graphs.

        Raises:
            CompileCacheError: if the folder cannot be created.
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
                f"cannot load compiled code from {self.root}, which is on a file system mounted "
                "noexec: choose another folder with --int8-compile-cache"
            )
        if self.folder.is_dir():
            return
        description = self.folder.with_suffix(".json")
        with _named(self.root):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(description, json.dumps(self._key, indent=2) + "\n")


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`CompileCacheError` of one line that names the path."""
    try:
        yield
    except OSError as error:
        raise CompileCacheError(
            f"cannot write the compile cache: {error.strerror}: {error.filename or folder}"
        ) from None


def check_temporary_folder(device_type: str) -> None:
    """Reject a temporary folder that breaks Inductor's C++ compiler: Inductor keeps precompiled
    headers there, and does not quote their path in its commands.

    Raises:
        CompileCacheError: if the path has spaces or quotes.
    """
    folder = tempfile.gettempdir()
    if device_type == "cpu" and not is_plain(folder):
        raise CompileCacheError(
            "the path of the folder for temporary files must have no spaces or quotes, got "
            f"{folder!r}: torch.compile cannot pass it to the C++ compiler; set TMPDIR to another "
            "folder"
        )


def default_folder() -> Path:
    """Return the folder where torch keeps compiled code by default."""
    return Path(os.environ.get(_INDUCTOR) or inductor_folder())


@contextlib.contextmanager
def usable_default() -> Iterator[None]:
    """Let torch keep compiled code in its default folder, by a path that the C++ compiler accepts.

    Raises:
        CompileCacheError: if code cannot be loaded from there.
    """
    given = os.environ.get(_INDUCTOR)
    folder = default_folder()
    if is_noexec(folder):
        raise CompileCacheError(
            f"cannot load compiled code from {folder}, which is on a file system mounted noexec: "
            f"choose another folder with --int8-compile-cache or {_INDUCTOR}"
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
    """Return this process's numbers of compile cache hits and misses so far."""
    graphs = torch._dynamo.utils.counters["aot_autograd"]
    kernels = torch._dynamo.utils.counters["inductor"]
    found = graphs["autograd_cache_hit"] + kernels["fxgraph_cache_hit"]
    missed = graphs["autograd_cache_miss"] + kernels["fxgraph_cache_miss"]
    # For a graph that AOTAutograd's cache bypasses, Inductor looks up the kernels.
    return int(found), int(missed + kernels["fxgraph_cache_bypass"])
