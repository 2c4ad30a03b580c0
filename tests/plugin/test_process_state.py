"""A session restores the settings of torch, numpy, Python and the process."""

from __future__ import annotations

import inspect

import pytest

from toys import process_state, projects
from toys.projects import FAILS, OUT_OF_MEMORY, SMOKE, make_project, toy, without

TOY = toy(bs5=FAILS, bs6=OUT_OF_MEMORY, bs7="raise KeyboardInterrupt")
CONFTEST = f"""{projects.CONFTEST}

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop():
    import random

    import numpy
    import torch
    import torch._inductor.compile_fx

    import process_state

    backends = torch.backends
    backends.cuda.matmul.fp32_precision = "tf32"
    backends.mkldnn.matmul.fp32_precision = "bf16"
    backends.cudnn.allow_tf32 = False
    backends.cudnn.benchmark = True
    backends.cuda.enable_mem_efficient_sdp(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(7)
    numpy.random.seed(8)
    random.seed(9)
    before = process_state.process_state()
    try:
        return (yield)
    finally:
        changed = process_state.changes(before, process_state.process_state())
        for environment in changed.get("environment", ()):
            environment.pop("PYTEST_CURRENT_TEST", None)  # of a test that Ctrl-C ended
        print("changed:", {{name: both for name, both in changed.items() if both[0] != both[1]}})
"""
TESTS = """
import random

import numpy
import torch


def state():
    return [torch.get_rng_state().tolist(), repr(numpy.random.get_state()), random.getstate()]


def test_throughput(int8_throughput):
    before = state()
    try:
        int8_throughput()
    finally:
        assert state() == before


def test_model(int8_model, int8_batch):
    int8_model(*int8_batch)


def test_guardrail(int8_guardrail):
    int8_guardrail()


def test_sensitivity(int8_sensitivity):
    int8_sensitivity()
"""


@pytest.mark.parametrize(
    ("batches", "outcomes"),
    [
        ("4,5,6", {"passed": 7, "failed": 6, "skipped": 2}),
        ("7", {}),
    ],
    ids=["errors", "interrupted"],
)
def test_leaves_process_state_unchanged(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    forked: None,
    batches: str,
    outcomes: dict[str, int],
) -> None:
    project = make_project(
        pytester,
        monkeypatch,
        toy=TOY,
        conftest=CONFTEST,
        process_state=inspect.getsource(process_state),
        test_one=TESTS,
    )
    sets = f"--int8-set=batch_size={batches}"
    result = project.runpytest_subprocess(*SMOKE, sets, "-s", *without())
    result.stdout.fnmatch_lines(["*changed: {}"])
    assert outcomes.items() <= result.parseoutcomes().items()
