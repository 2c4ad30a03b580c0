"""Train the weights of the workload ``digits``, which the package ships.

    python benchmarks/train_digits.py [--output FILE] [--steps N]

Training takes 500 AdamW steps of 64 images with small affine changes, in FP32 on one CPU thread:
25 s of CPU time (AMD EPYC, torch 2.13.0). The recipe was chosen by cross-validation on the training
and selection splits. All random numbers come from one seeded generator, so the same torch on the
same machine trains the same weights; another CPU or version of torch trains slightly different
ones.

The header of the file contains the recipe, the versions, the digest of the splits, and how many
images of each held-out split the model classifies correctly in FP32. The script also prints these
counts.
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
    """Hyperparameters of the training."""

    version: int = 1
    """Increment it if a change to this script changes the weights."""
    steps: int = 500
    """Steps of AdamW."""
    batch: int = 64
    """Images per step."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule."""
    warm_up: int = 40
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Weight decay of matrices and convolutions; biases and norms have none."""
    label_smoothing: float = 0.05
    """Share of each label's probability that is spread over all classes."""
    turn: float = 10.0
    """Largest rotation and shear of an image, in degrees."""
    zoom: float = 0.1
    """Largest relative change of scale."""
    shift: float = 0.5
    """Largest shift in each direction, in pixels."""
    seed: int = 0
    """Seed for the initial weights and for the order and augmentation of the images."""


def train(recipe: Recipe, model: VisionTransformer | None = None) -> VisionTransformer:
    """Train a model on the training split and return it in evaluation mode.

    Args:
        recipe: the hyperparameters.
        model: trained instead of the workload's model.
    """
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
    """Initialize every parameter with random numbers from ``generator``."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "pos_embed":
                # As large as the patch embeddings: smaller position embeddings train slowly.
                nn.init.trunc_normal_(parameter, std=0.5, generator=generator)
            elif parameter.dim() > 1:  # keeps unit variance from input to output
                std = parameter[0].numel() ** -0.5
                nn.init.trunc_normal_(
                    parameter, std=std, a=-2 * std, b=2 * std, generator=generator
                )
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.zero_()


def augment(images: torch.Tensor, generator: torch.Generator, recipe: Recipe) -> torch.Tensor:
    """Rotate, shear, scale and shift each image at random, filling with the background."""
    random = torch.rand(5, len(images), generator=generator) * 2 - 1
    turn, slant = random[:2] * math.radians(recipe.turn)
    scale = 1 + random[2] * recipe.zoom
    right, down = random[3:] * recipe.shift * 2 / IMAGE_SIZE  # the image spans -1 to 1
    rows = (
        torch.stack([turn.cos() * scale, -(turn + slant).sin() * scale, right], 1),
        torch.stack([turn.sin() * scale, (turn + slant).cos() * scale, down], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # grid_sample fills with 0, so shift the background from -1 to 0 and back.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def schedule(step: int, recipe: Recipe) -> float:
    """Return the fraction of the peak learning rate: a linear warm-up, then a half cosine."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(recipe.steps - recipe.warm_up, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def right_images(model: VisionTransformer) -> dict[str, str]:
    """Return how many images of each held-out split ``model`` classifies correctly, as "R/N"."""
    evaluation = digits().evaluation
    with torch.inference_mode():
        found = {
            "selection": evaluation.selection(model)[1],
            "certification": evaluation.scores(model)[1],
        }
    return {name: f"{scores.sum():.0f}/{len(scores)}" for name, scores in found.items()}


def header(recipe: Recipe, right: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of the weights file."""
    return {
        **{f"recipe.{name}": str(value) for name, value in asdict(recipe).items()},
        **{f"right.{name}": count for name, count in right.items()},
        "scikit-learn": sklearn.__version__,
        "splits_sha256": splits_digest(),
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=WEIGHTS, help="weights file (default: the package's file)"
    )
    parser.add_argument(
        "--steps", type=int, default=Recipe.steps, help="AdamW steps (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    # The order of sums depends on the number of threads.
    torch.set_num_threads(1)
    recipe = replace(Recipe(), steps=args.steps)
    model = train(recipe)
    right = right_images(model)
    save_file(model.state_dict(), args.output, header(recipe, right))
    for name, count in right.items():
        print(f"{name}: {count} correct")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
