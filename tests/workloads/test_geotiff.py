"""Test folders of labelled GeoTIFFs."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rasterio")

import rasterio

from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.workloads.geotiff import FILE_BANDS, LEAST_IMAGES, SHARES, find_images
from pytest_int8bench.workloads.scenes import BANDS

COUNTS = {"Forest": 20, "River": 40}


def write(path: Path, *, height: int = 6, width: int = 6, bands: int = 13, value: int = 0) -> None:
    """Write an image with pixels 1000 x band + 10 x row + column + value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    band, row, column = np.indices((bands, height, width))
    pixels = (1000 * band + 10 * row + column + value).astype(np.uint16)
    with (
        warnings.catch_warnings(action="ignore"),
        rasterio.open(
            path, "w", driver="GTiff", height=height, width=width, count=bands, dtype="uint16"
        ) as file,
    ):
        file.write(pixels)


def fill(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for index in range(count):
            write(folder / name / f"{name}_{index:02}.tif", value=index)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fill(tmp_path_factory.mktemp("images"), COUNTS)
    # Neither an image nor a class.
    (folder / "README.txt").write_text("about")
    (folder / "River" / "notes.txt").write_text("about")
    (folder / "empty").mkdir()
    return folder


def test_folders_are_classes(folder: Path) -> None:
    images = find_images(folder)
    assert images.classes == ("Forest", "River")
    assert images.labels.tolist() == [0] * 20 + [1] * 40
    assert images.size == (6, 6)
    assert images.ids([0, 59]) == ["Forest/Forest_00.tif", "River/River_39.tif"]


def test_reorders_bands_for_olmoearth(folder: Path) -> None:
    pixels = find_images(folder).read([3], 6)
    assert (pixels.shape, pixels.dtype) == ((1, 6, 6, 12), np.float32)
    bands = [FILE_BANDS[int(value) // 1000] for value in pixels[0, 0, 0]]
    assert tuple(bands) == BANDS
    assert "B10" not in bands


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_crops_images_around_the_centre(folder: Path, size: int) -> None:
    pixels = find_images(folder).read([0, 2], size)
    assert pixels.shape == (2, size, size, 12)
    start = (6 - size) // 2
    rows, columns = np.indices((size, size)) + start
    band = pixels[..., BANDS.index("B01")]  # the first one in the file
    assert band[0].tolist() == (10 * rows + columns).tolist()
    assert band[1].tolist() == (10 * rows + columns + 2).tolist()


def test_splits_are_disjoint_stratified_and_reproducible(folder: Path) -> None:
    images = find_images(folder)
    splits = {name: images.split(name) for name in SHARES}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(60))
    per_class = {n: np.bincount(images.labels[p]).tolist() for n, p in splits.items()}
    assert per_class == {"train": [6, 12], "selection": [3, 6], "certification": [11, 22]}
    for name, positions in splits.items():
        assert find_images(folder).split(name).tolist() == positions.tolist()
        # Calibration uses the first few images, which must not all belong to one class.
        assert sorted(positions) != positions.tolist()


def test_every_split_has_images_of_the_smallest_class(tmp_path: Path) -> None:
    images = find_images(fill(tmp_path, {"a": LEAST_IMAGES, "b": LEAST_IMAGES}))
    assert [len(images.split(name)) for name in SHARES] == [6, 2, 12]


def test_images_without_georeference_do_not_warn(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_images(folder).read([0], 6)


def test_rejects_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError) as caught:
        find_images(tmp_path / "nowhere")
    assert (
        str(caught.value) == f"the folder of labelled images {tmp_path / 'nowhere'} does not exist"
    )


def test_rejects_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "Forest").mkdir()
    with pytest.raises(WorkloadError) as caught:
        find_images(tmp_path)
    assert str(caught.value) == f"{tmp_path} must hold images as CLASS/*.tif, got none"


def test_rejects_a_single_class(tmp_path: Path) -> None:
    write(tmp_path / "Forest" / "1.tif")
    with pytest.raises(WorkloadError) as caught:
        find_images(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} must have at least 2 classes (folders with *.tif), got only Forest"
    )


def test_rejects_class_with_few_images(tmp_path: Path) -> None:
    fill(tmp_path, {"Forest": LEAST_IMAGES, "River": LEAST_IMAGES - 1})
    with pytest.raises(WorkloadError) as caught:
        find_images(tmp_path)
    assert str(caught.value) == (
        f"each class in {tmp_path} must have at least 10 images, got 9 of River"
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return fill(tmp_path, {"Forest": LEAST_IMAGES, "River": LEAST_IMAGES})


def test_images_must_be_large_enough(small: Path) -> None:
    images = find_images(small)
    message = f"images in {small} must be 7x7 or larger (image_size=7), got 6x6"
    with pytest.raises(WorkloadError) as caught:
        images.check_size(7)
    assert str(caught.value) == message
    with pytest.raises(WorkloadError) as caught:
        images.read([0], 7)
    assert str(caught.value) == message


def test_images_must_have_one_size(small: Path) -> None:
    odd = small / "River" / "River_05.tif"
    write(odd, height=6, width=8)
    with pytest.raises(WorkloadError) as caught:
        find_images(small).read(range(20), 4)
    assert str(caught.value) == (
        f"images must all be of one size: {odd} is 6x8, {small / 'Forest/Forest_00.tif'} is 6x6"
    )


@pytest.mark.parametrize("bands", [3, 12, 14])
def test_images_must_have_13_bands(small: Path, bands: int) -> None:
    odd = small / "River" / "River_05.tif"
    write(odd, bands=bands)
    with pytest.raises(WorkloadError) as caught:
        find_images(small).read(range(20), 6)
    assert str(caught.value) == (
        f"image {odd} must have 13 bands (B01, B02, B03, B04, B05, B06, B07, B08, B09, B10, B11, "
        f"B12, B8A), got {bands}"
    )


@pytest.mark.parametrize("content", [b"", b"no image at all", "truncated"])
def test_names_unreadable_image(small: Path, content: bytes | str) -> None:
    odd = small / "River" / "River_05.tif"
    odd.write_bytes(content if isinstance(content, bytes) else odd.read_bytes()[:600])
    with pytest.raises(WorkloadError) as caught:
        find_images(small).read(range(20), 6)
    assert str(caught.value).startswith(f"image {odd} cannot be read: ")
    assert "\n" not in str(caught.value)


def test_reports_missing_rasterio_in_one_line(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(WorkloadError) as caught:
        find_images(small)
    assert str(caught.value).startswith(
        "GeoTIFF images need pip install 'pytest-int8bench[eval]' ("
    )


# -- files that claim to be images -------------------------------------------------------------

VRT = """<VRTDataset rasterXSize="6" rasterYSize="6">{bands}</VRTDataset>"""
VRT_BAND = """<VRTRasterBand dataType="UInt16" band="{band}"><SimpleSource>
<SourceFilename relativeToVRT="0">{source}</SourceFilename><SourceBand>1</SourceBand>
</SimpleSource></VRTRasterBand>"""


def refused(folder: Path, replaced: Path) -> str:
    """Return the error of reading all images after replacing one."""
    with pytest.raises(WorkloadError) as caught:
        find_images(folder).read(range(2 * LEAST_IMAGES), 6)
    message = str(caught.value)
    assert message.startswith(f"image {replaced} ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_vrt_named_tif_reads_no_other_file(
    small: Path, tmp_path_factory: pytest.TempPathFactory, index: int
) -> None:
    other = tmp_path_factory.mktemp("private") / "other.tif"
    write(other, value=7)
    path = small / "Forest" / f"Forest_{index:02}.tif"
    bands = "".join(VRT_BAND.format(band=band + 1, source=other) for band in range(13))
    path.write_text(VRT.format(bands=bands))
    with rasterio.open(path) as file:  # GDAL alone would accept it
        assert file.driver == "VRT"
    assert "cannot be read: " in refused(small, path)


def test_ignores_sidecar_files(small: Path) -> None:
    image = small / "Forest" / "Forest_00.tif"
    Path(f"{image}.aux.xml").write_text("<PAMDataset><Metadata>")  # GDAL warns about files it reads
    Path(f"{image}.ovr").write_text(VRT.format(bands=""))
    assert find_images(small).read([0], 6).shape == (1, 6, 6, 12)


def sparse(path: Path, side: int, **options: object) -> None:
    """Write a file of a few kilobytes that claims side x side pixels."""
    with (
        warnings.catch_warnings(action="ignore"),
        rasterio.open(
            path,
            "w",
            driver="GTiff",
            height=side,
            width=side,
            count=13,
            dtype="uint16",
            sparse_ok=True,
            **options,
        ),
    ):
        pass


def test_rejects_image_with_too_many_pixels_before_reading(small: Path) -> None:
    path = small / "Forest" / "Forest_00.tif"
    sparse(path, 20_000, tiled=True, blockxsize=4096, blockysize=4096, interleave="band")
    assert path.stat().st_size < 2**20
    assert refused(small, path) == (
        f"image {path} must have at most 1 GiB of pixels, got 9.7 GiB (20000x20000, 13 bands)"
    )


def test_rejects_small_image_with_too_large_blocks(small: Path) -> None:
    path = small / "Forest" / "Forest_00.tif"
    sparse(path, 6, tiled=True, blockxsize=16384, blockysize=16384)
    assert "must have at most 1 GiB of pixels, got 6.5 GiB (16384x16384" in refused(small, path)


def test_does_not_open_special_files(small: Path) -> None:
    path = small / "Forest" / "Forest_00.tif"
    path.unlink()
    os.mkfifo(path)  # opening it would wait for a writer
    assert refused(small, path) == f"image {path} must be a regular file"
