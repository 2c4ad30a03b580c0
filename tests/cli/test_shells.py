"""Test the command line in real shells.

Exit codes report the verdict even if output fails, and commands in text from files have no effect.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.cli import commands, compare, outputs
from pytest_int8bench.cli.main import main
from pytest_int8bench.results.records import Saved
from toys.results import CPU, everything, saved, timed, verdict_of, write

Capture = pytest.CaptureFixture[str]
COMMAND = Path(sys.executable).with_name("int8bench")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    Path("pyproject.toml").write_text("")


def save(name: str, slower: float = 1.0) -> str:
    result = timed("模型_²", slower=slower, workload="größe")
    return str(write(name, saved(result, cpu="EPYC", commit="a" * 40)))


# -- streams ------------------------------------------------------------------------------------


def broken_pipe() -> io.TextIOWrapper:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return open(write_end, "w", encoding="utf-8")


STREAMS = {
    "closed": lambda: None,
    "pipe": broken_pipe,
    "full": lambda: open("/dev/full", "w"),  # noqa: SIM115
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    "latin-1": lambda: io.TextIOWrapper(io.BytesIO(), encoding="latin-1"),
    "cp1252": lambda: io.TextIOWrapper(io.BytesIO(), encoding="cp1252"),
}


@pytest.fixture(params=STREAMS)
def stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replace stdout by one that cannot print everything."""
    made = STREAMS[request.param]()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", made)
        yield made
    if made is not None:
        made.close()


@pytest.mark.usefixtures("stream")
@pytest.mark.parametrize(("slower", "code"), [(1.0, 0), (1.2, 1)])
def test_compare_prints_its_verdict_and_writes_its_files(slower: float, code: int) -> None:
    files = ("--json=out.json", "--markdown=out.md", "--junit=out.xml")
    assert main(["compare", save("base.json"), save("new.json", slower), *files]) == code
    assert json.loads(Path("out.json").read_text())["int8bench_compare"]["exit_code"] == code
    assert "模型" in Path("out.md").read_text(encoding="utf-8")
    assert Path("out.xml").exists()


@pytest.mark.usefixtures("stream")
def test_show_report_and_help_exit_0() -> None:
    path = save("base.json")
    assert main(["show", path]) == 0
    assert main(["report", path, "--output=report.md"]) == 0
    assert Path("report.md").exists()
    for arguments in (["--help"], ["compare", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0


@pytest.mark.usefixtures("stream")
def test_errors_exit_2_even_if_stderr_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert main(["compare", "nowhere-²", "nothing"]) == 2
    assert main(["show", "nowhere-²"]) == 2
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--nonsense-²"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("{compare} | true; exit ${{PIPESTATUS[0]}}", 1),
        ("{compare} > /dev/full 2> /dev/full", 1),
        ("{compare} >&- 2>&-", 1),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {compare}", 1),
        ("PYTHONIOENCODING=cp1252 {compare} --markdown=nowhere/²/x.md", 1),
        ("{int8bench} --help > /dev/full", 0),
    ],
)
def test_exit_code_survives_broken_streams(command: str, code: int) -> None:
    typed = f"{COMMAND} compare {save('base.json')} {save('new.json', 1.2)} --json=out.json"
    line = command.format(compare=typed, int8bench=COMMAND)
    environ = {name: v for name, v in os.environ.items() if not name.startswith("PYTHONIO")}
    done = subprocess.run(
        ["bash", "-c", line], env=environ, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert Path("out.json").exists() is bool(code)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("one\ntwo"), "RuntimeError: one (test_shells.py, line "),
        (MemoryError(), "MemoryError: MemoryError() (test_shells.py, line "),
        (KeyError("x\x1b"), "KeyError: 'x\\x1b' (test_shells.py, line "),
        (KeyboardInterrupt(), "interrupted\n"),
    ],
)
def test_uncaught_error_is_one_line_and_exits_2(
    error: BaseException, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(compare, "compare", fail)
    assert main(["compare", save("base.json"), save("new.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"int8bench compare: {line}")
    assert err.count("\n") == 1


def test_failing_import_exits_2(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, commands.__name__, None)
    assert main(["show", save("a.json")]) == 2
    assert capsys.readouterr().err.startswith("int8bench show: ModuleNotFoundError: ")


def test_failing_report_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*args: object) -> str:
        raise RuntimeError("no XML today")

    monkeypatch.setattr("pytest_int8bench.cli.outputs.to_xml", fail)
    base, new = save("base.json"), save("new.json")
    files = ("--junit=out.xml", "--json=out.json", "--markdown=out.md")
    assert main(["compare", base, new, *files]) == 2
    assert capsys.readouterr().err == "int8bench compare: no XML today\n"
    assert Path("out.json").exists()
    assert Path("out.md").exists()


# -- text from files ----------------------------------------------------------------------------

ATTACK = "\n::error::x\x1b[2J\x00\x9b1m\u202e\u2028##[error]|`<b>"


def attacked(value: Any) -> Any:
    """Return saved values with the attack appended to every text, and prepended to some."""
    if isinstance(value, dict):
        return {name: attacked(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [attacked(entry) for entry in value]
    return f"{value}{ATTACK}" if isinstance(value, str) else value


#: Fields with a fixed set of words; files with any other word are rejected.
WORDS = ("status", "outcome", "compile_cache", "by", "limit")


def attack(path: str, content: Saved, *, journal: bool = False) -> str:
    block = content.to_dict()
    for records in (block["results"], block["accuracy"], block["sensitivity"]):
        for record in records:
            kept = {name: record[name] for name in WORDS if name in record}
            record |= {**attacked(record), **kept, "workload": f"::error::{ATTACK}"}
    block["environment"] = attacked(block["environment"])
    if journal:
        lines = [{"int8bench": {"schema": 1, "environment": block["environment"]}}]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, *block["results"]])
    else:
        text = json.dumps({"benchmarks": [], "int8bench": block})
    Path(path).write_text(text)
    return path


def check_harmless(text: str) -> None:
    for line in text.split("\n"):
        assert not line.strip().startswith("::")
        assert "##[" not in line
        assert all(c.isprintable() for c in line)


@pytest.mark.parametrize("journal", [False, True])
def test_shown_text_is_harmless(journal: bool, capsys: Capture) -> None:
    path = attack("run.jsonl" if journal else "run.json", everything(), journal=journal)
    assert main(["show", path]) == 0
    out, err = capsys.readouterr()
    assert "error::x\\x1b[2J\\x00\\x9b1m\\u202e " in out
    assert err == ""
    check_harmless(out)


def test_compared_text_is_harmless(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    failed = timed("z", status="failed")
    base = attack("base.json", saved(timed(), failed, verdict_of(), **CPU))
    new = attack("new.json", saved(timed(slower=1.2), failed, verdict_of("FAIL"), **CPU))
    assert main(["compare", base, new, "--markdown=out.md", "--junit=out.xml"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    check_harmless(out)
    for path in ("summary.md", "out.md"):
        text = Path(path).read_text(encoding="utf-8")
        assert all(c.isprintable() for c in text.replace("\n", ""))
        assert "<b>" not in text.replace(r"\<b\>", "")
        assert "]|" not in text


def test_a_report_is_harmless() -> None:
    path = attack("run.json", everything())
    assert main(["report", path, "--output=report.md"]) == 0
    text = Path("report.md").read_text(encoding="utf-8")
    assert all(c.isprintable() for c in text.replace("\n", ""))
    assert r"\|\`\<b\>" in text
    assert "`<b>" not in text.replace(r"\`\<b\>", "")


@pytest.mark.parametrize("name", ["a\n::error::b.json", "\x1b[2J.json", "\udcff.json"])
def test_prints_names_and_errors_in_one_harmless_line(name: str, capsys: Capture) -> None:
    assert main(["show", name]) == 2
    write(name, Saved(CPU, [timed()]))
    assert main(["compare", name, name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 2
    check_harmless(err)
    assert main(["report", name, "--output=report.md"]) == 0
    assert main(["compare", name, save("new.json"), "--markdown=out.md", "--allow=cpu"]) == 2
    check_harmless(capsys.readouterr().out)


def test_truncates_a_long_error(capsys: Capture) -> None:
    block = {**Saved(CPU, []).to_dict(), "results": "x" * 100_000}
    Path("a.json").write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    assert main(["show", "a.json"]) == 2
    assert len(capsys.readouterr().err) < 2100


def test_names_a_git_lfs_pointer(capsys: Capture) -> None:
    Path("a.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert main(["show", "a.json"]) == 2
    what = "is a pointer of Git LFS, not the file itself: run git lfs pull"
    assert capsys.readouterr().err == f"int8bench: a.json {what}\n"


# -- the summary of a step ----------------------------------------------------------------------

MIB = 1 << 20  # the size that GitHub accepts


def many(name: str, count: int, slower: float) -> str:
    results = [timed(f"{'x' * 1500}_{n:05}", slower=slower if n == 7 else 1) for n in range(count)]
    return str(write(name, saved(*results, cpu="EPYC")))


@pytest.mark.parametrize("before", [0, 30_000])
def test_too_large_summary_keeps_the_worst_rows(
    before: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text("y" * before)
    limit = 1 << 16
    monkeypatch.setattr(outputs, "MARKDOWN_BYTES", limit)
    base, new = many("base.json", 60, 1), many("new.json", 60, 1.2)
    given = ["--noise-floor", "throughput=5%"]  # one process per side shows no noise
    assert main(["compare", base, new, "--markdown=out.md", *given]) == 1
    for path, first in (("summary.md", before), ("out.md", 0)):
        text = Path(path).read_text()[first:]
        assert limit - 2000 < first + len(text.encode()) <= limit
        rows = [line for line in text.splitlines() if line.startswith("| toy: xxx")]
        assert rows[0].endswith("| regressed |")
        assert "00007 |" in rows[0]
        left_out = 60 - len(rows)
        assert f"\n{left_out:,} of 60 rows are left out; the worst are shown first; the" in text
        assert "--max" not in text.splitlines()[0]
        assert "REGRESSED" in text.splitlines()[0]
    assert len(capsys.readouterr().out.splitlines()) > 60  # the log has everything


def test_full_summary_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text("y" * (MIB - 10))
    assert main(["compare", save("base.json"), save("new.json")]) == 2
    message = "int8bench compare: cannot write summary.md: the summary of this step is full\n"
    assert capsys.readouterr().err == message
    assert Path("summary.md").stat().st_size == MIB - 10
    assert main(["compare", "base.json", save("new.json", 1.2)]) == 1


def test_nearly_full_summary_gets_only_the_headline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text("y" * (MIB - 100))
    assert main(["compare", save("base.json"), save("new.json")]) == 0
    headline = "## int8bench compare: nothing regressed (1 run: 1 same)\n\n"
    assert Path("summary.md").read_text()[MIB - 100 :] == headline
