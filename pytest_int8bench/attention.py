"""The attention backends: those of ``torch.nn.functional.scaled_dot_product_attention`` and our
kernel for short sequences.

To add a backend, add a row to :data:`BACKENDS` and its name to ``choices.ATTENTION_BACKENDS``;
parameter checks, ``attention=auto``, evidence and error messages use the table. Importing this
module does not load torch, because RunParams needs it to reject impossible combinations.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn.attention import SDPBackend

_HALF = ("bfloat16", "float16")
_ANY = ("float32", *_HALF)


@dataclass(frozen=True, eq=False)
class Backend:
    """An attention backend and everything the rest of the package knows about it."""

    sdpa: tuple[str, ...]
    """Names of the ``torch.nn.attention.SDPBackend`` members that it allows."""
    dtypes: Mapping[str, tuple[str, ...]]
    """Supported input dtypes by device type; unlisted devices lack the backend."""
    kernels: re.Pattern[str]
    """Pattern for the names of its device kernels (CUDA) and operators (CPU)."""
    is_general: bool = False
    """Whether it supports masks and any head size, and so can replace other backends."""

    @functools.cached_property
    def sdpa_backends(self) -> tuple[SDPBackend, ...]:
        """The ``torch.nn.attention.SDPBackend`` members named in :attr:`sdpa`."""
        from torch.nn.attention import SDPBackend

        return tuple(getattr(SDPBackend, name) for name in self.sdpa)


#: Backends by name; ``attention=auto`` breaks ties in this order.
BACKENDS = {
    "flash": Backend(
        sdpa=("FLASH_ATTENTION",),
        dtypes={"cuda": _HALF, "cpu": _ANY},
        kernels=re.compile(r"flash_fwd|pytorch_flash|_scaled_dot_product_flash_attention"),
    ),
    "cudnn": Backend(
        sdpa=("CUDNN_ATTENTION",),
        dtypes={"cuda": _HALF},
        kernels=re.compile(
            r"cudnn.*(sdpa|attention|fmha)|_scaled_dot_product_cudnn", re.IGNORECASE
        ),
    ),
    "efficient": Backend(
        sdpa=("EFFICIENT_ATTENTION",),
        dtypes={"cuda": _ANY},
        kernels=re.compile(r"fmha_cutlass|_scaled_dot_product_efficient|AttentionKernel<"),
        is_general=True,
    ),
    "math": Backend(
        sdpa=("MATH",),
        dtypes={"cuda": _ANY, "cpu": _ANY},
        # On CUDA, math attention runs the same matmul and softmax kernels as other layers.
        kernels=re.compile(r"_scaled_dot_product_attention_math"),
        is_general=True,
    ),
    "short": Backend(
        # torch handles the calls that our kernel does not support.
        sdpa=("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
        dtypes={"cuda": _HALF},
        kernels=re.compile(r"\bshort_attention\b"),
    ),
}

#: Our own backend, outside SDPA: it replaces the attention calls that it supports.
SHORT = "short"
#: Name of attention on INT8 queries and keys, next to the names of SDPA backends.
INT8 = "int8"
_INT8_KERNELS = re.compile(r"\b(int8_attention|quantize_heads)\b")

# Attention kernels that SDPA does not choose, such as FlashAttention 3 and FlexAttention.
_OTHER_KERNELS = re.compile(r"FlashAttn|flex_attention|fmha")

# Inductor names pointwise and reduction kernels after the operators fused into them.
_FUSED_AROUND = re.compile(r"triton_(poi|red|per|for)_")


# -- choosing -----------------------------------------------------------------------------------


def sdpa_backends(attention: str) -> list[SDPBackend]:
    """Return the SDPA backends that ``attention`` allows; ``auto`` allows all of them.

    Raises:
        ValueError: for an unknown name.
    """
    if attention == "auto":
        every = [sdpa for backend in BACKENDS.values() for sdpa in backend.sdpa_backends]
        return list(dict.fromkeys(every))
    if attention not in BACKENDS:
        names = ", ".join((*BACKENDS, "auto"))
        raise ValueError(f"attention must be one of {names}, got {attention!r}")
    return list(BACKENDS[attention].sdpa_backends)


def backends_of(device_type: str) -> list[str]:
    """Return the backends available on a device, in order of preference."""
    return [name for name, backend in BACKENDS.items() if device_type in backend.dtypes]


def general_backends() -> list[str]:
    """Return the backends to try when another does not support a model's attention."""
    return [name for name, backend in BACKENDS.items() if backend.is_general]


def impossible_reason(attention: str, device_type: str, *, bf16: bool) -> str | None:
    """Return why a backend cannot run on a device or in a dtype, or None if it can.

    Args:
        attention: a backend, or ``auto``.
        device_type: ``cuda`` or ``cpu``.
        bf16: inputs are BF16 rather than FP32.
    """
    if attention == "auto":
        return None
    dtypes = BACKENDS[attention].dtypes
    if device_type not in dtypes:
        devices = " and ".join(name.upper() for name in dtypes)
        return f"attention={attention} exists on {devices} only, gpu_type={device_type}"
    if not bf16 and "float32" not in dtypes[device_type]:
        return f"{attention} attention takes 16-bit inputs only, bf16=False"
    return None


def allowed_backends() -> tuple[bool, ...]:
    """Return which backends SDPA may currently choose from."""
    from torch.backends import cuda

    return (
        cuda.flash_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


class FlashSDPA:
    """Context manager that allows a single attention backend (flash by default).

    There is no silent fallback: inside it, ``torch.nn.functional.scaled_dot_product_attention``
    raises ``RuntimeError`` for inputs that the backend does not support (e.g. flash in FP32 or
    with a mask). Instances are reusable and may be nested.
    """

    def __init__(self, attention: str = "flash") -> None:
        self.attention = attention
        self._backends = sdpa_backends(attention)
        self._entered: list[Any] = []

    def __enter__(self) -> FlashSDPA:
        from torch.nn.attention import sdpa_kernel

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


# -- recognizing --------------------------------------------------------------------------------


def own_names(kernels: Iterable[str]) -> list[str]:
    """Return the kernels that are named after their own operation."""
    return [name for name in kernels if not _FUSED_AROUND.match(name)]


def is_int8_attention_kernel(kernel: str) -> bool:
    """Return whether a kernel quantizes queries and keys or computes attention on INT8 ones."""
    return bool(own_names([kernel]) and _INT8_KERNELS.search(kernel))


def attention_kernel(kernels: Iterable[str]) -> str | None:
    """Return the backend that ``kernels`` belong to, or None if unknown; INT8 and ``short`` take
    precedence over the backends of the remaining calls."""
    names = own_names(kernels)
    if any(map(is_int8_attention_kernel, names)):
        return INT8
    for name in sorted(BACKENDS, key=lambda name: name != SHORT):
        if any(BACKENDS[name].kernels.search(kernel) for kernel in names):
            return name
    return None


def is_attention_kernel(kernel: str) -> bool:
    """Return whether a kernel computes attention, chosen by SDPA or not."""
    return attention_kernel([kernel]) is not None or bool(
        own_names([kernel]) and _OTHER_KERNELS.search(kernel)
    )
