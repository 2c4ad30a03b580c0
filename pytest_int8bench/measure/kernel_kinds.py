"""Break down the device time of one forward into INT8 matmuls, other matmuls, attention, rest."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from pytest_int8bench.attention import is_attention_kernel, own_names
from pytest_int8bench.measure.evidence import Evidence

# Convolutions run GEMM kernels too but are not linear layers.
_CONVOLUTION = re.compile(r"fprop|implicit_gemm|convol|conv2d|conv3d|winograd", re.IGNORECASE)
# cuBLAS (nvjet since Hopper, xmma and s16816gemm before), CUTLASS and Inductor's templates.
_MATMUL = re.compile(r"nvjet|gemm|gemv|splitk|cublasLt::|triton_(tem|mm)_", re.IGNORECASE)


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one forward by kind of kernel."""

    int8_products: float
    """Matmuls on INT8 operands."""
    other_products: float
    """Other matmuls, including those of math attention, which use the kernels of linear layers."""
    attention: float
    rest: float
    """Norms, activation functions, quantization, copies, convolutions and unknown kernels."""

    @property
    def total_s(self) -> float:
        """Seconds of all kernels."""
        return self.int8_products + self.other_products + self.attention + self.rest

    @property
    def products_s(self) -> float:
        """Seconds of all matmuls."""
        return self.int8_products + self.other_products

    def to_dict(self) -> dict[str, float]:
        """Return the seconds by kind for JSON."""
        return asdict(self)


def break_down(evidence: Evidence) -> Breakdown:
    """Break down one profiled forward on CUDA by the names of its kernels."""
    int8 = {kernel.name for kernel in evidence.int8_products}
    seconds = {"int8_products": 0.0, "other_products": 0.0, "attention": 0.0, "rest": 0.0}
    for kernel in evidence.kernels:
        seconds["int8_products" if kernel.name in int8 else kind_of(kernel.name)] += kernel.seconds
    return Breakdown(**seconds)


def kind_of(kernel: str) -> str:
    """Return ``other_products``, ``attention`` or ``rest`` for any kernel but an INT8 matmul."""
    if not own_names([kernel]):  # a fused kernel named after its operators
        return "rest"
    if is_attention_kernel(kernel):
        return "attention"
    if _MATMUL.search(kernel) and not _CONVOLUTION.search(kernel):
        return "other_products"
    return "rest"


def shortest_s(evidence: Evidence) -> float:
    """Return the seconds of the shortest kernel that ran, a lower bound for every kernel."""
    return min(kernel.seconds / kernel.calls for kernel in evidence.kernels)
