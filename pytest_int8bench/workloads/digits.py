"""A small Vision Transformer trained on handwritten digits: real data, and an accuracy to lose.

Data: ``sklearn.datasets.load_digits``, the 1797 images (8x8, 17 levels of grey) of scikit-learn's
copy of the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository, 1998). They come with scikit-learn: nothing is downloaded.

Splits: 800 images to train on (inputs and calibration come from them too), 200 to select on, and
797 to certify on; seeded, stratified by class. All three share writers.

Recipe: :class:`Recipe`, 163,754 parameters in 16 tokens of 64; AdamW, 500 steps of 64 images with
small affine changes, on one CPU thread in FP32. Values were chosen by cross-validation on the
images of the first two splits.

Measured (torch 2.13.0, torchao 0.18, AMD EPYC, eager, batch 64): 20 s of CPU time to train; top-1
on the certification split 793/797 in FP32, 792/797 (99.4 %) in BF16, 792/797 in W8A8 and 793/797
in W8; on the selection split 200/200 in each.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads import Evaluation, Workload

IMAGE_SIZE = 8
PATCH = 2
TOKENS = (IMAGE_SIZE // PATCH) ** 2
CLASSES = 10
#: Samples of each split.
TRAIN, SELECTION, CERTIFICATION = 800, 200, 797
#: Training images that SmoothQuant is calibrated on, and how many at once.
CALIBRATION, CALIBRATION_BATCH = 256, 64
#: Top-1 on the selection split under which training must have gone wrong.
LEAST_TOP1 = 0.95
_SPLIT_SEED = 0
# To be raised when a change of this file changes the weights, so that cached ones are not used.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The model and how it is trained. The cache tells weights apart by these values."""

    stem: int = 32
    """Channels between the three convolutions of the patch embedding."""
    dim: int = 64
    """Width of a token."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads of a block."""
    hidden: int = 128
    """Width of the MLP."""
    steps: int = 500
    """Steps of AdamW."""
    batch: int = 64
    """Images of a step."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule."""
    warm_up: int = 40
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.1
    label_smoothing: float = 0.05
    turn: float = 10.0
    """Images are turned and slanted by up to this many degrees,"""
    zoom: float = 0.1
    """scaled by up to this share,"""
    shift: float = 0.5
    """and moved by up to this many pixels each way."""
    seed: int = 0
    """Of initial weights, and of order and augmentation of the images."""


RECIPE = Recipe()


class Attention(nn.Module):
    """Self-attention, (batch, tokens, dim) to the same."""

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
    """Two layers and GELU, (..., dim) to the same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block, (batch, tokens, dim) to the same."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(recipe.dim)
        self.attn = Attention(recipe.dim, recipe.heads)
        self.norm2 = nn.LayerNorm(recipe.dim)
        self.mlp = Mlp(recipe.dim, recipe.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Images (batch, 1, 8, 8) to logits (batch, 10), with the mean over tokens before the head."""

    def __init__(self, recipe: Recipe = RECIPE) -> None:
        super().__init__()
        # Convolutions: 800 images are too few to learn from patches alone what is near to what.
        self.patch_embed = nn.Sequential(
            nn.Conv2d(1, recipe.stem, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(recipe.stem, recipe.stem, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(recipe.stem, recipe.dim, 3, stride=PATCH, padding=1),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, recipe.dim))
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(recipe.dim)
        self.head = nn.Linear(recipe.dim, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x).mean(1))
        return logits


@contextmanager
def _own_modes() -> Iterator[None]:
    """Keep the modes of the caller out: ``build`` may be called in any."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        yield


Ids: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Scores: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Split:
    """Part of the data, on the CPU."""

    ids: Ids
    """Rows of ``sklearn.datasets.load_digits``, ascending; (n,)."""
    images: torch.Tensor
    """(n, 1, 8, 8), FP32, from -1 (paper) to 1 (ink) in steps of 1/8, which BF16 holds exactly."""
    labels: torch.Tensor
    """(n,), int64."""


@functools.cache
def splits() -> dict[str, Split]:
    """Return the splits ``train``, ``selection`` and ``certification``: disjoint, with the classes
    in the proportions of the whole."""
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


def digits() -> Workload:
    """Return the workload ``digits``.

    Its model is trained on the first build on this machine, on the CPU, and read from
    :func:`cache_folder` after that. Images of the training split are measured, again from the
    first one where a batch is larger than the split.
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
        model = _empty(RECIPE)
        weights = trained_weights()
        model.load_state_dict({k: v.clone() for k, v in weights.items()}, assign=True)
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
    """Return the rows in the data, and 1 where the largest logit is the label's; (n,) both."""
    logits = forward(split.images).detach().to("cpu", torch.float32)
    # The largest of NaN is the first of them, and would make every image a 0.
    right = (logits.argmax(1) == split.labels) & logits.isfinite().all(1)
    return split.ids, right.numpy().astype(np.float64)


def _empty(recipe: Recipe) -> VisionTransformer:
    """Return the model without memory for its weights, so that no generator is drawn from."""
    with torch.device("meta"):
        return VisionTransformer(recipe).to(torch.float32)


def _initialize(model: VisionTransformer, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "pos_embed":
                # As large as the patches' embeddings: smaller ones are learned late.
                nn.init.trunc_normal_(parameter, std=0.5, generator=generator)
            elif parameter.dim() > 1:  # inputs of unit variance give outputs of unit variance
                std = parameter[0].numel() ** -0.5
                nn.init.trunc_normal_(
                    parameter, std=std, a=-2 * std, b=2 * std, generator=generator
                )
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.zero_()


def _augment(
    images: torch.Tensor, generator: torch.Generator, recipe: Recipe = RECIPE
) -> torch.Tensor:
    """Turn, slant, scale and move each image a little, with paper coming in."""
    random = torch.rand(5, len(images), generator=generator, dtype=torch.float32) * 2 - 1
    turn, slant = random[:2] * math.radians(recipe.turn)
    scale = 1 + random[2] * recipe.zoom
    right, down = random[3:] * recipe.shift * 2 / IMAGE_SIZE  # the image is from -1 to 1
    rows = (
        torch.stack([turn.cos() * scale, -(turn + slant).sin() * scale, right], 1),
        torch.stack([turn.sin() * scale, (turn + slant).cos() * scale, down], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # What comes in is 0: paper, once that is 0.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def _train(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Train on the training split and return the state dict: FP32, on the CPU.

    All that is random comes from a generator of its own, seeded by the recipe. Two trainings on
    one machine give the same weights.
    """
    with _own_modes(), _one_thread():
        generator = torch.Generator("cpu").manual_seed(recipe.seed)
        model = _empty(recipe).to_empty(device="cpu").train()
        _initialize(model, generator)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        train = splits()["train"]
        order = torch.empty(0, dtype=torch.int64)
        for step in range(recipe.steps):
            if len(order) < recipe.batch:
                order = torch.randperm(len(train.ids), generator=generator)
            chosen, order = order[: recipe.batch], order[recipe.batch :]
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, recipe)
            logits = model(_augment(train.images[chosen], generator, recipe))
            loss = F.cross_entropy(
                logits, train.labels[chosen], label_smoothing=recipe.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {name: value.detach() for name, value in model.state_dict().items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: the sums do not depend on the number of cores, and products this
    small do not wait for threads that a busy machine (pytest-xdist) does not run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _schedule(step: int, recipe: Recipe) -> float:
    """Return the share of the peak learning rate: up linearly, then down half a cosine."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(recipe.steps - recipe.warm_up, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def cache_folder() -> Path:
    """Return where trained weights are kept: ``$XDG_CACHE_HOME/pytest-int8bench``, or
    ``~/.cache/pytest-int8bench`` where that is not set to an absolute path.

    Raises:
        RuntimeError: if there is no home folder.
    """
    set_to = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (set_to if set_to.is_absolute() else Path.home() / ".cache") / "pytest-int8bench"


def cache_name(recipe: Recipe = RECIPE) -> str:
    """Return the name of the file for ``recipe`` on this torch and these data."""
    release = ".".join(torch.__version__.split(".")[:2])
    digest = hashlib.sha256(repr((_VERSION, recipe, release)).encode())
    for name, split in splits().items():
        digest.update(name.encode())
        for array in (split.ids, split.images.numpy(), split.labels.numpy()):
            digest.update(array.astype("<f8").tobytes())
    return f"digits-{digest.hexdigest()[:16]}.pt"


@functools.cache
def trained_weights(recipe: Recipe = RECIPE) -> dict[str, torch.Tensor]:
    """Return the state dict that ``recipe`` gives: from the cache, or trained and cached.

    A file that cannot be used is trained anew and replaced. Where none can be written, the weights
    last as long as the process, and a warning says so.

    Returns:
        FP32 tensors on the CPU, the same ones at each call: to be copied, not changed.

    Raises:
        WorkloadError: if training went wrong, by the selection split.
    """
    with _own_modes():
        weights = _read(recipe)
        if weights is not None:
            return weights
        weights = _train(recipe)
        _check(weights, recipe)
        try:
            _write(cache_folder() / cache_name(recipe), weights)
        except (OSError, RuntimeError) as error:
            warnings.warn(
                f"the weights of workload 'digits' cannot be kept, each process trains them: "
                f"{error}; set XDG_CACHE_HOME to a folder that can be written",
                stacklevel=2,
            )
        return weights


def _check(weights: dict[str, torch.Tensor], recipe: Recipe) -> None:
    model = _empty(recipe).eval()
    model.load_state_dict(weights, assign=True)
    with torch.no_grad():
        top1 = _selection(model)[1].mean()
    if top1 < LEAST_TOP1:
        raise WorkloadError(
            f"workload 'digits': training reached {top1:.1%} top-1 on the selection split, must be "
            f"{LEAST_TOP1:.0%} at least"
        )


def _read(recipe: Recipe) -> dict[str, torch.Tensor] | None:
    """Return the weights in the cache, or None if they are not there or not whole."""
    try:
        path = cache_folder() / cache_name(recipe)
        found = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: found[name] for name in _empty(recipe).state_dict()}
        fit = all(
            (value.shape, value.dtype) == (weights[name].shape, weights[name].dtype)
            and bool(weights[name].isfinite().all())
            for name, value in _empty(recipe).state_dict().items()
        )
    except Exception:  # whatever a file of another kind makes the reader raise
        return None
    return weights if fit else None


def _write(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Put the file in place at once: a process that reads it, or Ctrl-C, never sees half of it."""
    content = io.BytesIO()
    torch.save(weights, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(content.getvalue())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
