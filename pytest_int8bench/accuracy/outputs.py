"""Compare a candidate's outputs with its baseline's when there are no labels.

These figures can fail a model, but only labels can show how much accuracy it lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pytest_int8bench.errors import ClearError
from pytest_int8bench.tensors import tensors_of

#: At 10 dB, the noise has a tenth of the signal's power.
MIN_SQNR_DB = 10.0
#: Minimum share of samples whose top-1 class must not change.
MIN_AGREEMENT = 0.9
NEIGHBORS = 5
#: In smaller batches, nearest neighbors say too little about the embedding.
MIN_NEIGHBOR_SAMPLES = 4 * NEIGHBORS
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Distance:
    """Distance between the outputs of two models for one batch."""

    samples: int
    finite: bool
    """Whether the outputs are finite wherever the reference is."""
    cosine: float
    """Cosine similarity, averaged over samples."""
    sqnr_db: float
    """Power of the reference over power of the difference, in dB; infinite for equal outputs."""
    top1_agreement: float | None
    """Share of samples with the same top-1 class; None unless outputs are (samples x classes)."""
    knn_agreement: float | None
    """Share of each sample's nearest neighbors in the batch that are the same in both outputs;
    None for fewer than 20 samples."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible values; an infinite SQNR becomes None."""
        values = asdict(self)
        values["sqnr_db"] = self.sqnr_db if math.isfinite(self.sqnr_db) else None
        return values


class OutputsError(ClearError, ValueError):
    """Raised for outputs that cannot be compared."""


def distance(reference: Any, output: Any) -> Distance:
    """Compare the outputs of two models for the same batch.

    Args:
        reference: tensors, possibly nested, with samples in the first dimension.
        output: tensors of the same structure and shapes.

    Raises:
        OutputsError: if ``reference`` has no floating-point tensor with samples, or no finite
            value.
    """
    ours, theirs = _rows(reference), _rows(output)
    if ours.numel() == 0:
        raise OutputsError(
            "cannot compare outputs: the model returns no floating-point tensor with samples in "
            "its first dimension; give the workload an evaluation"
        )
    if not torch.isfinite(ours).any():
        raise OutputsError(
            "cannot compare outputs: every output of the baseline is NaN or infinite"
        )
    # Exclude values that are not finite in both outputs: inf - inf is NaN.
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
    neighbors = None
    if len(a) >= MIN_NEIGHBOR_SAMPLES:
        shared = [
            len(set(near) & set(far))
            for near, far in zip(_neighbors(a), _neighbors(b), strict=True)
        ]
        neighbors = sum(shared) / (NEIGHBORS * len(shared))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=1).mean())
    return Distance(len(a), finite, cosine, sqnr, top1, neighbors)


def sqnr_db(signal: float, noise: float) -> float:
    """Return signal power over noise power in dB, infinite without noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def problem(candidate: Distance, floor: Distance) -> str | None:
    """Return why the candidate fails, or None if it does not.

    A minimum applies only if the eager baseline itself meets it when compared with the compiled
    baseline.

    Args:
        candidate: the candidate's distance from the compiled baseline.
        floor: the eager baseline's distance from the compiled baseline (the noise floor).
    """
    if not candidate.finite:
        return "the outputs hold NaN or infinity where the baseline's are finite"
    if candidate.sqnr_db < MIN_SQNR_DB <= floor.sqnr_db:
        return f"SQNR must be at least {MIN_SQNR_DB:g} dB, got {candidate.sqnr_db:.1f} dB"
    agreement = candidate.top1_agreement
    if agreement is not None and (floor.top1_agreement or 0) >= MIN_AGREEMENT:
        from scipy.stats import binomtest

        same = round(agreement * candidate.samples)
        # Require significance: one changed sample of four proves nothing.
        test = binomtest(same, candidate.samples, MIN_AGREEMENT, alternative="less")
        if test.pvalue < 1 - _CONFIDENCE:
            return (
                f"top-1 agreement must be at least {MIN_AGREEMENT:.0%}, got {agreement:.1%} of "
                f"{candidate.samples} samples"
            )
    return None


def nan_remark(reference: Any) -> str | None:
    """Return a remark on NaN in the baseline's outputs, or None if there is none."""
    values = _rows(reference)
    count = int(values.isnan().sum())
    if not count:
        return None
    return (
        f"the baseline's own outputs hold NaN ({count} of {values.numel()} values, excluded "
        "from the comparison)"
    )


def _floating(output: Any) -> Iterator[torch.Tensor]:
    yield from (t for t in tensors_of(output) if t.is_floating_point() and t.dim() > 0)


def _rows(output: Any) -> torch.Tensor:
    """Flatten all floating-point outputs to one FP64 row per sample."""
    tensors = list(_floating(output))
    samples = len(tensors[0]) if tensors else 0
    rows = [t.double().reshape(samples, -1) for t in tensors if samples and len(t) == samples]
    return torch.cat(rows, dim=1) if rows else torch.zeros(0, 0, dtype=torch.double)


def _neighbors(rows: torch.Tensor) -> list[list[int]]:
    distances = torch.cdist(rows, rows).fill_diagonal_(math.inf)
    nearest: list[list[int]] = distances.topk(NEIGHBORS, largest=False).indices.tolist()
    return nearest
