"""Survey which linear layers of real-world models the default filter selects, by model type.

    python tests/toys/survey.py [transformers | timm | TYPE ...]

builds every model type of the installed transformers or timm on the meta device, with two layers of
its default configuration and without a download. It prints the share of linear weights that the
filter selects, and exits with 1 if the filter excludes layers of repeated blocks for a reason that
is not in ``REVIEWED``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pytest_int8bench.errors import first_line
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.quantization.structure import within

#: Layers of repeated blocks that the filter may exclude, as reviewed by hand: names and reasons.
REVIEWED = {
    r"rout(er|ing)|(^|[._])gat(e|eway|ing_block)(\.|$)": "chooses experts, or scales by a gate",
    r"(in_proj_(a|b|ba)|self_attn\.[abg]_proj|linear_attn\.[ab]_proj|g_[ab]_proj|sink_proj"
    r"|indexer\.weights_proj|[if]gate_preact|block_inject_weight)$": "a factor per head",
    r"(mixer|mamba|self_attn)\.(x|dt)_proj$": "the step of a state space, or a bias per head",
    r"laurel\.linear_|hyper_connection\.input_mix_weight_": "a narrow bypass of the residual",
    r"norm\.(mlp\.fc|linear)\d$": "a norm with a condition",
    r"(position_bias|cpb|rel_pos)[._]mlp|pos_proj$|relative_pos_embeddings$": "a bias of positions",
    r"attn\.proj_[lw]$": "mixes the heads of an attention map",
    r"downsample\.reduction$|pool\.fc$|(^|\.)(revert_)?projs\.": "between the stages of a pyramid",
    r"deepstack_merger|patch_embedder\.|vision_tower\.encoder_layers\.N\.projection$": "patches",
    r"bbox_embed|reg_conf|matchability|token_confidence|mask_embed|hypernetworks_mlps": "a head",
    r"task_mlp|attn\.attn\.mlp\.fc2$|(sampling_offsets|attention_weights)$": "empty, or one output",
}
_REVIEWED = re.compile("|".join(f"(?:{pattern})" for pattern in REVIEWED))
_DEPTH = re.compile(r"(.*_)?(num_)?(hidden_|encoder_|decoder_)?layers|n_layers?|depth|num_blocks")


@dataclass(frozen=True)
class Surveyed:
    """The result of the filter on a model."""

    taken: frozenset[str]
    linears: frozenset[str]
    share: float
    """Part of the weights of linear layers that it takes."""

    @property
    def unexplained(self) -> list[str]:
        """Layers of repeated blocks that the filter excludes for no reviewed reason."""
        return sorted(
            {
                pattern
                for name in self.linears - self.taken
                if "N" in (pattern := numbers_as_n(name)).split(".")[:-1]
                and not _REVIEWED.search(pattern)
            }
        )


def numbers_as_n(name: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def survey(model: nn.Module) -> Surveyed:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    with within(model):
        taken = {name for name, layer in linears.items() if is_transformer_linear(layer, name)}
    sizes = {name: int(layer.weight.numel()) for name, layer in linears.items()}
    share = sum(sizes[name] for name in taken) / max(sum(sizes.values()), 1)
    return Surveyed(frozenset(taken), frozenset(linears), share)


def hf_model(kind: str) -> nn.Module:
    """Build a transformers model type from its default configuration on the meta device, with two
    layers if it is configurable."""
    from transformers import CONFIG_MAPPING, AutoModel

    for config in (_shrunk(CONFIG_MAPPING[kind]()), CONFIG_MAPPING[kind]()):
        try:
            with torch.device("meta"):
                model: nn.Module = AutoModel.from_config(config)
            return model
        except Exception as error:
            problem = error
    raise problem


def timm_model(name: str) -> nn.Module:
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


def _shrunk(config: Any, depth: int = 2) -> Any:
    for key, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            _shrunk(value, depth)
        elif _DEPTH.fullmatch(key) and type(value) is int and value > depth:
            setattr(config, key, depth)
    return config


def _every(kinds: list[str]) -> Iterator[tuple[str, nn.Module | str]]:
    """Yield each model, or the reason why it cannot be built."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    build = hf_model
    if kinds == ["timm"]:
        import timm

        kinds, build = timm.list_models(), timm_model
    elif kinds in ([], ["transformers"]):
        kinds = sorted(MODEL_MAPPING_NAMES)
    for kind in kinds:
        try:
            yield kind, build(kind)
        except Exception as error:  # some default configurations are incomplete
            yield kind, first_line(error)


def main(arguments: Iterable[str]) -> int:
    failed = built = 0
    for kind, model in _every(list(arguments)):
        if isinstance(model, str):
            print(f"{kind:40} not built: {model[:100]}")
            continue
        built += 1
        found = survey(model)
        counted = f"{len(found.taken):5} of {len(found.linears):5} layers, {found.share:6.1%}"
        print(f"{kind:40} {counted}", *found.unexplained)
        failed += bool(found.unexplained)
    print(f"{built} model types; layers of repeated blocks are left out unexplained in {failed}")
    return 1 if failed or not built else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
