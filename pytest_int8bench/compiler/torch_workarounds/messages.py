"""Hide logs and warnings of torch that are not about the user's model."""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def hide_metrics_error() -> Iterator[None]:
    """Keep a harmless error of torch's compile metrics out of the log.

    To write its configuration to the metrics, torch sorts the functions in
    ``torch._dynamo.config.ignore_logging_functions``, and logs a ``TypeError`` because functions
    cannot be compared.

    Affects torch 2.11 (logger ``torch._dynamo.metrics_context``, torch/_dynamo/metrics_context.py).
    We know of no upstream issue.
    """
    logger = logging.getLogger("torch._dynamo.metrics_context")

    def is_another(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, TypeError) and "'function' and 'function'" in str(error))

    logger.addFilter(is_another)
    try:
        yield
    finally:
        logger.removeFilter(is_another)


@contextlib.contextmanager
def hide_trace_records() -> Iterator[None]:
    """Keep pytest from capturing torch's structured trace.

    The trace's logger has level DEBUG and does not propagate, and torch formats records, including
    graphs, only if it has a handler. Pytest 9.1 adds its capturing handlers even to loggers that do
    not propagate (``catching_logs`` in _pytest/logging.py), so that the report of a test that fails
    after compiling has more than a hundred empty lines. Handlers of torch (``TORCH_TRACE``) and of
    users stay.

    Affects torch 2.11 to 2.15 (``trace_structured`` in torch/_logging/_internal.py).
    """
    logger = logging.getLogger("torch.__trace")
    hidden = [handler for handler in logger.handlers if _is_of_pytest(handler)]
    for handler in hidden:
        logger.removeHandler(handler)
    try:
        yield
    finally:
        for handler in hidden:
            logger.addHandler(handler)


def _is_of_pytest(handler: logging.Handler) -> bool:
    return type(handler).__module__.partition(".")[0] == "_pytest"


@contextlib.contextmanager
def hide_compiler_warnings(model: torch.nn.Module) -> Iterator[None]:
    """Hide warnings of torch that are not about the user's model while it compiles:

    - Dynamo cannot trace ``_thread.get_ident``, which the ``repr`` of a dataclass in the argument
      of a logger calls, and continues without it (torch 2.14 and 2.15, ``SkipFunctionVariable`` in
      torch/_dynamo/variables/functions.py).
    - AOTAutograd's cache asks the authors of tensor subclasses, here torchao's, to implement a
      method (torch 2.13 to 2.15, ``_reduce_tensor_subclass`` in
      torch/_functorch/_aot_autograd/autograd_cache.py).
    - Autotuning calls a deprecated method of tensors (torch 2.11, ``select_algorithm.py`` in
      torch/_inductor).
    - Each attention backend warns why it does not support the inputs (all versions, sdp_utils.cpp
      in aten/src/ATen/native/transformers/). If no backend does, torch raises an error anyway.
    """
    of_torchao = {
        type(tensor).__name__
        for tensor in itertools.chain(model.parameters(), model.buffers())
        if type(tensor).__module__.partition(".")[0] == "torchao"
    }
    patterns = [
        r"Dynamo does not know how to trace the builtin `_thread\.get_ident",
        *(rf"{name} does not implement _stable_hash_for_caching" for name in sorted(of_torchao)),
        r"(?s).*\(Triggered internally at \S*/sdp_utils",
    ]
    with warnings.catch_warnings():
        for pattern in patterns:
            warnings.filterwarnings("ignore", pattern, UserWarning)
        warnings.filterwarnings(
            "ignore", "TypedStorage is deprecated", UserWarning, r"torch\._inductor\."
        )
        yield
