"""Entry points, settings and counters for torch.compile."""

from __future__ import annotations

import itertools
import logging
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo

# A sweep compiles a fresh graph for each point. Past Dynamo's default limit of 8, calls would
# silently run eagerly.
_RECOMPILE_LIMIT = 1 << 16

# OlmoEarth's forward logs, which breaks the graph unless Dynamo ignores these calls.
_LOGGING = {
    logging.Logger.debug,
    logging.Logger.info,
    logging.Logger.warning,
    logging.Logger.error,
}

_serial = itertools.count()


def dynamo_settings() -> AbstractContextManager[Any]:
    """Return the context in which models are compiled and called."""
    config = torch._dynamo.config
    patched: AbstractContextManager[Any] = config.patch(
        recompile_limit=_RECOMPILE_LIMIT,
        accumulated_recompile_limit=_RECOMPILE_LIMIT,
        ignore_logging_functions=config.ignore_logging_functions | _LOGGING,
        # Otherwise the model would run eagerly after a compile error, but be labeled compiled.
        suppress_errors=False,
    )
    return patched


def graphs_skipped() -> int:
    """Return how often Inductor skipped CUDA graphs that were requested."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def graphs_compiled() -> int:
    """Return how many graphs this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def graph_breaks() -> int:
    """Return the number of graph breaks in this process so far."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def fresh_entry(model: torch.nn.Module) -> Callable[..., Any]:
    """Return a function that calls ``model`` and has its own code object.

    Dynamo caches compiled graphs by code object. If it cached them on ``model.forward``, a second
    compilation of the same class would reuse the first graph even with another attention backend,
    and all points of a sweep would share one list of graphs.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = entry.__code__.replace(co_name=f"int8bench_entry_{next(_serial)}")
    return types.FunctionType(
        code, entry.__globals__, code.co_name, entry.__defaults__, entry.__closure__
    )


def device_type_of(model: torch.nn.Module) -> str:
    """Return the device type of ``model``, ``cpu`` if it has no tensors."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return "cpu" if tensor is None else tensor.device.type
