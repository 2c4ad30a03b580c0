"""GENERATED Sentinel-2 scenes with labels: no satellite saw them.

They show whether a quantized encoder distinguishes scenes as well as its baseline does. This works
on any machine and without a download. Accuracy on them says nothing about accuracy on real images;
:mod:`pytest_int8bench.workloads.geotiff` reads real ones.

A scene has one of ten land-cover classes, each with a spectrum that varies through the year between
a background (soil, litter, water) and foliage. That class covers at least three quarters of the
scene's parcels. The difficulty affects whole scenes, so no encoder can average it away: a random
weight (:data:`LEANING_SD`) mixes the spectrum of the paired class into the scene's own, and in
about one scene of twenty that weight exceeds one half. Illumination, haze, shifts of the season and
a spectral offset vary as well.

Scene ``i`` of a split is the same on every device and for every batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

#: Number of scenes in each split.
SIZES = {"train": 1000, "selection": 500, "certification": 3000}
#: Bands in the order of OlmoEarth's ``sentinel2_l2a``.
BANDS = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09")
#: Digital number for a reflectance of 1, and the highest value of a pixel.
FULL_SCALE = 10_000

#: Standard deviation of a normally distributed number whose absolute value is the weight of the
#: paired class in a scene. A scene with a weight over 0.5 looks more like the paired class than its
#: own. At 0.25, that is 4.6 % of all scenes, so even a perfect encoder reaches only about 95 %.
LEANING_SD = 0.25

_SEED = 2020
_PARCELS = 4  # rows and columns of parcels
_MOST_OTHERS = 4  # maximum number of parcels of other classes in a scene
_SHIFT_MONTHS_SD, _PARCEL_SHIFT_MONTHS_SD = 0.2, 0.15
_ILLUMINATION_SD, _PARCEL_BRIGHTNESS_SD = 0.03, 0.04
_OFFSET_SD = 0.02
_HAZE_SD = 0.008
_NOISE_SD = 0.04
_NOISE_STARTS = 1 << 16

# Invented, rounded digital numbers, typical of each surface, in the order of BANDS.
_SURFACES = {
    "water": (500, 450, 300, 150, 250, 180, 160, 140, 80, 60, 550, 130),
    "concrete": (1400, 1600, 1800, 2200, 1900, 2000, 2100, 2300, 2500, 2200, 1300, 2300),
    "soil": (900, 1200, 1600, 2300, 1850, 2050, 2200, 2450, 3100, 2700, 750, 2500),
    "wet soil": (550, 700, 800, 950, 850, 900, 930, 980, 1000, 750, 500, 950),
    "litter": (500, 700, 900, 1600, 1150, 1350, 1500, 1700, 2200, 1500, 420, 1700),
    "straw": (1000, 1400, 1900, 2900, 2200, 2500, 2700, 3100, 3900, 2900, 850, 3100),
    "conifers": (250, 400, 280, 2000, 550, 1500, 1900, 2150, 1000, 480, 230, 2200),
    "broadleaves": (280, 550, 320, 3600, 800, 2700, 3400, 3800, 1900, 850, 250, 3900),
    "grass": (400, 750, 500, 2900, 1050, 2250, 2700, 3100, 2300, 1250, 350, 3100),
    "wheat": (350, 650, 380, 4000, 900, 2900, 3700, 4100, 1800, 800, 300, 4000),
    "maize": (320, 750, 420, 4500, 1000, 3300, 4200, 4650, 2100, 1000, 280, 4600),
    "rapeseed": (450, 1300, 900, 4100, 1600, 3100, 3700, 4200, 2000, 1000, 400, 4000),
    "rice": (300, 550, 350, 3000, 750, 2200, 2700, 3050, 1200, 500, 280, 2900),
}
# Class: background, foliage, lowest and highest foliage cover, month of the highest cover (January
# is 0), standard deviation of the season in months. Consecutive classes are paired: first and
# second, third and fourth, and so on.
_SEASONS = {
    "water": ("water", "grass", 0.00, 0.05, 7.0, 2.0),
    "rice": ("wet soil", "rice", 0.00, 0.95, 7.3, 1.3),
    "built-up": ("concrete", "grass", 0.05, 0.20, 6.0, 2.5),
    "bare soil": ("soil", "grass", 0.00, 0.15, 5.0, 2.0),
    "coniferous forest": ("litter", "conifers", 0.85, 0.95, 6.0, 2.5),
    "deciduous forest": ("litter", "broadleaves", 0.05, 0.95, 6.5, 2.0),
    "winter wheat": ("soil", "wheat", 0.10, 0.95, 4.3, 1.3),
    "rapeseed": ("straw", "rapeseed", 0.15, 0.95, 3.5, 1.2),
    "grassland": ("litter", "grass", 0.40, 0.90, 5.0, 2.5),
    "maize": ("soil", "maize", 0.00, 0.95, 6.8, 1.2),
}
CLASSES = tuple(_SEASONS)
# Haze by band, in the order of BANDS; it scatters short wavelengths most.
_HAZE = np.array([0.80, 0.60, 0.45, 0.22, 0.38, 0.32, 0.27, 0.20, 0.06, 0.03, 1.00, 0.17])

_BACKGROUND = np.array([_SURFACES[season[0]] for season in _SEASONS.values()], dtype=float)
_FOLIAGE = np.array([_SURFACES[season[1]] for season in _SEASONS.values()], dtype=float)
_LOWEST, _HIGHEST, _PEAK, _WIDTH = np.array([season[2:] for season in _SEASONS.values()]).T


def labels(count: int) -> NDArray[np.int64]:
    """Return the classes of the first ``count`` scenes of any split, as indices in :data:`CLASSES`.
    Scenes take the classes in turn."""
    return np.arange(count) % len(CLASSES)


def months(num_timesteps: int) -> NDArray[np.int64]:
    """Return the month of each image of a scene, where 0 is January.

    Up to twelve images are spread over the year (one: July; three: March, July and November), so
    that even a few show the seasons. With more than twelve, the months are consecutive, and the
    count continues past December: 12 is the next January.
    """
    if num_timesteps > 12:
        return np.arange(num_timesteps)
    return (2 * np.arange(num_timesteps) + 1) * 12 // (2 * num_timesteps)


def scene_batch(
    indices: Sequence[int],
    split: str,
    image_size: int,
    num_timesteps: int,
    *,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return GENERATED scenes.

    Args:
        indices: indices of the scenes in the split.
        split: a key of :data:`SIZES`.
        image_size: height and width in pixels.
        num_timesteps: images per scene, taken in :func:`months`.
        device: where the pixels are computed.

    Returns:
        (batch, height, width, timesteps, bands) FP32 digital numbers, reflectance x 10000, from 0
        to 10000; bands as in :data:`BANDS`.
    """
    draws = [_draw(split, index, num_timesteps) for index in indices]
    batch = {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}
    # numpy computes everything but the pixels. The operations on the device (lookups, one
    # multiplication, one clamp) round identically on all devices.
    spectra = torch.from_numpy(_parcel_spectra(batch, num_timesteps).astype(np.float32)).to(device)
    scenes = torch.arange(len(draws), device=device)[:, None, None]
    pixels = spectra[scenes, _parcel_of_pixels(batch["corner"], image_size, device)]
    bank = _noise(image_size * image_size * num_timesteps * len(BANDS), str(device))
    length = bank.numel() - _NOISE_STARTS
    starts = torch.from_numpy(batch["noise_start"]).to(device)
    pixels *= bank.unfold(0, length, 1)[starts].view_as(pixels)
    return pixels.clamp_(0, FULL_SCALE)


def _draw(split: str, index: int, num_timesteps: int) -> dict[str, Any]:
    """Draw all random numbers of one scene from its own generator."""
    rng = np.random.default_rng([_SEED, list(SIZES).index(split), index])
    label = index % len(CLASSES)
    parcels = _PARCELS * _PARCELS
    foreign = rng.permutation(parcels) < rng.integers(_MOST_OTHERS + 1)
    # Parcels of random class may have the scene's own class: excluding it would give that class
    # away.
    return {
        "label": label,
        "foreign": foreign,
        "parcel_class": np.where(foreign, rng.integers(len(CLASSES), size=parcels), label),
        "other": label ^ 1,
        "leaning": min(abs(rng.normal(0, LEANING_SD)), 1.0),
        "corner": rng.random(2),
        "noise_start": rng.integers(_NOISE_STARTS),
        "shift": rng.normal(0, _SHIFT_MONTHS_SD)
        + rng.normal(0, _PARCEL_SHIFT_MONTHS_SD, size=parcels),
        "brightness": rng.normal(0, _PARCEL_BRIGHTNESS_SD, size=parcels),
        "offset": rng.normal(0, _OFFSET_SD, size=len(BANDS)),
        "illumination": rng.normal(0, _ILLUMINATION_SD)
        + rng.normal(0, _ILLUMINATION_SD, size=num_timesteps),
        "haze": np.abs(rng.normal(0, _HAZE_SD, size=num_timesteps)),
    }


def _parcel_spectra(batch: dict[str, NDArray[Any]], num_timesteps: int) -> Floats:
    """Return (batch, parcels, timesteps, bands) digital numbers without pixel noise."""
    own = _season(batch["parcel_class"], batch["shift"], num_timesteps)
    other = _season(
        np.broadcast_to(batch["other"][:, None], batch["shift"].shape),
        batch["shift"],
        num_timesteps,
    )
    leaning = np.where(batch["foreign"], 0.0, batch["leaning"][:, None])[..., None, None]
    spectra = (1 - leaning) * own + leaning * other
    log_gain = (
        batch["brightness"][:, :, None, None]
        + batch["illumination"][:, None, :, None]
        + batch["offset"][:, None, None, :]
    )
    haze = batch["haze"][:, None, :, None] * _HAZE
    return np.asarray(spectra * np.exp(log_gain) + FULL_SCALE * haze)


def _season(classes: NDArray[Any], shift: Floats, num_timesteps: int) -> Floats:
    """Return the spectra of parcels over the year.

    Args:
        classes: (batch, parcels) indices in :data:`CLASSES`.
        shift: (batch, parcels) number of months by which the season of a parcel is late.

    Returns:
        (batch, parcels, timesteps, bands) digital numbers.
    """
    late = months(num_timesteps) - (_PEAK[classes] + shift)[..., None]
    distance = (late + 6) % 12 - 6  # December is next to January
    season = np.exp(-0.5 * (distance / _WIDTH[classes][..., None]) ** 2)
    lowest, highest = _LOWEST[classes][..., None], _HIGHEST[classes][..., None]
    cover = (lowest + (highest - lowest) * season)[..., None]
    background, foliage = _BACKGROUND[classes][:, :, None], _FOLIAGE[classes][:, :, None]
    return np.asarray((1 - cover) * background + cover * foliage)


def _parcel_of_pixels(corner: Floats, image_size: int, device: torch.device | str) -> torch.Tensor:
    """Return (batch, height, width) parcel indices. The grid starts at ``corner`` (fractions of
    height and width) and wraps around; if it were aligned with patches, each patch would show only
    one parcel."""
    starts = torch.from_numpy((corner * image_size).astype(np.int64)).to(device)
    places = torch.arange(image_size, device=device)
    grid = (places + starts[..., None]) % image_size * _PARCELS // image_size
    return grid[:, 0, :, None] * _PARCELS + grid[:, 1, None, :]


@functools.lru_cache(maxsize=2)
def _noise(length: int, device: str) -> torch.Tensor:
    """Return noise factors for the pixels; each scene reads ``length`` of them from a start of its
    own.

    Fresh noise for every pixel would take longer than everything else.
    """
    rng = np.random.default_rng(_SEED)
    noise = rng.standard_normal(length + _NOISE_STARTS, dtype=np.float32)
    return torch.from_numpy(1 + np.float32(_NOISE_SD) * noise).to(device)
