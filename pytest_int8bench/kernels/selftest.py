"""Compare the output of a kernel with another kernel's, bit for bit, once per process.

A kernel in an experimental language may compile with another version of Triton, yet compute wrong
results. Importing this module does not load torch; :mod:`.dispatch` says why.
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
    """A self-test that a kernel must pass before it is used."""

    kernel: str
    """Description of the kernel in the warning about a failure."""
    passed_with: tuple[str, ...]
    """Prefixes of the Triton versions with which the kernel has passed its tests on a GPU. It needs
    no self-test with them."""
    problems: Callable[[int], Sequence[Problem]]
    """Takes the number of multiprocessors; returns matmuls that run each variant of the kernel."""


_passed: dict[tuple[SelfTest, torch.device], bool] = {}


def has_passed(
    test: SelfTest,
    device: torch.device,
    launches: Callable[[Problem], Sequence[Launch]],
    *,
    may_try: bool,
) -> bool:
    """Return whether a kernel needs no self-test with this version of Triton or has passed it.

    Args:
        test: the kernel's self-test.
        device: where it runs.
        launches: returns the launches of a matmul to compare, with a bias and without a factor.
        may_try: run the self-test if it has not run yet; False during CUDA graph capture.
    """
    import triton

    if triton.__version__.startswith(test.passed_with):
        return True
    if (test, device) not in _passed and may_try:
        try:
            problems = test.problems(devices.multiprocessors(device))
            same = have_equal_bits(problems, launches, device)
            failure = None if same else "its output differs from another kernel's"
        except Exception as error:  # another version of the language may raise anything
            failure = first_line(error)
        # Set this first: a warning filter may turn the warning into an exception.
        _passed[test, device] = failure is None
        if failure is not None:
            warnings.warn(
                f"{test.kernel} is not used, because its self-test failed with triton "
                f"{triton.__version__}: {failure}",
                stacklevel=2,
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
