"""Check pytest, its plugins, and settings that slow down processes."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

from pytest_int8bench.cli.checks.lines import OK, PROBLEM, WARNING, Line
from pytest_int8bench.cli.checks.machine import Machine
from pytest_int8bench.cli.checks.software import OURS, installed
from pytest_int8bench.clock import lasting_tracers

_BENCHMARK = "pytest-benchmark"
# Plugin that affects timings -> how it does so, and the remedy.
_AFFECTING_TIMINGS = {
    "pytest-codspeed": ("--codspeed disables timing", "run without --codspeed"),
    "pytest-cov": ("--cov traces Python, except while the timer runs", "run with --no-cov"),
    "pytest-memray": ("--memray tracks every allocation", "run without --memray"),
    "pytest-monitor": ("it monitors load and memory during each test", "run with --no-monitor"),
    "pytest-profiling": ("--profile profiles every call", "run without --profile"),
    "pytest-run-parallel": ("--parallel-threads runs tests in parallel", "run without it"),
    "pytest-xdist": ("with -n, processes share cores and GPUs", "run at most one worker per GPU"),
}
# Environment variable that affects measurements -> how it does so.
_VARIABLES = {
    "TORCHDYNAMO_DISABLE": "torch.compile compiles nothing",
    "TORCH_COMPILE_DISABLE": "torch.compile compiles nothing",
    "TRITON_INTERPRET": "Triton interprets its kernels instead of compiling them",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "pytest loads only plugins named with -p",
}


def pytest(machine: Machine) -> Iterator[Line]:
    """Check pytest and the plugins that this package needs."""
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
    """List the installed plugins, with warnings about those that affect timings."""
    found = _plugins()
    for name in found:
        if name in _AFFECTING_TIMINGS:
            how, remedy = _AFFECTING_TIMINGS[name]
            yield Line(WARNING, f"{name} is installed: {how}", remedy)
    known = {OURS, _BENCHMARK, *_AFFECTING_TIMINGS}
    others = ", ".join(name for name in found if name not in known)
    yield Line(OK, f"other plugins, not known to affect timings: {others or 'none'}")


def environment(machine: Machine) -> Iterator[Line]:
    """Report settings that slow down processes started here or change their results."""
    set_here = {name: why for name, why in _VARIABLES.items() if os.environ.get(name)}
    for name, why in set_here.items():
        if os.environ[name] != "0":
            yield Line(WARNING, f"{name}={os.environ[name]}: {why}", f"unset {name}")
    tracers = ", ".join(lasting_tracers())
    if tracers:
        yield Line(WARNING, f"timings would include the overhead of {tracers}", "turn it off")
    else:
        yield Line(OK, "nothing in this environment adds overhead to each call")


def _plugins() -> list[str]:
    """Return the names of distributions whose plugins pytest loads automatically."""
    entries = importlib.metadata.entry_points(group="pytest11")
    names = (entry.dist.metadata["Name"] for entry in entries if entry.dist is not None)
    return sorted({name.lower().replace("_", "-") for name in names if name})
