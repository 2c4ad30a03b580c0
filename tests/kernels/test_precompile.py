"""Kernels are compiled once, in threads, and nothing of it is lost or left."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from pytest_int8bench.kernels import precompile

CPU = torch.device("cpu")


def test_finishing_waits_for_what_was_started_and_it_is_done_once() -> None:
    go, done = threading.Event(), []

    def compiled() -> None:
        go.wait(30)
        done.append(threading.current_thread().name)

    precompile.start("one", compiled, CPU)
    precompile.start("one", compiled, CPU)
    precompile.start("other", compiled, CPU)
    go.set()
    precompile.finish()
    assert len(done) == 2
    assert all(name.startswith("int8bench-compile") for name in done)
    precompile.start("one", compiled, CPU)  # it may have to be again, such as for another cache
    precompile.finish()
    assert len(done) == 3


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_errors_are_left_to_the_launch(error: type[BaseException]) -> None:
    def fails() -> None:
        raise error

    precompile.start("fails", fails, CPU)
    precompile.finish()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_starts_afresh() -> None:
    go = threading.Event()
    precompile.start("kept", lambda: go.wait(30), CPU)
    child = os.fork()
    if child == 0:
        precompile.finish()  # of the parent's thread, which is not here
        done: list[int] = []
        precompile.start("own", lambda: done.append(1), CPU)
        precompile.finish()
        os._exit(0 if done == [1] else 1)
    go.set()
    precompile.finish()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
