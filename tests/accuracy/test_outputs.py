"""Comparing outputs without labels."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pytest_int8bench.accuracy.outputs import Distance, OutputsError, distance, problem

SAMPLES = 64
LOGITS = torch.randn(SAMPLES, 10, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(SAMPLES, 10, generator=torch.Generator().manual_seed(1))


def test_equal_outputs_have_zero_distance() -> None:
    found = distance({"a": LOGITS}, {"a": LOGITS.clone()})
    assert found == Distance(SAMPLES, True, pytest.approx(1), math.inf, 1.0, 1.0)
    assert found.to_dict()["sqnr_db"] is None
    assert problem(found, found) is None


@pytest.mark.parametrize("part", [0.01, 0.1, 0.3])
def test_sqnr_is_signal_power_over_error_power(part: float) -> None:
    found = distance(LOGITS, LOGITS + part * NOISE)
    power = LOGITS.square().sum() / (part * NOISE).square().sum()
    assert found.sqnr_db == pytest.approx(10 * math.log10(power), abs=1e-3)
    assert found.sqnr_db == pytest.approx(-20 * math.log10(part), abs=0.7)
    assert found.cosine == pytest.approx(1 / math.sqrt(1 + part**2), abs=0.01)


def test_agreement_counts_samples() -> None:
    other = LOGITS.clone()
    other[:16] = -other[:16]
    found = distance(LOGITS, other)
    assert found.top1_agreement == 0.75
    assert found.knn_agreement is not None
    assert 0 < found.knn_agreement < 1


def test_agreement_is_none_for_sequence_outputs() -> None:
    tokens = torch.randn(4, 7, 3)
    found = distance(tokens, tokens + 0.01)
    assert (found.top1_agreement, found.knn_agreement) == (None, None)


def test_rejects_outputs_without_anything_to_compare() -> None:
    classes = LOGITS.argmax(1)
    with pytest.raises(OutputsError, match=r"^cannot compare outputs: the model returns no"):
        distance(classes, classes)
    with pytest.raises(OutputsError, match=r"^cannot compare outputs: every output of the"):
        distance(LOGITS * math.nan, LOGITS)


def far(**changes: object) -> Distance:
    return dataclasses.replace(Distance(SAMPLES, True, 0.99, 30.0, 0.99, 0.9), **changes)


NEAR = far()


def test_problems_name_figure_and_limit() -> None:
    assert problem(NEAR, NEAR) is None
    assert problem(far(sqnr_db=9.94), NEAR) == "SQNR must be at least 10 dB, got 9.9 dB"
    assert problem(far(top1_agreement=0.75), NEAR) == (
        "top-1 agreement must be at least 90%, got 75.0% of 64 samples"
    )
    nothing = distance(LOGITS, LOGITS * math.nan)
    assert problem(nothing, NEAR) == (
        "the outputs hold NaN or infinity where the baseline's are finite"
    )


def test_limits_the_baseline_itself_misses_do_not_apply() -> None:
    floor = far(sqnr_db=5.0, top1_agreement=0.5)
    assert problem(far(sqnr_db=4.0, top1_agreement=0.4), floor) is None


def test_few_samples_do_not_prove_disagreement() -> None:
    assert problem(far(samples=4, top1_agreement=0.75), NEAR) is None
    assert problem(far(samples=400, top1_agreement=0.88), NEAR) is None
    assert problem(far(samples=400, top1_agreement=0.86), NEAR) is not None
