"""Finding the saved files to compare, and writing reports whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench import files
from pytest_int8bench.files import FileError, append, write
from pytest_int8bench.results.base import SchemaError
from pytest_int8bench.results.journal import Journal
from pytest_int8bench.results.locating import find, find_side, latest_two, read_runs
from pytest_int8bench.results.records import Saved
from pytest_int8bench.words import plural
from toys import results


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


STORAGE = Path(".benchmarks")


def save(path: str | Path, saved_at: int | None = None) -> Path:
    path = results.write(path, results.saved(cpu="EPYC"))
    if saved_at is not None:
        os.utime(path, (saved_at, saved_at))
    return path


def said(error: pytest.ExceptionInfo[FileError]) -> str:
    return str(error.value)


# -- finding ------------------------------------------------------------------------------------


def test_finds_a_file() -> None:
    path = save("run.json")
    assert find("run.json", STORAGE) == [path]


def test_a_folder_stands_for_its_json_files() -> None:
    paths = [save(f"runs/{name}.json") for name in ("b", "a")]
    Path("runs/notes.txt").touch()
    save("runs/deeper/c.json")
    Journal(Path("runs/a.jsonl"), {})
    assert find("runs", STORAGE) == paths[::-1]
    assert find("runs", STORAGE, journals=True) == [paths[1], Path("runs/a.jsonl"), paths[0]]


def test_a_folder_of_journals_is_not_a_side() -> None:
    Path("runs").mkdir()
    Journal(Path("runs/a.jsonl"), {})
    with pytest.raises(FileError) as error:
        find_side(["runs"], STORAGE)
    assert said(error) == "runs contains no JSON files"


def test_finds_a_file_by_number() -> None:
    save(".benchmarks/Linux/0001_one.json")
    second = save(".benchmarks/Linux/0002_two.json")
    assert find("0002", STORAGE) == [second]
    named = save("0002")  # a file takes precedence
    assert find("0002", STORAGE) == [named]


def test_a_number_on_two_machines_is_ambiguous() -> None:
    paths = [save(f".benchmarks/{name}/0001_run.json") for name in ("A", "B")]
    with pytest.raises(FileError) as error:
        find("0001", STORAGE)
    assert said(error) == f"0001 is ambiguous; name one of {paths[0]}, {paths[1]}"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere.json", "nowhere.json does not exist"),
        ("empty", "empty contains no JSON files"),
        ("0003", ".benchmarks contains no file with number 0003"),
        ("003", "003 does not exist"),
        # An unset variable of a shell, which Path takes for the current folder.
        ("", "must be a file, a folder or a pytest-benchmark run number, got ''"),
    ],
)
def test_missing_sections_are_listed(name: str, why: str) -> None:
    Path("empty").mkdir()
    save("here.json")
    with pytest.raises(FileError) as error:
        find(name, STORAGE)
    assert said(error) == why


def test_rejects_a_file_twice_on_one_side() -> None:
    paths = [save("runs/a.json"), save("runs/b.json")]
    assert find_side(["runs"], STORAGE) == find_side(["runs/a.json", "runs/b.json"], STORAGE)
    Path("link.json").symlink_to(paths[1])
    for again in ("runs/../runs/a.json", "link.json"):
        with pytest.raises(FileError) as error:
            find_side(["runs", again], STORAGE)
        assert said(error) == (
            f"one side has the same file twice: runs/a.json, runs/b.json, {again}"
        )


def test_the_latest_two_files_are_of_the_machine_that_saved_last() -> None:
    save(".benchmarks/Other/0099_x.json", 300)
    save(".benchmarks/Here/0008_a.json", 500)
    base = save(".benchmarks/Here/0009_b.json", 100)
    new = save(".benchmarks/Here/0010_a.json", 200)  # the number decides, not the time
    save(".benchmarks/Here/notes.json", 900)
    save(".benchmarks/0011_x.json", 900)
    assert latest_two(STORAGE) == (base, new)


def save_at(name: str, day: int) -> Path:
    """Save a file dated to a day of January."""
    path = STORAGE / "Here" / name
    results.write(path, results.saved(cpu="EPYC"), datetime=f"2026-01-{day:02}T12:00:00")
    return path


def test_the_latest_two_past_9999() -> None:
    for number in (9998, 9999):
        save_at(f"{number}_a.json", number - 9990)
    base, new = save_at("10000_a.json", 10), save_at("10001_a.json", 11)
    assert latest_two(STORAGE) == (base, new)
    assert find("10000", STORAGE) == [base]
    # pytest-benchmark does not count past this number.
    later = save_at("10001_b.json", 12)
    os.utime(later, (1, 1))
    for path in (base, new):
        os.utime(path, (0, 0))
    assert latest_two(STORAGE) == (new, later)


def test_names_that_merely_begin_with_digits_are_not_numbered() -> None:
    base, new = save_at("0001_a.json", 1), save_at("0002_a.json", 2)
    for name in ("2024-notes.json", "1234abc.json", "20260131T120000Z.json", "99999.json"):
        save_at(name, 20)
    save_at("00003_a.json", 21)
    save_at("٠٠٠٤_a.json", 22)  # digits of another script
    assert latest_two(STORAGE) == (base, new)


@pytest.mark.parametrize("names", [["2024_results.json"], ["20250101_a.json", "20250102_a.json"]])
def test_rejects_numbers_that_contradict_times(names: list[str]) -> None:
    for day, name in enumerate(names, start=1):
        os.utime(save_at(name, day), (day, day))
    base, new = save_at("0001_a.json", 10), save_at("0002_a.json", 11)
    with pytest.raises(FileError) as error:
        latest_two(STORAGE)
    last = [base.name, new.name, *names][-2:]
    assert said(error) == (
        f"the latest two files in {STORAGE}/Here are {last[0]} and {last[1]} by number, but "
        "0001_a.json and 0002_a.json by the times in them; name BASE and NEW"
    )


@pytest.mark.parametrize("count", [0, 1])
def test_two_files_are_needed(count: int) -> None:
    for number in range(count):
        save(f".benchmarks/Here/000{number}_x.json")
    save(".benchmarks/Other/0009_x.json", 5)
    with pytest.raises(FileError) as error:
        latest_two(STORAGE if count else Path("nowhere"))
    assert said(error) == (
        f"{STORAGE if count else 'nowhere'} contains {plural(count, 'numbered file')} to compare, "
        "but two are needed; save them with --benchmark-autosave, or name BASE and NEW"
    )


def test_runs_are_read_in_order_and_errors_name_the_file() -> None:
    paths = [save("b.json"), save("a.json")]
    assert [run.path for run in read_runs(paths)] == paths
    assert read_runs(paths)[0].saved == Saved({"cpu": "EPYC"}, [])
    Path("bad.json").write_text("")
    with pytest.raises(SchemaError, match=r"^bad\.json is empty$"):
        read_runs([*paths, Path("bad.json")])


# -- writing ------------------------------------------------------------------------------------


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_a_report_is_written_replaced_and_readable_by_others() -> None:
    previous = os.umask(0o022)
    try:
        write(Path("deep/report.md"), "one ü\n")
        write(Path("deep/report.md"), "two\n")
    finally:
        os.umask(previous)
    assert Path("deep/report.md").read_text() == "two\n"
    assert Path("deep/report.md").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in Path("deep").iterdir()] == ["report.md"]


def test_a_report_in_json_is_replaced() -> None:
    for count in (1, 2):
        write(Path("out.json"), json.dumps({"int8bench_compare": {"exit_code": count}}))
    assert json.loads(Path("out.json").read_text()) == {"int8bench_compare": {"exit_code": 2}}


def newer(path: Path) -> None:
    path.write_text('{"int8bench": {"schema": 99, "environment": {}}}')


def foreign(path: Path) -> None:
    path.write_text('{\n    "benchmarks": [],\n    "version": "5.1.0"\n}')


def cut_off(path: Path) -> None:
    path.write_text(save(path).read_text()[:60])


def journal(path: Path) -> None:
    Journal(path, {})


@pytest.mark.parametrize("kind", [save, newer, foreign, cut_off, journal])
def test_saved_benchmarks_are_never_overwritten(kind: Any) -> None:
    path = Path("run.json")
    kind(path)
    before = path.read_bytes()
    with pytest.raises(FileError) as error:
        write(path, "report")
    assert said(error) == "refusing to overwrite run.json: it contains saved benchmarks"
    assert path.read_bytes() == before
    assert names() == ["run.json"]


def test_only_regular_files_are_replaced() -> None:
    target = Path("target.md")
    target.write_text("mine")
    Path("link.md").symlink_to(target)
    Path("folder").mkdir()
    for name in ("link.md", "folder", "/dev/null"):
        with pytest.raises(FileError) as error:
            write(Path(name), "report")
        assert said(error) == f"refusing to overwrite {name}: not a regular file"
    assert target.read_text() == "mine"
    assert Path("link.md").is_symlink()


def test_a_folder_that_cannot_be_created_is_a_one_line_error() -> None:
    Path("file").touch()
    with pytest.raises(FileError) as error:
        write(Path("file/report.md"), "report")
    assert said(error) in (
        "cannot write file/report.md: Not a directory",
        "cannot write file/report.md: File exists",
    )


@pytest.mark.parametrize("before", [None, "an earlier report"])
def test_full_disk_leaves_no_report(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("report.md")
    if before is not None:
        path.write_text(before)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FileError) as error:
        write(path, "report")
    assert said(error) == "cannot write report.md: No space left on device"
    assert names() == ([] if before is None else ["report.md"])
    assert before is None or path.read_text() == before


def test_an_interrupt_leaves_no_partial_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(Path("report.md"), "report")
    assert names() == []


def test_appends_to_a_summary() -> None:
    for text in ("one ü\n", "two\n"):
        append(Path("summary.md"), text)
    assert Path("summary.md").read_text(encoding="utf-8") == "one ü\ntwo\n"


def test_a_full_disk_leaves_a_summary_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    append(Path("summary.md"), "of another step\n")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FileError) as error:
        append(Path("summary.md"), "ours\n")
    assert said(error) == "cannot write summary.md: No space left on device"
    assert Path("summary.md").read_text() == "of another step\n"


def test_a_summary_in_a_missing_folder_is_a_one_line_error() -> None:
    with pytest.raises(FileError) as error:
        append(Path("nowhere/summary.md"), "ours\n")
    assert said(error) == "cannot write nowhere/summary.md: No such file or directory"


def test_a_summary_may_be_a_device() -> None:
    append(Path("/dev/null"), "ours\n")
