"""Test where a session is saved, and that a failed write affects nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_int8bench.files import relative
from pytest_int8bench.results.reading import read
from toys.projects import SMOKE, THROUGHPUT, int8, journals, make_project, without

BASELINE = "--int8-mode=off"
REPORT = "--int8-report=report.md"


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forked: None
) -> pytest.Pytester:
    return make_project(pytester, monkeypatch, test_one=THROUGHPUT)


@pytest.mark.parametrize("folder", ["../my results", "kept here"])
def test_supports_storage_anywhere(project: pytest.Pytester, folder: str) -> None:
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


def test_unwritable_storage_loses_nothing_else(project: pytest.Pytester) -> None:
    with (project.path / "conftest.py").open("a") as conftest:
        conftest.write(
            "\nimport shutil, pathlib\n\ndef pytest_runtest_logfinish():\n"
            "    shutil.rmtree('taken', ignore_errors=True)\n    pathlib.Path('taken').touch()\n"
        )
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


def test_unwritable_journal_is_not_fatal_with_warnings_as_errors(
    project: pytest.Pytester,
) -> None:
    (project.path / ".benchmarks").touch()
    found = project.runpytest_subprocess(
        *SMOKE, "-W", "error", "-W", "ignore::DeprecationWarning", *without()
    )
    found.assert_outcomes(passed=2)
    assert found.ret == pytest.ExitCode.OK
    found.stdout.fnmatch_lines(
        [f"toy *{int8(4)} *", "journal: none*", "int8bench: cannot create the journal: *"]
    )
    found.stdout.no_fnmatch_line("*INTERNALERROR*")
    assert not journals(project)


#: conftest.py that simulates a full disk after the first test.
FULL = """
import errno, os, pathlib

opened = pathlib.Path.open

class Full:
    def __init__(self, file):
        self.file, self.room = file, {room}
    def write(self, data):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data)[:self.room]
        self.room -= len(part)
        return self.file.write(part)
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()

def full(path, mode="r", *args, **options):
    file = opened(path, mode, *args, **options)
    return Full(file) if mode == "ab" else file

def pytest_runtest_logfinish(nodeid):
    is_first = "_int8_" not in nodeid
    pathlib.Path.open = full if is_first else opened
"""


def test_briefly_full_disk_loses_nothing(project: pytest.Pytester) -> None:
    """The disk is full when the second of three results is written."""
    with (project.path / "conftest.py").open("a") as conftest:
        conftest.write(FULL.replace("{room}", "40"))
    found = project.runpytest_subprocess(
        *SMOKE, "--int8-mode=w8a8,w8", "--int8-journal=mine.jsonl", *without()
    )
    found.assert_outcomes(passed=3)
    assert found.ret == pytest.ExitCode.OK
    found.stdout.fnmatch_lines(["*cannot write a result to the journal: *", "journal: mine.jsonl"])
    saved = read(project.path / "mine.jsonl")
    assert len(saved.results) == 3
    assert saved.skipped == ()


@pytest.mark.parametrize("loss", ["os.remove(path)", "os.truncate(path, 10)"])
def test_deleted_journal_is_written_again(project: pytest.Pytester, loss: str) -> None:
    with (project.path / "conftest.py").open("a") as conftest:
        conftest.write(
            "\nimport os\n\ndef pytest_runtest_logfinish():\n    path = 'mine.jsonl'\n    " + loss
        )
    found = project.runpytest_subprocess(*SMOKE, "--int8-journal=mine.jsonl", *without())
    found.assert_outcomes(passed=2)
    found.stdout.fnmatch_lines(["journal: mine.jsonl"])
    assert len(read(project.path / "mine.jsonl").results) == 2


def test_reports_points_missing_from_the_journal(project: pytest.Pytester) -> None:
    """A journal was requested, but its folder became a file."""
    with (project.path / "conftest.py").open("a") as conftest:
        conftest.write(
            "\nimport shutil, pathlib\n\ndef pytest_runtest_logfinish():\n"
            "    shutil.rmtree('out', ignore_errors=True)\n    pathlib.Path('out').touch()\n"
        )
    found = project.runpytest_subprocess(*SMOKE, REPORT, "--int8-journal=out/it.jsonl", *without())
    found.assert_outcomes(passed=2)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines(
        ["journal: out/it.jsonl lacks 2 of 2 records: *", "report: report.md"]
    )


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("folder", "Is a directory"),
        ("missing/new.json", "No such file or directory"),
        ("taken/new.json", "Not a directory"),
        ("pipe", "a named pipe, which may have no reader"),
        ("/proc/new.json", "No such file or directory"),
    ],
)
def test_rejects_unwritable_json_at_start(project: pytest.Pytester, path: str, why: str) -> None:
    (project.path / "folder").mkdir()
    (project.path / "taken").touch()
    os.mkfifo(project.path / "pipe")
    found = project.runpytest_subprocess(*SMOKE, f"--benchmark-json={path}", *without())
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(
        [f"ERROR: --benchmark-json: must be a writable file, got '*{path}': {why}"]
    )
    assert not journals(project)
    found.stdout.no_fnmatch_line("*INTERNALERROR*")


@pytest.mark.parametrize(
    ("folder", "why"),
    [("taken", "Not a directory"), ("/proc/here", "No such file or directory")],
)
def test_rejects_unwritable_storage_at_start(
    project: pytest.Pytester, folder: str, why: str
) -> None:
    (project.path / "taken").touch()
    options = f"--benchmark-storage={folder}", "--benchmark-save=it"
    found = project.runpytest_subprocess(*SMOKE, *options, *without())
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    rule = "--benchmark-storage: must be a writable directory"
    found.stderr.fnmatch_lines([f"ERROR: {rule}, got '{folder}': {why}"])
    assert not journals(project)


def test_does_not_restrict_unrelated_sessions(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(benchmark):\n    benchmark(lambda: None)\n")
    found = pytester.runpytest_subprocess("--benchmark-json=/dev/stdout", *without())
    assert found.ret == pytest.ExitCode.OK


@pytest.mark.parametrize("change", ["shutil.rmtree('out')", "os.mkdir('out/new.json')"])
def test_json_that_becomes_unwritable_loses_nothing_else(
    project: pytest.Pytester, change: str
) -> None:
    with (project.path / "conftest.py").open("a") as conftest:
        conftest.write(
            f"\nimport os, shutil\n\ndef pytest_runtest_teardown():\n    {change}\n"
            "    if not os.path.exists('out'):\n        open('out', 'w').close()\n"
        )
    (project.path / "out").mkdir()
    found = project.runpytest_subprocess(
        *SMOKE,
        *(BASELINE, REPORT, "--benchmark-json=out/new.json", "--benchmark-autosave"),
        *without(),
    )
    found.assert_outcomes(passed=1)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines(
        [
            "not saved as JSON: see below",
            "journal: .benchmarks/*",
            "int8bench: saving failed: *",
            "report: report.md",
        ]
    )
    found.stdout.no_fnmatch_line("*INTERNALERROR*")
    assert [*(project.path / ".benchmarks").rglob("0001*.json")]


def test_json_is_replaced_atomically(project: pytest.Pytester) -> None:
    with (project.path / "conftest.py").open("a") as conftest:
        conftest.write(
            "\nimport os\n\ndef pytest_runtest_teardown():\n"
            "    def full(*_):\n        raise OSError(28, 'No space left on device')\n"
            "    os.fsync = full\n"
        )
    (project.path / "new.json").write_text("old")
    found = project.runpytest_subprocess(*SMOKE, BASELINE, "--benchmark-json=new.json", *without())
    found.stdout.fnmatch_lines(["int8bench: saving failed: OSError: *No space left on device"])
    assert (project.path / "new.json").read_text() == "old"
    assert not [*project.path.glob(".new.json*")]


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_rejects_existing_journal_at_start(project: pytest.Pytester, there: str) -> None:
    path = project.path / "mine.jsonl"
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to("nowhere")}[there]()
    found = project.runpytest_subprocess(*SMOKE, "--int8-journal=mine.jsonl", *without())
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(
        ["ERROR: --int8-journal: must be a writable file that does not exist yet, got *mine.jsonl*"]
    )


@pytest.mark.slow
def test_only_one_of_two_sessions_gets_the_journal(project: pytest.Pytester) -> None:
    """Both sessions find that it does not exist, and both would measure."""
    inner = (
        "\nimport pathlib, subprocess, sys\n\ndef pytest_configure(config):\n"
        "    if pathlib.Path('once').exists():\n        return\n    pathlib.Path('once').touch()\n"
        "    done = subprocess.run([sys.executable, '-m', 'pytest', *sys.argv[1:]])\n"
        "    pathlib.Path('once').write_text(str(done.returncode))\n"
    )
    with (project.path / "conftest.py").open("a") as conftest:
        conftest.write(inner)
    found = project.runpytest_subprocess(*SMOKE, BASELINE, "--int8-journal=mine.jsonl", *without())
    inner_code = int((project.path / "once").read_text())
    assert sorted([int(found.ret), inner_code]) == [0, pytest.ExitCode.USAGE_ERROR]
    assert len(read(project.path / "mine.jsonl").results) == 1


def test_rejects_journal_that_cannot_be_created_at_start(project: pytest.Pytester) -> None:
    (project.path / "taken").touch()
    found = project.runpytest_subprocess(*SMOKE, "--int8-journal=taken/mine.jsonl", *without())
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(
        ["ERROR: --int8-journal: must be a writable file *, got 'taken/mine.jsonl'*"]
    )


def test_session_without_results_leaves_no_journal(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one():\n    pass\n")
    for option in ("-q", "--help", "--collect-only"):
        pytester.runpytest_subprocess("--int8-journal=mine.jsonl", option, *without())
        assert not (pytester.path / "mine.jsonl").exists()


def test_shows_paths_relative_to_an_existing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert relative(folder / "a" / "b") == Path("a", "b")
    assert relative(tmp_path / "b") == tmp_path / "b"
    folder.rmdir()
    assert relative(tmp_path / "b") == tmp_path / "b"
