"""Decide which linear layers to quantize."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from pytest_int8bench.quantization.structure import Structure, current, is_numbered

if TYPE_CHECKING:
    import torch

    Inputs: TypeAlias = tuple[Any, ...] | list[Any] | Mapping[str, Any]


# Common names of attention and MLP layers. In a repeated block, other names match as well.
_ATTENTION = re.compile(
    r"(q|k|v|o|qkv|kv|qk|(q|k|v|o|out)_proj(_\w+)?|proj|out|to_q|to_k|to_v|to_out|to_qkv"
    r"|to_kv|(query|key|value)(_proj)?|query_key_value|q_lin|k_lin|v_lin|out_lin|in_proj|c_attn"
    r"|c_proj|att_in|att_out|wq|wk|wv|wo|wqkv|dense"
    r"|(qkv|kv|qk)_proj|(q|k|v|kv|qkv|o)_[ab]_proj(_with_mqa)?|in_proj_qkvz?"
    r"|linear_(q|k|v|qkv|out)|to_(query|key|value))",
    re.IGNORECASE,
)
_MLP = re.compile(
    r"(fc_?\d|w_?\d|w12|lin\d|linear_?\d|up_proj|down_proj|gate_proj|gate_up_proj|wi(_\d)?|c_fc|dense\w*|pwconv\d|ffn_output)",
    re.IGNORECASE,
)
_ATTENTION_PARENT = re.compile(r"(\w+_)?(attn|attention)\d*", re.IGNORECASE)
_MLP_PARENT = re.compile(r"(mlp|ffn|ff|feed_?forward|intermediate)")
_PART_OF_BLOCK = re.compile(
    r"(\w*_)?(self_?|cross_?)?(attn|attention|mlp|ffn|ff|feed_?forward)\w*", re.I
)
_HEAD = re.compile(
    r"(?!multi_?head)(\w*_)?heads?(_\w+)?|.*(classifier|pooler|logits|score|project_and_aggregate).*",
    re.IGNORECASE,
)
_EMBEDDING = re.compile(
    r"(\w+_)?embed(s|ding|dings)?(_(tokens|proj|layer|layers|positions|in|out))?|\w+_embedder"
    r"|.*tokenizer.*|stem|patchify",
    re.IGNORECASE,
)
_NORM = re.compile(r".*norm.*|ln(_?\w)?", re.IGNORECASE)
_ADAPTER = re.compile(r"(\w*_)?(lora|loha|lokr|dora|ia3|vera|adalora)(_\w*)?", re.IGNORECASE)
_ROUTER = re.compile(r"(\w+_)?(routers?|routing)(_\w+)?", re.IGNORECASE)
_GATE = re.compile(r"(\w+_)?(gates?|gating\w*)(_(linear|layer|net(work)?|fc))?|wg", re.IGNORECASE)
_WRAPPED = re.compile(r"linear|lin|base_layer|module|inner|wrapped|_\w+|original_\w+|fn")
# Layers beside attention and MLP: downsampling between stages, position biases, conditioning of
# diffusion models, and outputs of detectors.
_AUXILIARY = re.compile(
    r"(down|up)_?sampl\w*|\w*merging\w*|reduction|pool(ing)?|proj_[lw]|cpb_mlp|pos_proj|rel_?pos(_\w+)?"
    r"|\w*(position|pos)_bias\w*|ada(_?(ln|norm|in|group|layer|rms)\w*)?|(\w+_)?time_emb\w*|\w*hypernet\w*|\w*bbox\w*"
    r"|\w*confidence\w*|reg_\w+",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"(\w+_)?mod(ulation)?", re.IGNORECASE)
#: If one side of a layer of unknown name is at least this many times wider than the other, it is a
#: gate, a bias or a factor rather than attention or MLP.
_NARROW = 16


def is_transformer_linear(module: nn.Module, name: str) -> bool:
    """Return whether a module is an attention projection or MLP layer of a transformer. This is the
    default filter.

    In a repeated block, such as ``layers.3``, it selects linear layers of any name; elsewhere it
    requires a usual name. It does not select embeddings, norms, heads, classifiers, poolers,
    routers, gates or low-rank adapters. While :func:`apply_int8_quant` runs, it also inspects the
    model around the layer, and recognizes blocks, routers and adapters of any name.

    Args:
        module: any module of the model.
        name: its dotted name, as in ``model.named_modules()``.
    """
    return isinstance(module, nn.Linear) and _Place(module, name, current()).is_selected


def is_missed(module: nn.Linear, name: str, structure: Structure) -> bool:
    """Return whether to report a layer that was not quantized: it belongs to the attention or the
    MLP of a repeated block, or cannot be distinguished from them."""
    place = _Place(module, name, structure)
    if place.block is None or place.is_excluded:
        return False
    return place.is_selected or not place.is_auxiliary


class _Place:
    """A linear layer and its position in the model."""

    def __init__(self, layer: nn.Linear, name: str, structure: Structure | None) -> None:
        self.layer, self.name, self.structure = layer, name, structure
        self.path = name.split(".")
        parts = list(self.path)
        while len(parts) > 1 and (parts[-1].isdigit() or _WRAPPED.fullmatch(parts[-1])):
            parts.pop()  # an item of nn.Sequential, such as to_out.0, or a wrapped layer
        self.leaf, self.parents = parts[-1], parts[:-1]
        self.block = self._find_block()

    @property
    def is_selected(self) -> bool:
        if self.is_excluded:
            return False
        if self._has_known_name:
            return True
        placed = self.block is not None or self._is_in_attention
        return placed and not self.is_auxiliary and not self._is_narrow

    @property
    def is_excluded(self) -> bool:
        """True if its name, size or neighbors show that it is neither attention nor MLP."""
        return (
            any(_ADAPTER.fullmatch(part) for part in self.path)
            or self._is_gate
            or self._is_in_norm_head_or_embedding
            or (self.structure is not None and self.structure.is_adapter(self.layer, self.name))
        )

    @property
    def _has_known_name(self) -> bool:
        return bool(
            _ATTENTION.fullmatch(self.leaf)
            or _MLP.fullmatch(self.leaf)
            or any(_MLP_PARENT.fullmatch(part) for part in (*self.parents, self.leaf))
        )

    @property
    def _is_in_attention(self) -> bool:
        return bool(self.parents and _ATTENTION_PARENT.fullmatch(self.parents[-1]))

    @property
    def _chooses_experts(self) -> bool:
        if self.structure is None or self._is_in_attention:
            return False
        return self.structure.is_router(self.layer, self.name)

    @property
    def _is_gate(self) -> bool:
        if min(self.layer.in_features + 1, self.layer.out_features) < 2 or any(
            _ROUTER.fullmatch(part) for part in self.path
        ):
            return True
        if self._chooses_experts:
            return True
        if any(_GATE.fullmatch(part) for part in self.parents):
            return True
        if not _GATE.fullmatch(self.leaf) or self.layer.out_features > self.layer.in_features:
            return False
        holder = ".".join(self.parents)
        return self.structure is None or not self.structure.is_gated_unit(self.layer, holder)

    @property
    def _is_in_norm_head_or_embedding(self) -> bool:
        """True if it belongs to a norm, a head or an embedding, but not to a block inside one."""
        start = 0
        if self.block is not None:
            start = self.block + is_numbered(self.path[self.block])
        if any(self._is_norm_head_or_embedding(index) for index in range(start, len(self.path))):
            return True
        holders = [index for index in range(start) if self._is_norm_head_or_embedding(index)]
        return bool(holders) and not self._is_transformer_block(holders)

    def _is_norm_head_or_embedding(self, index: int) -> bool:
        part = self.path[index]
        if _HEAD.fullmatch(part):
            return True
        if _EMBEDDING.fullmatch(part):
            return self.block is not None or not self._attends_below(index)
        if not _NORM.fullmatch(part) or self._attends_below(index):
            return False
        return self.structure is None or not self.structure.is_batch_normed(self._prefix(index))

    def _attends_below(self, index: int) -> bool:
        """Return whether part ``index`` of the name is a network and the layer is in a block of
        it."""
        below = self.path[index + 1 : -1]
        if self.structure is not None and not self.structure.attends(self._prefix(index)):
            return False
        wanted = _ATTENTION_PARENT if self.structure is None else _PART_OF_BLOCK
        return any(wanted.fullmatch(part) for part in below)

    def _is_transformer_block(self, holders: list[int]) -> bool:
        """Return whether the block belongs to a whole network inside a head or an embedding."""
        assert self.block is not None
        if self.structure is None:
            below = self.path[self.block + 1 : -1]
            return any(_PART_OF_BLOCK.fullmatch(part) for part in below)
        prefix = self._prefix(self.block)
        if self.structure.attends(prefix):
            return True
        return holders[-1] < self.block - 1 and self.structure.is_normed_mlp(prefix)

    @property
    def is_auxiliary(self) -> bool:
        """True if it is between blocks, or in a block but outside its attention and MLP."""
        block = self.block or 0
        if any(_CONDITION.fullmatch(part) for part in self.path[block:]):
            factor, rest = divmod(self.layer.out_features, self.layer.in_features)
            return factor > 1 and not rest
        places = [i for i in range(len(self.path)) if _AUXILIARY.fullmatch(self.path[i])]
        if self.block is not None:
            places = [i for i in places if i >= self.block - 1]
            if self.structure is not None and self.structure.is_stage(self._prefix(self.block)):
                places.append(self.block)
        if not places:
            return False
        return not any(_PART_OF_BLOCK.fullmatch(part) for part in self.path[max(places) + 1 : -1])

    @property
    def _is_narrow(self) -> bool:
        size = self.layer.in_features, self.layer.out_features
        return min(size) * _NARROW <= max(size)

    def _find_block(self) -> int | None:
        """Return the index in ``path`` of the innermost repeated block."""
        for index in reversed(range(len(self.path) - 1)):
            if self.structure is not None:
                if self.structure.is_block(self._prefix(index)):
                    return index
            elif is_numbered(self.path[index]) and not all(
                part.isdigit() or _WRAPPED.fullmatch(part) for part in self.path[index + 1 :]
            ):
                return index
        return None

    def _prefix(self, index: int) -> str:
        return ".".join(self.path[: index + 1])


#: Function of a module and its name that returns whether to quantize the module.
FilterFn: TypeAlias = "Callable[[torch.nn.Module, str], bool]"
