"""A small project whose tests measure a toy, and readers of what its sessions save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result

SMOKE = (
    *("--int8-preset=smoke", "--int8-set=compile_mode=off"),
    "--int8-set=benchmark_interval_s=0.02",
)
#: Plugins that may be installed; each is disabled except in its own tests.
OTHERS = ("randomly", "codspeed", "xdist", "hypothesispytest", "anyio")

FAILS = 'raise ValueError("five is too many")'
OUT_OF_MEMORY = 'raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")'


def toy(**at: str) -> str:
    """Return toy.py: two layers that run a statement at a batch size, such as ``bs5``."""
    lines = "".join(
        f"        if x.shape[0] == {name.removeprefix('bs')}:\n            {statement}\n"
        for name, statement in at.items()
    )
    return f"""
import os
import signal

import torch
from torch import nn

from pytest_int8bench import Workload


class Toy(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.fc1 = nn.Linear(32, width)
        self.fc2 = nn.Linear(width, 32)

    def forward(self, x):
{lines}        return self.fc2(nn.functional.gelu(self.fc1(x)))


def make(name="toy", build=lambda p: Toy(), **more):
    return Workload(
        name=name,
        build=build,
        inputs=lambda p, device: (torch.randn(p.batch_size, 16, 32, device=device),),
        **{{"units": lambda p: {{"samples": p.batch_size, "tokens": 16 * p.batch_size}}, **more}},
    )
"""


#: Batches of 5 fail, batches of 6 run out of memory.
TOY = toy(bs5=FAILS, bs6=OUT_OF_MEMORY)
#: conftest.py with the workload of toy.py; pytest-benchmark's own information takes seconds.
CONFTEST = """
import pytest


@pytest.fixture(scope="session")
def int8_workload():
    import toy

    return toy.make()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info():
    return {"node": "here"}
"""
THROUGHPUT = """
def test_throughput(int8_throughput):
    result = int8_throughput()
    assert result.oom or result.samples_per_s > 0
"""


def without(*using: str | None) -> list[str]:
    """Return options that disable all optional plugins except those named."""
    return [option for name in OTHERS if name not in using for option in ("-p", f"no:{name}")]


def make_project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, *, ini: str = "", **files: str
) -> pytest.Pytester:
    """Write toy.py, conftest.py and ``files``, which may override them."""
    monkeypatch.delenv("CODSPEED_ENV", raising=False)  # set by a plugin of the outer session
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads would wait for other tests' processes
    pytester.makeini(f"[pytest]\npythonpath = .\n{ini}")
    pytester.makepyfile(**{"toy": TOY, "conftest": CONFTEST, **files})
    return pytester


def bf16(batch: int) -> str:
    """Return the run name of a baseline with the preset smoke."""
    return f"cpu_bf16_bs{batch}_compile_mode-off"


def int8(batch: int, mode: str = "w8a8") -> str:
    """Return the run name of a candidate with the preset smoke."""
    return f"cpu_bf16_int8_{mode}_off_bs{batch}"


def ids(result: pytest.RunResult) -> list[str]:
    """Return the node ids that ``--collect-only -q`` lists."""
    return [line for line in result.outlines if "::" in line]


def journals(project: pytest.Pytester) -> list[Path]:
    """Return the journals, oldest first."""
    found = (project.path / ".benchmarks" / "int8bench").glob("*.jsonl")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def journaled(project: pytest.Pytester) -> dict[str, Result]:
    """Return the results in the only journal, by node."""
    [path] = journals(project)
    return {result.nodeid: result for result in read(path).results}


def statuses(results: list[Result]) -> dict[str, str]:
    return {result.nodeid: result.status for result in results}


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
