"""Test reports as users write them: ``int8bench report``, ``--int8-report``, and a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_int8bench.cli.main import main
from pytest_int8bench.files import FileError
from pytest_int8bench.plugin.reading import read_settings
from pytest_int8bench.plugin.recorder import Recorder
from pytest_int8bench.plugin.session import Session
from pytest_int8bench.report import write as outputs
from pytest_int8bench.results.journal import Journal
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Saved
from toys.projects import OUT_OF_MEMORY, SMOKE, THROUGHPUT, make_project, toy, without
from toys.results import BASE, CPU, GPU, commits, everything, result, write, write_journal

INSTALL = "pip install 'pytest-int8bench[report]'"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Return the one-line error, without the command's name."""
    assert main(["report", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("int8bench report: ").rstrip("\n")


def data_of(page: Path) -> dict[str, object]:
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text())
    assert found is not None
    data: dict[str, object] = json.loads(found[1])
    return data


# -- the command ------------------------------------------------------------------------------


def test_writes_a_page_from_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("one.json"), everything())
    assert main(["report", "one.json"]) == 0
    assert capsys.readouterr() == ("report.html\n", "")
    assert data_of(Path("report.html"))["schema"] == 1


def test_writes_page_and_markdown_from_folder_and_journal() -> None:
    Path("runs").mkdir()
    for name, saved in commits():
        write(Path(name), saved)
    journal = Journal(Path("now.jsonl"), {**GPU, "commit": "f00dface"})
    journal.append(everything().results[0])
    outputs = ("--output", "a.html", "--output", "b.md")
    assert main(["report", "runs", "now.jsonl", *outputs]) == 0
    assert "f00dfac" in Path("a.html").read_text()
    assert "| 0abcdef | 1abcdef | 2abcdef | 3abcdef | f00dfac |" in Path("b.md").read_text()


def files_of(*args: str) -> list[list[str]]:
    """Return label, file, device and points of each file in the history, which a report on a
    single file does not have."""
    assert main(["report", *args, "--output", "r.md"]) == 0
    _, found, history = Path("r.md").read_text().partition("## History")
    if not found:
        return []
    rows = [line for line in history.splitlines() if ".json" in line]
    return [[cell.strip() for cell in row.strip("|").split("|")][:4] for row in rows]


def test_writes_a_report_from_a_folder_of_journals() -> None:
    Path("runs").mkdir()
    for name, saved in commits():
        write_journal(Path(name).with_suffix(".jsonl"), saved)
    assert [row[:2] for row in files_of("runs")] == [
        [f"{n}abcdef", f"000{n}.jsonl"] for n in range(4)
    ]


@pytest.mark.parametrize("args", [["runs"], ["runs/a.jsonl", "runs/z.json"], ["runs", "."]])
def test_file_takes_precedence_over_its_journal(args: list[str]) -> None:
    Path("runs").mkdir()
    write(Path("runs/z.json"), everything())
    write_journal(Path("runs/a.jsonl"), everything())
    write_journal(Path("whole.jsonl"), everything())
    assert files_of(*args) == []
    text = Path("r.md").read_text()
    assert files_of("runs/z.json") == []
    assert Path("r.md").read_text() == text


def test_ignores_all_journals_of_a_saved_file() -> None:
    # The runner merges the results of several processes into one file. The second one died early.
    whole = everything()
    write(Path("run.json"), whole)
    write_journal(Path("run.jsonl"), replace(whole, results=whole.results[:2], sensitivity=[]))
    [failed] = [r for r in whole.results if r.status == "failed"]
    write_journal(Path("run-2.jsonl"), Saved({}, [failed]))
    assert files_of(".") == []


def test_journal_adds_results_missing_from_its_file() -> None:
    first, *others = everything().results
    write(Path("part.json"), Saved(GPU, [first]))
    write_journal(Path("part.jsonl"), Saved(GPU, [first, *others[:2]]))
    assert [row[1:] for row in files_of(".")] == [
        ["part.json", "A100", "1 of 1"],
        ["part.jsonl", "A100", "2 of 2"],
    ]


def test_includes_journals_of_other_sessions() -> None:
    # A skipped point looks the same in every session.
    skipped = [r for r in everything().results if r.status == "skipped"]
    write(Path("a.json"), Saved(GPU, [result(BASE, 100.0), *skipped]))
    write_journal(Path("b.jsonl"), Saved(GPU, [result(BASE, 101.0), *skipped]))
    write_journal(Path("c.jsonl"), Saved(CPU, skipped))
    assert [row[1:] for row in files_of(".")] == [
        ["a.json", "A100", "1 of 2"],
        ["b.jsonl", "A100", "1 of 2"],
        ["c.jsonl", "EPYC", "0 of 1"],
    ]


def timed(name: str, time: object, rate: float = 1.0) -> None:
    write(Path(name), Saved(GPU, [result(BASE, rate)]), datetime=time)


def order_of(*args: str) -> list[str]:
    return [row[1] for row in files_of(*args)]


def test_history_is_ordered_by_session_time() -> None:
    timed("a.json", "2026-01-03T00:00:00+00:00", 300.0)
    timed("b.json", "2026-01-01T23:30:00-02:00", 200.0)  # 01:30 of the next day in UTC
    timed("c.json", "2026-01-02T01:00:00", 100.0)  # older versions of pytest-benchmark: UTC
    assert order_of(".") == ["c.json", "b.json", "a.json"]
    page = Path("r.md").read_text()
    # The newest of the three is shown as the current throughput.
    assert "| BF16 | BF16 | 300 " in page.partition("## History")[0]
    assert "| 100 | 200 | 300 |" in page


def test_files_of_the_same_time_keep_their_order() -> None:
    for name in ("b.json", "c.json", "a.json"):
        timed(name, "2026-01-02T00:00:00Z")
    timed("first.json", "2026-01-01T00:00:00Z")
    assert order_of("b.json", "c.json", "a.json", "first.json") == [
        *("first.json", "b.json", "c.json", "a.json")
    ]


@pytest.mark.parametrize("time", [None, "yesterday", 5, "0001-01-01T00:00:00+05:00"])
def test_file_without_time_stays_after_its_predecessor(time: object) -> None:
    timed("new.json", "2026-01-02T00:00:00Z")
    timed("none.json", time)
    timed("old.json", "2026-01-01T00:00:00Z")
    assert order_of("new.json", "none.json", "old.json") == ["old.json", "new.json", "none.json"]
    assert order_of("none.json", "new.json", "old.json") == ["none.json", "old.json", "new.json"]


def test_journals_are_ordered_by_start_time() -> None:
    timed("before.json", "2001-01-01T00:00:00Z")
    write_journal(Path("now.jsonl"), Saved(GPU, [result(BASE, 3.0)]))
    timed("later.json", "2999-01-01T00:00:00Z")
    assert order_of("later.json", "now.jsonl", "before.json") == [
        *("before.json", "now.jsonl", "later.json")
    ]


def test_rejects_folder_without_files_or_journals(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert refusal(capsys, "empty") == "empty contains no JSON files or journals"


def test_finds_a_file_by_pytest_benchmark_number() -> None:
    folder = Path("saved/Linux-CPython")
    folder.mkdir(parents=True)
    write(folder / "0003_run.json", everything())
    assert main(["report", "0003", "--storage", "saved", "--output", "r.md"]) == 0


def test_counts_a_repeated_file_once() -> None:
    write(Path("one.json"), everything())
    assert main(["report", "one.json", "./one.json", "--output", "r.md"]) == 0
    assert "## History" not in Path("r.md").read_text()


def test_rejects_other_file_types(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "one.json", "--output", "report.pdf")
    assert message == "--output: must be a file that ends in .html or .md, got 'report.pdf'"


def test_rejects_foreign_and_missing_files(capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.json").write_text('{"benchmarks": []}')
    assert refusal(capsys, "other.json") == (
        "other.json has no int8bench block: it was not saved by pytest-int8bench"
    )
    assert refusal(capsys, "nothing.json") == "nothing.json does not exist"
    assert not Path("report.html").exists()


def test_does_not_overwrite_saved_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    before = write(Path("one.md"), everything()).read_text()
    assert refusal(capsys, "one.md", "--output", "one.md") == (
        "--output: refusing to overwrite one.md: it contains saved benchmarks"
    )
    assert Path("one.md").read_text() == before


def test_replaces_an_existing_report() -> None:
    write(Path("one.json"), everything())
    Path("r.md").write_text("before")
    assert main(["report", "one.json", "--output", "r.md"]) == 0
    assert Path("r.md").read_text().startswith("# INT8 inference benchmarks\n")
    assert sorted(path.name for path in Path().iterdir()) == ["one.json", "r.md"]


def test_html_needs_the_report_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Path("one.json"), everything())
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refusal(capsys, "one.json")
    assert message == f"--output: report.html needs jinja2 and matplotlib: {INSTALL}"
    assert main(["report", "one.json", "--output", "r.md"]) == 0


# -- the option -------------------------------------------------------------------------------


def test_report_paths_are_absolute_and_unique(pytester: pytest.Pytester) -> None:
    config = pytester.parseconfig(
        "--int8-report=r.html", "--int8-report=r.md", "--int8-report=r.md"
    )
    assert read_settings(config).reports == (pytester.path / "r.html", pytester.path / "r.md")


def test_rejects_missing_folder_before_measuring(pytester: pytest.Pytester) -> None:
    config = pytester.parseconfig("--int8-report=none/r.html")
    with pytest.raises(pytest.UsageError) as caught:
        read_settings(config)
    assert str(caught.value) == (
        "--int8-report: must be in an existing, writable directory, got 'none/r.html'"
    )


def test_rejects_missing_extra_at_start(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(pytest.UsageError) as caught:
        read_settings(pytester.parseconfig("--int8-report=r.html"))
    assert str(caught.value) == f"--int8-report: r.html needs jinja2: {INSTALL}"


def test_ab_processes_write_no_report(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nint8_report = r.md")
    assert read_settings(pytester.parseconfig("--int8-lean")).reports == ()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (FileError("cannot write r.md: No space left"), "cannot write r.md: No space left"),
        (KeyError("bug"), "cannot write {folder}/r.md: KeyError: 'bug'"),
    ],
)
def test_failing_report_is_reported_and_stops_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    config = pytester.parseconfig("--int8-report=r.md", "--int8-report=r.html")
    recorder = Recorder(Session(config, read_settings(config)))
    recorder.journal = Journal(pytester.path / "j.jsonl", GPU)
    made = []
    monkeypatch.setattr(
        outputs,
        "publish",
        lambda named, path: fail() if path.suffix == ".md" else made.append(path),
    )
    assert not recorder.write_reports()
    assert made == [pytester.path / "r.html"]
    assert recorder.reported == [
        f"report: {why.format(folder=pytester.path)}",
        "report: to try again: int8bench report j.jsonl",
        "report: r.html",
    ]


TOY = toy(
    bs6=OUT_OF_MEMORY, bs7='raise ValueError("seven <is> too many")', bs8="raise KeyboardInterrupt"
)


@pytest.mark.slow
def test_interrupted_session_still_writes_a_report(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forked: None
) -> None:
    make_project(pytester, monkeypatch, toy=TOY, test_one=THROUGHPUT)
    result = pytester.runpytest_subprocess(
        *without(),
        *SMOKE,
        "--int8-set=batch_size=2,6,7,8",
        "--int8-report=r.html",
        "--int8-report=r.md",
        "--benchmark-json=saved.json",
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["report: r.html", "report: r.md"])
    [journal] = (pytester.path / ".benchmarks/int8bench").glob("*.jsonl")
    saved = {r.run_name: r for r in read(journal).results}
    chart = next(c for c in data_of(pytester.path / "r.html")["charts"] if c["kind"] == "lines")  # type: ignore[attr-defined]
    shown = {p["name"].removeprefix("toy: "): p for s in chart["series"] for p in s["points"]}
    assert {name: point["y"] for name, point in shown.items()} == {
        name: r.samples_per_s for name, r in saved.items()
    }
    notes = sorted(point["note"] for point in shown.values() if point["y"] is None)
    assert notes == ["OOM", "OOM", "failed", "failed"]  # baselines and candidates
    text = (pytester.path / "r.md").read_text()
    assert "| failed | ValueError: seven \\<is\\> too many |" in text


def test_says_that_nothing_was_measured(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(): pass")
    result = pytester.runpytest_inprocess("--int8-report=r.md", "-pno:randomly")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        ["int8bench: no report written: no test measured a point or its accuracy"]
    )
    assert not (pytester.path / "r.md").exists()


# -- in a browser -----------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_browser_shows_the_page_without_errors(tmp_path: Path) -> None:
    write(Path("one.json"), everything())
    assert main(["report", "one.json", "--output", "r.html"]) == 0
    options = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync dump-dom "
        "disable-background-networking disable-component-update enable-logging=stderr v=0"
    )
    done = subprocess.run(
        [
            str(CHROMIUM),
            *(f"--{option}" for option in options.split()),
            f"--user-data-dir={tmp_path / 'profile'}",
            (tmp_path / "r.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    charts = data_of(Path("r.html"))["charts"]
    assert isinstance(charts, list)
    assert done.stdout.count("<svg ") == len(charts)
    for bar in next(chart for chart in charts if chart["id"] == "speedup-1")["bars"]:
        shown = f"{bar['value']:.2f} [{bar['low']:.2f}, {bar['high']:.2f}]"
        for tag in ("text", "td"):
            assert re.search(rf"<{tag} [^>]*>{re.escape(shown)}</{tag}>", done.stdout)
    rates = next(chart for chart in charts if chart["id"].startswith("throughput-"))
    for series in rates["series"]:
        for point in (point for point in series["points"] if point["y"] is not None):
            cells = rf">{series['name']}</th>\s*<td[^>]*>{point['x_shown']}</td>\s*<td[^>]*>"
            found = re.search(rf"{cells}([\d,.]+) \[", done.stdout)
            assert found is not None
            assert float(found[1].replace(",", "")) == pytest.approx(point["y"], rel=0.005)
