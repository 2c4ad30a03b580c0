"""The kernel whose warps have roles: it compiles for sm90, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# In a process of its own: where no GPU is, Triton's own functions are interpreted in this one.
COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
import triton
from pytest_int8bench.fused import configs, launch
from pytest_int8bench.fused.specialized import int8_product_specialized as kernel

found = []
for size, has_bias, residual in json.loads(sys.argv[1]):
    problem = configs.Problem(*size, 2, residual)
    shared_out = configs.specialized(problem, 132)
    made = launch.of_product(problem, has_bias, residual, "specialized", 0, shared_out, None)
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
    source = GluonASTSource(kernel, signature, {at[n]: v for n, v in constants.items()}, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=made.options)
    found.append([compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async")])
print(json.dumps(found))
"""
PROBLEMS = [
    ((196608, 2304, 768), True, False),
    ((196608, 768, 768), True, True),
    ((98304, 1024, 4096), False, True),
    ((196608, 768, 3072), False, False),
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
