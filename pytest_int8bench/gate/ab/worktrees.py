"""Check revisions of the user's repository out side by side.

The user's working tree, index, branches, stash and HEAD stay as they are.
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
# The temporary folders of another machine (a cluster's node, a container) cannot be seen from
# here, and must not be taken for gone: the name says whose they are.
_HOST = re.sub(r"[^A-Za-z0-9.-]", "", platform.node())

_SETTINGS = (
    f"core.hooksPath={os.devnull}",  # git's hooks are for what the user does
    "core.fsmonitor=false",  # would start a process that watches the worktree
    "worktree.useRelativePaths=false",  # would write an extension into the repository's config
)
#: What git sets for its hooks, and what would lead every call to another repository or index:
#: `git rev-parse --local-env-vars`, without the settings that users give in the environment.
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
# Lines of git that are no errors: advice, progress, and what git-lfs says where to read on.
_BESIDE = re.compile(
    r"warning: |hint: |Preparing worktree|HEAD is now|Note: |[A-Z]\w+ing [\w ]+:\s+\d+%|"
    r"Downloading .*\(\d|Errors logged to |Use `git lfs"
)
_PROC = Path("/proc")
_SHORT = 10
_SHORTEST = 4  # git takes nothing shorter for the start of a hash


class GitError(ClearError):
    """Raised with one line if git refuses something or cannot work here."""


@dataclass(frozen=True)
class Revision:
    """A commit, and what the user calls it."""

    name: str
    """As typed: a branch, a tag, a hash, ``HEAD~3``."""
    commit: str
    """The full hash."""

    @property
    def label(self) -> str:
        """``main (1a2b3c4d5e)``, or the short hash alone where the name is a hash itself."""
        short = self.commit[:_SHORT]
        is_hash = len(self.name) >= _SHORTEST and self.commit.startswith(self.name.lower())
        return short if is_hash else f"{self.name} ({short})"


def find_repository(folder: Path) -> Path:
    """Return the top level of the working tree that ``folder`` is in.

    Raises:
        GitError: if git is not installed, ``folder`` is in no repository or in one without a
            working tree, or git refuses it (such as another user's repository).
    """
    code, out, err = _run(folder, "rev-parse", "--show-toplevel")
    if code == 0:
        return Path(out.removesuffix("\n"))
    if "not a git repository" in err:
        raise GitError(f"{folder} is not in a git repository")
    if "must be run in a work tree" in err:
        raise GitError(f"{folder} is in a bare repository or a .git folder, not in a working tree")
    raise GitError(f"git cannot read {folder}: {_complaint(err)}")


def resolve(root: Path, name: str) -> Revision:
    """Return the commit that ``name`` stands for in the repository at ``root``.

    Raises:
        GitError: if ``name`` is no commit there, or git is not installed.
    """
    verify = ("rev-parse", "--verify", "--quiet", "--end-of-options")
    code, found, _ = _run(root, *verify, name)
    if code == 0:
        # Not NAME^{commit} at once: in ":/text", that would be part of the text.
        code, found, _ = _run(root, *verify, f"{found.strip()}^{{commit}}")
    commit = found.strip()
    if code == 0 and re.fullmatch("[0-9a-f]+", commit):  # "^main" is a valid answer, with its ^
        return Revision(name, commit)
    message = f"{name!r} is not a revision of {root}"
    if _run(root, "rev-parse", "--is-shallow-repository")[1].strip() == "true":
        message += (
            " (the clone is shallow: fetch its history, in GitHub Actions with fetch-depth: 0)"
        )
    raise GitError(message)


def changed_files(root: Path) -> list[str]:
    """Return the tracked files with changes that are not committed, staged or not.

    The paths start from ``root``. A submodule counts if its commit or its tracked files changed.

    Raises:
        GitError: if git cannot read the repository.
    """
    hide = ("--untracked-files=no", "--ignore-submodules=untracked", "--no-renames")
    out = _git(root, "status", "--porcelain", "-z", *hide)
    return [record[len("XY ") :] for record in out.split("\0") if record]


def has_submodules(folder: Path) -> bool:
    """Return whether the revision in ``folder`` has submodules, whose folders a worktree leaves
    empty."""
    return (folder / ".gitmodules").is_file()


@contextlib.contextmanager
def worktrees(root: Path, revisions: Mapping[str, Revision]) -> Iterator[dict[str, Path]]:
    """Check the revisions out into detached worktrees, and remove these in the end.

    They are in one folder in the folder for temporary files, outside of the repository, so that
    no ``conftest.py`` or ini file of the main checkout is above them. Submodules are not checked
    out. No hook runs.

    While the context is open, SIGTERM and SIGHUP end it as Ctrl-C does, with a ``SystemExit`` in
    the main thread; a signal that is ignored (``nohup``) stays so. In another thread, signals are
    left alone. What a process that was killed left behind is removed at the next start.

    Args:
        root: top level of the user's working tree, which may be a linked worktree.
        revisions: key -> revision. Keys are the names of the folders; two may have one commit.

    Yields:
        key -> folder.

    Raises:
        GitError: if git cannot check a revision out, or the folder for temporary files is in the
            repository.
        OSError: if nothing can be written to the folder for temporary files.
        SystemExit: on SIGTERM and SIGHUP, with 128 and the signal's number.

    Warns:
        UserWarning: if a worktree cannot be removed.
    """
    temporary = Path(tempfile.gettempdir()).resolve()
    if temporary.is_relative_to(root.resolve()):
        raise GitError(
            f"the folder for temporary files, {temporary}, is in the repository {root}: "
            "set TMPDIR to one outside of it"
        )
    with handling(exit_now, *ENDING):
        for folder in _left_behind(root, temporary):
            _remove(root, folder)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=f"-{_HOST}", dir=temporary))
        try:
            # Before git lists a worktree in it: without an owner, it counts as left behind.
            (folder / "owner").write_text(f"{os.getpid()} {_start_time(os.getpid())}")
            yield {key: _add(root, folder / key, value) for key, value in revisions.items()}
        finally:
            # Ignored rather than handled, so that git, which a terminal's Ctrl-C reaches as well,
            # inherits it.
            with handling(signal.SIG_IGN, signal.SIGINT, *ENDING):
                _remove(root, folder)


def _add(root: Path, folder: Path, revision: Revision) -> Path:
    try:
        # Checked out by a call of its own, which can be ended; `worktree add` leaves the process
        # that writes the files running when it is ended itself.
        _git(root, "worktree", "add", "--detach", "--no-checkout", str(folder), revision.commit)
        _git(folder, "reset", "--hard", "--quiet", "--no-recurse-submodules")
    except GitError as error:
        raise GitError(f"git cannot check out {revision.label}: {error}") from None
    return folder


def _left_behind(root: Path, temporary: Path) -> set[Path]:
    """Return the folders of this machine's processes that ended without removing theirs."""
    folders = {path.parent for path in _listed(root) if path.parent.parent == temporary}
    return {
        folder
        for folder in folders
        if folder.name.startswith(_PREFIX)
        and folder.name.removeprefix(_PREFIX).partition("-")[2] == _HOST
        and not _is_alive(folder / "owner")
    }


def _remove(root: Path, folder: Path) -> None:
    """Remove ``folder`` and its worktrees; warn where that is not possible.

    The folder goes first: as long as git lists a worktree in it, the next start finds the rest.
    Nothing is pruned, for worktrees of the user may be on a disk that is not mounted.
    """
    try:
        _delete(folder)
        for path in _listed(root):
            if path.parent == folder:  # twice --force: also a locked one
                _git(root, "worktree", "remove", "--force", "--force", str(path))
    except (OSError, GitError) as error:
        text = f"int8bench could not remove {folder}: {error}"
        try:
            warnings.warn(text, stacklevel=2)
        except UserWarning:  # with warnings as errors; what was measured must not be lost for this
            show(text, error=True)


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        return
    # Builds and package managers make folders read-only.
    for parent, names, _ in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.chmod(0o700)
    shutil.rmtree(folder)


def _listed(root: Path) -> list[Path]:
    """Return the folders of all worktrees of the repository, the main one too."""
    lines = _git(root, "worktree", "list", "--porcelain").split("\n")
    return [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]


# -- processes and signals --------------------------------------------------------------------


def _is_alive(owner: Path) -> bool:
    """Return whether the process that wrote ``owner`` still runs."""
    try:
        pid, start = owner.read_text().split()
        return _start_time(int(pid)) == start
    except PermissionError:  # another user's, who can remove it
        return True
    except (OSError, ValueError):  # gone with the folder, or cut off by a power cut
        return False


def _start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since the machine did; a process that took
    over the number of another has another time. None if there is no such process, ``unknown`` if
    there is, but no ``/proc``."""
    if not (_PROC / "self" / "stat").exists():
        try:
            os.kill(pid, 0)
        except PermissionError:  # another user's process
            pass
        except (ProcessLookupError, OverflowError):
            return None
        return "unknown"
    try:
        # proc(5): the state is field 3, the start time field 22. The name in field 2 may hold
        # spaces and parentheses.
        stat = (_PROC / str(pid) / "stat").read_text("latin-1")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]  # ended, but nobody asked how


# -- git --------------------------------------------------------------------------------------


def _git(folder: Path, *arguments: str) -> str:
    code, out, err = _run(folder, *arguments)
    if code != 0:
        raise GitError(_complaint(err))
    return out


def _run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run git in ``folder`` and return its exit code and what it printed."""
    settings = [word for setting in _SETTINGS for word in ("-c", setting)]
    environ = {name: value for name, value in os.environ.items() if name not in LOCAL_VARIABLES}
    # Messages that can be recognized, and no refreshed index written by a mere question.
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
            # Ended and not killed, as subprocess.run would: git removes what is half made.
            process.terminate()
            process.wait()
            raise
    return process.returncode, os.fsdecode(out), os.fsdecode(err)


def _complaint(err: str) -> str:
    """Return the first line of an error that git prints, and the last one, which names what git
    could not do. The first has the cause: what a filter such as git-lfs says goes before git's
    own."""
    lines = [line for part in re.split(r"[\r\n]+", err) if (line := part.strip())]
    lines = [line for line in lines if not _BESIDE.match(line)] or lines
    errors = [line for line in lines if line.startswith(("error: ", "fatal: "))]
    telling = dict.fromkeys([*lines[:1], *(errors or lines)[-1:]])
    return "; ".join(telling) or "git failed without a message"
