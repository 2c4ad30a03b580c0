"""FP8 (e4m3): weights and dynamic activations with one scale per row, through TorchAO.

For comparison: the alternative to INT8 on an Ada or Hopper GPU.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

from pytest_int8bench.quantization.modes import Mode, Proof

#: The lowest compute capability at which ``torch._scaled_mm`` runs on FP8 tensor cores.
CAPABILITY = (8, 9)
#: ``torch._scaled_mm`` requires K and N to be multiples of this.
MULTIPLE = 16
# cuBLAS on Hopper and later (nvjet names its operands' types: q is e4m3) and on Ada
# (sm89_xmma_gemm_e4m3...), CUTLASS (which names types in full), and Inductor's Triton templates.
# Inductor also names pointwise kernels after the matmul they surround; these prove nothing.
_MATMUL = re.compile(
    r"nvjet_(sm\d+_)?qq|gemm.*e4m3|f8f8\w*_rowwise|triton_(tem|mm)\w*_scaled_mm",
    re.IGNORECASE | re.DOTALL,
)


def _configure(model: nn.Module) -> Any:
    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        # True would reconfigure Inductor for the whole process, including the baseline.
        set_inductor_config=False,
    )


def _layer_problem(module: nn.Linear) -> str | None:
    rows, columns = module.weight.shape
    if rows % MULTIPLE or columns % MULTIPLE:
        return f"shape: {columns}x{rows} is not a multiple of {MULTIPLE} (FP8 matmul)"
    if module.weight.dtype != torch.bfloat16:
        dtype = str(module.weight.dtype).removeprefix("torch.")
        return f"dtype: {dtype} (row-wise FP8 requires BF16 weights)"
    return None


def _device_problem(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"FP8 requires CUDA, got {'ROCm' if torch.version.hip else device.type}"
    if not torch.cuda.is_available():
        return "FP8 requires CUDA, but torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"FP8 requires sm89 (Ada) or later, got sm{capability[0]}{capability[1]}"
    return None


MODE = Mode(
    name="fp8",
    configure=_configure,
    layer_problem=_layer_problem,
    device_problem=_device_problem,
    proof=Proof(storage=torch.float8_e4m3fn, kernels=_MATMUL),
    next_mode="w8",
)
