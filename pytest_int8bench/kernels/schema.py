"""Schemas of the operators, and the names of norms, activations and rotations they accept."""

from __future__ import annotations

import torch

NORMS = ("none", "layer", "rms")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")
#: Rotations of queries and keys; :func:`.ops.rotate_heads` describes them.
ROTATIONS = ("none", "angles", "positions", "halves")

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

DEQUANTIZED_LINEAR = (
    "dequantized_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor"
)
SCHEMAS = (
    (
        "quantize_rows(Tensor x, str norm, str activation, Tensor? gate, Tensor? weight,"
        " Tensor? bias, float eps, Tensor? factor, bool keep) -> (Tensor, Tensor, Tensor)"
    ),
    (
        "linear(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias,"
        " Tensor? gamma, Tensor? residual, ScalarType dtype) -> Tensor"
    ),
    "dequantize(Tensor[] weights, Tensor[] weight_scales, ScalarType dtype) -> Tensor[]",
    "read_weight(Tensor values, Tensor? factor) -> Tensor",
    (
        "quantize_heads(Tensor q, Tensor k, str rotation, Tensor[] q_turn, Tensor[] k_turn)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    (
        "int8_attention(Tensor q, Tensor q_scale, Tensor k, Tensor k_scale, Tensor v, float scale)"
        " -> Tensor"
    ),
    ("rotate_heads(Tensor[] heads, str rotation, Tensor[] turn, bool rows_first) -> Tensor[]"),
    "short_attention(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> Tensor",
)
#: Operator that runs if code reads the values of a quantized weight instead of multiplying by it.
READ_OPERATOR = "int8bench::read_weight"
