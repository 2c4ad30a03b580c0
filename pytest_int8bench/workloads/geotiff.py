"""Read labelled 13-band Sentinel-2 images in EuroSAT's layout, ``FOLDER/CLASS/*.tif``.

Each image shows one moment. A model with several timesteps gets the image repeated, always in
:data:`MONTH`, so it cannot make use of seasons. EuroSAT has top-of-atmosphere reflectances (L1C),
while OlmoEarth was trained on surface reflectances (L2A).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_int8bench.errors import WorkloadError, first_line
from pytest_int8bench.workloads.scenes import BANDS

#: Bands of a file, in EuroSAT's order; OlmoEarth does not use B10 (cirrus).
FILE_BANDS = (
    *("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12"),
    "B8A",
)
#: Share of each class in each split.
SHARES = {"train": 0.30, "selection": 0.15, "certification": 0.55}
#: Minimum number of images per class; with fewer, a split could lack the class.
LEAST_IMAGES = 10
#: Maximum decoded size of one file: a few kilobytes of compressed zeros can expand to any size.
MAX_IMAGE_BYTES = 2**30
#: June (January is 0), assumed because the files do not record when the images were taken.
MONTH = 5

_SPLIT_SEED = 0
_SUFFIXES = (".tif", ".tiff")
_BAND_INDICES = [FILE_BANDS.index(band) + 1 for band in BANDS]  # rasterio counts from 1


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a folder, read on demand."""

    folder: Path
    classes: tuple[str, ...]
    """Sorted names of the class folders."""
    paths: tuple[Path, ...]
    """Files, sorted by class and name."""
    labels: NDArray[np.int64]
    """(images,) index of each image's class in ``classes``."""
    size: tuple[int, int]
    """Height and width in pixels of the first image; all others must match."""

    def split(self, name: str) -> NDArray[np.int64]:
        """Return the positions of the images of the split ``name``, a key of :data:`SHARES`.

        Each class is shuffled (seeded) and divided by the shares, then the classes are shuffled
        together. The splits are disjoint, and always the same for the same files.
        """
        rng = np.random.default_rng(_SPLIT_SEED)
        edges = np.cumsum([0.0, *SHARES.values()])
        which = list(SHARES).index(name)
        parts = []
        for label in range(len(self.classes)):
            members = rng.permutation(np.flatnonzero(self.labels == label))
            first, last = (round(float(e) * len(members)) for e in edges[which : which + 2])
            parts.append(members[first:last])
        return rng.permutation(np.concatenate(parts))

    def ids(self, positions: Iterable[int]) -> list[str]:
        """Return the names ``CLASS/FILE`` of the images at ``positions``."""
        return [self.paths[i].relative_to(self.folder).as_posix() for i in positions]

    def read(self, positions: Iterable[int], image_size: int) -> NDArray[np.float32]:
        """Read the images at ``positions`` and crop them around their centers.

        Returns:
            (images, height, width, bands) digital numbers; bands as in
            :data:`~pytest_int8bench.workloads.scenes.BANDS`.

        Raises:
            WorkloadError: one line, if a file cannot be read, differs in size from the first one,
                or is smaller than ``image_size``.
        """
        self.check_size(image_size)
        top, left = ((side - image_size) // 2 for side in self.size)
        images = []
        for position in positions:
            path = self.paths[position]
            pixels = _read(path)
            if pixels.shape[:2] != self.size:
                raise WorkloadError(
                    f"images must all be of one size: {path} is {_size(pixels.shape[:2])}, "
                    f"{self.paths[0]} is {_size(self.size)}"
                )
            images.append(pixels[top : top + image_size, left : left + image_size])
        return np.stack(images).astype(np.float32)

    def check_size(self, image_size: int) -> None:
        """Raise ``WorkloadError`` if images are smaller than ``image_size``."""
        if min(self.size) < image_size:
            raise WorkloadError(
                f"images in {self.folder} must be {image_size}x{image_size} or larger "
                f"(image_size={image_size}), got {_size(self.size)}"
            )


def find_images(folder: Path) -> Images:
    """Find the images ``CLASS/*.tif`` in a folder and read the first one to check it.

    Raises:
        WorkloadError: if the folder does not exist or has fewer than two classes, a class has fewer
            than :data:`LEAST_IMAGES` images, the first image cannot be read or does not have 13
            bands, or rasterio is missing.
    """
    if not folder.is_dir():
        raise WorkloadError(f"the folder of labelled images {folder} does not exist")
    found = {
        part.name: sorted(p for p in part.iterdir() if p.suffix.lower() in _SUFFIXES)
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise WorkloadError(f"{folder} must hold images as CLASS/*.tif, got none")
    if len(found) < 2:
        raise WorkloadError(
            f"{folder} must have at least 2 classes (folders with *.tif), got only {min(found)}"
        )
    for name, group in found.items():
        if len(group) < LEAST_IMAGES:
            raise WorkloadError(
                f"each class in {folder} must have at least {LEAST_IMAGES} images, "
                f"got {len(group)} of {name}"
            )
    paths = tuple(path for group in found.values() for path in group)
    labels = np.repeat(np.arange(len(found)), [len(group) for group in found.values()])
    height, width = _read(paths[0]).shape[:2]
    return Images(folder, tuple(found), paths, labels, (height, width))


def _read(path: Path) -> NDArray[Any]:
    """Return the pixels of a file: (height, width, bands)."""
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning
    except ImportError as error:
        raise WorkloadError(
            f"GeoTIFF images need pip install 'pytest-int8bench[eval]' ({error})"
        ) from None
    if not path.is_file():
        raise WorkloadError(f"image {path} must be a regular file")
    with warnings.catch_warnings():
        # The location of an image does not matter here.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            # Allow only the GTiff driver, and no sidecar files. Otherwise, GDAL would guess the
            # format from the content, and some formats, like sidecar files, name other files and
            # URLs to read.
            with (
                rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO"),
                rasterio.open(path, driver="GTiff") as file,
            ):
                _check_shape(path, file)
                pixels = file.read(_BAND_INDICES)
        except WorkloadError:
            raise
        except Exception as error:  # from rasterio or GDAL
            raise WorkloadError(f"image {path} cannot be read: {first_line(error)}") from None
    return np.moveaxis(np.asarray(pixels), 0, -1)


def _check_shape(path: Path, file: Any) -> None:
    """Raise ``WorkloadError`` for wrong bands or too many pixels, before any pixels are read."""
    if file.count != len(FILE_BANDS):
        raise WorkloadError(
            f"image {path} must have {len(FILE_BANDS)} bands ({', '.join(FILE_BANDS)}), "
            f"got {file.count}"
        )
    # GDAL decodes whole blocks, which may be larger than the image.
    sides = [file.shape, *file.block_shapes]
    itemsize = max(np.dtype(dtype).itemsize for dtype in file.dtypes)
    size = max(math.prod(shape) for shape in sides) * len(FILE_BANDS) * itemsize
    if size > MAX_IMAGE_BYTES:
        raise WorkloadError(
            f"image {path} must have at most {MAX_IMAGE_BYTES / 2**30:g} GiB of pixels, "
            f"got {size / 2**30:.1f} GiB ({_size(max(sides, key=math.prod))}, {file.count} bands)"
        )


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
