"""Set up the interpreter, signals and fixtures that all tests share."""

from __future__ import annotations

import gc
import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from forking import Template, popen_for

if not Path("/dev/nvidiactl").exists():
    # Without an NVIDIA device Triton's kernels run under its interpreter. Triton reads this when it
    # is first imported, and for all kernels: on a GPU the tests that need it skip.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, so more torch threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Background jobs and nohup ignore these signals, and the processes that tests start and
# interrupt would inherit that.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_configure(config: pytest.Config) -> None:
    # Import torch before the test modules, because sys.modules keeps the order in which imports
    # start: pickle names torch's constants after the first module that has a ``torch``
    # attribute, and compile cache keys contain that name. The xdist controller runs no tests.
    if getattr(config.option, "dist", "no") == "no":
        importlib.import_module("torch")


@pytest.fixture(scope="session", autouse=True)
def _frozen() -> Iterator[None]:
    """Keep torch and the tests, half a million permanent objects, out of garbage collection, which
    runs each time a model is dropped."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()  # frozen objects would be reported as leaks at exit


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide pytest-xdist's variables, so that sessions started by tests are not workers."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def _template() -> Iterator[Template]:
    template = Template()
    yield template
    template.close()


@pytest.fixture
def forked(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Fork ``pytester`` sessions from a process with torch loaded, unless there is a GPU."""
    if not Path("/dev/nvidiactl").exists() and hasattr(os, "fork"):
        template = request.getfixturevalue("_template")
        monkeypatch.setattr(pytester, "popen", popen_for(template, pytester.popen))
