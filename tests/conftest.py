"""What every test needs."""

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
    # Workers share the cores: more threads of torch would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What is started in the background, or by nohup, ignores these, and so would the processes that
# tests start and interrupt.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_configure(config: pytest.Config) -> None:
    # Before the tests' modules, which pytest's importlib mode leaves in sys.modules where it began
    # to import them: pickle names torch's constants after the first module that has ``torch``, and
    # the key of a compile cache holds that name. The controller of pytest-xdist runs no test.
    if getattr(config.option, "dist", "no") == "no":
        importlib.import_module("torch")


@pytest.fixture(scope="session", autouse=True)
def _frozen() -> Iterator[None]:
    """The collector, which models that are dropped call each time, leaves torch and the tests out:
    half a million objects that stay."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()  # what stays at the end would be reported as leaked


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that a test starts are not workers of pytest-xdist, whoever runs the test."""
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
    """Sessions that ``pytester`` starts have torch loaded already, where no GPU forbids to fork."""
    if not Path("/dev/nvidiactl").exists() and hasattr(os, "fork"):
        template = request.getfixturevalue("_template")
        monkeypatch.setattr(pytester, "popen", popen_for(template, pytester.popen))
