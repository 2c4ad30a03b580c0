"""W8A8: INT8 weights, and activations quantized dynamically, row by row."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from torchao.utils import should_reduce_range

from pytest_int8bench.quantization.modes import Bound, Mode, Proof

#: CUDA's INT8 matmul (``torch._int_mm``) requires K and N to be multiples of this.
CUDA_MULTIPLE = 8
_TOO_FEW_ROWS = re.compile(r"self\.size\(0\) needs to be greater than 16, but got (\d+)")


def _configure(model: nn.Module) -> Any:
    devices = {parameter.device for parameter in model.parameters()}
    return Int8DynamicActivationInt8WeightConfig(
        # True would reconfigure Inductor for the whole process, including the baseline.
        set_inductor_config=False,
        # The INT8 matmul of CPUs without VNNI saturates at 16 bits.
        reduce_range=any(should_reduce_range(device) for device in devices),
    )


def _layer_problem(module: nn.Linear) -> str | None:
    if module.weight.device.type != "cuda":
        return None
    rows, columns = module.weight.shape
    if rows % CUDA_MULTIPLE or columns % CUDA_MULTIPLE:
        return f"shape: {columns}x{rows} is not a multiple of {CUDA_MULTIPLE} (CUDA INT8 matmul)"
    return None


def _explain(error: str) -> str | None:
    match = _TOO_FEW_ROWS.search(error)
    if match is None:
        return None
    return (
        f"an INT8 matmul on CUDA must have more than 16 rows, got {match[1]}: "
        "use a larger batch or int8_mode=w8"
    )


MODE = Mode(
    name="w8a8",
    configure=_configure,
    layer_problem=_layer_problem,
    proof=Proof(
        int8_matmuls=True,
        hint=" (on CUDA, matmuls of 16 rows or fewer run in floating point)",
    ),
    bound=Bound(int8_matmuls=True),
    smoothquant_helps=True,
    next_mode="w8",
    explain=_explain,
)
