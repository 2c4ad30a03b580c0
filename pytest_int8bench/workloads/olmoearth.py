"""OlmoEarth encoders, built by ``olmoearth_pretrain_minimal``."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olmoearth_pretrain_minimal import (
    ModelID,
    OlmoEarthPretrain_v1,
    load_model_from_id,
    load_model_from_path,
)
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.data.normalize import (
    NormalizerV1,
    NormalizerV1_1,
    NormalizerV1_2,
    NormalizerV1_3,
)
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.constants import Modality
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.datatypes import (
    MaskedOlmoEarthSample,
)

from pytest_int8bench.errors import first_line
from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads import geotiff, scenes
from pytest_int8bench.workloads.probes import Split, embedding_evaluations
from pytest_int8bench.workloads.weights import (
    HUB,
    WeightsError,
    check_not_pointer,
    load_state_dict,
    read_state_dict,
)
from pytest_int8bench.workloads.workload import Evaluation, Workload

#: Model version -> available sizes (olmoearth_pretrain_minimal 0.1.5, ``OlmoEarthPretrain_v1``).
VERSION_SIZES = {
    "v1": ("nano", "tiny", "base", "large"),
    "v1.1": ("nano", "tiny", "base"),
    "v1.2": ("nano", "tiny", "small", "base"),
    "v1.3": ("base",),
}
PIXEL_M = 10
INPUT_SEED = 0
# The defaults of ``olmoearth_pretrain_minimal``.
_MAX_PATCH_SIZE, _MAX_TIMESTEPS = 8, 12
_ENCODER = "encoder."
# The package imports the classes that config.json names, and treats ``helios``, its former name, as
# its own name.
_CONFIG, _CLASS = "config.json", "_CLASS_"
_CONFIG_PACKAGES = ("olmoearth_pretrain", "olmoearth_pretrain_minimal", "helios")
_SENTINEL2 = "sentinel2_l2a"
_NORMALIZERS = {
    "v1": NormalizerV1,
    "v1.1": NormalizerV1_1,
    "v1.2": NormalizerV1_2,
    "v1.3": NormalizerV1_3,
}
# Small, because SmoothQuant runs the model eagerly with every activation in memory.
_CALIBRATION_BATCHES, _CALIBRATION_BATCH = 4, 32


def olmoearth(eval_data: Path | None = None) -> Workload:
    """Return the workload of OlmoEarth encoders with random weights and random inputs.

    Args:
        eval_data: folder of labelled images ``CLASS/*.tif`` (see
            :mod:`~pytest_int8bench.workloads.geotiff`) for evaluating accuracy and calibrating
            SmoothQuant, instead of the GENERATED scenes of
            :mod:`~pytest_int8bench.workloads.scenes`.
    """
    # A string, so that two workloads with the same folder compare equal.
    folder = None if eval_data is None else str(eval_data)
    return Workload(
        name="olmoearth",
        build=build,
        load=load,
        inputs=inputs,
        units=units,
        tokens=count_tokens,
        evaluation=lambda params: evaluations(params, folder),
        calibration=lambda params, device: calibration(params, device, folder),
        keep_fp32=_is_patch_embedding,
        impossible_reason=_impossible_reason,
    )


class OlmoEarthEncoder(torch.nn.Module):
    """An OlmoEarth encoder that takes plain tensors and runs in ``fast_pass`` (no masked tokens).

    Args:
        encoder: the encoder from ``olmoearth_pretrain_minimal``.
        modalities: names of the input modalities, in order.
        patch_size: patch height and width in pixels.
    """

    def __init__(
        self, encoder: torch.nn.Module, modalities: tuple[str, ...], patch_size: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.modalities = modalities
        self.patch_size = patch_size

    def forward(self, timestamps: torch.Tensor, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode one batch.

        Args:
            timestamps: (batch, timesteps, 3) day, month (January is 0), year.
            tensors: for each modality in turn, data (batch, height, width, timesteps, bands) and
                mask (batch, height, width, timesteps, band groups).

        Returns:
            modality -> tokens (batch, rows, columns, timesteps, band groups, channels).
        """
        fields = {}
        for index, name in enumerate(self.modalities):
            fields[name] = tensors[2 * index]
            fields[f"{name}_mask"] = tensors[2 * index + 1]
        sample = MaskedOlmoEarthSample(timestamps=timestamps, **fields)
        output = self.encoder(sample, patch_size=self.patch_size, fast_pass=True)
        tokens = output["tokens_and_masks"]
        return {name: getattr(tokens, name) for name in self.modalities}


class _Fp32PatchEmbeddings(torch.nn.Module):
    """FP32 patch embeddings in a BF16 encoder, as their antialiased resize has no BF16 CPU
    kernel."""

    def __init__(self, patch_embeddings: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_embeddings = patch_embeddings
        self.dtype = dtype

    def forward(self, sample: Any, patch_size: int) -> dict[str, torch.Tensor]:
        fields = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in sample.as_dict(return_none=False).items()
        }
        tokens = self.patch_embeddings(type(sample)(**fields), patch_size)
        return {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tokens.items()
        }


def build(params: RunParams) -> OlmoEarthEncoder:
    """Build the encoder of ``params`` with random weights."""
    return _wrapped(_pretrain_model(params).encoder, params)


def load(params: RunParams, weights: str) -> OlmoEarthEncoder:
    """Build the encoder of ``params`` with the given weights.

    Args:
        params: the point; size and version must match the weights.
        weights: ``hub``; a folder with ``config.json`` and ``weights.pth``, as on the Hub; or a
            file with the state dict of the whole model or of its encoder.

    Raises:
        WeightsError: one line, if the weights cannot be loaded or do not fit.
    """
    if weights != HUB and not Path(weights).is_dir():
        encoder = _pretrain_model(params).encoder
        state = read_state_dict(Path(weights))
        inside = {k.removeprefix(_ENCODER): v for k, v in state.items() if k.startswith(_ENCODER)}
        load_state_dict(encoder, inside or state, source=weights)
        return _wrapped(encoder, params)
    check_not_pointer(Path(weights))
    name = f"OlmoEarth {params.model_version} {params.model_size}"
    try:
        if weights == HUB:
            version = params.model_version.replace(".", "_")
            model = load_model_from_id(ModelID(f"OlmoEarth-{version}-{params.model_size.title()}"))
        else:
            config = json.loads((Path(weights) / _CONFIG).read_bytes())
            _check_classes(config["model"], weights)  # the package instantiates nothing else
            model = load_model_from_path(weights)
    except WeightsError:
        raise
    except Exception as error:  # from the Hub's client or the package
        raise WeightsError(
            f"weights {weights} of {name} cannot be loaded: {first_line(error)}"
        ) from None
    own, theirs = (
        sum(p.numel() for p in m.encoder.parameters()) for m in (_pretrain_model(params), model)
    )
    if own != theirs:
        raise WeightsError(
            f"weights {weights} do not fit the model: {theirs:,} parameters for {own:,} of {name}"
        )
    return _wrapped(model.encoder, params)


def _check_classes(config: Any, weights: str) -> None:
    """Reject a config that names classes of other packages: importing them would run their code."""
    pending = [config]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            pending += part.values()
            name = part.get(_CLASS, _CONFIG_PACKAGES[0])
            if not isinstance(name, str) or name.split(".")[0] not in _CONFIG_PACKAGES:
                raise WeightsError(
                    f"{_CONFIG} of {weights} must name classes of olmoearth_pretrain only, which "
                    f"are imported and so run as code, got {name!r:.80}"
                )


def _pretrain_model(params: RunParams) -> Any:
    return OlmoEarthPretrain_v1(
        model_size=params.model_size,
        model_version=params.model_version,
        max_patch_size=max(_MAX_PATCH_SIZE, params.patch_size),
        max_sequence_length=max(_MAX_TIMESTEPS, params.num_timesteps),
    ).model


def _wrapped(encoder: Any, params: RunParams) -> OlmoEarthEncoder:
    if params.bf16 and params.gpu_type == "cpu":
        encoder.patch_embeddings = _Fp32PatchEmbeddings(encoder.patch_embeddings, torch.bfloat16)
    return OlmoEarthEncoder(encoder, modalities(params), params.patch_size)


def modalities(params: RunParams) -> tuple[str, ...]:
    """Return ``olmoearth_pretrain_minimal``'s names for the modalities that ``params`` selects."""
    names = {_SENTINEL2: params.use_s2, "sentinel1": params.use_s1}
    names["landsat"] = params.use_landsat
    return tuple(name for name, used in names.items() if used)


def inputs(params: RunParams, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return monthly timestamps, and seeded random normalized images with their masks."""
    generator = torch.Generator(device).manual_seed(INPUT_SEED)
    dtype = torch.bfloat16 if params.bf16 else torch.float32
    shape = (params.batch_size, params.image_size, params.image_size, params.num_timesteps)
    tensors = [_timestamps(params.batch_size, range(params.num_timesteps), device)]
    for name in modalities(params):
        spec = Modality.get(name)
        bands = (*shape, spec.num_bands)
        tensors.append(torch.randn(bands, generator=generator, device=device, dtype=dtype))
        # 0 means that the encoder sees the token (MaskValue.ONLINE_ENCODER).
        groups = (*shape, len(spec.band_sets))
        tensors.append(torch.zeros(groups, device=device, dtype=torch.uint8))
    return tuple(tensors)


def _timestamps(batch_size: int, months: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return (batch, timesteps, 3): the first day of each month, where month 0 is January 2020."""
    month = torch.tensor(months, device=device)
    stamps = torch.stack([torch.ones_like(month), month % 12, 2020 + month // 12], dim=-1)
    return stamps.expand(batch_size, -1, -1).contiguous()


def units(params: RunParams) -> dict[str, float]:
    """Return samples, 10 m pixels and km² per batch; all timesteps of a location count as one."""
    pixels = params.batch_size * params.image_size**2
    return {
        "samples": params.batch_size,
        "pixels": pixels,
        "square_km": pixels * (PIXEL_M / 1000) ** 2,
    }


def count_tokens(output: dict[str, torch.Tensor]) -> int:
    """Count the tokens of all modalities in the output."""
    return sum(math.prod(tokens.shape[:-1]) for tokens in output.values())


def evaluations(
    params: RunParams, folder: str | None = None
) -> tuple[Evaluation, Evaluation] | None:
    """Return the evaluations of a point: a kNN and a linear probe on frozen embeddings.

    Args:
        params: the point.
        folder: folder of labelled images; None for generated scenes.

    Returns:
        The evaluations, or None unless Sentinel-2 is the only modality, as no other has labels.

    Raises:
        WorkloadError: one line, if the folder's images cannot be read or are too small.
    """
    if modalities(params) != (_SENTINEL2,):
        return None
    train, selection, certification = (_split(params, name, folder) for name in scenes.SIZES)
    return embedding_evaluations(train, selection, certification, mean_tokens)


def calibration(
    params: RunParams, device: torch.device, folder: str | None = None
) -> list[tuple[torch.Tensor, ...]]:
    """Return batches to calibrate SmoothQuant: from the train split of :func:`evaluations`, or the
    measured inputs if there is no such split."""
    if modalities(params) != (_SENTINEL2,):
        return [inputs(params, device)]
    size = min(params.batch_size, _CALIBRATION_BATCH)
    point = params.replace(batch_size=size)
    return list(_split(point, "train", folder, most=_CALIBRATION_BATCHES * size).batches())


def mean_tokens(output: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return embeddings (batch, channels): the mean over tokens, then over modalities."""
    means = [tokens.flatten(1, -2).mean(1) for tokens in output.values()]
    return torch.stack(means).mean(0)


def normalize(pixels: torch.Tensor, model_version: str) -> torch.Tensor:
    """Normalize Sentinel-2 digital numbers (..., 12) in place as the package does; keep NaN."""
    scale, offset = _normalization(model_version)
    return pixels.mul_(scale.to(pixels.device)).add_(offset.to(pixels.device))


@functools.cache
def _normalization(model_version: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and the offset of each band, both (12,), found by applying the package's
    linear normalizer to 0 and 1."""
    bands = Modality.SENTINEL2_L2A
    ends = np.stack([np.zeros(bands.num_bands), np.ones(bands.num_bands)])
    offset, end = _NORMALIZERS[model_version]().normalize(bands, ends)
    return torch.from_numpy(end - offset).float(), torch.from_numpy(offset).float()


def _split(params: RunParams, name: str, folder: str | None, most: int | None = None) -> Split:
    """Return a split, or its first ``most`` samples, with the batch size and on the device of the
    point."""
    device = torch.device(params.gpu_type)
    if folder is None:
        labels = scenes.labels(scenes.SIZES[name])[:most]
        months = scenes.months(params.num_timesteps).tolist()
        ids = None

        def pixels(rows: range) -> torch.Tensor:
            return scenes.scene_batch(
                rows, name, params.image_size, params.num_timesteps, device=device
            )

    else:
        images = geotiff.find_images(Path(folder))
        images.check_size(params.image_size)
        positions = images.split(name)[:most]
        labels = images.labels[positions]
        months = [geotiff.MONTH] * params.num_timesteps
        ids = images.ids(positions)

        def pixels(rows: range) -> torch.Tensor:
            chosen = positions[rows.start : rows.stop]
            once = torch.from_numpy(images.read(chosen, params.image_size)).to(device)
            return once.unsqueeze(3).repeat(1, 1, 1, params.num_timesteps, 1)

    def batches() -> Iterator[tuple[torch.Tensor, ...]]:
        for start in range(0, len(labels), params.batch_size):
            rows = range(start, min(start + params.batch_size, len(labels)))
            data = normalize(pixels(rows), params.model_version)
            groups = len(Modality.SENTINEL2_L2A.band_sets)
            mask = torch.zeros((*data.shape[:-1], groups), device=device, dtype=torch.uint8)
            yield _timestamps(len(rows), months, device), data, mask

    return Split(labels, batches, ids)


def _impossible_reason(params: RunParams) -> str | None:
    sizes = VERSION_SIZES.get(params.model_version)
    if sizes is None:
        return f"OlmoEarth has no version {params.model_version}; it has {', '.join(VERSION_SIZES)}"
    if params.model_size not in sizes:
        return f"OlmoEarth {params.model_version} has no size {params.model_size}"
    return None


def _is_patch_embedding(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, _Fp32PatchEmbeddings)
