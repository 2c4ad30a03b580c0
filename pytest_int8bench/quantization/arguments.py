"""Validated arguments of ``apply_int8_quant``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from pytest_int8bench.choices import INT8_BACKENDS
from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.kernels import dispatch
from pytest_int8bench.quantization.modes import MODES, Mode

if TYPE_CHECKING:
    from pytest_int8bench.quantization.filters import FilterFn


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Settings for quantizing a model.

    Raises:
        ValueError: for an argument that is invalid for every model.
    """

    mode: str
    filter_fn: FilterFn
    smoothquant: bool
    calibration: Iterable[Any] | None
    alpha: float
    quant_config: Any
    backend: str

    def __post_init__(self) -> None:
        config = self.quant_config
        if self.backend not in INT8_BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(INT8_BACKENDS)}, got {self.backend!r}"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha!r}")
        if self.smoothquant and self.calibration is None:
            raise ValueError(
                "with smoothquant=True, calibration must be an iterable of inputs, got None"
            )
        if config is not None and not isinstance(config, AOBaseConfig | FqnToConfig):
            raise ValueError(
                f"quant_config must be a torchao AOBaseConfig or FqnToConfig, got {config!r}"
            )
        if self.smoothquant:
            self._check_smoothquant()

    def _check_smoothquant(self) -> None:
        config = self.quant_config
        if getattr(config, "act_quant_scale", None) is not None:
            raise ValueError(
                f"smoothquant=True does not support {type(config).__name__} with an "
                "act_quant_scale, which was measured before smoothing"
            )
        if isinstance(config, FqnToConfig):
            raise ValueError("smoothquant=True does not support FqnToConfig")
        if config is None and not self.quantizer.choice.smoothquant:
            raise ValueError(f"smoothquant=True does not support mode={self.mode}")

    @property
    def quantizer(self) -> Mode:
        """The mode named ``mode``."""
        return MODES[self.mode]

    @property
    def is_custom(self) -> bool:
        """True if the user's configuration replaces the mode's."""
        return self.quant_config is not None

    @property
    def precision(self) -> str:
        """Storage precision of weights, for messages."""
        return "INT8" if self.is_custom else self.quantizer.choice.precision

    @property
    def layer_problem(self) -> Callable[[nn.Linear], str | None] | None:
        """Function that returns why a layer cannot be quantized; None with a custom
        configuration."""
        return None if self.is_custom else self.quantizer.layer_problem

    def config(self, model: nn.Module) -> Any:
        """Return torchao's configuration for a model."""
        return self.quant_config if self.is_custom else self.quantizer.configure(model)

    def check_device(self, device: torch.device) -> bool:
        """Return whether to run layers on the fused kernels where they fit.

        Raises:
            QuantizationError: if the mode or the backend does not run on the device.
        """
        if not self.is_custom and (problem := self.quantizer.device_problem(device)) is not None:
            raise QuantizationError(f"int8_mode={self.mode}: {problem}")
        if self.is_custom:
            problem = dispatch.fused_problem(device)
        else:
            problem = self.quantizer.fused_problem(device)
        if self.backend == "fused" and problem:
            raise QuantizationError(f"int8_backend=fused: {problem}")
        if fusing := self.backend != "torchao" and not problem:
            dispatch.matmul_kernel(device)  # raises if the environment names an unavailable kernel
        return fusing
