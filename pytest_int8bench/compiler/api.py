"""Public entry point for compiling a model."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pytest_int8bench.attention import sdpa_backends
from pytest_int8bench.choices import COMPILE_MODES
from pytest_int8bench.compiler.compiled_model import CompiledModel


def compile_for_a100(
    model: torch.nn.Module,
    *,
    fullgraph: bool = True,
    mode: str = "max-autotune",
    allow_tf32: bool = True,
    attention: str = "flash",
    autocast_dtype: torch.dtype | None = None,
    dynamic: bool | None = False,
    cache_dir: str | os.PathLike[str] | None = None,
    int8_attention: bool = False,
) -> CompiledModel:
    """Compile ``model`` for inference with Inductor, on any device despite the function's name.

    The model compiles at its first call. Between calls, the process's settings are unchanged.

    Args:
        model: the model, in ``eval`` mode and on its device.
        fullgraph: require a single graph and raise an error on a graph break.
        mode: ``default``, ``reduce-overhead``, ``max-autotune``, ``max-autotune-no-cudagraphs``
            or ``off`` (eager under the same settings).
        allow_tf32: allow TF32 in FP32 matmuls.
        attention: the attention backend: ``flash``, ``cudnn``, ``efficient``, ``math``, ``short``
            (our kernel for sequences of up to 128 tokens, torch's choice for others) or ``auto``
            (torch's choice for each call; this function times nothing).
        autocast_dtype: run under autocast to this dtype. By default autocast is off, even if the
            caller enabled it: it does not affect INT8 linear layers, so the fair comparison is
            with BF16 weights.
        dynamic: as in ``torch.compile``; static shapes by default.
        cache_dir: folder in which to keep compiled code between processes. It can be copied to
            another machine with the same hardware, driver and versions; each attention backend
            has its own entry. By default, torch's folder for this machine.
        int8_attention: run ``scaled_dot_product_attention`` on INT8 queries and keys if it is
            called without a mask, dropout or causality, and heads have at most 128 columns. The
            ``int8_attention`` attribute of the result counts these calls.

    Returns:
        A module to call like ``model``. With CUDA graphs (``reduce-overhead``,
        ``max-autotune``), it copies outputs out of the graph, so that the next call does not
        overwrite them.

    Raises:
        ValueError: for an unknown mode or attention backend.
    """
    if mode not in COMPILE_MODES:
        raise ValueError(f"mode must be one of {', '.join(COMPILE_MODES)}, got {mode!r}")
    sdpa_backends(attention)
    return CompiledModel(
        model,
        fullgraph=fullgraph,
        mode=mode,
        allow_tf32=allow_tf32,
        attention=attention,
        autocast_dtype=autocast_dtype,
        dynamic=dynamic,
        cache_dir=None if cache_dir is None else Path(cache_dir).absolute(),
        int8_attention=int8_attention,
    )
