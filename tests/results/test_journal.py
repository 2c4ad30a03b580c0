"""The folder of journals."""

from __future__ import annotations

from pathlib import Path

from pytest_int8bench.results.journal import journal_folder


def test_git_ignores_the_folder_of_journals(tmp_path: Path) -> None:
    folder = journal_folder(tmp_path)
    assert (folder / ".gitignore").read_text() == "*\n"
    assert journal_folder(tmp_path) == folder


def test_a_link_in_place_of_the_ignore_file_is_not_written_through(tmp_path: Path) -> None:
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


def test_an_ignore_file_of_the_users_own_is_kept(tmp_path: Path) -> None:
    ignore = journal_folder(tmp_path) / ".gitignore"
    ignore.write_text("*\n!keep.jsonl\n")
    journal_folder(tmp_path)
    assert ignore.read_text() == "*\n!keep.jsonl\n"
