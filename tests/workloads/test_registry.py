"""Test loading workloads and callables by name."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads import Workload, registry
from pytest_int8bench.workloads.registry import (
    GROUP,
    WORKLOADS,
    WorkloadRow,
    check_fields,
    check_reference,
    check_workload_name,
    load_object,
    load_workload,
    point_for,
)

PACKAGE = Path(registry.__file__).parent
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
def test_accepts_valid_names(name: str) -> None:
    assert check_workload_name(name) == name


@pytest.mark.parametrize("name", ["timm:", "hf:", "hf:two words", "olmo", "file.py", ":make"])
def test_rejects_invalid_names(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^must .*, got '{re.escape(name)}'$"):
        check_workload_name(name)


@pytest.mark.parametrize(
    ("name", "example"), [("timm:", "timm:vit_base_patch16_224"), ("hf:", "hf:bert")]
)
def test_rejects_prefix_without_model(name: str, example: str) -> None:
    with pytest.raises(ValueError, match=f"^must name a model, such as {example}, got '{name}'$"):
        check_workload_name(name)
    assert check_workload_name(example) == example


@pytest.mark.parametrize("row", WORKLOADS, ids=lambda row: row.name)
def test_every_row_has_a_loader_and_a_summary(row: WorkloadRow) -> None:
    module, _, function = row.loader.partition(":")
    tree = ast.parse((PACKAGE / f"{module.rpartition('.')[2]}.py").read_text())
    [found] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    assert len(found.args.args) == len(row.takes)
    assert row.help


def test_rejects_library_name_as_reference() -> None:
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
def test_loads_a_workload(folder: Path, reference: str) -> None:
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
def test_reports_failed_load_in_one_line(folder: Path, reference: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        load_workload(reference, folder)
    assert "\n" not in str(caught.value)


def test_rejects_fields_that_a_library_ignores() -> None:
    message = "^patch_size is OlmoEarth's and does nothing for timm:vit_base; its own axes are "
    with pytest.raises(ValueError, match=message):
        check_fields("timm:vit_base", ["batch_size", "patch_size"])
    check_fields("timm:vit_base", ["batch_size", "extra.image_size", "attention"])
    check_fields("olmoearth", ["patch_size"])
    check_fields("a.b:c", ["patch_size"])


@pytest.mark.parametrize(
    ("workload", "name"),
    [
        ("olmoearth", "nano_cpu_bf16_s2_is16_ps4_ts12_bs4"),
        # These are known to ignore OlmoEarth's fields ...
        ("digits", "cpu_bf16_bs4"),
        ("timm:vit_base", "cpu_bf16_bs4"),
        ("hf:bert", "cpu_bf16_bs4"),
        # ... and these may read them.
        ("a.b:c", "cpu_bf16_is16_bs4_model_size-nano"),
        ("toy.py:make", "cpu_bf16_is16_bs4_model_size-nano"),
        (None, "cpu_bf16_is16_bs4_model_size-nano"),
    ],
)
def test_run_names_depend_on_the_workload(workload: str | None, name: str) -> None:
    params = RunParams(model_size="nano", image_size=16, gpu_type="cpu", batch_size=4)
    for point in (params, params.with_short_name()):
        assert point_for(point, workload).run_name == name
        assert point_for(point_for(point, workload), workload).run_name == name


def test_loads_any_object(folder: Path) -> None:
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
def test_missing_library_names_the_extra(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in list(sys.modules):
        if loaded.partition(".")[0] == module or loaded.startswith("pytest_int8bench.workloads."):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    needed = f"{name} needs pip install 'pytest-int8bench[{extra}]' ("
    with pytest.raises(ValueError, match=re.escape(needed)):
        load_workload(name, Path())


# -- entry points -----------------------------------------------------------------------------

NAMES = "must be olmoearth, digits, timm:NAME, hf:NAME"
FORMS = "module:callable or path.py:callable"


def install(folder: Path, distribution: str, **points: str) -> None:
    """Create a distribution that offers workloads, as pip installs it."""
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))


@pytest.mark.parametrize("target", ["make", "made", "holder.make"])
def test_entry_point_provides_a_workload(folder: Path, target: str) -> None:
    install(folder, "int8-toy", toy=f"named_by_test:{target}")
    assert check_workload_name("toy") == "toy"
    check_fields("toy", ["patch_size"])
    assert load_workload("toy", Path()).name == "mine"


def test_lists_entry_points_once_after_built_in_names(folder: Path) -> None:
    install(folder, "int8-toy", toy="named_by_test:make", other="named_by_test:make")
    install(folder, "another-toy", toy="named_by_test:make")
    with pytest.raises(ValueError, match=r"^must be ") as caught:
        check_workload_name("to")
    assert str(caught.value) == f"{NAMES}, other, toy, {FORMS}, got 'to'"


def test_rejects_name_offered_by_two_distributions(folder: Path) -> None:
    install(folder, "int8-toy", toy="named_by_test:make")
    install(folder, "another-toy", toy="named_by_test:make")
    owners = "another-toy and int8-toy"
    with pytest.raises(
        ValueError, match=f"^workload toy is offered by several distributions: {owners}$"
    ):
        check_workload_name("toy")


def test_built_in_names_override_entry_points(folder: Path) -> None:
    install(folder, "int8-toy", digits="named_by_test:make")
    pytest.importorskip("sklearn")
    assert load_workload("digits", Path()).name == "digits"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:make", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_"),
        ("named_by_test:none", "cannot be loaded: AttributeError: module 'named_by_test' has no "),
        ("named_by_test:fails", "raised KeyError: 'weights.pth'"),
        ("named_by_test:nothing", "must give a pytest_int8bench.Workload, got None"),
    ],
)
def test_reports_broken_entry_point_in_one_line(folder: Path, target: str, message: str) -> None:
    install(folder, "int8-toy", toy=target)
    where = f"toy ({target} of the distribution int8-toy) "
    with pytest.raises(ValueError, match="^" + re.escape(where + message)) as caught:
        load_workload(check_workload_name("toy"), folder)
    assert "\n" not in str(caught.value)


def test_reports_removed_distribution_in_one_line(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^no installed distribution offers the workload 'toy'"):
        load_workload("toy", folder)


def test_registry_loads_few_modules() -> None:
    heavy = ("torch", "numpy", "importlib.metadata", "pytest_int8bench.params")
    names = "olmoearth", "timm:vit", "a.b:c"
    code = f"""
import sys
import pytest_int8bench.sweep
from pytest_int8bench.workloads.registry import check_workload_name
for name in {names!r}:
    check_workload_name(name)
print([name for name in {heavy!r} if name in sys.modules])
"""
    # Without -S, .pth files in site-packages could import modules.
    command = [sys.executable, "-S", "-c", code]
    root = str(PACKAGE.parents[1])
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": root}, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


# -- files outside the import path --------------------------------------------------------------

OWN_FILE = """
import torch
from torch.nn import functional as F

count = 0

class Gelu(torch.nn.Module):
    def forward(self, x):
        return F.gelu(x)

def make():
    global count
    count += 1
    return Gelu()
"""


@pytest.mark.parametrize("file", ["queue.py", "my-model.v2.py"])
def test_model_from_a_file_compiles(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(OWN_FILE)  # no other module may be mistaken for it
    model = load_object(f"{file}:make", tmp_path)()
    x = torch.randn(3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    assert importlib.import_module("queue").__file__ != str(tmp_path / file)
    module = importlib.import_module(type(model).__module__)  # like Dynamo
    assert module.__file__ == str(tmp_path / file)


def test_imports_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(OWN_FILE)
    load_object("one.py:make", tmp_path)()
    load_object("one.py:make", tmp_path)()
    assert load_object("one.py:count", tmp_path) == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "one.py").write_text(OWN_FILE)
    assert load_object("one.py:count", other) == 0


def test_imports_a_failed_file_again(tmp_path: Path) -> None:
    path = tmp_path / "fails.py"
    path.write_text("raise KeyError('bug')")
    with pytest.raises(KeyError):
        load_object("fails.py:make", tmp_path)
    path.write_text("make = 3 # mended")
    assert load_object("fails.py:make", tmp_path) == 3
