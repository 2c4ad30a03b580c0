"""Write files atomically, name them by time, and find the cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pytest_int8bench.errors import ClearError

_PLAIN = re.compile(r"[A-Za-z0-9_./+@:%~=,-]*")
#: Disk errors that may have passed by the next write.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
#: Free space that a disk must have; the smallest benchmark files are about this size.
_PROBE_BYTES = 1 << 16
_PROBE_NAME_LENGTH = 100
# Keys of saved files and journals, including damaged ones and those of newer versions.
_BENCHMARKS = re.compile(r'"(benchmarks|int8bench)"\s*:')


class FileError(ClearError, ValueError):
    """A file does not exist, or must not be written."""


def check_writable(path: Path) -> None:
    """Refuse to overwrite anything but a report.

    Raises:
        FileError: one line, if ``path`` contains benchmarks or is not a regular file.
        OSError: if the file cannot be read.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise FileError(f"refusing to overwrite {path}: not a regular file")
    if _BENCHMARKS.search(path.read_text(encoding="utf-8", errors="replace")):
        raise FileError(f"refusing to overwrite {path}: it contains saved benchmarks")


def write(path: Path, text: str) -> None:
    """Write a report atomically, replacing an older report but never saved benchmarks.

    Raises:
        FileError: one line, if ``path`` contains benchmarks or cannot be written.
    """
    with _as_file_error(path):
        check_writable(path)
        replace_text(path, text)


def append(path: Path, text: str) -> None:
    """Append all of ``text`` or nothing to a shared file such as ``$GITHUB_STEP_SUMMARY``.

    Raises:
        FileError: one line, if the file contains benchmarks or cannot be written.
    """
    with _as_file_error(path):
        if path.is_file() and _is_saved(path.read_text(encoding="utf-8", errors="replace")):
            raise FileError(f"refusing to append to {path}: it contains saved benchmarks")
        with _with_reader(path):
            append_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Create a file with this text, or replace an existing one and keep its mode.

    The text is on disk when this returns. Readers see the old text or the new one, never a part.
    The folder is created if it does not exist.

    Raises:
        OSError: if the file cannot be written; an old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(_mode(path))
        partial.replace(path)
    except BaseException:  # includes Ctrl-C
        partial.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str) -> None:
    """Append all of ``text`` or nothing, create the file if needed, and sync it to disk.

    Raises:
        OSError: if the text cannot be written; the file is unchanged.
    """
    # A buffer would keep text that could not be written, and write it when the file is closed.
    with path.open("ab", buffering=0) as file:
        before = file.tell() if path.is_file() else None  # None for a device or a pipe
        try:
            _write_all(file, text.encode())
            if before is not None:
                os.fsync(file.fileno())
        except BaseException:  # includes Ctrl-C
            if before is not None:
                with contextlib.suppress(OSError):
                    file.truncate(before)
            raise


def create(path: Path, text: str) -> None:
    """Create a new file. If several processes try at once, only one succeeds.

    Raises:
        FileExistsError: if the path exists, even as a dangling link.
        OSError: if the text cannot be written; no file is left behind.
    """
    with path.open("xb", buffering=0) as file:
        try:
            _write_all(file, text.encode())
            os.fsync(file.fileno())
        except BaseException:  # includes Ctrl-C
            path.unlink(missing_ok=True)
            raise


def probe_report(path: Path) -> None:
    """Check with :func:`probe` that :func:`write` can write a file, whose folder need not exist.

    Raises:
        FileError: one line, if the file cannot be written.
    """
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    with _as_file_error(path):
        probe(folder / path.name)


def probe(path: Path) -> None:
    """Check that a path is writable and its disk has room, without changing the file.

    Raises:
        OSError: if the file cannot be written.
    """
    target = real_path(path)
    if target.is_fifo():
        raise OSError(errno.EINVAL, "a named pipe, which may have no reader", str(path))
    if target.exists():
        with target.open("rb+" if target.is_file() else "ab"):
            pass
        if not target.is_file():
            return
    elif path.exists():  # a pipe from the shell, such as /dev/fd/63, whose target has no path
        return
    beside = target.with_name(f".{target.name[:_PROBE_NAME_LENGTH]}.{os.getpid()}")
    try:
        create(beside, " " * _PROBE_BYTES)
    except PermissionError:
        if not target.exists():
            raise
        return  # the folder is read-only, but the file itself could be opened
    beside.unlink()


class LineFile:
    """A file to which lines are appended, each synced to disk immediately.

    A line that cannot be written is retried with the next one. If the file has disappeared or
    changed, all lines are rewritten. If another file has taken its place, that file is left alone
    and the lines go to a new name.

    Args:
        path: the existing file; see :meth:`save`.
        lines: returns all lines of the file, without line ends.
        mark: start of the first line, which identifies this file.
        size: size of the file in bytes, or None if it must be rewritten.
    """

    def __init__(
        self, path: Path, lines: Callable[[], Iterable[str]], *, mark: str, size: int | None
    ) -> None:
        self.path = path
        self._lines = lines
        self._mark = mark.encode()
        self._size = size
        self._unwritten: list[str] = []

    def add(self, line: str) -> None:
        """Append a line, which ``lines`` must return from now on.

        Raises:
            OSError: if it cannot be written; the file is unchanged.
        """
        self._unwritten.append(line)
        self.save()

    def rewrite(self) -> None:
        """Rewrite all lines.

        Raises:
            OSError: if they cannot be written; the file is unchanged.
        """
        self._size = None
        self.save()

    def save(self) -> None:
        """Write the missing lines.

        Raises:
            OSError: if they cannot be written; the file is unchanged.
        """
        start, size = self._found()
        if start == self._mark and size == self._size:
            if self._unwritten:
                append_text(self.path, _joined(self._unwritten))
        elif not self._mark.startswith(start):
            self._move()
        else:
            replace_text(self.path, _joined(self._lines()))
        self._size = self.path.stat().st_size
        self._unwritten.clear()

    def lacking(self) -> int:
        """Return how many lines are missing from the file or differ from ``lines``."""
        start, size = self._found()
        if start == self._mark and size == self._size:
            return len(self._unwritten)
        return len([*self._lines()])

    def remove(self) -> None:
        """Remove the file, unless it has changed and may belong to another process.

        Raises:
            OSError: if it cannot be removed.
        """
        if self._found() == (self._mark, self._size):
            self.path.unlink()

    def _found(self) -> tuple[bytes, int]:
        try:
            with self.path.open("rb") as file:
                return file.read(len(self._mark)), os.fstat(file.fileno()).st_size
        except OSError:
            return b"", 0

    def _move(self) -> None:
        text = _joined(self._lines())
        for number in itertools.count(2):
            path = self.path.with_stem(f"{self.path.stem}-{number}")
            with contextlib.suppress(FileExistsError):
                create(path, text)
                self.path = path
                return


def _joined(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def real_path(path: Path) -> Path:
    """Resolve a path's links; ``Path.resolve`` may raise RuntimeError for a circle of links."""
    return Path(os.path.realpath(path))


def relative(path: Path) -> Path:
    """Return ``path`` relative to the current folder if that exists and contains it."""
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, OSError):
        return path


def timestamp() -> str:
    """Return the current UTC time for file names, such as ``20260131T235959Z``."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def cache_folder() -> Path:
    """Return the user's cache folder, which may not exist yet.

    It is ``pytest-int8bench`` in ``$XDG_CACHE_HOME``, or in ``~/.cache`` if that variable is unset,
    empty or a relative path, which the XDG specification tells programs to ignore.

    Raises:
        RuntimeError: if the user has no home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return folder / "pytest-int8bench"


def is_noexec(folder: Path) -> bool:
    """Return whether ``folder``, which need not exist, is on a file system mounted ``noexec``."""
    if not hasattr(os, "statvfs"):  # Windows
        return False
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return bool(os.statvfs(there).f_flag & getattr(os, "ST_NOEXEC", 0))


def is_plain(path: Path | str) -> bool:
    """Return whether ``path`` needs no quotes on a command line."""
    return _PLAIN.fullmatch(str(path)) is not None


def plain_path(folder: Path) -> Path:
    """Return a path to ``folder`` that needs no quotes on a command line.

    If the path itself needs quotes, this is a link in :func:`cache_folder` or in a folder for
    temporary files.

    Raises:
        OSError: if the link cannot be created, or all these folders need quotes too.
    """
    if is_plain(folder):
        return folder
    links = _links_folder(folder)
    link = links / hashlib.sha256(str(folder).encode(errors="surrogateescape")).hexdigest()[:16]
    if not (link.is_symlink() and link.readlink() == folder):
        partial = link.with_suffix(f".{os.getpid()}")
        partial.unlink(missing_ok=True)
        partial.symlink_to(folder)
        partial.replace(link)
    return link


def _links_folder(folder: Path) -> Path:
    # Prefer a permanent folder, because compile caches keep the links' paths.
    with contextlib.suppress(RuntimeError, OSError):  # no home directory, or a read-only one
        links = cache_folder() / "links"
        if is_plain(links):
            links.parent.mkdir(parents=True, exist_ok=True)
            links.mkdir(mode=0o700, exist_ok=True)
            return links
    user = os.getuid() if hasattr(os, "getuid") else 0
    temporary = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    usable = [path for path in temporary if is_plain(path) and path.is_dir()]
    if not usable:
        raise OSError(errno.EINVAL, "must be a path without spaces or quotes", str(folder))
    links = usable[0] / f"int8bench-links-{user}"
    links.mkdir(mode=0o700, exist_ok=True)
    if links.lstat().st_uid != user:
        raise PermissionError(errno.EACCES, "belongs to another user", str(links))
    return links


def _write_all(file: BinaryIO, data: bytes) -> None:
    # An unbuffered file may accept only a part per call, for example if the disk is nearly full.
    left = memoryview(data)
    while left:
        written = file.write(left)
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left = left[written:]


def _is_saved(text: str) -> bool:
    """Return whether a text is a saved, possibly damaged file, not a page that quotes one."""
    return text.lstrip().startswith("{") and _BENCHMARKS.search(text) is not None


@contextlib.contextmanager
def _with_reader(path: Path) -> Iterator[None]:
    """Refuse a named pipe without a reader, because opening it for writing would block."""
    if not path.is_fifo():
        yield
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(error.errno, "a named pipe without a reader", str(path)) from None
    try:
        yield  # keep the pipe open, so that its reader sees no end of file yet
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_file_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from None


def _mode(path: Path) -> int:
    """Return the mode of an existing file, or the default mode of a new one."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mode & 0o777
    current = os.umask(0)
    os.umask(current)
    return 0o666 & ~current
