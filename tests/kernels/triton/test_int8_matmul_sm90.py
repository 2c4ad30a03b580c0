"""The kernel whose warps have roles: it compiles for sm90 on any machine, and proves itself."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_int8bench.kernels import device as kernels_device
from pytest_int8bench.kernels import dispatch, selftest, table
from pytest_int8bench.kernels import tiles as kernels_tiles
from pytest_int8bench.kernels.tile_types import Problem, Product, Specialized, Tile

triton = pytest.importorskip("triton")
launch = pytest.importorskip("pytest_int8bench.kernels.launch")

# In a process of its own: where no GPU is, Triton's own functions are interpreted in this one. The
# driver is one of an H200 that runs nothing; all before it is what runs on a GPU.
LAUNCH = """
import json, sys
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from pytest_int8bench.kernels import cuda, device as devices, dispatch, launch, precompile, table
from pytest_int8bench.kernels.tile_types import Problem
from pytest_int8bench.kernels.triton.int8_matmul_sm90 import int8_product_specialized

grids, new = [], []

class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, *rest):
        grids.append([x, y, z])

driver.set_active(SimpleNamespace(
    launcher_cls=Launcher,
    utils=SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        load_binary=lambda *args: (None, None, 168, 0, 1024),
        unload_module=lambda module: None,
    ),
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
))
devices.multiprocessors = lambda device: 132
devices.capability = lambda device: (9, 0)
for rows, outputs, inputs, has_bias, has_residual, aligned in json.loads(sys.argv[1]):
    problem = Problem(rows, outputs, inputs, 2, has_residual)
    device = torch.device("cpu")
    q, weight, out, residual, *vectors = launch.operands_like(
        problem, has_bias, has_residual, torch.bfloat16, device
    )
    if not aligned:
        vectors = [v if v is None else torch.cat([v[:1], v])[1:] for v in vectors]
    scale, weight_scale, bias, gamma = vectors
    stride = outputs * has_residual
    kernels = dispatch.accepting(
        "specialized", device, problem, stride, residual, torch.bfloat16, True
    )
    product = dispatch.matmul_launch(
        kernels, device, problem, has_bias, has_residual, stride, None
    )
    operands = (q, weight, out, residual, *vectors)
    dtypes = [None if operand is None else operand.dtype for operand in operands]
    product.compile_ahead(dtypes, device)
    precompile.finish()
    compiled = int8_product_specialized.device_caches[0][0]
    known = set(compiled)
    for _ in range(2):  # the second one repeats what was prepared
        cuda.linear(
            q, scale, weight, weight_scale, bias, gamma, residual, out.dtype, kernel="specialized"
        )
    new.append(len(set(compiled) - known))
kept = list(cuda._kept.values())
compiled = [kernel for one in kept for kernel in one.kernel.device_caches[0][0].values()]
print(json.dumps({
    "kernels": [one.kernel.fn.__name__ for one in kept],
    "grids": grids,
    "new": new,
    "shared": [kernel.metadata.shared for kernel in compiled],
    "products": [kernel.asm["ptx"].count("wgmma.mma_async") for kernel in compiled],
}))
"""
# Rows, outputs and inputs; bias, residual (and gamma), and whether vectors are aligned.
PROBLEMS = [
    (16384, 2304, 768, True, False, True),
    (16384, 2304, 768, True, False, False),
    (45056, 768, 768, True, True, True),
    (34000, 1024, 4096, False, True, True),
    (45056, 768, 3072, False, False, True),
]


@pytest.mark.slow
def test_each_kind_of_problem_compiles_and_is_launched(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["INT8BENCH_PRODUCT"] = "specialized"  # whatever the version of Triton
    command = [sys.executable, "-c", LAUNCH, json.dumps(PROBLEMS)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("{")))
    assert found["kernels"] == ["int8_product_specialized"] * len(PROBLEMS)
    wanted = [kernels_tiles.specialized(Problem(*p[:3], 2, p[4]), 132) for p in PROBLEMS]
    programs = [tiles.slots * tiles.groups for tiles in wanted if tiles is not None]
    assert found["grids"] == [[count, 1, 1] for count in programs for _ in range(2)]
    assert all(0 < shared <= 227 * 1024 for shared in found["shared"])  # of a multiprocessor
    assert all(products > 0 for products in found["products"])
    # What was compiled ahead is what is launched, but for vectors that are not aligned.
    assert found["new"] == [int(not aligned) for *_, aligned in PROBLEMS]


# -- proving itself -----------------------------------------------------------------------------

GPU = torch.device("cuda", 0)
LARGE = Problem(196608, 768, 768, 2, residual=False)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200 with a Triton that the kernel has not run with."""
    monkeypatch.setattr(kernels_device, "capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels_device, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    monkeypatch.delenv("INT8BENCH_PRODUCT", raising=False)
    monkeypatch.setattr(selftest, "_passed", {})


def chosen(*, may_try: bool = True) -> Tile:
    kernels = table.kernels_of("linear")
    passed = [one for one in kernels if dispatch.has_passed(one, GPU, may_try=may_try)]
    return dispatch.kernel_and_tile(passed, GPU, LARGE, None)[1]


def proof(monkeypatch: pytest.MonkeyPatch, outcome: bool | Exception) -> list[torch.device]:
    asked = []

    def have_equal_bits(problems: Any, launches: Any, device: torch.device) -> bool:
        asked.append(device)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(selftest, "have_equal_bits", have_equal_bits)
    return asked


def test_proves_itself_once_per_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = proof(monkeypatch, True)
    # While a CUDA graph is recorded nothing can be tried, and nothing is known.
    assert isinstance(chosen(may_try=False), Product)
    assert isinstance(chosen(), Specialized)
    assert isinstance(chosen(may_try=False), Specialized)
    assert asked == [GPU]


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (False, "its output differs from another kernel's"),
        (ValueError("no such\nlayout"), "no such"),
    ],
)
def test_failed_proof(monkeypatch: pytest.MonkeyPatch, outcome: bool | Exception, why: str) -> None:
    proof(monkeypatch, outcome)
    warning = f"^the warp-specialized INT8 matmul kernel is not used.* triton 3.10.0: {why}$"
    with pytest.warns(UserWarning, match=warning):
        assert isinstance(chosen(), Product)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(chosen(), Product)


@pytest.mark.parametrize("known", ["version", "forced"])
def test_what_is_known_or_wanted_is_not_tried(monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    asked = proof(monkeypatch, False)
    if known == "version":
        monkeypatch.setattr(triton, "__version__", "3.6.0")
    else:
        monkeypatch.setenv("INT8BENCH_PRODUCT", "specialized")
    assert isinstance(chosen(), Specialized)
    assert asked == []


@pytest.mark.parametrize("differing", [None, 0, 1, 2])
def test_compares_each_form(monkeypatch: pytest.MonkeyPatch, differing: int | None) -> None:
    """With launches that write ones, and one of the kernel's that misses an element."""
    forms: list[tuple[bool, int]] = []

    def launched(problem: Problem, bias: bool, gamma: bool, stride: int, tile: Tile, _: Any) -> Any:
        if isinstance(tile, Specialized):
            forms.append((tile.stationary, tile.buffers))
        misses = isinstance(tile, Specialized) and len(forms) - 1 == differing

        def run(a: None, b: None, out: torch.Tensor, *rest: Any) -> None:
            out.fill_(1)
            if misses:
                out[-1, -1] = torch.nan

        return run

    rows = [dataclasses.replace(row, launch=launched) for row in table.kernels_of("linear")]
    monkeypatch.setattr(table, "KERNELS", rows)
    monkeypatch.setattr(
        launch, "operands_like", lambda p, *_: (None, None, torch.empty(8, 4), *[None] * 5)
    )
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with nullcontext() if differing is None else pytest.warns(UserWarning, match="output differs"):
        assert dispatch.has_passed(rows[0], GPU, may_try=True) is (differing is None)
    every = [(True, 1), (False, 2), (False, 1)]
    assert forms == (every if differing is None else every[: differing + 1])
