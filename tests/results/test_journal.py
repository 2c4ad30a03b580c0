"""The journal, also on a failing disk, and the folder of journals."""

from __future__ import annotations

import errno
import itertools
import json
from pathlib import Path

import pytest

from pytest_int8bench.results.journal import Journal, journal_folder
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result
from toys.disks import failing
from toys.results import result_of

ENVIRONMENT = {"machine": "here"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def point(number: int, **more: object) -> Result:
    return result_of(f"bs{number}", **more)


def is_whole(path: Path) -> bool:
    """Return whether each line is JSON."""
    return all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("room", [0, 1, 300])
@pytest.mark.parametrize("keeps_half", [False, True])
def test_records_lost_to_a_full_disk_are_written_with_the_next(
    path: Path, number: int, room: int, keeps_half: bool
) -> None:
    journal = Journal(path, ENVIRONMENT)
    journal.append(point(1))
    before = path.read_bytes()
    with failing(room, number, keeps_half=keeps_half):
        for count in (2, 3):
            with pytest.raises(OSError, match=r"\[Errno"):
                journal.append(point(count))
    assert path.read_bytes().startswith(before)
    assert keeps_half or path.read_bytes() == before
    assert journal.results == [point(1), point(2), point(3)]
    journal.append(point(4))
    assert is_whole(path)
    assert read(path).results == journal.results
    assert journal.problem() is None


def test_missing_records_are_written_or_reported_at_the_end(path: Path) -> None:
    journal = Journal(path, ENVIRONMENT)
    journal.append(point(1))
    with failing(10, errno.ENOSPC):
        with pytest.raises(OSError, match="No space"):
            journal.append(point(2))
        assert journal.problem() == "lacks 1 of 2 records: No space left on device"
    assert read(path).results == [point(1)]
    assert journal.problem() is None
    assert read(path).results == [point(1), point(2)]


@pytest.mark.parametrize("loss", ["file", "folder", "emptied", "cut", "torn"])
@pytest.mark.parametrize("is_at_the_end", [False, True])
def test_a_deleted_journal_is_written_again(tmp_path: Path, loss: str, is_at_the_end: bool) -> None:
    path = tmp_path / "folder" / "journal.jsonl"
    journal = Journal(path, ENVIRONMENT)
    journal.append(point(1))
    text = path.read_text()
    if loss in ("emptied", "cut", "torn"):
        path.write_text({"emptied": "", "cut": text[:-20], "torn": text + "{half"}[loss])
    else:
        path.unlink()
    if loss == "folder":
        path.parent.rmdir()
    if not is_at_the_end:
        journal.append(point(2))
    assert journal.problem() is None
    assert is_whole(path)
    assert read(path).results == journal.results
    assert read(path).environment == ENVIRONMENT


def test_another_journal_in_its_place_is_left_alone(path: Path) -> None:
    journal = Journal(path, ENVIRONMENT)
    journal.append(point(1))
    path.unlink()
    other = Journal(path, {"machine": "there"})
    other.append(point(8))
    journal.append(point(2))
    assert journal.path == path.with_name("journal-2.jsonl")
    assert read(journal.path).results == [point(1), point(2)]
    other.append(point(9))
    assert read(path).results == [point(8), point(9)]


def test_a_failed_withdrawal_is_repaired_later(path: Path) -> None:
    journal = Journal(path, ENVIRONMENT)
    journal.append(point(1, status="failed", reason="once"))
    with failing(0, errno.EIO):
        with pytest.raises(OSError, match="Input/output"):
            journal.withdraw(journal.records_of(point(1).nodeid))
        assert journal.problem() == "is out of date: Input/output error"
    assert journal.problem() is None
    assert read(path).results == []


def test_a_file_is_created_whole_or_not_at_all(path: Path) -> None:
    with failing(5, errno.ENOSPC), pytest.raises(OSError, match="No space"):
        Journal(path, ENVIRONMENT)
    assert not path.exists()


def test_an_existing_journal_is_not_overwritten(path: Path) -> None:
    Journal(path, ENVIRONMENT).append(point(1))
    with pytest.raises(FileExistsError):
        Journal(path, ENVIRONMENT)
    assert read(path).results == [point(1)]


def test_a_reopened_journal_continues_after_whole_lines(path: Path) -> None:
    journal = Journal(path, ENVIRONMENT)
    journal.append(point(1))
    whole = path.read_text()
    for end, broken in itertools.product(("", "{half"), ("", "x\n")):
        path.write_text(whole + broken + end)
        again = Journal.reopen(path)
        again.append(point(2))
        assert is_whole(path)
        assert read(path).results == [point(1), point(2)]


def test_the_fingerprint_may_come_later(path: Path) -> None:
    journal = Journal(path, {})
    assert read(path).results == []
    told: list[str] = []
    journal.tell = told.append
    journal.begin(ENVIRONMENT)
    journal.append(point(1))
    assert read(path).environment == ENVIRONMENT
    assert read(path).results == [point(1)]
    assert told == path.read_text().splitlines()


def test_a_journal_without_records_can_be_discarded(path: Path) -> None:
    journal = Journal(path, {})
    journal.discard()
    assert not path.exists()
    journal.append(point(1))
    journal.discard()
    assert read(path).results == [point(1)]


@pytest.mark.parametrize("another", ["new", "longer", "gone"])
def test_a_file_that_became_another_journal_is_not_discarded(path: Path, another: str) -> None:
    journal = Journal(path, {})
    if another == "longer":  # the same journal, with a record of another process that continues it
        Journal.reopen(path).append(point(1))
    else:
        path.unlink()
    if another == "new":
        Journal(path, {})
    before = path.read_text() if path.exists() else None
    journal.discard()
    assert (path.read_text() if path.exists() else None) == before


def test_git_ignores_the_folder_of_journals(tmp_path: Path) -> None:
    folder = journal_folder(tmp_path)
    assert (folder / ".gitignore").read_text() == "*\n"
    assert journal_folder(tmp_path) == folder


def test_does_not_write_the_ignore_file_through_a_link(tmp_path: Path) -> None:
    folder = journal_folder(tmp_path)
    ignore = folder / ".gitignore"
    ignore.unlink()
    kept, missing = tmp_path / "kept", tmp_path / "missing"
    kept.write_text("text")
    for target in (kept, missing):
        ignore.symlink_to(target)
        journal_folder(tmp_path)
        ignore.unlink()
    assert kept.read_text() == "text"
    assert not missing.exists()


def test_a_users_ignore_file_is_kept(tmp_path: Path) -> None:
    ignore = journal_folder(tmp_path) / ".gitignore"
    ignore.write_text("*\n!keep.jsonl\n")
    journal_folder(tmp_path)
    assert ignore.read_text() == "*\n!keep.jsonl\n"
