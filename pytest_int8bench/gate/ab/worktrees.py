"""Check out revisions of the user's repository side by side.

The user's working tree, index, branches, stash and HEAD are not changed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pytest_int8bench.errors import ClearError
from pytest_int8bench.printing import show
from pytest_int8bench.processes.signals import ENDING, exit_now, handling

_PREFIX = "int8bench-ab-"
# Folder names contain the host, because temporary folders of another host (a cluster node, a
# container) are not visible from here and must not be mistaken for abandoned ones.
_HOST = re.sub(r"[^A-Za-z0-9.-]", "", platform.node())

_SETTINGS = (
    f"core.hooksPath={os.devnull}",  # hooks must run only for the user's own commands
    "core.fsmonitor=false",  # would start a process that watches the worktree
    "worktree.useRelativePaths=false",  # would write an extension into the repository's config
)
#: Variables that git sets for its hooks, and that would redirect every call to another repository
#: or index: `git rev-parse --local-env-vars`, except settings that users pass in the environment.
LOCAL_VARIABLES = {
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_CONFIG",
    "GIT_DIR",
    "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_INTERNAL_SUPER_PREFIX",
    "GIT_NO_REPLACE_OBJECTS",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
}
# Lines of git that are not errors: advice, progress, and where git-lfs logs its errors.
_NOT_ERRORS = re.compile(
    r"warning: |hint: |Preparing worktree|HEAD is now|Note: |[A-Z]\w+ing [\w ]+:\s+\d+%|"
    r"Downloading .*\(\d|Errors logged to |Use `git lfs"
)
_PROC = Path("/proc")
_SHORT = 10
_SHORTEST = 4  # git does not accept shorter abbreviations of a hash


class GitError(ClearError):
    """Raised if git fails or cannot be used."""


@dataclass(frozen=True)
class Revision:
    """A commit and the user's name for it."""

    name: str
    """Name as typed: a branch, a tag, a hash, ``HEAD~3``."""
    commit: str
    """Full hash."""

    @property
    def label(self) -> str:
        """``main (1a2b3c4d5e)``, or only the short hash if the name is a hash itself."""
        short = self.commit[:_SHORT]
        is_hash = len(self.name) >= _SHORTEST and self.commit.startswith(self.name.lower())
        return short if is_hash else f"{self.name} ({short})"


def find_repository(folder: Path) -> Path:
    """Return the top level of the working tree that contains ``folder``.

    Raises:
        GitError: if git is not installed, ``folder`` is not in a working tree of a repository, or
            git refuses to use it (for example, because another user owns it).
    """
    code, out, err = _run(folder, "rev-parse", "--show-toplevel")
    if code == 0:
        return Path(out.removesuffix("\n"))
    if "not a git repository" in err:
        raise GitError(f"{folder} is not in a git repository")
    if "must be run in a work tree" in err:
        raise GitError(f"{folder} is in a bare repository or a .git folder, not in a working tree")
    raise GitError(f"git cannot read {folder}: {_error_summary(err)}")


def resolve(root: Path, name: str) -> Revision:
    """Resolve a revision's name in the repository at ``root``.

    Raises:
        GitError: if ``name`` is not a commit there, or git is not installed.
    """
    verify = ("rev-parse", "--verify", "--quiet", "--end-of-options")
    code, found, _ = _run(root, *verify, name)
    if code == 0:
        # Peel in a second step: in ":/text", an appended ^{commit} would be part of the text.
        code, found, _ = _run(root, *verify, f"{found.strip()}^{{commit}}")
    commit = found.strip()
    if code == 0 and re.fullmatch("[0-9a-f]+", commit):  # for "^main", git prints ^ and the hash
        return Revision(name, commit)
    message = f"{name!r} is not a revision of {root}"
    if _run(root, "rev-parse", "--is-shallow-repository")[1].strip() == "true":
        message += (
            " (the clone is shallow; fetch its history, in GitHub Actions with fetch-depth: 0)"
        )
    raise GitError(message)


def changed_files(root: Path) -> list[str]:
    """Return the tracked files with uncommitted changes, staged or not, relative to ``root``.

    A submodule counts if its commit or its tracked files changed.

    Raises:
        GitError: if git cannot read the repository.
    """
    hide = ("--untracked-files=no", "--ignore-submodules=untracked", "--no-renames")
    out = _git(root, "status", "--porcelain", "-z", *hide)
    return [record[len("XY ") :] for record in out.split("\0") if record]


def has_submodules(folder: Path) -> bool:
    """Return whether the revision in ``folder`` has submodules; a worktree leaves them empty."""
    return (folder / ".gitmodules").is_file()


@contextlib.contextmanager
def worktrees(root: Path, revisions: Mapping[str, Revision]) -> Iterator[dict[str, Path]]:
    """Check out the revisions into detached worktrees, and remove them at the end.

    The worktrees are in a new folder in the temporary directory, outside of the repository, so that
    pytest finds no ``conftest.py`` or ini file of the main checkout above them. Submodules are not
    checked out, and hooks do not run.

    While the context is open, SIGTERM and SIGHUP end it like Ctrl-C, by a ``SystemExit`` in the
    main thread. Ignored signals (``nohup``) stay ignored, and outside of the main thread, signal
    handlers are not changed. Worktrees of a killed process are removed at the next start.

    Args:
        root: top level of the user's working tree, which may be a linked worktree.
        revisions: key -> revision. Keys are folder names; two revisions may be the same commit.

    Yields:
        key -> folder.

    Raises:
        GitError: if git cannot check out a revision, or the temporary directory is in the
            repository.
        OSError: if the temporary directory is not writable.
        SystemExit: on SIGTERM and SIGHUP, with the code 128 plus the signal's number.

    Warns:
        UserWarning: if a worktree cannot be removed.
    """
    temporary = Path(tempfile.gettempdir()).resolve()
    if temporary.is_relative_to(root.resolve()):
        raise GitError(
            f"the temporary directory must be outside of the repository {root}, got {temporary}; "
            "set TMPDIR to another directory"
        )
    with handling(exit_now, *ENDING):
        for folder in _abandoned(root, temporary):
            _remove(root, folder)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=f"-{_HOST}", dir=temporary))
        try:
            # Write this before git lists a worktree in the folder: without an owner, another
            # process would remove it as abandoned.
            (folder / "owner").write_text(f"{os.getpid()} {_start_time(os.getpid())}")
            yield {key: _add(root, folder / key, value) for key, value in revisions.items()}
        finally:
            # Ignore signals instead of handling them, so that git inherits this. A terminal sends
            # Ctrl-C to git as well.
            with handling(signal.SIG_IGN, signal.SIGINT, *ENDING):
                _remove(root, folder)


def _add(root: Path, folder: Path, revision: Revision) -> Path:
    try:
        # Check out with a separate command: when terminated, `worktree add` leaves the process that
        # writes the files running.
        _git(root, "worktree", "add", "--detach", "--no-checkout", str(folder), revision.commit)
        _git(folder, "reset", "--hard", "--quiet", "--no-recurse-submodules")
    except GitError as error:
        raise GitError(f"git cannot check out {revision.label}: {error}") from None
    return folder


def _abandoned(root: Path, temporary: Path) -> set[Path]:
    """Return the folders that ended processes of this host did not remove."""
    folders = {path.parent for path in _listed(root) if path.parent.parent == temporary}
    return {
        folder
        for folder in folders
        if folder.name.startswith(_PREFIX)
        and folder.name.removeprefix(_PREFIX).partition("-")[2] == _HOST
        and not _is_alive(folder / "owner")
    }


def _remove(root: Path, folder: Path) -> None:
    """Remove ``folder`` and its worktrees; warn if that fails.

    Delete the folder first: as long as git lists a worktree in it, the next start finds the rest.
    Do not prune, because worktrees of the user may be on a disk that is not mounted.
    """
    try:
        _delete(folder)
        for path in _listed(root):
            if path.parent == folder:  # a second --force also removes a locked worktree
                _git(root, "worktree", "remove", "--force", "--force", str(path))
    except (OSError, GitError) as error:
        text = f"int8bench could not remove {folder}: {error}"
        try:
            warnings.warn(text, stacklevel=2)
        except UserWarning:  # warnings are errors, but the results must not be lost
            show(text, error=True)


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        return
    # Builds and package managers can make folders read-only.
    for parent, names, _ in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.chmod(0o700)
    shutil.rmtree(folder)


def _listed(root: Path) -> list[Path]:
    """Return the folders of all worktrees of the repository, including the main one."""
    lines = _git(root, "worktree", "list", "--porcelain").split("\n")
    return [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]


# -- processes and signals --------------------------------------------------------------------


def _is_alive(owner: Path) -> bool:
    """Return whether the process that wrote ``owner`` is still running."""
    try:
        pid, start = owner.read_text().split()
        return _start_time(int(pid)) == start
    except PermissionError:  # another user owns it and can remove it
        return True
    except (OSError, ValueError):  # removed with the folder, or truncated by a power failure
        return False


def _start_time(pid: int) -> str | None:
    """Return a process's start time in clock ticks since boot, which tells reused ids apart.

    Return None for no such process, and ``unknown`` for one without ``/proc``.
    """
    if not (_PROC / "self" / "stat").exists():
        try:
            os.kill(pid, 0)
        except PermissionError:  # another user's process
            pass
        except (ProcessLookupError, OverflowError):
            return None
        return "unknown"
    try:
        # proc(5): the state is field 3, the start time field 22. The name in field 2 may contain
        # spaces and parentheses.
        stat = (_PROC / str(pid) / "stat").read_text("latin-1")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]  # Z and X: ended, but not reaped yet


# -- git --------------------------------------------------------------------------------------


def _git(folder: Path, *arguments: str) -> str:
    code, out, err = _run(folder, *arguments)
    if code != 0:
        raise GitError(_error_summary(err))
    return out


def _run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    settings = [word for setting in _SETTINGS for word in ("-c", setting)]
    environ = {name: value for name, value in os.environ.items() if name not in LOCAL_VARIABLES}
    # Untranslated messages, and no index refresh by commands that only read.
    environ |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            ["git", *settings, "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env=environ,
        )
    except FileNotFoundError:
        raise GitError("git is not installed") from None
    with process:
        try:
            out, err = process.communicate()
        except BaseException:
            # Terminate instead of killing (as subprocess.run does), so that git can clean up.
            process.terminate()
            process.wait()
            raise
    return process.returncode, os.fsdecode(out), os.fsdecode(err)


def _error_summary(err: str) -> str:
    """Return the first line of git's errors, which has the cause (filters such as git-lfs print
    before git does), and the last, which names the failed operation."""
    lines = [line for part in re.split(r"[\r\n]+", err) if (line := part.strip())]
    lines = [line for line in lines if not _NOT_ERRORS.match(line)] or lines
    errors = [line for line in lines if line.startswith(("error: ", "fatal: "))]
    telling = dict.fromkeys([*lines[:1], *(errors or lines)[-1:]])
    return "; ".join(telling) or "git failed without a message"
