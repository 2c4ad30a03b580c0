"""Decide which linear layers to quantize."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from pytest_int8bench.errors import QuantizationError as QuantizationError

if TYPE_CHECKING:
    import torch

    Inputs: TypeAlias = tuple[Any, ...] | list[Any] | Mapping[str, Any]


_ATTENTION = re.compile(
    r"(q|k|v|o|qkv|kv|q_proj|k_proj|v_proj|o_proj|out_proj|proj|out|to_q|to_k|to_v|to_out|to_qkv"
    r"|(query|key|value)(_proj)?|query_key_value|q_lin|k_lin|v_lin|out_lin|in_proj|c_attn|c_proj"
    r"|att_in|att_out|wq|wk|wv|wo|wqkv|dense)",
    re.IGNORECASE,
)
_MLP = re.compile(
    r"(fc_?\d|w_?\d|w12|lin\d|linear_?\d|up_proj|down_proj|gate_proj|gate_up_proj|wi(_\d)?|c_fc|dense\w*|pwconv\d|ffn_output)",
    re.IGNORECASE,
)
_MLP_PARENT = re.compile(r"(mlp|ffn|ff|feed_?forward|intermediate)")
_KEPT = re.compile(
    r"(?!multi_?head)(\w*_)?heads?(_\w+)?"
    r"|(\w+_)?embed(s|ding|dings)?(_(tokens|proj|layer|layers|positions|in|out))?|\w+_embedder"
    r"|.*(norm|classifier|pooler|logits|score|project_and_aggregate|tokenizer).*"
    r"|ln(_?\w)?|stem|patchify",
    re.IGNORECASE,
)


def is_transformer_linear(module: nn.Module, name: str) -> bool:
    """The default filter: attention projections and MLP layers of a transformer.

    Goes by the module's type and dotted name. Embeddings, norms, heads, classifiers and poolers
    stay as they are.

    Args:
        module: any module of the model.
        name: its dotted name, as in ``model.named_modules()``.
    """
    if not isinstance(module, nn.Linear):
        return False
    parts = name.split(".")
    if any(_KEPT.fullmatch(part) for part in parts):
        return False
    leaf, parents = parts[-1], parts[:-1]
    while leaf.isdigit() and parents:  # nn.Sequential, such as to_out.0 or mlp.2
        leaf, parents = parents[-1], parents[:-1]
    return bool(
        _ATTENTION.fullmatch(leaf)
        or _MLP.fullmatch(leaf)
        or any(_MLP_PARENT.fullmatch(part) for part in (*parents, leaf))
    )


#: Whether to quantize a module, given it and its name.
FilterFn: TypeAlias = "Callable[[torch.nn.Module, str], bool]"
