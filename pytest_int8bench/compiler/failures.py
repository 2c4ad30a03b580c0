"""Find the cause of an error in compiling or running a model."""

from __future__ import annotations

import torch._dynamo

from pytest_int8bench.errors import ClearError
from pytest_int8bench.out_of_memory import oom_of


class CompileError(ClearError, RuntimeError):
    """The model did not compile, ran eagerly, or recompiled during timing."""


def root_of(error: BaseException) -> BaseException:
    """Return the root cause of ``error``; Dynamo wraps errors in uninformative ones."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def is_of_model(error: BaseException) -> bool:
    """Return whether tracing the model or running out of memory caused ``error``, and not a
    compiler or a kernel."""
    of_backend = isinstance(error, torch._dynamo.exc.BackendCompilerFailed)
    of_dynamo = isinstance(error, torch._dynamo.exc.TorchDynamoException)
    return oom_of(error) is not None or (of_dynamo and not of_backend)
