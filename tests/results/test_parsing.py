"""Malformed and malicious files are rejected in one short line."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.cli.main import main
from pytest_int8bench.results import parsing
from pytest_int8bench.results.base import SchemaError
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Saved
from toys.results import CPU, everything, timed, write

Capture = pytest.CaptureFixture[str]
BLOCK = json.dumps({"benchmarks": [], "int8bench": everything().to_dict()})


def refused(path: Path) -> str:
    """Return the error about ``path`` without its name."""
    with pytest.raises(SchemaError) as info:
        read(path)
    message = str(info.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 500
    return message.removeprefix(str(path)).removeprefix(": ").strip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BLOCK.encode("utf-8-sig"), "starts with a byte order mark: save it as UTF-8 without one"),
        (BLOCK.encode("utf-16"), "must be UTF-8 text, got UTF-16"),
        (b"\xfe\xff" + BLOCK.encode("utf-16-be"), "must be UTF-8 text, got UTF-16"),
        (BLOCK.encode("utf-32"), "must be UTF-8 text, got UTF-32"),
        (BLOCK.encode("utf-16-le"), "is not UTF-8 text: it starts with a NUL byte"),
        (BLOCK.encode("utf-32-be"), "is not UTF-8 text: it starts with a NUL byte"),
        (b"\x00" * 4096, "is not UTF-8 text: it starts with a NUL byte"),
    ],
    ids=["bom", "utf-16", "utf-16-be", "utf-32", "utf-16-no-mark", "utf-32-no-mark", "zeros"],
)
def test_rejects_other_encodings(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "saved.json"
    path.write_bytes(content)
    assert refused(path) == message


def test_rejects_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    os.mkfifo(path)
    assert refused(path) == "must be a regular file, got a pipe"


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/urandom"])
def test_rejects_a_link_to_a_device(tmp_path: Path, device: str) -> None:
    path = tmp_path / "saved.json"
    path.symlink_to(device)
    assert refused(path) == "must be a regular file, got a device"


def test_rejects_folders_loops_and_sockets(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "gone.json").symlink_to("nothing")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.json"))
        for path in tmp_path.iterdir():
            with pytest.raises(OSError, match=path.name):
                read(path)


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    saved = Saved(CPU, [timed()])
    write(tmp_path / "saved.json", saved)
    (tmp_path / "link.json").symlink_to("saved.json")
    assert read(tmp_path / "link.json") == saved


def test_folders_with_pipes_and_devices(tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path / "0001_a.json", Saved(CPU, [timed()]))
    os.mkfifo(tmp_path / "0002_b.json")
    (tmp_path / "0003_c.jsonl").symlink_to("/dev/zero")
    output = str(tmp_path / "r.md")
    for command in (
        ["report", str(tmp_path), "--output", output],
        ["compare", str(tmp_path / "0001_a.json"), str(tmp_path / "0002_b.json")],
        ["show", str(tmp_path / "0003_c.jsonl")],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "must be a regular file, got a" in error
        assert error.count("\n") == 1


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


TOO_DEEP = "is nested too deeply; at most 32 levels are allowed"


@pytest.mark.parametrize("levels", [40, 300, 900, 5_000, 200_000])
@pytest.mark.parametrize("place", ["params", "coverage", "later", "environment"])
def test_rejects_deep_nesting(tmp_path: Path, levels: int, place: str) -> None:
    record = timed().to_dict()
    record["coverage"] = {}
    mark = '"DEEP"'
    if place == "environment":
        block: dict[str, Any] = {"schema": 1, "environment": {"later": "DEEP"}, "results": []}
    else:
        if place == "later":
            record["later"] = "DEEP"
        else:
            record[place] = {"later": "DEEP"}
        block = {"schema": 1, "environment": {}, "results": [record]}
    text = json.dumps({"benchmarks": [], "int8bench": {**block, "accuracy": []}})
    path = tmp_path / "saved.json"
    path.write_text(text.replace(mark, nested(levels)))
    assert refused(path) == TOO_DEEP
    if place != "environment":
        header = json.dumps({"int8bench": {"schema": 1, "environment": {}}})
        path.write_text(f"{header}\n{json.dumps(record).replace(mark, nested(levels))}\n")
        assert refused(path) == TOO_DEEP


def test_nesting_outside_our_block_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "saved.json", Saved(CPU, [timed()]), machine_info="DEEP")
    path.write_text(path.read_text().replace('"DEEP"', nested(100)))
    assert read(path).results == [timed()]


@pytest.mark.parametrize("field", ["reason", "nodeid", "status", "samples_per_s", "later"])
def test_long_texts(tmp_path: Path, field: str) -> None:
    path = tmp_path / "saved.json"
    record = {**timed().to_dict(), field: "x" * 1_000_001}
    block = {**Saved(CPU, []).to_dict(), "results": [record]}
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    assert refused(path) == "has a string of 1,000,001 characters; at most 1,000,000 are allowed"


def test_wrong_values_are_shortened_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    for changes, start in (
        ({"status": "x" * 900_000}, "not a result: status must be one of ok, "),
        ({"samples_per_s": "x" * 900_000}, "not a result: samples_per_s must be a number above 0"),
        ({"kernels": [{"name": [["x" * 900] * 900] * 9}]}, "not a result: kernels[0].name must be"),
        ({"coverage": {"left_out": {"y" * 900_000: 5}}}, "not a result: coverage.left_out.yyy"),
        ({"nodeid": "z" * 900_000, "rounds": -1}, "not a result: rounds must be a whole number"),
    ):
        record = {**timed().to_dict(), **changes}
        block = {**Saved(CPU, []).to_dict(), "results": [record]}
        path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
        assert start in refused(path)


@pytest.mark.parametrize("line", ["x" * 10**8, '{"a": "' + "x" * 10**8 + '"}', "9" * 10**8])
def test_lines_of_100_megabytes(tmp_path: Path, line: str) -> None:
    path = tmp_path / "run.jsonl"
    header = json.dumps({"int8bench": {"schema": 1, "environment": {}}})
    path.write_text(f"{header}\n{line}\n{header}\n")
    assert refused(path)


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "saved.json"
    path.touch()
    os.truncate(path, 2**40)  # takes no room on the disk
    assert refused(path) == (
        "is too large: 1,099,511,627,776 bytes; at most 1,073,741,824 are allowed"
    )
    monkeypatch.setattr(parsing, "MAX_BYTES", 100)
    path.write_text(" " * 101)
    assert refused(path) == "is too large: 101 bytes; at most 100 are allowed"


@pytest.mark.parametrize(
    "text", ["\ud800", "a\udfffb", "\ufeff", "\ufffe", "\x00", "\x1b]0;x\x07", "\u2028::error::x"]
)
def test_texts_are_cleaned(tmp_path: Path, text: str, capsys: Capture) -> None:
    path = write(tmp_path / "saved.json", Saved(CPU, [timed(status="failed", reason=text)]))
    [result] = read(path).results
    assert str(result.reason).isprintable() or not text.strip()
    assert main(["show", str(path)]) == 0
    assert text not in capsys.readouterr().out


@pytest.mark.parametrize("schema", [True, None, "1", 1.0, [1], {}, 10**4000])
def test_rejects_schemas_of_wrong_types(tmp_path: Path, schema: Any) -> None:
    path = tmp_path / "saved.json"
    block = {**Saved(CPU, []).to_dict(), "schema": schema}
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    assert "schema" in refused(path)


@pytest.mark.parametrize("value", [5, None, {}, "x"])
def test_rejects_tables_of_wrong_types(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "saved.json"
    block = {**Saved(CPU, []).to_dict(), "sensitivity": value}
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    assert refused(path) == f"sensitivity must be a list, got {value!r}"
