"""Test recognizing Git LFS pointers."""

from __future__ import annotations

import pytest

from pytest_int8bench.git_lfs import is_pointer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)


@pytest.mark.parametrize("text", [POINTER, POINTER.encode(), POINTER.replace("\n", "\r\n")])
def test_recognizes_a_pointer(text: str | bytes) -> None:
    assert is_pointer(text)


@pytest.mark.parametrize("text", ["", "version 2", b"PK\x03\x04\xff", '{"version": "5.1.0"}'])
def test_other_files_are_not_pointers(text: str | bytes) -> None:
    assert not is_pointer(text)
