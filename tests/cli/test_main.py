"""The ``int8bench`` command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pytest_int8bench
from pytest_int8bench.cli.main import main
from pytest_int8bench.report.terminal import render
from pytest_int8bench.results.records import Saved
from toys.results import CPU, result_of, write, write_journal

RESULT = result_of("nano_cpu_bf16_s2_is16_ps4_ts3_bs4", workload="olmoearth", samples_per_s=123.4)
SAVED = Saved(CPU, [RESULT], [])


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return write_journal(tmp_path / "run.jsonl", SAVED)


def test_shows_a_journal(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(journal)]) == 0
    out, err = capsys.readouterr()
    assert out == render(SAVED, width=None, color=False)
    assert f"{RESULT.run_name}       123 " in out
    assert err == ""


def test_show_reports_broken_lines(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, record = journal.read_text().splitlines()
    for between, told in (("{half", "line 2"), ("{half\n\0\0", "lines 2, 3")):
        journal.write_text(f"{header}\n{between}\n{record}\n")
        assert main(["show", str(journal)]) == 0
        out, err = capsys.readouterr()
        assert out == render(SAVED, width=None, color=False)
        assert err == f"int8bench: {journal}: skipped broken {told}\n"


def test_report_and_compare_report_broken_lines(
    journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.jsonl"
    new.write_text(journal.read_text() + "{half\n")
    main(["compare", str(journal), str(new)])
    assert capsys.readouterr().err == f"int8bench compare: {new}: skipped broken line 3\n"
    assert main(["report", str(new), "--output", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().err == f"int8bench report: {new}: skipped broken line 3\n"


def test_show_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "0001_run.json"
    write(path, SAVED)
    assert main(["show", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out == render(SAVED, width=None, color=False)
    assert err == ""


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one-line error, without the path."""
    assert main(["show", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.rstrip("\n").replace(str(path), "FILE")


def test_rejects_missing_file_and_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(tmp_path / "nothing.json", capsys)
    must_be = "int8bench: FILE must be a saved JSON file or a journal: "
    assert message == must_be + "No such file or directory"
    assert refusal(tmp_path, capsys) == must_be + "Is a directory"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"benchmarks": [], "version": "5.1.0"}',
            "int8bench: FILE has no int8bench block: it was not saved by pytest-int8bench",
        ),
        ("hello", "int8bench: FILE is neither JSON nor a journal (line 1)"),
        (
            '{"benchmarks": [], "int8bench": {"schema": 2}}',
            (
                "int8bench: FILE has schema 2, but this version reads only up to 1; "
                "update pytest-int8bench"
            ),
        ),
        (
            '{"int8bench": {"schema": 2, "environment": {}}}\n{}\n',
            (
                "int8bench: FILE has schema 2, but this version reads only up to 1; "
                "update pytest-int8bench"
            ),
        ),
    ],
)
def test_rejects_unreadable_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert refusal(path, capsys) == message


def test_rejects_binary_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(b"\x80\x81")
    assert "FILE" in refusal(path, capsys)


def test_rejects_environment_that_is_not_an_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    block = {**SAVED.to_dict(), "environment": None}
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    assert "environment must be an object, got None" in refusal(path, capsys)


@pytest.mark.parametrize("environment", [{}, {"gpu": None}, {"gpu": {}}, {"packages": None}])
def test_shows_incomplete_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], environment: dict[str, Any]
) -> None:
    path = tmp_path / "other.json"
    block = {**SAVED.to_dict(), "environment": environment}
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    assert main(["show", str(path)]) == 0
    assert "None" not in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["--version"])
    assert info.value.code == 0
    assert capsys.readouterr().out == pytest_int8bench.__version__ + "\n"


def test_requires_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main([])
    assert info.value.code == 2
    assert "the following arguments are required: command" in capsys.readouterr().err


def test_installed_command_runs(journal: Path) -> None:
    command = Path(sys.executable).with_name("int8bench")
    done = subprocess.run(
        [command, "show", journal], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == render(SAVED, width=None, color=False)


def test_command_runs_as_a_module(journal: Path) -> None:
    command = [sys.executable, "-m", "pytest_int8bench.cli.main", "show"]
    done = subprocess.run([*command, str(journal)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    assert subprocess.run([*command, "missing"], capture_output=True).returncode == 2


def test_show_does_not_load_torch(journal: Path) -> None:
    code = (
        "import sys; from pytest_int8bench.cli.main import main; main(sys.argv[1:]); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "show", str(journal)], capture_output=True, check=False
    )
    assert done.returncode == 0
