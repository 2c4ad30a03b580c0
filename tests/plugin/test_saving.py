"""Where a session is saved, and that what cannot be written takes down nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_int8bench.files import relative
from toys.projects import SMOKE, THROUGHPUT, int8, journals, make_project, without

BASELINE = "--int8-mode=off"
REPORT = "--int8-report=report.md"


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forked: None
) -> pytest.Pytester:
    return make_project(pytester, monkeypatch, test_one=THROUGHPUT)


@pytest.mark.parametrize("folder", ["../my results", "kept here"])
def test_storage_may_be_anywhere(project: pytest.Pytester, folder: str) -> None:
    storage = (project.path / folder).resolve()
    found = project.runpytest_subprocess(
        *SMOKE,
        BASELINE,
        REPORT,
        "--benchmark-autosave",
        f"--benchmark-storage={folder}",
        *without(),
    )
    found.assert_outcomes(passed=1)
    assert found.ret == pytest.ExitCode.OK
    shown = storage if folder.startswith("..") else folder
    found.stdout.fnmatch_lines([f"saved: {shown}", "journal: .benchmarks/*", "report: report.md"])
    assert list(storage.rglob("*.json"))


def test_a_storage_that_cannot_be_written_loses_nothing_else(project: pytest.Pytester) -> None:
    (project.path / "taken").touch()
    found = project.runpytest_subprocess(
        *SMOKE,
        BASELINE,
        REPORT,
        *("--benchmark-autosave", "--benchmark-storage=taken", "--benchmark-json=new.json"),
        *without(),
    )
    found.assert_outcomes(passed=1)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines(
        [
            "not saved as JSON: see below",
            "journal: .benchmarks/*",
            "int8bench: saving failed: NotADirectoryError:*taken*",
            "report: report.md",
        ]
    )
    found.stdout.no_fnmatch_line("*INTERNALERROR*")
    assert (project.path / "new.json").exists()


def test_a_journal_that_cannot_be_written_is_no_error_with_warnings_as_errors(
    project: pytest.Pytester,
) -> None:
    (project.path / ".benchmarks").touch()
    found = project.runpytest_subprocess(
        *SMOKE, "-W", "error", "-W", "ignore::DeprecationWarning", *without()
    )
    found.assert_outcomes(passed=2)
    assert found.ret == pytest.ExitCode.OK
    found.stdout.fnmatch_lines([f"toy *{int8(4)} *", "journal: none*", "int8bench: no journal: *"])
    found.stdout.no_fnmatch_line("*INTERNALERROR*")
    assert not journals(project)


def test_paths_are_relative_to_the_folder_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert relative(folder / "a" / "b") == Path("a", "b")
    assert relative(tmp_path / "b") == tmp_path / "b"
    folder.rmdir()
    assert relative(tmp_path / "b") == tmp_path / "b"
