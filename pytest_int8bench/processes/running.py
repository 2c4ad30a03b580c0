"""Run and stop child processes and describe how they ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# pytest's exit codes: tests failed, interrupted (or collection failed), no tests collected.
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
    """Return whether an environment variable configures the current pytest session, so that a new
    session must not inherit it."""
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
    """Run a child process, and stop it if this process is interrupted.

    Args:
        command: the command, a string if ``shell`` is set.
        cwd: folder in which it runs.
        env: its complete environment.
        log: file for its output, in which case its stdin is empty; by default it shares the
            terminal.
        errors: file for its stderr; by default stderr goes where stdout goes.
        shell: run the command in a shell in a new session, whose processes are all stopped
            together.

    Returns:
        The exit code, negative for a signal.
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
    """Interrupt ``process``, give it time to finish its output, then kill it.

    Args:
        process: the process, which may already have ended.
        group: stop its whole process group; it must have been started in a new session.
    """
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Ctrl-C in a terminal has already interrupted the child too; os.kill has not.
            process.wait(timeout=0 if group else 1)
        if process.poll() is None:
            _signal(process, signal.SIGINT, group)
            process.wait(timeout=_INTERRUPT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # even after a second Ctrl-C
        _signal(process, signal.SIGKILL, group)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals, group: bool) -> None:
    if not group:
        process.send_signal(number)
        return
    with contextlib.suppress(ProcessLookupError):  # the group has no processes left
        os.killpg(process.pid, number)


def ending(code: int) -> str:
    """Describe the exit code of a process that did not finish its tests."""
    if code >= 0:
        return _ERRORS.get(code, f"exit code {code}")
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
