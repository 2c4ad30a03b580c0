"""Public entry points for compiling a model."""

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
    """Compile ``model`` with Inductor for inference; despite its name not for A100 only.

    Compiling happens at the first call. The process's own settings are untouched between calls.

    Args:
        model: the model, in ``eval`` mode and on its device.
        fullgraph: require one graph; a graph break is then an error.
        mode: ``default``, ``reduce-overhead``, ``max-autotune``, ``max-autotune-no-cudagraphs``
            or ``off`` (eager under the same settings).
        allow_tf32: let FP32 products use TF32.
        attention: the attention backend allowed: ``flash``, ``cudnn``, ``efficient``, ``math``,
            ``short`` (our kernel for sequences of up to 128 tokens, torch's choice for others) or
            ``auto``, with which torch decides for each call (nothing is timed here).
        autocast_dtype: run under autocast to this dtype. Off by default, also where autocast is
            on around the call: INT8 linears do not see it, so real BF16 weights are the fair
            comparison.
        dynamic: as in ``torch.compile``; static shapes by default.
        cache_dir: folder to keep compiled code in from process to process. It may be copied to
            another machine, and is used where hardware, driver, versions and attention backend
            are the same. By default, torch's own for this machine.
        int8_attention: run ``scaled_dot_product_attention`` on INT8 queries and keys where it is
            called without a mask, dropout or causality, for heads of up to 128 columns; the
            ``int8_attention`` attribute says where it was.

    Returns:
        A module to call like ``model``. With CUDA graphs (``reduce-overhead``,
        ``max-autotune``) outputs are copied out of the graph, so that the next call does not
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
