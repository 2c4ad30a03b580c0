"""Files that are written whole or not at all, their names, and the folder for cached ones."""

from __future__ import annotations

import errno
import os
import re
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
    is_noexec,
    is_plain,
    plain_path,
    replace_text,
    timestamp,
)


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


def test_interrupt_leaves_no_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_text(Path("file"), "text")
    assert os.listdir() == []


def test_appends_to_disk_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
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


# -- paths that command lines can hold -----------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "a-b_c.d+e@f=g,h:i"])
def test_a_plain_path_is_its_own(name: str, tmp_path: Path) -> None:
    assert plain_path(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["my cache", "it's", 'a"b', "a\\b", "$(x)", "a;b", "caf\xe9", "(1)"]
)
def test_another_path_gets_a_link(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    link.symlink_to(tmp_path)  # another's
    assert plain_path(folder).resolve() == folder


def test_links_are_where_temporary_paths_are_plain(
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
def test_noexec_is_found_above_a_folder(
    flag: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    found = SimpleNamespace(f_flag=flag)
    monkeypatch.setattr(os, "statvfs", lambda path: asked.append(path) or found)
    assert is_noexec(tmp_path / "a" / "b") is expected
    assert asked == [tmp_path]
