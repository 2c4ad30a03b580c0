"""Exchange files between ``int8bench ab`` and a measuring process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from os.path import isabs
from pathlib import Path
from typing import Any

_FOLDER = "INT8BENCH_SIDE"
_PARENT, _ONLY, _MODULES = "parent", "only.json", "modules.json"


@dataclass(frozen=True)
class SideFiles:
    """The folder to which both processes write."""

    folder: Path

    @classmethod
    def start(cls, folder: Path, only: Collection[str] | None) -> SideFiles:
        """Create the folder for a new process that runs the node ids ``only``, or all if None."""
        files = cls(folder)
        folder.mkdir(parents=True)
        (folder / _PARENT).write_text(str(os.getpid()))
        if only is not None:
            (folder / _ONLY).write_text(json.dumps(sorted(only)))
        return files

    @classmethod
    def from_env_vars(cls) -> SideFiles:
        """Return the folder that :meth:`to_env_vars` names."""
        return cls(Path(os.environ[_FOLDER]))

    def to_env_vars(self) -> dict[str, str]:
        """Return the environment variable that names the folder."""
        return {_FOLDER: str(self.folder)}

    @property
    def journal(self) -> Path:
        """Path of the measuring process's journal."""
        return self.folder / "journal.jsonl"

    def only(self) -> list[str] | None:
        """Return the node ids to run, or None for all."""
        only: list[str] | None = self._read(_ONLY)
        return only

    def is_started_by(self, pid: int) -> bool:
        """Return whether the process ``pid`` created the folder."""
        path = self.folder / _PARENT
        return path.exists() and path.read_text() == str(pid)

    def note_modules(self) -> None:
        """Record the files of all loaded modules."""
        files = {name: getattr(module, "__file__", None) for name, module in [*sys.modules.items()]}
        # Pseudo-modules such as torch.classes have a relative path that does not exist.
        found = {n: file for n, file in files.items() if isinstance(file, str) and isabs(file)}
        (self.folder / _MODULES).write_text(json.dumps(found))

    def modules(self) -> dict[str, str] | None:
        """Return module -> file, or None if the process ended before recording them."""
        files: dict[str, str] | None = self._read(_MODULES)
        return files

    def _read(self, name: str) -> Any:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None
