"""The table of kernels: one row is all that the rest of the package needs to know a kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pytest_int8bench.kernels import device as kernels_device
from pytest_int8bench.kernels import dispatch, reference, table, tiles
from pytest_int8bench.kernels.tile_types import Heads, Problem, Product, Specialized
from pytest_int8bench.measure.evidence import EvidenceError, check_labels, profile_forward
from pytest_int8bench.params import RunParams

cuda = pytest.importorskip("pytest_int8bench.kernels.cuda")  # needs Triton

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
W8A8 = RunParams(int8_enabled=True, gpu_type="cpu")
TILE = Product(16, 16, 16, 4, 2)
HEADS = Heads(1, 1, 1, 8, 8, 8)


# -- a new row ----------------------------------------------------------------------------------


class Toy:
    """A kernel in plain torch, and what was asked of its row."""

    def __init__(self) -> None:
        self.tiled: list[tuple[str, Problem]] = []
        self.runs = 0

    def tiles(self, name: str, problem: Problem, device: torch.device, time: Any) -> Product:
        self.tiled.append((name, problem))
        return TILE

    def launch(self, problem: Problem, *call: Any) -> Callable[..., None]:
        *_, tile, device = call
        assert (tile, device) == (TILE, CPU)
        return self.run

    def run(self, q: Any, weight: Any, out: torch.Tensor, residual: Any, *vectors: Any) -> None:
        self.runs += 1
        row_scale, column_scale, bias, gamma = vectors
        parts = q, row_scale, weight, column_scale, bias, gamma, residual
        torch.ops.int8bench_toy.matmul_of_toy(out, list(parts[:4]), list(parts[4:]))


@pytest.fixture(scope="module", autouse=True)
def _operator() -> Iterator[None]:
    """An operator whose name a profile of the CPU shows."""
    library = torch.library.Library("int8bench_toy", "FRAGMENT")
    library.define("matmul_of_toy(Tensor(a!) out, Tensor[] parts, Tensor?[] rest) -> ()")

    def matmul(out: Any, parts: Any, rest: Any) -> None:
        out.copy_(reference.linear(*parts, *rest, out.dtype))

    library.impl("matmul_of_toy", matmul, "CompositeExplicitAutograd")
    yield
    library._destroy()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """Add a row before the others."""
    made = Toy()
    row = table.Kernel(
        operator="linear",
        name="toy",
        function="matmul_of_toy",
        launch=made.launch,
        tiles=made.tiles,
        accepts=lambda problem, stride, residual, dtype, is_aligned: problem.k > 8,
    )
    monkeypatch.setattr(table, "KERNELS", (row, *table.KERNELS))
    monkeypatch.setattr(cuda, "_kept", {})
    return made


def operands(k: int = 32) -> tuple[Any, ...]:
    q, weight = (torch.randint(-127, 128, (n, k), dtype=torch.int8) for n in (3, 16))
    bias = torch.randn(16)
    return q, torch.rand(3), weight, torch.rand(16), bias, None, None, torch.float32


def test_a_row_is_chosen_run_and_recognized(toy: Toy) -> None:
    name = dispatch.matmul_kernel(CPU)
    assert name == "toy"
    given = operands()
    outs = []
    evidence = profile_forward(lambda: outs.append(cuda.linear(*given, kernel=name)), CPU)
    assert torch.equal(outs[0], reference.linear(*given))
    assert (toy.runs, toy.tiled) == (1, [("toy", Problem(3, 16, 32, 4, residual=False))])
    assert [kernel.name for kernel in evidence.int8_products] == ["int8bench_toy::matmul_of_toy"]
    check_labels(evidence, W8A8, (1, 1), fused=True)
    with pytest.raises(EvidenceError, match="labelled int8_backend=torchao, but int8bench_toy::"):
        check_labels(evidence, W8A8, (1, 1), fused=False)


def test_a_row_can_be_forced(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INT8BENCH_PRODUCT", "toy")
    assert dispatch.matmul_kernel(CPU) == "toy"
    monkeypatch.setenv("INT8BENCH_PRODUCT", "pointers")
    assert dispatch.matmul_kernel(CPU) == "pointers"
    monkeypatch.setenv("INT8BENCH_PRODUCT", "cublas")
    message = "must be one of toy, specialized, tma, pointers, got 'cublas'$"
    with pytest.raises(dispatch.KernelError, match=message):
        dispatch.forced_kernel()


def test_operands_that_a_row_does_not_accept_take_the_next_that_the_device_runs(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(k: int, capability: tuple[int, int]) -> list[str]:
        monkeypatch.setattr(kernels_device, "capability", lambda device: capability)
        problem = Problem(64, 128, k, 2, residual=False)
        kernels = dispatch.accepting("toy", GPU, problem, 0, None, torch.bfloat16, True)
        return [kernel.name for kernel in kernels]

    assert names(32, (9, 0)) == ["toy", "specialized", "tma", "pointers"]
    assert names(8, (9, 0)) == ["pointers"]  # TMA takes rows of 16 bytes
    assert names(32, (10, 0)) == ["toy", "tma", "pointers"]
    assert names(32, (8, 0)) == ["toy", "pointers"]


# -- the rows there are -------------------------------------------------------------------------


def launches() -> dict[str, Any]:
    """Return a launch of each kernel by the name of its row."""
    problem = Problem(64, 128, 128, 2, residual=False)
    call = {
        "specialized": (problem, False, False, 0, Specialized(1, 1, 1, 4, 1, True), CPU),
        "tma": (problem, False, False, 0, TILE, CPU),
        "pointers": (problem, False, False, 0, TILE, CPU),
        "quantize_rows": (
            *((4, 8), (8, 0), "none", "none", 0.0, False, [False] * 4),
            tiles.rows(4, 8, 1),
        ),
        "dequantize": ([(3, 5)], tiles.weights()),
        "quantize_heads": (HEADS, "none", 0, [(8, 8, 8)] * 6),
        "rotate_heads": (HEADS, "angles", 0, [(8, 8, 8)] * 5),
        "int8_attention": (HEADS, 0.1, (8, 8, 8), tiles.attention(HEADS, True), True),
        "short_attention": (HEADS, 0.1, True, [(8, 8, 8)] * 3, tiles.short(HEADS)),
    }
    return {row.name: row.launch(*call[row.name]) for row in table.KERNELS}


def test_rows_name_the_functions_that_they_launch() -> None:
    found = {name: launch.kernel.fn.__name__ for name, launch in launches().items()}
    assert found == {row.name: row.function for row in table.KERNELS}


def test_rows_have_names_of_their_own() -> None:
    for names in ([row.name for row in table.KERNELS], [r.function for r in table.KERNELS]):
        assert len(set(names)) == len(names)


def test_a_name_can_be_checked_without_torch() -> None:
    code = """
import os, sys
os.environ["INT8BENCH_PRODUCT"] = "tma"
from pytest_int8bench.kernels.dispatch import forced_kernel
assert forced_kernel() == "tma"
print(sorted({"torch", "triton", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
