"""Run a child process, stop it, and say how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# Exit codes of pytest: some tests failed, interrupted (or nothing could be collected), no tests.
FAILED, INTERRUPTED, NO_TESTS = 1, 2, 5
_ERRORS = {
    0: "no test ran",
    FAILED: "every test failed before its point was known",
    INTERRUPTED: "the tests could not be collected",
    3: "internal error",
    4: "usage error",
    NO_TESTS: "no tests collected",
}
_INTERRUPT_S = 10


def is_pytests(variable: str) -> bool:
    """Return whether an environment variable belongs to the pytest session that started this
    process, so that a new session must not inherit it."""
    own = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
    return variable in own or variable.startswith("PYTEST_XDIST_")


def run(
    command: Sequence[str] | str,
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: IO[str] | None = None,
    errors: IO[str] | None = None,
    shell: bool = False,
) -> int:
    """Run a process, and stop it if this one is interrupted.

    Args:
        command: what to run; a string for the shell with ``shell``.
        cwd: folder that it runs in.
        env: all of its environment.
        log: where its output goes, and then it reads nothing; by default it shares the terminal.
        errors: where its stderr goes, if it does not go to ``log`` as well.
        shell: run it by the shell, in a session of its own, which is stopped as a whole.

    Returns:
        Its exit code, negative for a signal.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=None if log is None else subprocess.DEVNULL,
        stdout=log,
        stderr=errors or (None if log is None else subprocess.STDOUT),
        shell=shell,
        start_new_session=shell,
    )
    try:
        return process.wait()
    except BaseException:
        stop(process, group=shell)
        raise


def stop(process: subprocess.Popen[bytes], *, group: bool = False) -> None:
    """Interrupt ``process``, give it time to finish what it has to say, then kill it.

    Args:
        process: what to stop; it may have ended.
        group: it was started in a session of its own, which ends as a whole.
    """
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A terminal interrupts both processes, os.kill only this one.
            process.wait(timeout=0 if group else 1)
        if process.poll() is None:
            _signal(process, signal.SIGINT, group)
            process.wait(timeout=_INTERRUPT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also at a second Ctrl-C
        _signal(process, signal.SIGKILL, group)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals, group: bool) -> None:
    if not group:
        process.send_signal(number)
        return
    with contextlib.suppress(ProcessLookupError):  # nobody is left in it
        os.killpg(process.pid, number)


def ending(code: int) -> str:
    """Return how a process ended that did not finish its tests."""
    if code >= 0:
        return _ERRORS.get(code, f"exit code {code}")
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
