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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch._dynamo
import torch._functorch.config

from pytest_int8bench.environment import compiled_for
from pytest_int8bench.errors import ClearError
from pytest_int8bench.files import replace_text

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
        """Where the compiled code is."""
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
        os.environ[_INDUCTOR] = str(self.folder)
        os.environ[_TRITON] = str(self.folder / "triton")
        try:
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
        if self.folder.is_dir():
            return
        description = self.folder.with_suffix(".json")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(description, json.dumps(self._key, indent=2) + "\n")
        except OSError as error:
            raise CompileCacheError(
                f"the compile cache cannot be written: {error.strerror}: {error.filename}"
            ) from None


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
