"""Scaled dot product attention: which backend may run, and which one a kernel belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_int8bench.choices import ATTENTION_BACKENDS

_BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
    "auto": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
}

# Names of device kernels (CUDA) and operators (CPU) of each backend.
_KERNELS = {
    "flash": re.compile(r"flash_fwd|pytorch_flash|_scaled_dot_product_flash_attention"),
    "cudnn": re.compile(r"cudnn.*(sdpa|attention|fmha)|_scaled_dot_product_cudnn", re.IGNORECASE),
    "efficient": re.compile(r"fmha_cutlass|_scaled_dot_product_efficient|AttentionKernel<"),
    # On CUDA, math attention is products and a softmax like those of other layers.
    "math": re.compile(r"_scaled_dot_product_attention_math"),
}

# Inductor's pointwise and reduction kernels carry the names of the operators they were fused
# around.
_FUSED_AROUND = re.compile(r"triton_(poi|red|per|for)_")


def own_names(kernels: Iterable[str]) -> list[str]:
    """Return the kernels whose names say what they do themselves."""
    return [name for name in kernels if not _FUSED_AROUND.match(name)]


def sdpa_backends(attention: str) -> list[SDPBackend]:
    """Return the backends that ``attention`` allows.

    Raises:
        ValueError: for an unknown name.
    """
    if attention not in _BACKENDS:
        raise ValueError(
            f"attention must be one of {', '.join(ATTENTION_BACKENDS)}, got {attention!r}"
        )
    return _BACKENDS[attention]


class FlashSDPA:
    """Context manager that allows one attention backend, flash by default, and no other.

    ``torch.nn.functional.scaled_dot_product_attention`` raises ``RuntimeError`` inside where
    the backend cannot take the inputs (e.g. flash in FP32 or with a mask), so there is no
    silent fall-back. May be entered again, also nested.
    """

    def __init__(self, attention: str = "flash") -> None:
        self.attention = attention
        self._backends = sdpa_backends(attention)
        self._entered: list[Any] = []

    def __enter__(self) -> FlashSDPA:
        context = sdpa_kernel(self._backends)
        context.__enter__()
        self._entered.append(context)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._entered.pop().__exit__(exc_type, exc, tb)


def attention_kernel(kernels: Iterable[str]) -> str | None:
    """Return the backend whose kernels are among ``kernels``, or None if no kernel is known."""
    names = own_names(kernels)
    for backend, pattern in _KERNELS.items():
        if any(pattern.search(name) for name in names):
            return backend
    return None
