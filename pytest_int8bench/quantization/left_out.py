"""Find weights that a user would expect to be quantized but that are not: attention and MLP layers
of repeated blocks, and weights outside ``nn.Linear``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from pytest_int8bench.quantization.filters import is_missed
from pytest_int8bench.quantization.structure import Structure, above
from pytest_int8bench.words import plural

#: Report weights outside nn.Linear if they exceed this share of all weights.
_MOST = 0.5
# Parameters of two or more dimensions that no matmul reads.
_TABLE = re.compile(
    r".*(pos|token|embed|table|latent|quer(y|ies)$|prompt|bias|codebook).*", re.IGNORECASE
)
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Expected:
    """The layers that should be converted according to the model's structure."""

    layers: tuple[str, ...]
    """Attention and MLP layers of repeated blocks."""
    elsewhere: dict[str, Any]
    """The result of :func:`weights_elsewhere`."""

    def missed(self, left_out: Iterable[str]) -> dict[str, Any]:
        """Return :attr:`.Coverage.missed`, given the names of all layers that were left out."""
        left = set(left_out)
        missed = [name for name in self.layers if name in left]
        return {"layers": missed, "of": len(self.layers)} if missed else {}


def expected(model: nn.Module) -> Expected:
    """Return which layers a user expects to be converted. ``model`` is not quantized yet."""
    structure = Structure(model)
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            if any(structure.is_block(holder) for holder in above(name)):
                layers.append(f"{name}.in_proj")
        elif isinstance(module, nn.Linear) and is_missed(module, name, structure):
            layers.append(name)
    return Expected(tuple(layers), weights_elsewhere(model))


def weights_elsewhere(model: nn.Module) -> dict[str, Any]:
    """Return :attr:`.Coverage.elsewhere`; empty if most weights are in ``nn.Linear``.

    Only parameters that matmuls and convolutions read count as weights: not embeddings, norms or
    biases.
    """
    linear = 0
    kinds: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for kind, parameter in _weights(module):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, nn.Linear):
                linear += parameter.numel()
                continue
            found = kinds.setdefault(kind, {"parameters": 0, "layers": []})
            found["parameters"] += parameter.numel()
            if name not in found["layers"][-1:]:
                found["layers"].append(name)
    outside = sum(found["parameters"] for found in kinds.values())
    if outside <= _MOST * (linear + outside):
        return {}
    ordered = sorted(kinds.items(), key=lambda item: -item[1]["parameters"])
    return {"share": outside / (linear + outside), "weights": dict(ordered)}


def hidden_matmuls(model: nn.Module) -> str:
    """Describe the modules other than ``nn.Linear`` that hold matmul weights, e.g.
    ``Conv1D (48 modules: h.0.attn.c_attn …)``; empty if most weights are in ``nn.Linear``."""
    return ", ".join(
        f"{kind} ({plural(len(found['layers']), 'module')}: {found['layers'][0]} …)"
        for kind, found in weights_elsewhere(model).get("weights", {}).items()
        if not kind.endswith(_CONVOLUTIONS)
    )


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name of the kind and the parameter for each of a module's own weights."""
    if isinstance(module, _LOOKED_UP):
        return
    kind = type(module).__name__
    for leaf, parameter in module.named_parameters(recurse=False):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if leaf == "weight":
                yield _convolution(kind, module.kernel_size), parameter
        elif sum(size > 1 for size in parameter.shape) > 1 and not _TABLE.fullmatch(leaf):
            dimensions = f"{parameter.dim()}-D parameters of " if parameter.dim() > 2 else ""
            yield dimensions + kind, parameter


def _convolution(kind: str, kernel: tuple[int, ...]) -> str:
    return f"{'x'.join(map(str, kernel))} {kind}" if set(kernel) == {1} else kind
