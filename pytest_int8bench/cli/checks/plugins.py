"""pytest, its plugins, and what slows processes down."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

from pytest_int8bench.cli.checks.lines import OK, PROBLEM, WARNING, Line
from pytest_int8bench.cli.checks.machine import Machine
from pytest_int8bench.cli.checks.software import OURS, installed
from pytest_int8bench.clock import lasting_tracers

_BENCHMARK = "pytest-benchmark"
# Plugins that change times -> how, and what to do.
_DISTURBING = {
    "pytest-codspeed": ("with --codspeed nothing is timed", "run without --codspeed"),
    "pytest-cov": ("with --cov Python is traced, except while a clock runs", "run with --no-cov"),
    "pytest-memray": ("with --memray each allocation is followed", "run without --memray"),
    "pytest-monitor": ("it watches load and memory during each test", "run with --no-monitor"),
    "pytest-profiling": ("with --profile each call is profiled", "run without --profile"),
    "pytest-run-parallel": ("with --parallel-threads tests run at once", "run without it"),
    "pytest-xdist": ("with -n, processes share cores and GPUs", "run at most one worker per GPU"),
}
# Variables that change what is measured -> how.
_VARIABLES = {
    "TORCHDYNAMO_DISABLE": "torch.compile compiles nothing",
    "TORCH_COMPILE_DISABLE": "torch.compile compiles nothing",
    "TRITON_INTERPRET": "Triton's kernels are interpreted",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "pytest loads no plugin that is not named by -p",
}


def pytest(machine: Machine) -> Iterator[Line]:
    """Check pytest and what this plugin needs of its plugins."""
    yield installed("pytest")
    line = installed(_BENCHMARK)
    if line.mark == PROBLEM:
        yield line
        return
    found = _plugins()
    missing = [name for name in (OURS, _BENCHMARK) if name not in found]
    what = [
        Line(PROBLEM, f"pytest does not find {name}", f"pip install {name}") for name in missing
    ]
    yield line.with_findings(what)


def plugins(machine: Machine) -> Iterator[Line]:
    """Name the installed plugins that change times."""
    found = _plugins()
    for name in found:
        if name in _DISTURBING:
            how, remedy = _DISTURBING[name]
            yield Line(WARNING, f"{name} is installed: {how}", remedy)
    known = {OURS, _BENCHMARK, *_DISTURBING}
    others = ", ".join(name for name in found if name not in known)
    yield Line(OK, f"other plugins, not known to change times: {others or 'none'}")


def environment(machine: Machine) -> Iterator[Line]:
    """Name what slows down processes that are started here, or changes what they compute."""
    set_here = {name: why for name, why in _VARIABLES.items() if os.environ.get(name)}
    for name, why in set_here.items():
        if os.environ[name] != "0":
            yield Line(WARNING, f"{name}={os.environ[name]}: {why}", f"unset {name}")
    tracers = ", ".join(lasting_tracers())
    if tracers:
        yield Line(WARNING, f"times would include what this costs: {tracers}", "turn it off")
    else:
        yield Line(OK, "nothing in this environment slows down each call")


def _plugins() -> list[str]:
    """Return the distributions whose plugins pytest loads by itself."""
    entries = importlib.metadata.entry_points(group="pytest11")
    names = (entry.dist.metadata["Name"] for entry in entries if entry.dist is not None)
    return sorted({name.lower().replace("_", "-") for name in names if name})
