"""Image models of timm by name: inputs and units come from the model's own configuration."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config

from pytest_int8bench.errors import first_line
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.workloads import Workload
from pytest_int8bench.workloads.weights import HUB, WeightsError, load_state_dict, read_state_dict

INPUT_SEED = 0


def timm_model(name: str) -> Workload:
    """Return the workload of a timm model with random weights, fed normal noise.

    The image size is the model's own; ``extra.image_size=384`` builds it for another. Models with
    more convolutions than a patch embedding run in ``channels_last``. The default filter leaves
    out the layers that timm's configuration calls classifier.

    Args:
        name: a model of ``timm.list_models()``.

    Raises:
        ValueError: one line, if timm has no such model.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models())
        hint = f"; there is {', '.join(close)}" if close else ""
        raise ValueError(f"timm has no model {name!r}{hint}")
    with torch.random.fork_rng(devices=[]):
        shell: Any = timm.create_model(name)
    channels, height, width = resolve_model_data_config(shell)["input_size"]
    classifiers = shell.pretrained_cfg.get("classifier") or ()
    heads = {classifiers} if isinstance(classifiers, str) else set(classifiers)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in shell.modules())
    embedding: Any = getattr(shell, "patch_embed", None)
    sized = hasattr(embedding, "img_size")
    # Pixels a token, also behind the convolutions of a hybrid.
    patched = hasattr(shell, "num_prefix_tokens") and hasattr(embedding, "feat_ratio")
    patch = embedding.feat_ratio(as_scalar=False) if patched else None
    prefix = getattr(shell, "num_prefix_tokens", 0)
    del shell

    def size(params: RunParams) -> tuple[int, int]:
        asked = int(params.extra["image_size"])
        return (height, width) if asked == height else (asked, asked)

    def create(params: RunParams, *, pretrained: bool = False) -> torch.nn.Module:
        changed = {"img_size": size(params)} if sized and size(params) != (height, width) else {}
        model: torch.nn.Module = timm.create_model(name, pretrained=pretrained, **changed)
        return model

    def load(params: RunParams, weights: str) -> torch.nn.Module:
        if weights == HUB:
            try:
                return create(params, pretrained=True)
            except Exception as error:  # the hub's client raises errors of its own
                raise WeightsError(
                    f"weights of timm:{name} cannot be loaded: {first_line(error)}"
                ) from None
        model = create(params)
        load_state_dict(model, read_state_dict(Path(weights)), source=weights)
        return model

    def inputs(params: RunParams, device: torch.device) -> tuple[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(INPUT_SEED)
        shape = (params.batch_size, channels, *size(params))
        return (torch.randn(shape, generator=generator, device=device),)

    def units(params: RunParams) -> dict[str, float]:
        rows, columns = size(params)
        pixels = params.batch_size * rows * columns
        counted: dict[str, float] = {"samples": params.batch_size, "pixels": pixels}
        if patch is not None:
            tokens = (rows // patch[0]) * (columns // patch[1]) + prefix
            counted["tokens"] = params.batch_size * tokens
        return counted

    return Workload(
        name=f"timm:{name}",
        build=create,
        load=load,
        inputs=inputs,
        units=units,
        filter_fn=lambda module, path: path not in heads and is_transformer_linear(module, path),
        axes={"image_size": height},
        channels_last=convolutions > 1,
    )
