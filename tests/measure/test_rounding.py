"""Test which differences rounding explains, and the noise that simulates rounding."""

from __future__ import annotations

import math

import pytest
import torch

from pytest_int8bench.measure.baseline_check import AGAIN, LIMIT, NOISY
from pytest_int8bench.measure.rounding import RoundingNoise, excess, outputs_of, where_finite

SHAPE = (4, 16, 32)


def draw(generator: torch.Generator, flips: float = 0.0) -> torch.Tensor:
    """Return zeros as one implementation computes them, with occasional ones."""
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.double) / 256
    return noise + (torch.rand(SHAPE, generator=generator) < flips / noise.numel())


@pytest.mark.parametrize("flips", [0.0, 0.02, 0.1, 1.0, 30.0])
def test_rounding_rarely_counts_as_an_error(flips: float) -> None:
    generator = torch.Generator().manual_seed(0)
    zeros, families = [torch.zeros(SHAPE, dtype=torch.double)], 100
    found = sum(
        excess(zeros, [[draw(generator, flips)] for _ in range(NOISY)], [draw(generator, flips)])
        > LIMIT
        for _ in range(families)
    )
    # In the worst case the only flip is in the judged code; that must happen 1 + AGAIN times.
    assert found / families <= 0.12
    assert 0.12 ** (1 + AGAIN) < 0.002
    assert found == 0 or flips


@pytest.mark.parametrize(
    "part", [(1,), (..., 5), (slice(None), 3), (3, 15, 31)], ids=["row", "channel", "token", "one"]
)
def test_detects_error_in_part_of_an_output(part: tuple[object, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(SHAPE, generator=generator, dtype=torch.double)
    exact[..., 7] *= 1000  # whose rounding exceeds everything else
    exact[3, 15, 31] = 3.0
    rounded = [[exact * (1 + draw(generator))] for _ in range(NOISY)]
    wrong = exact * (1 + draw(generator))
    wrong[part] *= -1
    assert excess([exact], rounded, [wrong]) > LIMIT


def test_compares_non_finite_values() -> None:
    exact = torch.tensor([[1.0, math.inf], [math.nan, 2.0]], dtype=torch.double)
    [masked] = where_finite([exact], [torch.tensor([[math.nan, 0.0], [0.0, 2.0]])])
    assert masked.isnan().tolist() == [[True, False], [True, False]]
    assert excess([exact], [[exact]], [exact.nan_to_num(nan=5.0)]) == 0
    assert excess([exact], [[exact]], [exact.masked_fill(exact == 2, math.nan)]) > LIMIT


def test_compares_integers_exactly() -> None:
    classes = [torch.tensor([3, 4])]
    assert excess(classes, [classes], classes) == 0
    assert excess(classes, [classes], [torch.tensor([3, 5])]) == math.inf


def test_compares_complex_outputs() -> None:
    [parts] = outputs_of(torch.tensor([1 + 2j]))
    assert parts.tolist() == [[1.0, 2.0]]


def test_noise_has_the_size_of_rounding() -> None:
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with RoundingNoise(0):
        moved, whole, view = x * 1.0, x.round(), x[:3]
    off = (moved.double() - x.double()).abs() / x.double()
    assert 2**-10 < off.mean() < 2**-8
    assert off.max() <= 2**-6
    assert x.min() <= moved.min() <= moved.max() <= x.max()  # as an index, it would stay in range
    assert torch.equal(whole, x.round())
    assert torch.equal(view, x[:3])


def test_noise_changes_sums_that_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (64, 16))
    plain = torch.nn.functional.linear(x, weight).double()
    with RoundingNoise(0):
        moved = torch.nn.functional.linear(x, weight).double()
    small = plain.abs() < plain.abs().quantile(0.02)
    assert ((moved - plain).abs() > plain.abs() / 16)[small].any()
