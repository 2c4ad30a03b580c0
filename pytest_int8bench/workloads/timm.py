"""Build timm image models by name, with inputs and units derived from the model's configuration."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config

from pytest_int8bench.errors import first_line
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.workloads.weights import HUB, WeightsError, load_state_dict, read_state_dict
from pytest_int8bench.workloads.workload import Workload

INPUT_SEED = 0


def timm_model(name: str) -> Workload:
    """Return the workload of a timm model with random weights, which gets Gaussian noise as input.

    The image size defaults to the model's own; ``extra.image_size=384`` selects another. Models
    that have convolutions besides the patch embedding run in ``channels_last``. The default filter
    skips the layers that timm's configuration lists as classifiers.

    Args:
        name: a model in ``timm.list_models()``.

    Raises:
        ValueError: one line, if timm has no such model.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models())
        hint = f"; there is {', '.join(close)}" if close else ""
        raise ValueError(f"timm has no model {name!r}{hint}")
    model = _describe(name)
    return Workload(
        name=f"timm:{name}",
        build=model.build,
        load=model.load,
        inputs=model.inputs,
        units=model.units,
        filter_fn=model.is_quantized,
        axes={"image_size": model.height},
        channels_last=model.convolutions > 1,
    )


@dataclass(frozen=True, kw_only=True)
class _NamedModel:
    """A timm model's configuration."""

    name: str
    channels: int
    height: int
    width: int
    is_sized: bool
    """Whether it is built for one image size, rather than accepting any."""
    heads: frozenset[str]
    """Module paths of its classifiers."""
    convolutions: int
    patch: tuple[int, int] | None
    """Height and width of a token in pixels, including a hybrid's convolutions; None if the model
    has no tokens."""
    prefix_tokens: int
    """Tokens that do not represent a patch."""

    def size(self, params: RunParams) -> tuple[int, int]:
        asked = int(params.extra["image_size"])
        return (self.height, self.width) if asked == self.height else (asked, asked)

    def build(self, params: RunParams, *, pretrained: bool = False) -> torch.nn.Module:
        size = self.size(params)
        changed = {"img_size": size} if self.is_sized and size != (self.height, self.width) else {}
        model: torch.nn.Module = timm.create_model(self.name, pretrained=pretrained, **changed)
        return model

    def load(self, params: RunParams, weights: str) -> torch.nn.Module:
        if weights == HUB:
            try:
                return self.build(params, pretrained=True)
            except Exception as error:  # the Hub's client raises its own errors
                raise WeightsError(
                    f"weights of timm:{self.name} cannot be loaded: {first_line(error)}"
                ) from None
        model = self.build(params)
        load_state_dict(model, read_state_dict(Path(weights)), source=weights)
        return model

    def inputs(self, params: RunParams, device: torch.device) -> tuple[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(INPUT_SEED)
        shape = (params.batch_size, self.channels, *self.size(params))
        return (torch.randn(shape, generator=generator, device=device),)

    def units(self, params: RunParams) -> dict[str, float]:
        rows, columns = self.size(params)
        pixels = params.batch_size * rows * columns
        counted: dict[str, float] = {"samples": params.batch_size, "pixels": pixels}
        if self.patch is not None:
            patches = (rows // self.patch[0]) * (columns // self.patch[1])
            counted["tokens"] = params.batch_size * (patches + self.prefix_tokens)
        return counted

    def is_quantized(self, module: torch.nn.Module, path: str) -> bool:
        return path not in self.heads and is_transformer_linear(module, path)


def _describe(name: str) -> _NamedModel:
    """Build the model once and return the properties needed to measure it."""
    with torch.random.fork_rng(devices=[]):
        shell: Any = timm.create_model(name)
    channels, height, width = resolve_model_data_config(shell)["input_size"]
    classifiers = shell.pretrained_cfg.get("classifier") or ()
    embedding: Any = getattr(shell, "patch_embed", None)
    patched = hasattr(shell, "num_prefix_tokens") and hasattr(embedding, "feat_ratio")
    return _NamedModel(
        name=name,
        channels=channels,
        height=height,
        width=width,
        is_sized=hasattr(embedding, "img_size"),
        heads=frozenset([classifiers] if isinstance(classifiers, str) else classifiers),
        convolutions=sum(isinstance(module, torch.nn.Conv2d) for module in shell.modules()),
        patch=embedding.feat_ratio(as_scalar=False) if patched else None,
        prefix_tokens=getattr(shell, "num_prefix_tokens", 0),
    )
