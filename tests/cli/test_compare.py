"""Test ``int8bench compare``: options, exit codes, reports, and one-line errors."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pytest_int8bench import files
from pytest_int8bench.cli.main import main
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.journal import Journal
from pytest_int8bench.results.records import Saved
from toys.results import saved, timed, verdict_of, write

Capture = pytest.CaptureFixture[str]
ENVIRONMENT: dict[str, Any] = {"cpu": "EPYC", "packages": {"torch": "2.11.0"}, "commit": "a" * 40}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    Path("pyproject.toml").write_text("")  # ignore any pyproject.toml above


def save(path: str, *records: Record, **environment: Any) -> str:
    return str(write(path, saved(*records, **{**ENVIRONMENT, **environment})))


@pytest.fixture
def base() -> str:
    return save("base.json", timed())


def run(capsys: Capture, *args: str) -> tuple[int, list[str]]:
    """Run the command; return the exit code and the lines it prints."""
    code = main(["compare", *args])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out.splitlines()


def refused(capsys: Capture, *args: str) -> str:
    """Run the command, which must print one line and exit with 2; return the line."""
    assert main(["compare", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("int8bench compare: ")
    return line.removeprefix("int8bench compare: ")


def misused(capsys: Capture, *args: str) -> str:
    """Like ``refused``, for errors of argparse."""
    with pytest.raises(SystemExit) as caught:
        main(["compare", *args])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    return line.removeprefix("int8bench compare: ")


# -- exit codes ---------------------------------------------------------------------------------


def test_equal_files_pass(base: str, capsys: Capture) -> None:
    code, lines = run(capsys, base, save("new.json", timed()))
    assert code == 0
    assert lines[-1] == "int8bench compare: nothing regressed (1 run: 1 same)"


def test_regression_exits_1_even_if_another_run_is_missing(capsys: Capture) -> None:
    base = save("base.json", timed("x"), timed("y"))
    code, lines = run(capsys, base, save("new.json", timed("x", slower=1.2)))
    assert code == 1
    assert lines[-1] == "int8bench compare: REGRESSED (2 runs: 1 regressed, 1 missing)"
    assert "missing: toy: y: not in the new run" in lines
    assert run(capsys, base, "new.json", "--max-slowdown", "20%")[0] == 2
    assert run(capsys, base, "new.json", "--max-slowdown=20%", "--allow-missing")[0] == 0


def test_another_machine_exits_2_unless_allowed(base: str, capsys: Capture) -> None:
    new = save("new.json", timed(), cpu="Xeon")
    code, lines = run(capsys, base, new)
    assert code == 2
    assert "differs: cpu: EPYC -> Xeon" in lines
    code, lines = run(capsys, base, new, "--allow", "cpu")
    assert code == 0
    assert "differs, as allowed: cpu: EPYC -> Xeon" in lines


def test_accepts_another_commit(base: str, capsys: Capture) -> None:
    new = save("new.json", timed(), commit="b" * 40, dirty=True)
    code, lines = run(capsys, base, new)
    assert code == 0
    assert "new: new.json (bbbbbbbbbb, uncommitted changes)" in lines


def test_every_metric_has_a_limit_option(capsys: Capture) -> None:
    fields = {"batch_time_p95_s": 1.0, "compile_s": 1.0, "peak_memory_bytes": 1000}
    base = save("base.json", timed(**fields))
    worse = {name: value * 2 for name, value in fields.items()}
    new = save("new.json", timed(batch_time_s=0.2, **worse))
    off = "--max-memory-growth=off"
    assert run(capsys, base, new)[0] == 1
    assert run(capsys, base, new, off)[0] == 0
    for option in ("batch-time-growth", "p95-growth", "compile-growth"):
        assert run(capsys, base, new, off, f"--max-{option}", "5%")[0] == 1
        assert run(capsys, base, new, off, f"--max-{option}=100%")[0] == 0


def test_accepts_a_noise_floor(base: str, capsys: Capture) -> None:
    new = save("new.json", timed(slower=1.1))
    assert run(capsys, base, new, "--noise-floor", "throughput=15%")[0] == 0
    assert run(capsys, base, new, "--noise-floor", "memory=15%")[0] == 1


def test_inconclusive_verdict_fails_on_request(capsys: Capture) -> None:
    base = save("base.json", verdict_of("PASS"))
    new = save("new.json", verdict_of("INCONCLUSIVE"))
    assert run(capsys, base, new)[0] == 0
    assert run(capsys, base, new, "--fail-on-inconclusive")[0] == 1


# -- which files --------------------------------------------------------------------------------


def test_compares_the_latest_two_saved_files_by_default(capsys: Capture) -> None:
    for number, slower in ((1, 5.0), (2, 1.0), (3, 1.2)):
        save(f".benchmarks/Linux/000{number}_run.json", timed(slower=slower))
    code, lines = run(capsys)
    assert code == 1
    assert "base: .benchmarks/Linux/0002_run.json (aaaaaaaaaa)" in lines
    assert "new: .benchmarks/Linux/0003_run.json (aaaaaaaaaa)" in lines
    assert run(capsys, "0001", "0003")[0] == 0
    Path(".benchmarks").rename("elsewhere")
    assert run(capsys, "--storage", "elsewhere")[0] == 1
    assert refused(capsys).startswith(".benchmarks contains 0 numbered files to compare")


def test_several_files_per_side_determine_the_noise(capsys: Capture) -> None:
    for index, slower in enumerate((1.0, 1.3, 0.8)):
        save(f"runs/{index}.json", timed(slower=slower))
    new = save("new.json", timed(slower=1.2))
    more = save("more.json", timed(slower=0.9))
    third = save("third.json", timed(slower=1.1))
    found = [run(capsys, *args) for args in (
        ("runs", "new.json", "--new", more, "--new", third),
        ("--base", "runs/0.json", "--base=runs/1.json", "--base=runs/2.json", "--new", new,
         "--new", more, "--new", third),
        ("runs/0.json", new, "--base", "runs/1.json", "--base=runs/2.json", "--new", more,
         "--new", third),
    )]  # fmt: skip
    assert [code for code, _ in found] == [0, 0, 0]
    assert found[0] == found[1] == found[2]
    assert any("learned from the files" in line for line in found[0][1])
    assert run(capsys, "runs/0.json", new)[0] == 1
    few = run(
        capsys, "--base", "runs/0.json", "--base", "runs/1.json", "--new", new, "--new", third
    )
    assert few[0] == 2, "the outlier in the base hides that the new files are slower"


def test_journals_are_compared(base: str, capsys: Capture) -> None:
    Journal(Path("run.jsonl"), ENVIRONMENT).append(timed(slower=2))
    assert run(capsys, base, "run.jsonl")[0] == 1


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (
            ["base.json"],
            "BASE and NEW must be two files, got 1; add more runs of a side with --base and --new",
        ),
        (
            ["a", "b", "c"],
            "BASE and NEW must be two files, got 3; add more runs of a side with --base and --new",
        ),
        (
            ["--base", "base.json"],
            "each side must have at least one file; give both --base and --new",
        ),
        (["base.json", "nowhere.json"], "nowhere.json does not exist"),
        (["", "base.json"], "must be a file, a folder or a pytest-benchmark run number, got ''"),
        (
            ["base.json", "new.json", "--base", "base.json"],
            "one side has the same file twice: base.json, base.json",
        ),
        (
            ["base.json", "new.json", "--json=out.md", "--markdown=./out.md"],
            "two reports would be written to out.md; name different files",
        ),
        (
            ["base.json", "new.json", "--junit=base.json"],
            "refusing to overwrite base.json: it is one of the files to compare",
        ),
        (
            ["base.json", "new.json", "--config=x.toml"],
            "--config must be an existing file, got x.toml",
        ),
        (["base.json", "new.json", "--allow=commit"], "--allow: commit may always differ"),
    ],
)
def test_reports_misuse_in_one_line(base: str, args: list[str], why: str, capsys: Capture) -> None:
    save("new.json", timed())
    assert refused(capsys, *args) == why


def test_rejects_comparing_a_file_with_itself(base: str, capsys: Capture) -> None:
    Path("link.json").symlink_to(base)
    assert refused(capsys, base, "link.json") == (
        f"{Path(base).resolve()} would be compared with itself"
    )


@pytest.mark.parametrize("option", ["json", "markdown", "junit", "comment"])
def test_rejects_report_path_that_is_a_symlink_loop(
    base: str, option: str, capsys: Capture
) -> None:
    Path("loop").symlink_to("loop")
    why = refused(capsys, base, save("new.json", timed()), f"--{option}=loop")
    assert why == "refusing to overwrite loop: not a regular file"
    assert refused(capsys, base, "loop") == "loop does not exist"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--max-slowdown=5"], "--max-slowdown: must be a percentage such as 5%, or off, got '5'"),
        (
            ["--noise-floor=3%"],
            (
                "--noise-floor: must be METRIC=PERCENTAGE with a metric of throughput, batch-time, "
                "p95, memory, compile, energy, call-time, got '3%'"
            ),
        ),
    ],
)
def test_rejects_bad_options(base: str, args: list[str], why: str, capsys: Capture) -> None:
    assert misused(capsys, base, base, *args) == why


# -- bad input ----------------------------------------------------------------------------------

WHOLE = json.dumps(
    {"benchmarks": [], "int8bench": Saved(ENVIRONMENT, [timed()]).to_dict()}, indent=1
)
TWICE = Saved(ENVIRONMENT, [timed(), timed()]).to_dict()
BAD = "new.json: test_a.py::test[x]: not a result:"


def with_result(**values: Any) -> str:
    block = Saved(ENVIRONMENT, []).to_dict()
    block["results"] = [{**timed().to_dict(), **values}]
    return json.dumps({"benchmarks": [], "int8bench": block})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "new.json is empty"),
        ("\n \n", "new.json is empty"),
        ("fast", "new.json is neither JSON nor a journal (line 1)"),
        (WHOLE[:60], "new.json is not JSON: it is cut off (line 5, column 3)"),
        (
            '{"benchmarks": []}',
            "new.json has no int8bench block: it was not saved by pytest-int8bench",
        ),
        (
            '{"int8bench": {"schema": 9}, "benchmarks": []}',
            "new.json has schema 9, but this version reads only up to 1; update pytest-int8bench",
        ),
        (with_result(batch_time_s=0), f"{BAD} batch_time_s must be a number above 0, got 0"),
        (
            with_result(samples_per_s=-5.0),
            f"{BAD} samples_per_s must be a number above 0, got -5.0",
        ),
        (with_result(throttled=None), f"{BAD} throttled must be a list of strings, got None"),
        (
            json.dumps({"benchmarks": [], "int8bench": TWICE}),
            "new.json holds a result 2 times: test_a.py::test[x], toy",
        ),
        (
            json.dumps(
                {"benchmarks": [], "int8bench": Saved({**ENVIRONMENT, "gpu": "A100"}, []).to_dict()}
            ),
            "new.json: environment.gpu must be an object, got 'A100'",
        ),
    ],
)
def test_reports_damaged_files_in_one_line(
    base: str, content: str, why: str, capsys: Capture
) -> None:
    Path("new.json").write_text(content)
    assert refused(capsys, base, "new.json", "--json=out.json") == why
    assert not Path("out.json").exists()


# -- the table of pyproject.toml ----------------------------------------------------------------


def test_per_run_limits_override_the_command_line_which_overrides_the_table(
    capsys: Capture,
) -> None:
    base = save("base.json", timed("x"), timed("y"))
    new = save("new.json", timed("x", slower=1.2), timed("y"))
    Path("deep").mkdir()
    Path("pyproject.toml").write_text('[tool.int8bench.gate]\nmax-slowdown = "25%"\n')
    assert run(capsys, base, new)[0] == 0
    assert run(capsys, base, new, "--max-slowdown=6%")[0] == 1
    with Path("pyproject.toml").open("a") as file:
        file.write('[tool.int8bench.gate.runs."x*"]\nmax-slowdown = "22%"\n')
        file.write('[tool.int8bench.gate.runs."z*"]\nmax-slowdown = "1%"\n')
    code, lines = run(capsys, base, new, "--max-slowdown=6%")
    assert code == 0
    assert "note: no run matches 'z*' in pyproject.toml" in lines
    Path("mine.toml").write_text("")
    assert run(capsys, base, new, "--config=mine.toml")[0] == 1


def test_merges_flags_and_names_of_table_and_command_line(capsys: Capture) -> None:
    base = save("base.json", timed("x"), timed("y"))
    new = save("new.json", timed("x"), cpu="Xeon", packages={"torch": "2.12.0"})
    Path("pyproject.toml").write_text(
        '[tool.int8bench.gate]\nallow = ["cpu"]\nallow-missing = true\n'
    )
    assert run(capsys, base, new)[0] == 2
    assert run(capsys, base, new, "--allow=torch")[0] == 0


def test_reports_a_bad_table_in_one_line(base: str, capsys: Capture) -> None:
    Path("pyproject.toml").write_text('[tool.int8bench.gate]\nallow-missing = "yes"\n')
    assert refused(capsys, base, save("new.json", timed())) == (
        f"{Path('pyproject.toml').resolve()}: tool.int8bench.gate: allow-missing must be true or "
        "false, got 'yes'"
    )


# -- reports ------------------------------------------------------------------------------------

REPORTS = ("--json=out/a.json", "--markdown=out/a.md", "--junit=out/a.xml")


def test_writes_reports(base: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text("earlier\n")
    for slower, code in ((1.0, 0), (1.2, 1)):
        new = save("new.json", timed(slower=slower))
        assert run(capsys, base, new, *REPORTS)[0] == code
        loaded = json.loads(Path("out/a.json").read_text())
        assert loaded["int8bench_compare"]["exit_code"] == code
        suite = ElementTree.parse("out/a.xml").getroot()[0]
        assert suite.attrib["name"] == "int8bench compare"
        assert suite.attrib["failures"] == str(code)
    markdown = Path("out/a.md").read_text()
    assert markdown.startswith("## int8bench compare: REGRESSED (1 run: 1 regressed)\n")
    summary = Path("summary.md").read_text()
    assert summary.startswith("earlier\n## int8bench compare: nothing regressed (1 run: 1 same)\n")
    assert summary.endswith(markdown + "\n")
    assert sorted(os.listdir("out")) == ["a.json", "a.md", "a.xml"]


def test_comment_has_marker_and_respects_size_limit(base: str, capsys: Capture) -> None:
    new = save("new.json", timed(slower=1.2))
    assert run(capsys, base, new, "--comment=a.md", "--markdown=b.md")[0] == 1
    comment = Path("a.md").read_text()
    assert comment == "<!-- int8bench compare -->\n" + Path("b.md").read_text()
    many = [save(f"{side}.json", *(timed(f"x{n}é" * 9) for n in range(900))) for side in "ab"]
    assert run(capsys, *many, "--comment=a.md")[0] == 0
    comment = Path("a.md").read_text()
    assert 50_000 < len(comment) < 60_000
    assert comment.startswith("<!-- int8bench compare -->\n## int8bench compare: nothing regressed")
    assert "rows are left out" in comment


def test_comment_needs_its_own_file(base: str, capsys: Capture) -> None:
    new = save("new.json", timed())
    assert refused(capsys, base, new, "--comment=a.md", "--markdown=a.md") == (
        "two reports would be written to a.md; name different files"
    )
    assert refused(capsys, base, new, f"--comment={new}") == (
        "refusing to overwrite new.json: it is one of the files to compare"
    )


def test_does_not_overwrite_saved_benchmarks(base: str, capsys: Capture) -> None:
    new, other = save("new.json", timed()), save("other.json", timed("y"))
    before = Path(other).read_text()
    assert main(["compare", base, new, f"--json={other}"]) == 2
    assert capsys.readouterr() == (
        "",
        "int8bench compare: refusing to overwrite other.json: it contains saved benchmarks\n",
    )
    assert Path(other).read_text() == before


def test_does_not_append_summary_to_saved_benchmarks(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    new = save("new.json", timed())
    for name in (base, save("other.json", timed("y"))):
        before = Path(name).read_text()
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", name)
        assert main(["compare", base, new]) == 2
        message = f"int8bench compare: refusing to append to {name}: it contains saved benchmarks\n"
        assert capsys.readouterr().err == message
        assert Path(name).read_text() == before


def test_appends_to_summary_that_contains_json(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text('```json\n{"benchmarks": []}\n```\n')
    assert run(capsys, base, save("new.json", timed()))[0] == 0
    assert "## int8bench compare" in Path("summary.md").read_text()


def test_report_path_equal_to_summary_is_written_once(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    new = save("new.json", timed())
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(Path("summary").absolute()))
    Path("summary").write_text("earlier\n")
    assert run(capsys, base, new, "--markdown=summary")[0] == 0
    summary = Path("summary").read_text()
    assert summary.startswith("earlier\n")
    assert summary.count("## int8bench compare") == 1
    for option in ("--json=summary", "--junit=./summary"):
        refusal = refused(capsys, base, new, option)
        assert (
            refusal
            == "refusing to overwrite summary: it is $GITHUB_STEP_SUMMARY, to which the report is "
            "appended as Markdown"
        )
    assert Path("summary").read_text() == summary


@pytest.mark.parametrize(("slower", "code"), [(1.0, 2), (2.0, 1)])
def test_does_not_block_on_summary_pipe_without_reader(
    base: str, slower: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    new = save("new.json", timed(slower=slower))
    for name in ("pipe", "link"):
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", name)
        assert main(["compare", base, new]) == code
        out, err = capsys.readouterr()
        assert err == f"int8bench compare: cannot write {name}: a named pipe without a reader\n"
        assert "int8bench compare: " in out


def test_writes_summary_to_pipe_with_reader(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    os.mkfifo("pipe")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "pipe")
    with open(os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)) as reader:
        assert run(capsys, base, save("new.json", timed()))[0] == 0
        assert reader.read().startswith("## int8bench compare")


@pytest.mark.parametrize(("slower", "code"), [(1.0, 2), (2.0, 1)])
def test_reports_full_disk_and_does_not_pass(
    base: str, slower: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    new = save("new.json", timed(slower=slower))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    monkeypatch.setattr(files.os, "fsync", full)
    assert main(["compare", base, new, *REPORTS]) == code
    assert capsys.readouterr().err.splitlines() == [
        f"int8bench compare: cannot write {name}: No space left on device"
        for name in ("out/a.json", "out/a.md", "out/a.xml", "summary.md")
    ]
    assert os.listdir("out") == []
    assert Path("summary.md").read_text() == ""
