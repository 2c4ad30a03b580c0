"""Run pytest sessions as forks of a process that has already loaded torch.

Loading torch, torchao and SciPy takes four seconds of CPU time, pytest and this package another
half, as long as the rest of a short session. A fork has its own process id, environment, folder,
outputs and exit status. Tests of what a session loads, and when, use separate processes.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pytest

#: Modules that are slow to load, and the modules of this package that import the others.
LOADED = (
    *("torch", "torch._dynamo", "torchao.quantization", "scipy.stats"),
    *("pytest_int8bench.accuracy.guardrail", "pytest_int8bench.gate.session"),
    *("pytest_int8bench.measure.point", "pytest_int8bench.plugin.calls"),
    "pytest_int8bench.report.terminal",
)
#: Sessions with one of these options do not need torch, and tests may check that.
WITHOUT_TORCH = frozenset({"--collect-only", "--benchmark-skip"})


class Template:
    """The process that forks. It ends when its standard input closes, so it ends with this one."""

    def __init__(self) -> None:
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def run(self, args: list[str], environ: Mapping[str, str], output: str, error: str) -> int:
        """Run ``python -m pytest ARGS`` in the current folder; return its exit status, negative
        for a signal, as :mod:`subprocess` does.

        Args:
            args: arguments of pytest.
            environ: the whole environment.
            output: file that standard output goes to.
            error: file that standard error goes to.
        """
        request = [args, dict(environ), os.getcwd(), output, error]
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks ended: {process.wait()}")
        return int(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Finished:
    """A finished process, with the methods that pytester calls."""

    stdin = None

    def __init__(self, status: int) -> None:
        self._status = status

    def wait(self) -> int:
        return self._status


def popen_for(template: Template, popen: Any) -> Any:
    """Return a popen that runs pytest sessions as forks and everything else through ``popen``."""
    pytest_command = [sys.executable, "-mpytest"]

    def start(cmdargs: tuple[str, ...], *, stdout: IO[str], stderr: IO[str], **more: Any) -> Any:
        args = list(cmdargs)
        if args[:2] != pytest_command or WITHOUT_TORCH.intersection(args):
            return popen(cmdargs, stdout=stdout, stderr=stderr, **more)
        given = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, given))}
        return Finished(template.run(args[2:], environ, stdout.name, stderr.name))

    return start


class _Loading:
    """Load modules like a session does, with assertions of plugins rewritten."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self) -> int:
        for name in LOADED:
            importlib.import_module(name)
        return 0  # and no session


def _serve() -> None:
    path = list(sys.path)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    others = [f"-pno:{name}" for name in ("codspeed", "hypothesispytest", "randomly")]
    pytest.main(["--noconftest", f"-c{os.devnull}", *others], plugins=[_Loading()])
    sys.path[:] = path
    gc.collect()
    gc.freeze()  # otherwise garbage collection in each fork would copy pages
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _session(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _session(
    args: list[str], environ: dict[str, str], folder: str, output: str, error: str
) -> None:
    status: Any = 1
    try:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environ)
        for number, (path, flags) in enumerate(
            [(os.devnull, os.O_RDONLY), (output, os.O_WRONLY), (error, os.O_WRONLY)]
        ):
            descriptor = os.open(path, flags)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = os.fdopen(0, closefd=False)
        random.seed()
        sys.argv = ["pytest", *args]
        sys.path[:0] = [folder, *environ["PYTHONPATH"].split(os.pathsep)]
        runpy.run_module("pytest", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Skip interpreter shutdown, which would destroy torch object by object.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
