"""Test generated scenes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pytest_int8bench.workloads import scenes
from pytest_int8bench.workloads.scenes import BANDS, CLASSES, labels, months, scene_batch

VARIATION = (
    *("LEANING_SD", "_SHIFT_MONTHS_SD", "_PARCEL_SHIFT_MONTHS_SD", "_ILLUMINATION_SD"),
    *("_PARCEL_BRIGHTNESS_SD", "_OFFSET_SD", "_HAZE_SD"),
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make only the parcels of scenes random."""
    for name in VARIATION:
        monkeypatch.setattr(scenes, name, 0.0)
    monkeypatch.setattr(
        scenes, "_noise", lambda length, device: torch.ones(length + scenes._NOISE_STARTS)
    )


@pytest.mark.parametrize(("image_size", "num_timesteps"), [(1, 1), (5, 2), (8, 13), (64, 1)])
def test_scenes_are_digital_numbers(image_size: int, num_timesteps: int) -> None:
    batch = scene_batch(range(3), "train", image_size, num_timesteps)
    assert batch.shape == (3, image_size, image_size, num_timesteps, 12)
    assert batch.dtype == torch.float32
    assert batch.min() >= 0
    assert 1000 < batch.max() <= scenes.FULL_SCALE


def test_clamps_bright_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_ILLUMINATION_SD", 2.0)
    assert scene_batch(range(20), "train", 8, 2).max() == scenes.FULL_SCALE


@settings(max_examples=20)
@given(
    indices=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    split=st.sampled_from(list(scenes.SIZES)),
)
def test_scenes_do_not_depend_on_batching(indices: list[int], split: str) -> None:
    together = scene_batch(indices, split, 8, 2)
    alone = torch.cat([scene_batch([index], split, 8, 2) for index in indices])
    assert torch.equal(together, alone)


def test_scenes_are_distinct() -> None:
    # All of one class, so that only randomness distinguishes them.
    every = [scene_batch(range(0, 50, 10), split, 8, 1) for split in scenes.SIZES]
    for one, two in itertools.combinations(torch.cat(every), 2):
        assert not torch.equal(one, two)


def test_first_scene_is_unchanged() -> None:
    # Published accuracies use these scenes, so they must not change by accident.
    pixels = scene_batch([0], "certification", 8, 1)[0, 0, 0, 0]
    assert pixels.round().int().tolist() == [
        603,
        593,
        424,
        563,
        429,
        468,
        530,
        500,
        305,
        174,
        683,
        484,
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_scenes_are_the_same_on_a_gpu() -> None:
    on_gpu = scene_batch(range(20), "train", 16, 3, device="cuda")
    assert torch.equal(on_gpu.cpu(), scene_batch(range(20), "train", 16, 3))


def test_classes_alternate() -> None:
    assert labels(23).tolist() == [*range(10), *range(10), 0, 1, 2]


@pytest.mark.parametrize(
    ("num_timesteps", "expected"),
    [(1, [6]), (2, [3, 9]), (3, [2, 6, 10]), (12, list(range(12))), (14, list(range(14)))],
)
def test_months_are_spread_over_the_year(num_timesteps: int, expected: list[int]) -> None:
    assert months(num_timesteps).tolist() == expected


@given(num_timesteps=st.integers(1, 40))
def test_months_increase(num_timesteps: int) -> None:
    found = months(num_timesteps)
    assert len(found) == num_timesteps
    assert (np.diff(found) > 0).all()
    assert found[0] >= 0
    assert found[-1] < max(12, num_timesteps)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("image_size", [4, 5, 6, 8, 16, 30])
def test_the_class_covers_most_of_its_scene(image_size: int) -> None:
    batch = scene_batch(range(200), "train", image_size, 1)
    # Without variation, all areas of a class look the same.
    own = torch.stack([spectrum(name, 1) for name in CLASSES])[torch.from_numpy(labels(200))]
    share = (batch == own[:, None, None]).all(-1).all(-1).float().mean((1, 2))
    assert share.min() > 0.5
    assert share.min() < 1 == share.max()
    if image_size % 4 == 0:
        assert share.min() >= 0.75


@pytest.mark.usefixtures("plain")
def test_crops_have_seasons() -> None:
    growth = {name: ndvi(spectrum(name, 12)) for name in CLASSES}
    assert int(growth["maize"].argmax()) == 7  # August
    assert int(growth["winter wheat"].argmax()) == 4  # May
    assert growth["maize"][7] > 0.7 > 0.3 > growth["maize"][1]
    assert growth["coniferous forest"].min() > 0.6
    assert growth["water"].max() < 0.2


def spectrum(name: str, num_timesteps: int) -> torch.Tensor:
    """Return (timesteps, bands) of a scene that is entirely of one class, without variation."""
    for index in range(CLASSES.index(name), 1000, len(CLASSES)):
        pixels = scene_batch([index], "train", 4, num_timesteps)[0].flatten(0, 1)
        if bool((pixels == pixels[0]).all()):
            return pixels[0]
    raise AssertionError(name)


def ndvi(pixels: torch.Tensor) -> torch.Tensor:
    red, near = (pixels[..., BANDS.index(band)] for band in ("B04", "B08"))
    return (near - red) / (near + red)


@pytest.mark.parametrize("num_timesteps", [1, 3, 6])
def test_scenes_are_neither_easy_nor_too_hard(num_timesteps: int) -> None:
    # Means of whole scenes, without pixel noise and parcels smaller than a patch, are the best
    # information about the class that an encoder can see.
    def means(split: str, count: int) -> np.ndarray:
        starts = range(0, count, 100)
        parts = [scene_batch(range(s, s + 100), split, 8, num_timesteps) for s in starts]
        return torch.cat([part.mean((1, 2)).flatten(1) for part in parts]).numpy()

    train, test = means("train", 1000), means("certification", 1000)
    for classifier in (
        KNeighborsClassifier(20, metric="cosine"),
        LogisticRegression(max_iter=5000),
    ):
        fitted = make_pipeline(StandardScaler(), classifier).fit(train, labels(1000))
        assert 0.86 < fitted.score(test, labels(1000)) < 0.96


def test_about_one_in_twenty_scenes_resembles_another_class() -> None:
    leaning = [scenes._draw("certification", index, 1)["leaning"] for index in range(3000)]
    assert np.mean(np.array(leaning) > 0.5) == pytest.approx(0.0455, abs=0.012)
