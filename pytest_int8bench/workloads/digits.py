"""A small Vision Transformer trained on handwritten digits: real data and a meaningful accuracy.

Data: ``sklearn.datasets.load_digits``, the 1797 images (8x8, 17 gray levels) of scikit-learn's copy
of the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI
Machine Learning Repository, 1998). scikit-learn ships the images, so nothing is downloaded.

Splits: 800 images for training (also used as inputs and for calibration), 200 for selection and 797
for certification; seeded and stratified by class. All three contain digits by the same writers.

Weights: :data:`WEIGHTS`, 163,754 FP32 parameters, the same on every machine, trained by
``benchmarks/train_digits.py``.

Measured (torch 2.13.0, torchao 0.18, AMD EPYC, eager, batch 64): top-1 on the certification split
793/797 in FP32, 792/797 (99.4 %) in BF16, 792/797 in W8A8 and 793/797 in W8; on the selection split
200/200 in each.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads.weights import WeightsError, load_state_dict, read_state_dict
from pytest_int8bench.workloads.workload import Evaluation, Workload

#: The trained weights; the file's header holds the recipe, the versions and the accuracy.
WEIGHTS = Path(__file__).parent / "data" / "digits.safetensors"
IMAGE_SIZE = 8
PATCH = 2
TOKENS = (IMAGE_SIZE // PATCH) ** 2
CLASSES = 10
#: Number of channels between the convolutions of the patch embedding.
STEM = 32
#: Width of a token, and of the MLP's hidden layer.
DIM, HIDDEN = 64, 128
#: Number of blocks, and attention heads per block.
DEPTH, HEADS = 4, 4
#: Number of samples in each split.
TRAIN, SELECTION, CERTIFICATION = 800, 200, 797
#: Number of training images for SmoothQuant's calibration, and its batch size.
CALIBRATION, CALIBRATION_BATCH = 256, 64
_SPLIT_SEED = 0


class Attention(nn.Module):
    """Self-attention on (batch, tokens, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(query, key, value)
        out: torch.Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on (..., dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block on (batch, tokens, dim)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.attn = Attention(DIM, HEADS)
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = Mlp(DIM, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Map images (batch, 1, 8, 8) to logits (batch, 10), averaging over tokens before the head."""

    def __init__(self) -> None:
        super().__init__()
        # Use convolutions, because 800 images are too few to learn locality from patches alone.
        self.patch_embed = nn.Sequential(
            nn.Conv2d(1, STEM, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(STEM, STEM, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(STEM, DIM, 3, stride=PATCH, padding=1),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, DIM))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x).mean(1))
        return logits


@contextmanager
def _own_modes() -> Iterator[None]:
    """Create ordinary CPU tensors, regardless of the caller's inference mode and device."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


Ids: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Scores: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Split:
    """One part of the data, on the CPU."""

    ids: Ids
    """Rows of ``sklearn.datasets.load_digits``, ascending; (n,)."""
    images: torch.Tensor
    """(n, 1, 8, 8), FP32, from -1 (paper) to 1 (ink) in steps of 1/8, which BF16 holds exactly."""
    labels: torch.Tensor
    """(n,), int64."""


@functools.cache
def splits() -> dict[str, Split]:
    """Return the disjoint, class-stratified splits ``train``, ``selection``, ``certification``."""
    with _own_modes():
        data = load_digits()
        ids = np.arange(len(data.target))
        rest, certification = train_test_split(
            ids, test_size=CERTIFICATION, stratify=data.target, random_state=_SPLIT_SEED
        )
        train, selection = train_test_split(
            rest,
            train_size=TRAIN,
            test_size=SELECTION,
            stratify=data.target[rest],
            random_state=_SPLIT_SEED,
        )
        chosen = {"train": train, "selection": selection, "certification": certification}
        return {name: _split(data, np.sort(part)) for name, part in chosen.items()}


def _split(data: Any, ids: Ids) -> Split:
    images = torch.from_numpy(data.images[ids] / 8 - 1).to(torch.float32).unsqueeze(1)
    return Split(ids, images, torch.from_numpy(data.target[ids]).to(torch.int64))


def splits_digest() -> str:
    """Return the SHA-256 of the row numbers, pixels and labels of every split."""
    digest = hashlib.sha256()
    for name, split in splits().items():
        digest.update(name.encode())
        for array in (split.ids, split.images.numpy(), split.labels.numpy()):
            digest.update(array.astype("<f8").tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict that ``benchmarks/train_digits.py`` wrote to ``path``.

    Raises:
        WeightsError: one line, if the file cannot be read, or if its weights were trained on other
            splits, whose training images may be in this certification split.
    """
    weights = read_state_dict(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    if header.get("splits_sha256") != splits_digest():
        raise WeightsError(
            f"weights {path} must come from benchmarks/train_digits.py, trained on the splits that "
            "the installed scikit-learn gives"
        )
    return weights


def digits() -> Workload:
    """Return the workload ``digits``.

    A batch takes images of the training split in order, repeating them if it is larger than the
    split.
    """
    return Workload(
        name="digits",
        build=_build,
        inputs=_inputs,
        units=_units,
        evaluation=Evaluation(metric="top1", scores=_certification, selection=_selection),
        calibration=_calibration,
    )


def _build(params: RunParams) -> nn.Module:
    with _own_modes():
        with torch.device("meta"):  # initializing weights would draw from the caller's generator
            model = VisionTransformer().to(torch.float32)
        model.to_empty(device="cpu")
        load_state_dict(model, read_weights(WEIGHTS), source=str(WEIGHTS))
        return model.eval()


def _inputs(params: RunParams, device: torch.device) -> tuple[torch.Tensor]:
    images = splits()["train"].images
    return (images[torch.arange(params.batch_size, device="cpu") % len(images)].to(device),)


def _units(params: RunParams) -> dict[str, float]:
    return {"samples": params.batch_size, "tokens": params.batch_size * TOKENS}


def _calibration(params: RunParams, device: torch.device) -> list[tuple[torch.Tensor]]:
    images = splits()["train"].images[:CALIBRATION].to(device)
    return [(batch,) for batch in images.split(CALIBRATION_BATCH)]


def _certification(forward: Callable[..., torch.Tensor]) -> tuple[Ids, Scores]:
    return _top1(forward, splits()["certification"])


def _selection(forward: Callable[..., torch.Tensor]) -> tuple[Ids, Scores]:
    return _top1(forward, splits()["selection"])


def _top1(forward: Callable[..., torch.Tensor], split: Split) -> tuple[Ids, Scores]:
    """Return the row numbers of the samples, and scores of 1 where the largest logit is the
    label's, else 0; both (n,)."""
    logits = forward(split.images).detach().to("cpu", torch.float32)
    # argmax returns the first NaN, so an all-NaN row would count as the digit 0.
    right = (logits.argmax(1) == split.labels) & logits.isfinite().all(1)
    return split.ids, right.numpy().astype(np.float64)
