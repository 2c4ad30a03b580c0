"""What ``int8bench ab`` and a process that measures tell each other, through files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from os.path import isabs
from pathlib import Path

_FOLDER = "INT8BENCH_SIDE"


@dataclass(frozen=True)
class SideFiles:
    """A folder in which the two processes tell each other what they must know."""

    folder: Path

    @classmethod
    def start(cls, folder: Path, only: Collection[str] | None) -> SideFiles:
        """Make the folder for a process to be started, which runs the node ids ``only``."""
        files = cls(folder)
        folder.mkdir(parents=True)
        files._parent.write_text(str(os.getpid()))
        if only is not None:
            files._only.write_text(json.dumps(sorted(only)))
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
        """Journal of the process."""
        return self.folder / "journal.jsonl"

    def only(self) -> list[str] | None:
        """Return the node ids to run; None for all."""
        return json.loads(self._only.read_text()) if self._only.exists() else None

    def is_started_by(self, pid: int) -> bool:
        """Say whether it was the process ``pid`` that made the folder."""
        return self._parent.exists() and self._parent.read_text() == str(pid)

    def note_modules(self) -> None:
        """Write down the files of all modules that are loaded."""
        files = {name: getattr(module, "__file__", None) for name, module in [*sys.modules.items()]}
        # torch.classes and the like make up a relative one.
        found = {n: file for n, file in files.items() if isinstance(file, str) and isabs(file)}
        self._modules.write_text(json.dumps(found))

    def modules(self) -> dict[str, str] | None:
        """Return module -> file; None if the process did not get as far as that."""
        return json.loads(self._modules.read_text()) if self._modules.exists() else None

    @property
    def _parent(self) -> Path:
        return self.folder / "parent"

    @property
    def _only(self) -> Path:
        return self.folder / "only.json"

    @property
    def _modules(self) -> Path:
        return self.folder / "modules.json"
