"""Workloads and callables by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pytest_int8bench.workloads import Workload
from pytest_int8bench.workloads.registry import (
    check_fields,
    check_reference,
    check_workload_name,
    load_object,
    load_workload,
)

MODULE = """
from pytest_int8bench import Workload


def make():
    return Workload(name="mine", build=lambda p: None, inputs=lambda p, device: ())


made = make()
class holder:
    make = make
text = "text"


def fails():
    raise KeyError("weights.pth")


def nothing():
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "named_by_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "named_by_test", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "olmoearth",
        "timm:vit_base_patch16_224.augreg",
        "hf:org/name-v1",
        "hf:bert",
        "a.b:c.d",
        "path/to-a/file.py:make",
        "../file.py:make",
    ],
)
def test_good_names(name: str) -> None:
    assert check_workload_name(name) == name


@pytest.mark.parametrize("name", ["timm:", "hf:", "hf:two words", "olmo", "file.py", ":make"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^must .*, got '{re.escape(name)}'$"):
        check_workload_name(name)


def test_a_library_is_no_reference() -> None:
    with pytest.raises(ValueError, match=r"must be module:callable or path\.py:callable"):
        check_reference("hf:org/name")


@pytest.mark.parametrize(
    "reference",
    [
        "named_by_test:make",
        "named_by_test:made",
        "named_by_test:holder.make",
        "named_by_test.py:make",
    ],
)
def test_a_workload_is_loaded(folder: Path, reference: str) -> None:
    workload = load_workload(reference, folder)
    assert isinstance(workload, Workload)
    assert workload.name == "mine"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("named_by_test:none", "named_by_test:none: named_by_test has no 'none'"),
        ("named_by_test:holder.none", "named_by_test:holder.none: named_by_test has no 'holder.n"),
        ("no_such_module:make", "no_such_module:make: No module named 'no_such_module'"),
        ("none.py:make", "none.py:make: there is no file "),
        ("named_by_test:text", "named_by_test:text must give a pytest_int8bench.Workload, got 't"),
        ("named_by_test:nothing", "named_by_test:nothing must give a pytest_int8bench.Workload, "),
        ("named_by_test:fails", "named_by_test:fails raised KeyError: 'weights.pth'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(folder: Path, reference: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        load_workload(reference, folder)
    assert "\n" not in str(caught.value)


def test_fields_that_a_library_does_not_read_are_refused() -> None:
    message = "^patch_size is OlmoEarth's and does nothing for timm:vit_base; its own axes are "
    with pytest.raises(ValueError, match=message):
        check_fields("timm:vit_base", ["batch_size", "patch_size"])
    check_fields("timm:vit_base", ["batch_size", "extra.image_size", "attention"])
    check_fields("olmoearth", ["patch_size"])
    check_fields("a.b:c", ["patch_size"])


def test_any_object_can_be_loaded(folder: Path) -> None:
    assert load_object("named_by_test.py:text", folder) == "text"


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("olmoearth", "olmoearth_pretrain_minimal", "olmoearth"),
        ("hf:bert", "transformers", "hf"),
        ("timm:vit", "timm", "timm"),
        ("digits", "sklearn", "eval"),
        ("digits", "safetensors", "eval"),
    ],
)
def test_missing_lib(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in list(sys.modules):
        if loaded.partition(".")[0] == module or loaded.startswith("pytest_int8bench.workloads."):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    needed = f"{name} needs pip install 'pytest-int8bench[{extra}]' ("
    with pytest.raises(ValueError, match=re.escape(needed)):
        load_workload(name, Path())
