"""Measure how much accuracy INT8 attention costs on trained models of handwritten digits.

    python benchmarks/attention_accuracy.py [--steps N]

Two models classify the same images: the workload ``digits`` (16 tokens), and a model with one token
per pixel of the images at twice their size (256 tokens, 2 transformer blocks), which this script
trains with the recipe in ``train_digits.py``. Each runs eagerly on the CPU, on the 797 images for
certification. INT8 attention runs in plain torch there; it differs from the kernels only in the
order of sums. dB is the SQNR of the logits against BF16.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.environment import describe, fingerprint
from pytest_int8bench.quantization.api import apply_int8_quant
from pytest_int8bench.workloads.digits import (
    DIM,
    WEIGHTS,
    VisionTransformer,
    read_weights,
    splits,
)
from train_digits import Recipe, train

ZOOM, DEPTH, PIXELS = 2, 2, (2 * 8) ** 2
MODES = (None, "w8a8", "w8")


class Pixels(VisionTransformer):
    """A digits model with one token per pixel of the enlarged image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed[-1].stride = (1, 1)
        self.pos_embed = nn.Parameter(torch.zeros(1, PIXELS, DIM))
        self.blocks = self.blocks[:DEPTH]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(F.interpolate(images, scale_factor=ZOOM, mode="bilinear"))


def logits(model: nn.Module, mode: str | None, int8_attention: bool) -> torch.Tensor:
    """Return the FP32 logits for the images for certification."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    if mode is not None:
        apply_int8_quant(model, mode=mode)
    compiled = compile_for_a100(model, mode="off", int8_attention=int8_attention)
    images = splits()["certification"].images.to(torch.bfloat16)
    return torch.cat([compiled(batch).float() for batch in images.split(64)])


def rows(name: str, model: nn.Module) -> list[str]:
    """Return the table rows of a model."""
    labels = splits()["certification"].labels
    baseline = logits(model, None, False)
    baseline_correct = baseline.argmax(1) == labels
    lines = []
    for mode in MODES:
        for int8_attention in (False, True):
            candidate = logits(model, mode, int8_attention)
            correct = candidate.argmax(1) == labels
            worse = (baseline_correct & ~correct).sum()
            better = (~baseline_correct & correct).sum()
            noise = (candidate - baseline).norm() / baseline.norm()
            sqnr = f"{-20 * math.log10(noise):.1f}" if noise else "–"
            lines.append(
                f"| {name} | {(mode or 'bf16').upper()} | {'INT8' if int8_attention else 'BF16'} | "
                f"{correct.sum()}/{len(labels)} | {worse}/{better} | {sqnr} |"
            )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shipped = VisionTransformer().eval()
    shipped.load_state_dict(read_weights(WEIGHTS))
    start = time.process_time()
    pixels = train(replace(Recipe(), steps=args.steps, batch=32), Pixels())
    print(describe(fingerprint(Path.cwd())))
    print(f"trained in {time.process_time() - start:.0f} s of CPU time")
    print("| model | layers | attention | top-1 | worse/better | dB |\n|---|---|---|---|---|---|")
    with torch.inference_mode():
        print("\n".join([*rows("digits", shipped), *rows("pixels", pixels)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
