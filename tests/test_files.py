"""Test atomic writes of files, their names, and the cache folder."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench import files
from pytest_int8bench.files import (
    append_text,
    cache_folder,
    create,
    is_noexec,
    is_plain,
    plain_path,
    probe,
    replace_text,
    timestamp,
)
from toys.disks import failing


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600)])
def test_new_file_follows_umask(umask: int, expected: int) -> None:
    previous = os.umask(umask)
    try:
        replace_text(Path("new"), "text")
    finally:
        os.umask(previous)
    assert mode(Path("new")) == expected


def test_replaced_file_keeps_its_mode() -> None:
    path = Path("deep/file")
    replace_text(path, "one ü\n")
    path.chmod(0o640)
    replace_text(path, "two ü\n")
    assert path.read_text(encoding="utf-8") == "two ü\n"
    assert mode(path) == 0o640
    assert os.listdir("deep") == ["file"]


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize(("write", "expected"), [(replace_text, "old"), (append_text, "old")])
def test_full_disk_leaves_file_as_it_was(write: Any, expected: str) -> None:
    path = Path("file")
    path.write_text("old")
    with pytest.raises(OSError, match="No space left on device"):
        write(path, "new")
    assert path.read_text() == expected
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("room", [0, 1, 4])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_disk_leaves_no_partial_text(room: int, number: int) -> None:
    path = Path("file")
    path.write_text("old")
    with failing(room, number), pytest.raises(OSError, match=re.escape(os.strerror(number))):
        append_text(path, "a new line\n")
    assert path.read_text() == "old"
    with failing(room, number), pytest.raises(OSError, match=re.escape(os.strerror(number))):
        create(Path("other"), "a new line\n")
    assert os.listdir() == ["file"]


def test_handles_short_writes() -> None:
    """A nearly full disk accepts part of the data: write the rest, or leave nothing behind."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        append_text(Path("file"), "1234\n")
        with pytest.raises(OSError, match="File too large"):
            append_text(Path("file"), "5678\n")
        with pytest.raises(OSError, match="File too large"):
            create(Path("other"), "0123456789\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert Path("file").read_text() == "1234\n"
    assert os.listdir() == ["file"]


def test_create_fails_if_the_file_exists() -> None:
    create(Path("file"), "mine")
    Path("link").symlink_to("nowhere")
    for taken in ("file", "link"):
        with pytest.raises(FileExistsError):
            create(Path(taken), "other")
    assert Path("file").read_text() == "mine"
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("there", ["missing", "file", "link", "link to nowhere"])
def test_probe_does_not_change_a_writable_file(there: str) -> None:
    path = Path("file")
    if there == "file":
        path.write_text("kept")
    elif there == "link":
        Path("target").write_text("kept")
        path.symlink_to("target")
    elif there == "link to nowhere":
        path.symlink_to("target")
    before = sorted(os.listdir())
    probe(path)
    assert sorted(os.listdir()) == before
    assert not path.is_file() or path.read_text() == "kept"


def test_probe_accepts_shell_pipes_and_devices() -> None:
    read_end, write_end = os.pipe()
    probe(Path(f"/dev/fd/{write_end}"))
    probe(Path(os.devnull))
    os.close(write_end)
    os.close(read_end)


def test_probe_rejects_unwritable_paths() -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("plain").touch()
    Path("link").symlink_to("missing/file")
    for name, why in {
        "folder": "Is a directory",
        "missing/file": "No such file",
        "plain/file": "Not a directory",
        "pipe": "a named pipe",
        "x" * 300: "File name too long",
        "link": "No such file",
        "/proc/new": "No such file",
    }.items():
        with pytest.raises(OSError, match=why):
            probe(Path(name))
    with failing(100, errno.ENOSPC), pytest.raises(OSError, match="No space"):
        probe(Path("new"))
    assert sorted(os.listdir()) == ["folder", "link", "pipe", "plain"]


def test_interrupt_leaves_no_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_text(Path("file"), "text")
    assert os.listdir() == []


def test_appends_to_disk_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    for line in ("one ü\n", "two\n"):
        append_text(Path("file"), line)
    assert Path("file").read_text(encoding="utf-8") == "one ü\ntwo\n"
    assert len(synced) == 2


def test_timestamp_is_utc_and_sorts() -> None:
    before = time.time()
    text = timestamp()
    assert re.fullmatch(r"\d{8}T\d{6}Z", text)
    assert text >= time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(before))


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "pytest-int8bench"


@pytest.mark.parametrize("value", [None, "", "relative/cache"])
def test_cache_folder_is_below_home_otherwise(
    value: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "pytest-int8bench"


# -- paths for command lines ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "a-b_c.d+e@f=g,h:i"])
def test_plain_path_is_unchanged(name: str, tmp_path: Path) -> None:
    assert plain_path(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["my cache", "it's", 'a"b', "a\\b", "$(x)", "a;b", "caf\xe9", "(1)"]
)
def test_other_paths_get_a_link(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / name
    folder.mkdir()
    link = plain_path(folder)
    assert is_plain(link)
    assert link.is_relative_to(tmp_path / "cache")
    assert link.resolve() == folder
    assert plain_path(folder) == link
    assert stat.S_IMODE(link.parent.stat().st_mode) == 0o700
    (folder / "file").touch()
    assert (link / "file").exists()
    link.unlink()
    link.symlink_to(tmp_path)  # another user's
    assert plain_path(folder).resolve() == folder


def test_links_go_to_a_folder_with_a_plain_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "my tmp"))
    folder = tmp_path / "my folder"
    folder.mkdir()
    link = plain_path(folder)
    assert is_plain(link)
    assert link.resolve() == folder
    link.unlink()


def test_refuses_links_in_the_folder_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        plain_path(tmp_path / "my folder")


@pytest.mark.parametrize(("flag", "expected"), [(0, False), (os.ST_NOEXEC, True)])
def test_detects_noexec_mount_above_a_folder(
    flag: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    found = SimpleNamespace(f_flag=flag)
    monkeypatch.setattr(os, "statvfs", lambda path: asked.append(path) or found)
    assert is_noexec(tmp_path / "a" / "b") is expected
    assert asked == [tmp_path]
