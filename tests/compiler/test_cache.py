"""Test the compile cache: one movable folder per machine and attention backend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import nn

from pytest_int8bench.compiler import cache as compile_cache
from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.cache import CompileCache, CompileCacheError
from pytest_int8bench.compiler.compiled_model import CompiledModel
from pytest_int8bench.files import is_plain
from pytest_int8bench.measure.evidence import profile_forward
from toys.models import BareAttention

CPU = torch.device("cpu")
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
MACHINE = {"gpu": "A100", "driver": "570", "torch": "2.13.0"}


def compiled(folder: Path, attention: str = "flash") -> CompiledModel:
    model = compile_for_a100(BareAttention(), mode="default", attention=attention, cache_dir=folder)
    x = torch.linspace(-1, 1, 512).reshape(1, 2, 16, 16)
    torch.testing.assert_close(model(x), BareAttention()(x))
    evidence = profile_forward(lambda: model(x), CPU)
    assert evidence.attention_kernel == ("flash" if attention == "flash" else None)
    return model


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    parts = dict(MACHINE)
    monkeypatch.setattr(compile_cache, "_compiled_for", lambda: parts)
    return parts


# -- folders ------------------------------------------------------------------------------------


def test_one_folder_per_backend_and_machine(tmp_path: Path, machine: dict[str, Any]) -> None:
    caches = [CompileCache(tmp_path / "new", attention) for attention in ("flash", "cudnn")]
    assert [cache.is_empty() for cache in caches] == [True, True]
    for cache in caches:
        with cache.entered():
            (cache.folder / "code").touch()
    folders = [cache.folder for cache in caches]
    assert folders[0] != folders[1]
    assert sorted((tmp_path / "new").iterdir()) == sorted(
        path for folder in folders for path in (folder, folder.with_suffix(".json"))
    )
    said = [json.loads(folder.with_suffix(".json").read_text()) for folder in folders]
    assert said == [{"attention": name, **MACHINE} for name in ("flash", "cudnn")]
    assert [cache.is_empty() for cache in caches] == [False, False]

    machine["driver"] = "575"
    assert caches[0].folder not in folders
    assert caches[0].is_empty()


def test_restores_folder_only_after_error(tmp_path: Path, machine: dict[str, Any]) -> None:
    cache = CompileCache(tmp_path, "flash")
    with cache.entered():
        (cache.folder / "old").touch()

    def fill() -> None:
        assert cache.is_empty()
        (cache.folder / "new").touch()

    def fail() -> None:
        fill()
        raise KeyError

    with pytest.raises(KeyError), cache.emptied():
        fail()
    assert [path.name for path in cache.folder.iterdir()] == ["old"]
    with cache.emptied():
        fill()
    assert [path.name for path in cache.folder.iterdir()] == ["new"]
    assert len([*tmp_path.iterdir()]) == 2


def test_cache_key_omits_commit_and_host() -> None:
    found = compile_cache._compiled_for()
    assert {"attention", "commit", "dirty", "power_limit_w"}.isdisjoint(found)
    names = {"gpu", "driver", "cuda", "cudnn", "python", "torch", "triton", "torchao", "cpu"}
    assert names | {"pytest-int8bench"} <= set(found)


@pytest.mark.parametrize("value", [None, "/somewhere"])
def test_entering_sets_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    cache = CompileCache(tmp_path, "flash")

    def look() -> None:
        inductor, triton = (os.environ[name] for name in VARIABLES)
        assert (Path(inductor), Path(triton)) == (cache.folder, cache.folder / "triton")
        assert torch._functorch.config.enable_autograd_cache is True
        raise KeyError

    with pytest.raises(KeyError), cache.entered():
        look()
    assert [os.environ.get(name) for name in VARIABLES] == [value, value]


def test_reports_folder_that_cannot_be_created_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    cache = CompileCache(path, "flash")
    with pytest.raises(CompileCacheError) as caught, cache.entered():
        pass
    assert str(caught.value) == (f"cannot write the compile cache: Not a directory: {cache.folder}")


# -- compiled -----------------------------------------------------------------------------------

AGAIN = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import test_cache
print(test_cache.compiled(Path(sys.argv[1])).compile_cache)
"""


@pytest.mark.slow
def test_moved_folder_stays_warm(tmp_path: Path) -> None:
    # The names contain characters that the C++ compiler's command line does not support.
    first, moved = tmp_path / "my first", tmp_path / 'it\'s "moved"'
    # On the second use in this process, only the folder is left of the first one.
    found = [compiled(first, a).compile_cache for a in ("flash", "math", "math", "flash")]
    assert found == ["cold", "cold", "warm", "warm"]
    first.rename(moved)
    script = AGAIN.format(paths=[str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(moved)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "warm"
    assert not first.exists()


def test_recompiles_damaged_graphs(tmp_path: Path) -> None:
    compiled(tmp_path)
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    for kind in ("aotautograd", "fxgraph"):
        for path in (folder / kind).rglob("*"):
            if path.is_file():
                path.write_bytes(b"damaged")
    assert compiled(tmp_path).compile_cache == "cold"
    assert compiled(tmp_path).compile_cache == "warm"


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """Return a list of the functions that replace torch's compiled graphs, in order."""
    found: list[Callable[..., Any]] = []
    monkeypatch.setattr(CompiledModel, "_new_entry", lambda self, *_, **__: found.pop(0))
    return found


def fails(error: Exception) -> Callable[..., Any]:
    def entry(x: torch.Tensor) -> torch.Tensor:
        raise error

    return entry


def counts(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1
    return x


def test_drops_and_recompiles_code_that_does_not_load(
    tmp_path: Path, entries: list[Callable[..., Any]], machine: dict[str, Any]
) -> None:
    cache = CompileCache(tmp_path, "flash")
    entries += [counts, fails(OSError("invalid ELF header")), counts]
    model = compile_for_a100(nn.Identity(), mode="default", cache_dir=tmp_path)
    with cache.entered():
        (cache.folder / "damaged.so").touch()
    x = torch.ones(1)
    assert model(x) is x
    assert entries == []
    assert cache.is_empty()


def test_keeps_code_if_an_empty_cache_does_not_help(
    tmp_path: Path, entries: list[Callable[..., Any]], machine: dict[str, Any]
) -> None:
    cache = CompileCache(tmp_path, "flash")
    entries += [counts, fails(OSError("no compiler")), fails(OSError("no compiler"))]
    model = compile_for_a100(nn.Identity(), mode="default", cache_dir=tmp_path)
    with cache.entered():
        (cache.folder / "code").touch()
    with pytest.raises(OSError, match="no compiler"):
        model(torch.ones(1))
    assert not cache.is_empty()


@pytest.mark.parametrize(
    ("error", "filled"),
    [
        (OSError("no compiler"), False),
        (torch.OutOfMemoryError("out of memory"), True),
        (torch._dynamo.exc.Unsupported("a graph break"), True),
    ],
    ids=["empty", "out of memory", "graph break"],
)
def test_raises_errors_unrelated_to_the_cache_immediately(
    tmp_path: Path,
    entries: list[Callable[..., Any]],
    machine: dict[str, Any],
    error: Exception,
    filled: bool,
) -> None:
    cache = CompileCache(tmp_path, "flash")
    entries += [counts, fails(error)]
    model = compile_for_a100(nn.Identity(), mode="default", cache_dir=tmp_path)
    with cache.entered():
        if filled:
            (cache.folder / "code").touch()
    with pytest.raises(type(error)):
        model(torch.ones(1))
    assert entries == []
    assert cache.is_empty() is not filled


def test_caches_nothing_without_a_folder_or_for_eager_models(tmp_path: Path) -> None:
    eager = compile_for_a100(nn.Linear(4, 4), mode="off", cache_dir=tmp_path)
    eager(torch.ones(2, 4))
    assert eager.compile_cache is None
    assert list(tmp_path.iterdir()) == []


# -- folders that compilers cannot use ----------------------------------------------------------


def noexec(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda path: flags)


def test_refuses_a_noexec_folder(
    tmp_path: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    noexec(monkeypatch)
    folder = re.escape(str(tmp_path / "new"))
    message = (
        rf"^cannot load compiled code from {folder}, .*mounted noexec: .*--int8-compile-cache$"
    )
    with (
        pytest.raises(CompileCacheError, match=message),
        CompileCache(tmp_path / "new", "flash").entered(),
    ):
        pass
    assert not (tmp_path / "new").exists()


def test_refuses_a_noexec_folder_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    noexec(monkeypatch)
    model = compile_for_a100(nn.Linear(4, 4).eval(), mode="default")
    with pytest.raises(CompileCacheError, match=r"mounted noexec.*TORCHINDUCTOR_CACHE_DIR"):
        model(torch.ones(2, 4))


@pytest.mark.parametrize("given", [None, "my code", "it's", "plain"])
def test_reaches_torchs_folder_by_a_plain_path(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / (given or "own folder")
    monkeypatch.setattr(compile_cache, "inductor_folder", lambda: str(folder))
    if given is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    before = dict(os.environ)
    with compile_cache.usable_default():
        inside = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert is_plain(inside)
        assert inside.resolve() == folder
    assert dict(os.environ) == before


@pytest.mark.parametrize(("device", "refused"), [("cpu", True), ("cuda", False)])
def test_rejects_temporary_folder_without_a_plain_path(
    device: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/my tmp")
    match = (
        "^the path of the folder for temporary files must have no spaces or quotes, got '/my tmp'"
    )
    with pytest.raises(CompileCacheError, match=match) if refused else nullcontext():
        compile_cache.check_temporary_folder(device)
