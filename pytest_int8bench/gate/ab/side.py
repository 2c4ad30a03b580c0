"""Measure one side of an A/B comparison: run pytest in a revision's worktree, with its own code."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pytest_int8bench.errors import ClearError
from pytest_int8bench.files import plain_path
from pytest_int8bench.gate.ab.worktrees import LOCAL_VARIABLES, Revision
from pytest_int8bench.processes.ab_files import SideFiles
from pytest_int8bench.processes.running import ending, run
from pytest_int8bench.results.base import SchemaError
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Timed

_PLUGIN = "pytest_int8bench.suite.side"
# Caches that the two sides must not share.
_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "extensions",
}
_INSTALLED = ("site-packages", "dist-packages")
_CODE = (".py", ".so", ".pyd")
_PROJECTS = ("pyproject.toml", "*/pyproject.toml", "*/*/pyproject.toml")
# Lines of pytest's output that explain a failure, most informative first.
_FAILURES = tuple(map(re.compile, (r"E   +(\w+.*)", r"ERROR: (?!usage)(.+)", r".*: error: (.+)")))
_TOO_OLD = re.compile(
    rf'(importing|loading) plugin "({re.escape(_PLUGIN)}|int8bench)"|'
    "unrecognized arguments: --int8"
)
# Python's import errors, for a module or for a name in a package, which may be a module.
_NO_MODULE = re.compile(
    r"No module named '([\w.]+)'|cannot import name '(\w+)' from (?:partially initialized module )?"
    r"'([\w.]+)'"
)
_MODULE_ENDS = (".py", "/__init__.py", ".so", ".*.so", ".pyd", ".*.pyd")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


class SideError(ClearError, RuntimeError):
    """Raised for a revision that cannot be measured."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A revision and the folders in which it is measured."""

    revision: Revision
    root: Path
    """Top level of the user's working tree."""
    tree: Path
    """Top level of the revision's worktree."""
    folder: Path
    """Folder in ``tree`` from which pytest runs."""
    site: Path
    """Target folder of ``--install``."""
    cache: Path
    """Compile cache shared by the processes of this side."""
    log: Path
    """File to which the output of all processes is appended."""

    def install(self, command: str) -> None:
        """Run the command of ``--install`` in the worktree; pip installs to ``site``.

        Raises:
            SideError: if the command fails.
        """
        environ = {**self._environ(), "PIP_TARGET": str(self.site), "PIP_UPGRADE": "1"}
        with self._logged(command) as log:
            begin = log.tell()
            code = run(command, cwd=self.tree, env=environ, log=log, shell=True)
        if code != 0:
            lines = self._printed(begin).strip().splitlines()
            why = f": {lines[-1].strip()}" if lines else ""
            how = f"exit code {code}" if code > 0 else ending(code)
            raise SideError(
                f"{self.revision.label}: --install failed with {how}{why} (its output is in "
                f"{self.log})"
            )

    def measure(self, pytest_args: Sequence[str], only: Collection[str] | None) -> Measured:
        """Run pytest once, in a fresh process.

        Args:
            pytest_args: the user's arguments; paths into the user's working tree are replaced by
                paths into the worktree.
            only: node ids to run; None for all.

        Raises:
            SideError: if nothing was measured, or if code of another revision was imported.
        """
        # If this process is killed, the next start removes this folder together with the worktrees.
        with tempfile.TemporaryDirectory(prefix="side-", dir=self.tree.parent) as folder:
            files = SideFiles.start(Path(folder) / "process", only)
            command = [sys.executable, "-P", "-m", "pytest", "-p", _PLUGIN]
            command += map(self._moved, pytest_args)
            command += ["--int8-lean", f"--int8-journal={files.journal}"]
            environ = {**self._environ(), **files.to_env_vars()}
            with self._logged(" ".join(command)) as log:
                begin = log.tell()
                start = time.monotonic()
                code = run(command, cwd=self.folder, env=environ, log=log)
                seconds = time.monotonic() - start
            modules = files.modules()
            try:
                saved = read(files.journal)
            except (FileNotFoundError, SchemaError):
                saved = None
        results = saved.timed if saved is not None else []
        if saved is None or modules is None or not results:
            what = "did not finish" if results else "measured nothing"
            raise SideError(self._failure(what, code, begin))
        self._check_own_code(modules)
        commit = saved.environment.get("commit")
        if commit != self.revision.commit:
            where = f", but at commit {commit}" if commit else ""
            raise SideError(
                f"{self.revision.label}: pytest's root folder must be in the worktree{where}; "
                "remove --rootdir and -c from the pytest arguments"
            )
        return Measured(saved.environment, results, seconds)

    @contextmanager
    def _logged(self, command: str) -> Iterator[IO[str]]:
        """Write a command to the log, and open the log for the command's output."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {command}  # {self.revision.label}\n")
            log.flush()
            yield log

    def _environ(self) -> dict[str, str]:
        left_out = {name for name in os.environ if name.startswith("PYTEST_XDIST_")}
        left_out |= LOCAL_VARIABLES  # in a git hook, they refer to the user's repository
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        given = [part for part in kept.get("PYTHONPATH", "").split(os.pathsep) if part]
        own = [self.site, self.tree / "src", self.tree, self.folder]
        path = [*map(str, own), *map(self._moved, given)]
        try:
            cache = plain_path(self.cache)
        except OSError as error:
            why = f"{error.strerror}: {error.filename}"
            raise SideError(f"cannot create a compile cache for this side: {why}") from None
        caches = {name: str(cache / folder) for name, folder in _CACHES.items()}
        return {**kept, **caches, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}

    def _moved(self, argument: str) -> str:
        """Replace a path into the user's working tree by the same path in the worktree."""
        name, equals, value = argument.partition("=")
        if equals and name.startswith("-"):
            return f"{name}={self._moved(value)}"
        if not os.path.isabs(argument):
            return argument
        # The path may point into the working tree directly or through links.
        for path in (Path(argument), Path(os.path.realpath(argument))):
            if path.is_relative_to(self.root):
                moved = self.tree / path.relative_to(self.root)
                return argument if self._is_data(path, moved) else str(moved)
        return argument

    def _is_data(self, path: Path, moved: Path) -> bool:
        """Return whether a path is not the project's code and exists only in the user's working
        tree, such as uncommitted weights or a virtual environment."""
        if any(part in path.parts for part in _INSTALLED):
            return True
        # Exclude uncommitted code here; it is refused when it is imported.
        return path.exists() and path.suffix != ".py" and not moved.exists()

    def _failure(self, what: str, code: int, begin: int) -> str:
        text = self._printed(begin)
        where = f"{self.revision.label}: "
        if _TOO_OLD.search(text):
            return where + (
                "pytest-int8bench is missing in this revision, turned off, or too old for "
                "int8bench ab"
            )
        if (missing := self._missing_module(text)) is not None:
            return where + missing
        found = (next(_matches(pattern, text), None) for pattern in _FAILURES)
        why = next(filter(None, found), None)
        return (
            where
            + f"pytest {what}: {ending(code)}"
            + (f": {why.strip()}" if why else "")
            + f" (its output is in {self.log})"
        )

    def _missing_module(self, text: str) -> str | None:
        """Return a message about a module that only the user's working tree has, such as a build
        output that git ignores, or None."""
        here = self.folder.relative_to(self.tree).as_posix()
        tops = dict.fromkeys(("", "src/", f"{here}/", f"{here}/src/"))
        for match in _NO_MODULE.finditer(text):
            module = (match[1] or f"{match[3]}.{match[2]}").strip(".")
            stem = module.replace(".", "/")
            patterns = [f"{top}{stem}{end}" for top in tops for end in _MODULE_ENDS if stem]
            found = (path for pattern in patterns for path in self.root.glob(pattern))
            files = (path.relative_to(self.root) for path in found)
            if (file := next((f for f in files if not (self.tree / f).exists()), None)) is not None:
                return (
                    f"module {module} is missing: {file} is in your working tree, but not in the "
                    "revision; if a build creates it, pass the build command, for example "
                    "--install 'pip install --no-deps .'"
                )
        return None

    def _printed(self, begin: int) -> str:
        """Return the log from byte ``begin``, without colors."""
        text = self.log.read_bytes()[begin:].decode(errors="replace")
        return _COLOR.sub("", text)

    def _check_own_code(self, modules: dict[str, str]) -> None:
        """Refuse project code that was imported from outside of this side's folders.

        Raises:
            SideError: naming the first such module.
        """
        own = [self.tree.resolve(), self.site.resolve(), self.cache.resolve()]
        # The user's working tree may contain a whole Python installation, for example from conda.
        python = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
        root, names = self.root.resolve(), self._names()
        for module, file in sorted(modules.items()):
            path = Path(file).resolve()
            is_installed = any(part in path.parts for part in _INSTALLED)
            is_python = not is_installed and any(path.is_relative_to(p) for p in python)
            if is_python or any(path.is_relative_to(folder) for folder in own):
                continue
            if path.is_relative_to(root) and not is_installed:
                raise SideError(
                    f"{self.revision.label}: module {module} was imported from {path}, not from "
                    "this revision; remove that path from sys.path, for example in a conftest.py "
                    "or an editable install (see --install)"
                )
            if module.partition(".")[0] in names:
                raise SideError(
                    f"{self.revision.label}: module {module} was imported from {path}, not from "
                    "the worktree; if the package must be built or installed, pass the command, "
                    "for example --install 'pip install --no-deps .'"
                )

    def _names(self) -> set[str]:
        """Return the top-level modules of the revision and the installed ones of its projects."""
        found = set()
        for folder in (self.tree, self.tree / "src"):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.suffix == ".py":
                    found.add(path.stem)
                elif (path / "__init__.py").is_file():
                    found.add(path.name)
        for project in self._projects():
            for distribution in importlib.metadata.distributions(name=project):
                found |= {
                    file.parts[0].partition(".")[0]
                    for file in distribution.files or ()
                    if file.suffix in _CODE and "editable" not in file.parts[0]
                }
        return found

    def _projects(self) -> set[str]:
        found = set()
        for pattern in _PROJECTS:
            for path in self.tree.glob(pattern):
                # Ignore invalid files; pip reports them.
                with suppress(OSError, ValueError, LookupError, TypeError):
                    name = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["name"]
                    found |= {name} if name and isinstance(name, str) else set()
        return found


@dataclass(frozen=True)
class Measured:
    """Output of one measuring process."""

    environment: dict[str, Any]
    results: list[Timed]
    seconds: float
    """Wall time of the process."""


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    for line in text.splitlines():
        if match := pattern.fullmatch(line):
            yield match[1]
