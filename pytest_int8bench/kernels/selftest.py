"""Check a kernel against another one, bit for bit, once per process.

A kernel in an experimental language may compile and compute something else with another version of
Triton. Importing this module does not load torch (see :mod:`.dispatch`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_int8bench.errors import first_line
from pytest_int8bench.kernels import device as devices
from pytest_int8bench.kernels.tile_types import Problem

if TYPE_CHECKING:
    import torch

    from pytest_int8bench.kernels.launch import Launch


@dataclass(frozen=True)
class SelfTest:
    """The test that a kernel must pass before it is used."""

    what: str
    """Name of the kernel in the warning if it fails."""
    passed_with: tuple[str, ...]
    """How the versions of Triton begin with which the kernel has passed its tests on a GPU; it
    needs no self-test with these."""
    problems: Callable[[int], Sequence[Problem]]
    """Returns matmuls that run each variant of the kernel, for a number of multiprocessors."""


_passed: dict[tuple[SelfTest, torch.device], bool] = {}


def has_passed(
    test: SelfTest,
    device: torch.device,
    launches: Callable[[Problem], Sequence[Launch]],
    *,
    may_try: bool,
) -> bool:
    """Return whether a kernel is known to give the bits of another one.

    Args:
        test: the kernel's test.
        device: where it runs.
        launches: returns the launches of a matmul to compare: with a bias, without a factor.
        may_try: run the test if it has not run yet. False while a CUDA graph is recorded.
    """
    import triton

    if triton.__version__.startswith(test.passed_with):
        return True
    if (test, device) not in _passed and may_try:
        try:
            problems = test.problems(devices.multiprocessors(device))
            same = have_equal_bits(problems, launches, device)
            failure = None if same else "they give other bits"
        except Exception as error:  # whatever another version of the language raises
            failure = first_line(error)
        _passed[test, device] = failure is None  # before the warning, which may be an error
        if failure is not None:
            warnings.warn(
                f"{test.what} are off with triton {triton.__version__}: {failure}", stacklevel=2
            )
    return _passed.get((test, device), False)


def have_equal_bits(
    problems: Sequence[Problem],
    launches: Callable[[Problem], Sequence[Launch]],
    device: torch.device,
) -> bool:
    """Return whether the launches of each matmul write the same output for random operands."""
    import torch

    from pytest_int8bench.kernels.launch import operands_like

    for problem in problems:
        with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):
            a, b, c, *rest = operands_like(problem, True, False, torch.bfloat16, device)
            outs = []
            for launch in launches(problem):
                out = torch.full_like(c, math.nan)
                launch(a, b, out, *rest)
                outs.append(out)
            if not all(torch.equal(outs[0], out) for out in outs[1:]):
                return False
    return True
