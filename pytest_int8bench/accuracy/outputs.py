"""Compare outputs with the baseline's, where there are no labels.

Such figures can fail a model. They cannot say how much accuracy it lost: that takes labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pytest_int8bench.errors import ClearError
from pytest_int8bench.tensors import tensors_of

#: Noise of a tenth of the signal's power.
MIN_SQNR_DB = 10.0
#: Share of samples whose top-1 class must stay the same.
MIN_AGREEMENT = 0.9
NEIGHBOURS = 5
#: Samples from which nearest neighbours say something.
MIN_NEIGHBOUR_SAMPLES = 4 * NEIGHBOURS
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Distance:
    """Distance of the outputs of one batch from the reference."""

    samples: int
    finite: bool
    """The outputs hold no NaN or infinity where the reference's hold none."""
    cosine: float
    """Mean cosine similarity of a sample's outputs."""
    sqnr_db: float
    """Power of the reference over power of the difference, in dB; infinite for equal outputs."""
    top1_agreement: float | None
    """Share of samples with the same highest output; None where outputs are not (samples x
    classes)."""
    knn_agreement: float | None
    """Share of nearest neighbours within the batch that stay; None for fewer than 20 samples."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; an infinite SQNR is None."""
        values = asdict(self)
        values["sqnr_db"] = self.sqnr_db if math.isfinite(self.sqnr_db) else None
        return values


class OutputsError(ClearError, ValueError):
    """Outputs that cannot be compared."""


def distance(reference: Any, output: Any) -> Distance:
    """Compare the outputs of two models for the same batch.

    Args:
        reference: outputs with tensors, samples in their first dimension.
        output: outputs of the same shapes.

    Raises:
        OutputsError: one line, if there is nothing to compare.
    """
    ours, theirs = _rows(reference), _rows(output)
    if ours.numel() == 0:
        raise OutputsError(
            "without labels, outputs are compared, and the model returns no floating tensor with "
            "samples in its first dimension: give the workload an evaluation"
        )
    if not torch.isfinite(ours).any():
        raise OutputsError("the baseline's outputs are NaN or infinite throughout")
    # inf - inf is NaN, so the figures leave out values that are not finite in both.
    both = torch.isfinite(ours) & torch.isfinite(theirs)
    finite = bool((torch.isfinite(theirs) | ~torch.isfinite(ours)).all())
    a, b = ours.where(both, 0.0), theirs.where(both, 0.0)
    signal, noise = float(a.square().sum()), float((a - b).square().sum())
    sqnr = sqnr_db(signal, noise)
    logits = next(_floating(reference), None)
    top1 = None
    if logits is not None and logits.dim() == 2 and logits.shape[1] > 1:
        finite_logits = next(_floating(output)).nan_to_num(nan=-math.inf)
        same = logits.nan_to_num(nan=-math.inf).argmax(1) == finite_logits.argmax(1)
        top1 = float(same.double().mean())
    neighbours = None
    if len(a) >= MIN_NEIGHBOUR_SAMPLES:
        shared = [
            len(set(near) & set(far))
            for near, far in zip(_neighbours(a), _neighbours(b), strict=True)
        ]
        neighbours = sum(shared) / (NEIGHBOURS * len(shared))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=1).mean())
    return Distance(len(a), finite, cosine, sqnr, top1, neighbours)


def sqnr_db(signal: float, noise: float) -> float:
    """Return the power of a reference over that of the difference from it, in dB; infinite for
    equal outputs."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def problem(candidate: Distance, floor: Distance) -> str | None:
    """Return why the candidate fails, or None.

    A figure fails it only where the baseline itself, compiled against eager, is better than that.

    Args:
        candidate: the candidate's distance from the baseline.
        floor: the eager baseline's distance from the compiled baseline.
    """
    if not candidate.finite:
        return "the outputs hold NaN or infinity where the baseline's are finite"
    if candidate.sqnr_db < MIN_SQNR_DB <= floor.sqnr_db:
        return f"SQNR {candidate.sqnr_db:.1f} dB is under {MIN_SQNR_DB:g} dB"
    agreement = candidate.top1_agreement
    if agreement is not None and (floor.top1_agreement or 0) >= MIN_AGREEMENT:
        from scipy.stats import binomtest

        same = round(agreement * candidate.samples)
        # One sample of four is no evidence.
        test = binomtest(same, candidate.samples, MIN_AGREEMENT, alternative="less")
        if test.pvalue < 1 - _CONFIDENCE:
            return (
                f"top-1 agreement {agreement:.1%} of {candidate.samples} samples is under "
                f"{MIN_AGREEMENT:.0%}"
            )
    return None


def nan_remark(reference: Any) -> str | None:
    """Return what the reader should know where the reference itself holds NaN, or None."""
    values = _rows(reference)
    count = int(values.isnan().sum())
    if not count:
        return None
    return (
        f"the baseline's own outputs hold NaN ({count} of {values.numel()} values, left out of the "
        "comparison)"
    )


def _floating(output: Any) -> Iterator[torch.Tensor]:
    yield from (t for t in tensors_of(output) if t.is_floating_point() and t.dim() > 0)


def _rows(output: Any) -> torch.Tensor:
    """Return all floating outputs as one row per sample, in FP64."""
    tensors = list(_floating(output))
    samples = len(tensors[0]) if tensors else 0
    rows = [t.double().reshape(samples, -1) for t in tensors if samples and len(t) == samples]
    return torch.cat(rows, dim=1) if rows else torch.zeros(0, 0, dtype=torch.double)


def _neighbours(rows: torch.Tensor) -> list[list[int]]:
    distances = torch.cdist(rows, rows).fill_diagonal_(math.inf)
    nearest: list[list[int]] = distances.topk(NEIGHBOURS, largest=False).indices.tolist()
    return nearest
