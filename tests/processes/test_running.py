"""Test stopping pytest processes and describing how they ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_int8bench.processes import running
from pytest_int8bench.processes.running import ending, is_pytests, stop
from toys.processes import runs

DEADLINE_S = 60
HANGING = "import signal; print('ready', flush=True); signal.pause()"
DEAF = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {HANGING}"
POLITE = f"""
import sys
try:
    {HANGING}
except KeyboardInterrupt:
    sys.exit(7)
"""


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "no test ran"),
        (1, "every test failed before its point was known"),
        (2, "the tests could not be collected"),
        (4, "usage error"),
        (5, "no tests collected"),
        (77, "exit code 77"),
        (-9, "SIGKILL"),
        (-15, "SIGTERM"),
        (-99, "signal 99"),
    ],
)
def test_describes_how_a_process_ended(code: int, text: str) -> None:
    assert ending(code) == text


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("PYTEST_ADDOPTS", True),
        ("PYTEST_PLUGINS", True),
        ("PYTEST_XDIST_WORKER", True),
        ("PYTEST_DISABLE_PLUGIN_AUTOLOAD", False),
        ("PYTHONPATH", False),
    ],
)
def test_recognizes_variables_of_an_outer_pytest(variable: str, expected: bool) -> None:
    assert is_pytests(variable) is expected


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for a process that ignores SIGINT."""
    monkeypatch.setattr(running, "_INTERRUPT_S", 0.01)


def start(code: str, *, group: bool = False) -> subprocess.Popen[bytes]:
    """Start a process and wait until it is ready for signals."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=group
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("group", [False, True])
def test_interrupted_process_may_finish(group: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_INTERRUPT_S", DEADLINE_S)
    with start(POLITE, group=group) as process:
        stop(process, group=group)
        assert process.returncode == 7


@pytest.mark.parametrize("group", [False, True])
def test_kills_a_process_that_ignores_signals(group: bool) -> None:
    with start(DEAF, group=group) as process:
        stop(process, group=group)
        assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("group", [False, True])
def test_does_not_signal_a_finished_process(group: bool) -> None:
    with start("print('ready')", group=group) as process:
        assert process.wait(DEADLINE_S) == 0
        stop(process, group=group)
        assert process.returncode == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ends_the_whole_process_group() -> None:
    """This holds even if the group's leader ended before the others."""
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {DEAF!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
print(child.pid, flush=True)
"""
    with start(code, group=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert process.wait(DEADLINE_S) == 0
        assert runs(child)
        stop(process, group=True)
        end = time.monotonic() + DEADLINE_S
        while runs(child):  # a killed process takes a moment to end
            assert time.monotonic() < end
