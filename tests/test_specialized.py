"""The kernel whose warps have roles: it compiles for sm90 on any machine, and proves itself."""

from __future__ import annotations

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

from pytest_int8bench.fused import configs
from pytest_int8bench.fused.configs import Problem, Product, Specialized

triton = pytest.importorskip("triton")
launch = pytest.importorskip("pytest_int8bench.fused.launch")

# In a process of its own: where no GPU is, Triton's own functions are interpreted in this one.
COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
import triton
from pytest_int8bench.fused import configs, launches
from pytest_int8bench.fused.specialized import int8_product_specialized as kernel

found = []
for size, has_bias, residual, divisible in json.loads(sys.argv[1]):
    problem = configs.Problem(*size, 2, residual)
    shared_out = configs.specialized(problem, 132)
    made = launches.of_product(problem, has_bias, residual, "specialized", 0, shared_out, None)
    types = {"row_scale": "*fp32", "column_scale": "*fp32", "bias": "*bf16", "gamma": "*bf16"}
    names = ("a", "b", "c", "residual")
    for name, described, dtype in zip(names, made.descriptors, ("i8", "i8", "bf16", "bf16")):
        types[name] = f"tensordesc<{dtype}{described.block},{described.layout!r}>"
    constants = dict(made.constants)
    missing = {"bias": has_bias, "gamma": residual, "residual": residual}
    constants |= {name: None for name, there in missing.items() if not there}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    at = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    # As Triton says it of addresses that are aligned.
    vectors = [name for name in types if signature[name].startswith("*") and divisible]
    attributes = {at[name]: [["tt.divisibility", 16]] for name in vectors}
    source = GluonASTSource(
        kernel, signature, {at[n]: v for n, v in constants.items()}, attributes
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=made.options)
    found.append([compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async")])
print(json.dumps(found))
"""
# Rows, outputs and inputs; bias, residual, and whether vectors are aligned.
PROBLEMS = [
    ((196608, 2304, 768), True, False, True),
    ((196608, 2304, 768), True, False, False),
    ((196608, 768, 768), True, True, True),
    ((98304, 1024, 4096), False, True, True),
    ((196608, 768, 3072), False, False, True),
]


def test_it_compiles_for_each_kind_of_problem(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, json.dumps(PROBLEMS)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for shared, products in json.loads(ran.stdout.splitlines()[-1]):
        assert shared <= 227 * 1024  # of a multiprocessor of sm90
        assert products > 0


# -- proving itself -----------------------------------------------------------------------------

GPU = torch.device("cuda", 0)
LARGE = Problem(196608, 768, 768, 2, residual=False)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200 with a Triton that the kernel has not run with."""
    monkeypatch.setattr(configs, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    monkeypatch.delenv("INT8BENCH_PRODUCT", raising=False)
    monkeypatch.setattr(launch, "_proved", {})
    monkeypatch.setattr(launch, "of_product", lambda *args: args[5])


def chosen(*, may_try: bool = True) -> Product | Specialized:
    operands = (lambda: None) if may_try else None
    tile: Any = launch.chosen_product(LARGE, True, False, "specialized", 0, GPU, operands)
    return tile


def proof(monkeypatch: pytest.MonkeyPatch, outcome: bool | Exception) -> list[torch.device]:
    asked = []

    def have_equal_bits(device: torch.device) -> bool:
        asked.append(device)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(launch, "_have_equal_bits", have_equal_bits)
    return asked


def test_it_proves_itself_once_with_a_triton_it_has_not_run_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = proof(monkeypatch, True)
    # While a CUDA graph is recorded nothing can be tried, and nothing is known.
    assert isinstance(chosen(may_try=False), Product)
    assert isinstance(chosen(), Specialized)
    assert isinstance(chosen(may_try=False), Specialized)
    assert asked == [GPU]


@pytest.mark.parametrize(
    ("outcome", "why"),
    [(False, "they give other bits"), (ValueError("no such\nlayout"), "no such")],
)
def test_what_does_not_prove_itself_is_off_and_said_once(
    monkeypatch: pytest.MonkeyPatch, outcome: bool | Exception, why: str
) -> None:
    proof(monkeypatch, outcome)
    warning = f"^INT8 products by warps with roles are off with triton 3.10.0: .*{why}$"
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
def test_each_form_of_it_is_compared(
    monkeypatch: pytest.MonkeyPatch, differing: int | None
) -> None:
    """With launches that write ones, and one of the kernel's that misses an element."""
    forms: list[tuple[bool, int]] = []

    def of_product(problem: Problem, *args: Any) -> Any:
        tile = args[4]
        if isinstance(tile, Specialized):
            forms.append((tile.stationary, tile.buffers))
        misses = isinstance(tile, Specialized) and len(forms) - 1 == differing

        def run(a: None, b: None, out: torch.Tensor, *rest: Any) -> None:
            out.fill_(1)
            if misses:
                out[-1, -1] = torch.nan

        return run

    monkeypatch.setattr(launch, "of_product", of_product)
    monkeypatch.setattr(
        launch, "operands_like", lambda p, *_: (None, None, torch.empty(8, 4), *[None] * 5)
    )
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert launch._have_equal_bits(GPU) is (differing is None)
    every = [(True, 1), (False, 2), (False, 1)]
    assert forms == (every if differing is None else every[: differing + 1])
