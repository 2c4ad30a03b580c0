"""Test making text harmless, and printing that cannot fail."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.printing import cleaned, one_line, printable, show

NAME = "base_cuda_bf16_int8_w8a8_s2_is64 (größer, 模型, km²)"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (NAME, NAME),
        ("two  spaces  stay", "two  spaces  stay"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("a\x00b\x7fc\x9b2Jd", r"a\x00b\x7fc\x9b2Jd"),
        ("one\n::error::two\r\n\tthree", "one ::error::two three"),
        ("one\u2028two\u2029three\x85four", "one two three four"),
        ("a\u202eb\u2066c\u200fd", r"a\u202eb\u2066c\u200fd"),
        ("\ufeffa\u200bb", r"\ufeffa\u200bb"),
        ("\udcff.json", r"\udcff.json"),
        ("\U000e0041", r"\U000e0041"),
        ("👩\u200d🔬", "👩\u200d🔬"),  # one emoji, composed of two by a joiner
    ],
)
def test_escapes_invisible_characters(text: str, shown: str) -> None:
    assert one_line(text) == shown


@given(st.text())
def test_one_line_is_idempotent(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert one_line(line) == line
    line.encode()


def test_cleans_all_texts_of_a_file() -> None:
    data = {"a\nb": ["\x1b", {"c": "d\n", "n": 1, "t": True, "x": None, "f": 0.5}]}
    clean = {"a b": ["\\x1b", {"c": "d ", "n": 1, "t": True, "x": None, "f": 0.5}]}
    assert cleaned(data) == clean


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("::error::boom", r"\::error::boom"),
        ("x\n  ::set-output name=a::b", "x\n  \\::set-output name=a::b"),
        ("a ##[error]b ##vso[task.complete]c", r"a #\#[error]b #\#vso[task.complete]c"),
        ("##teamcity[buildStop]", r"#\#teamcity[buildStop]"),
        ("tests/test_a.py::test ## title", "tests/test_a.py::test ## title"),
        ("\x1b[1mbold\x1b[0m \x1b]0;title\x07", "\x1b[1mbold\x1b[0m \\x1b]0;title\\x07"),
        ("tab\tand\nline", "tab\tand\nline"),
    ],
)
def test_escapes_terminal_and_ci_commands(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_every_encoding_accepts_every_text(encoding: str) -> None:
    text = printable("km² … → 模型 \udcff\n", encoding)
    text.encode(encoding)
    assert text.endswith("\n")
    assert ("km²" in text) is (encoding != "ascii")


# -- printing -----------------------------------------------------------------------------------


def broken_pipe() -> io.TextIOWrapper:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return open(write_end, "w", encoding="utf-8")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def test_a_broken_pipe_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = broken_pipe()
    monkeypatch.setattr(sys, "stdout", stream)
    show("one")
    show("two")
    assert capsys.readouterr().err == ""
    stream.close()  # with the unwritten rest


def test_reports_a_full_disk_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        show("one")
        show("two")
    message = "int8bench: what is printed is lost: No space left on device\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("stream", [None, closed()])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_swallows_text(
    name: str, stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, name, stream)
    show("one")
    show("two", error=True)


def test_escapes_characters_the_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    show("km²")
    assert raw.getvalue() == b"km\\xb2\n"
