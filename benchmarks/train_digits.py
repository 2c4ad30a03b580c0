"""Train the weights of workload ``digits``, which the package ships.

    python benchmarks/train_digits.py [--output FILE] [--steps N]

AdamW, 500 steps of 64 images with small affine changes, in FP32 on one CPU thread: 25 s of CPU time
(AMD EPYC, torch 2.13.0). The recipe was chosen by cross-validation on the images of the training
and selection splits. All random numbers come from one seeded generator, so training again with the
same torch on the same machine gives the same weights; another CPU or torch gives slightly others.

The file's header holds the recipe, the versions, the digest of the splits, and how many images of
each held-out split are right in FP32. Those counts are printed, too.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sklearn
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from pytest_int8bench.workloads.digits import (
    IMAGE_SIZE,
    WEIGHTS,
    VisionTransformer,
    digits,
    splits,
    splits_digest,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the model is trained."""

    version: int = 1
    """Raise it when a change to this script changes the weights."""
    steps: int = 500
    """Steps of AdamW."""
    batch: int = 64
    """Images of a step."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule."""
    warm_up: int = 40
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Of matrices and convolutions; not of biases and norms."""
    label_smoothing: float = 0.05
    """Share of each label that is spread over all classes."""
    turn: float = 10.0
    """Largest rotation and slant of an image, in degrees."""
    zoom: float = 0.1
    """Largest change of scale."""
    shift: float = 0.5
    """Largest shift in each direction, in pixels."""
    seed: int = 0
    """Seed of the initial weights, and of the order and augmentation of the images."""


def train(recipe: Recipe, model: VisionTransformer | None = None) -> VisionTransformer:
    """Return a model trained on the training split, in evaluation mode; that of the workload unless
    ``model`` is another one to train."""
    generator = torch.Generator().manual_seed(recipe.seed)
    model = VisionTransformer() if model is None else model
    initialize(model, generator)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    data = splits()["train"]
    order = torch.empty(0, dtype=torch.int64)
    for step in range(recipe.steps):
        if len(order) < recipe.batch:
            order = torch.randperm(len(data.ids), generator=generator)
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, recipe)
        logits = model(augment(data.images[chosen], generator, recipe))
        loss = F.cross_entropy(logits, data.labels[chosen], label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def initialize(model: VisionTransformer, generator: torch.Generator) -> None:
    """Set every parameter, drawing from ``generator``."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "pos_embed":
                # As large as the patches' embeddings, because smaller ones are learned late.
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


def augment(images: torch.Tensor, generator: torch.Generator, recipe: Recipe) -> torch.Tensor:
    """Rotate, slant, scale and shift each image at random, filling with paper."""
    random = torch.rand(5, len(images), generator=generator) * 2 - 1
    turn, slant = random[:2] * math.radians(recipe.turn)
    scale = 1 + random[2] * recipe.zoom
    right, down = random[3:] * recipe.shift * 2 / IMAGE_SIZE  # the image spans -1 to 1
    rows = (
        torch.stack([turn.cos() * scale, -(turn + slant).sin() * scale, right], 1),
        torch.stack([turn.sin() * scale, (turn + slant).cos() * scale, down], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # grid_sample fills with 0, so paper is 0 meanwhile.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def schedule(step: int, recipe: Recipe) -> float:
    """Return the share of the peak learning rate: up linearly, then down half a cosine."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(recipe.steps - recipe.warm_up, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def right_images(model: VisionTransformer) -> dict[str, str]:
    """Return how many images of each held-out split ``model`` gets right, such as 200/200."""
    evaluation = digits().evaluation
    with torch.inference_mode():
        found = {
            "selection": evaluation.selection(model)[1],
            "certification": evaluation.scores(model)[1],
        }
    return {name: f"{scores.sum():.0f}/{len(scores)}" for name, scores in found.items()}


def header(recipe: Recipe, right: Mapping[str, str]) -> dict[str, str]:
    """Return what the file says about its weights."""
    return {
        **{f"recipe.{name}": str(value) for name, value in asdict(recipe).items()},
        **{f"right.{name}": count for name, count in right.items()},
        "scikit-learn": sklearn.__version__,
        "splits_sha256": splits_digest(),
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    """Train, write the file and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="the package's file if left")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of AdamW, 500 if left")
    args = parser.parse_args(argv)
    # The order of sums depends on the number of threads.
    torch.set_num_threads(1)
    recipe = replace(Recipe(), steps=args.steps)
    model = train(recipe)
    right = right_images(model)
    save_file(model.state_dict(), args.output, header(recipe, right))
    for name, count in right.items():
        print(f"{name}: {count} right")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
