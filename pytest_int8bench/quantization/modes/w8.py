"""W8: INT8 weights, dequantized before matmuls in the baseline's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchao.quantization import Int8WeightOnlyConfig

from pytest_int8bench.quantization.coverage import Layer
from pytest_int8bench.quantization.lowering import dequantize, is_converted_on_cuda
from pytest_int8bench.quantization.modes import Bound, Mode, Proof


def _configure(model: nn.Module) -> Any:
    # True would reconfigure Inductor for the whole process, including the baseline.
    return Int8WeightOnlyConfig(set_inductor_config=False)


def _lower(model: nn.Module, layers: Sequence[Layer]) -> None:
    dequantize(model, [layer for layer in layers if is_converted_on_cuda(model, layer)])


MODE = Mode(
    name="w8",
    configure=_configure,
    lower=_lower,
    # Checks only that weights are stored in INT8: the dequantizing kernels' names are generic.
    proof=Proof(),
    bound=Bound(int8_matmuls=False),
)
