"""Global state that a session might change."""

from __future__ import annotations

import contextlib
import gc
import locale
import logging
import os
import random
import signal
import sys
import warnings
from typing import Any

import numpy as np
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config

_CONFIGS = {
    "dynamo": torch._dynamo.config,
    "functorch": torch._functorch.config,
    "inductor": torch._inductor.config,
}
_FP32 = [
    ("generic", "all"),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
]


def process_state() -> dict[str, Any]:
    """Return the settings of torch, numpy, Python and this process, by name."""
    state: dict[str, Any] = {
        f"fp32 precision of {'.'.join(key)}": torch._C._get_fp32_precision_getter(*key)
        for key in _FP32
    }
    state["matmul precision"] = None
    with contextlib.suppress(RuntimeError):  # both APIs have been used
        state["matmul precision"] = torch.get_float32_matmul_precision()
    for name, module in _CONFIGS.items():
        for key, value in module.get_config_copy().items():
            state[f"{name}.{key}"] = repr(value)
    backends = torch.backends.cuda
    cudnn = torch.backends.cudnn
    state |= {
        "SDPA": (
            backends.flash_sdp_enabled(),
            backends.mem_efficient_sdp_enabled(),
            backends.math_sdp_enabled(),
            backends.cudnn_sdp_enabled(),
        ),
        "SDPA priority": torch._C._get_sdp_priority_order(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "deterministic debug": torch.get_deterministic_debug_mode(),
        "reduced precision": (
            backends.matmul.allow_fp16_reduced_precision_reduction,
            backends.matmul.allow_bf16_reduced_precision_reduction,
        ),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "torch generator": torch.get_rng_state().tolist(),
        "python generator": random.getstate(),
        "numpy generator": repr(np.random.get_state()),
        "numpy errors": np.geterr(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "signals": {n: signal.getsignal(n) for n in sorted(signal.valid_signals())},
        "collector": (gc.get_threshold(), gc.isenabled()),
        "path": list(sys.path),
        "folder": os.getcwd(),
        "recursion limit": sys.getrecursionlimit(),
        "switch interval": sys.getswitchinterval(),
        "tracer": (sys.gettrace(), sys.getprofile()),
        "excepthook": sys.excepthook,
        "locale": locale.setlocale(locale.LC_ALL),
        "log levels": {
            name: logging.getLogger(name).level
            for name in ("", "torch", "torch._dynamo", "torch._inductor", "torchao", "transformers")
        },
    }
    return state


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the differences: name -> both values."""
    names = {*before, *after}
    return {n: (before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)}
