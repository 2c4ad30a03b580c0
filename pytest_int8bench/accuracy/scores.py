"""Validate the scores that evaluations return, and judge a candidate's against its baseline's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.statistics.checks import ScoreError, check_share, check_size, numbers
from pytest_int8bench.accuracy.statistics.groups import Codes, group_codes
from pytest_int8bench.accuracy.statistics.verdict import ALPHA, Verdict, judge, samples_to_pass
from pytest_int8bench.workloads.workload import Evaluation


@dataclass(frozen=True)
class Scores:
    """One score per sample, or one row per image if the evaluation has an ``aggregate``."""

    ids: np.ndarray[Any, Any] | None
    values: np.ndarray[Any, Any]


def read_scores(given: Any, metric: str, owner: str) -> Scores:
    """Validate the return value of ``Evaluation.scores``.

    Args:
        given: one score per sample, or ``(ids, scores)``.
        metric: the metric's name, for errors.
        owner: the model that was scored, ``baseline`` or ``candidate``, for errors.

    Raises:
        ScoreError: for anything else.
    """
    ids = None
    if isinstance(given, tuple):
        if len(given) != 2:
            raise ScoreError(
                f"{metric}: scores must return one score per sample or (ids, scores), got a tuple "
                f"of {len(given)}"
            )
        ids, given = _ids(given[0], metric), given[1]
    if isinstance(given, str | bytes):
        raise ScoreError(f"{metric}: scores must be numbers, got {type(given).__name__}")
    found = numbers(_array(given), metric, owner)
    if found.ndim == 0:
        raise ScoreError(f"{metric}: scores must be one per sample, got the number {found:g}")
    values = np.array(found, dtype=np.float64)  # a copy: the evaluation may reuse its buffer
    if ids is not None and len(ids) != len(values):
        raise ScoreError(
            f"{metric}: scores must return one id per score, got {len(ids)} ids for "
            f"{len(values)} scores"
        )
    return Scores(ids, values)


def _ids(given: Any, metric: str) -> np.ndarray[Any, Any]:
    ids = np.array(_array(given))
    if ids.ndim != 1:
        raise ScoreError(f"{metric}: ids must be a list of names or numbers, got {given!r:.40}")
    return ids


def _array(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()
    return value


def _check_ids(metric: str, reference: Any, candidate: Any) -> None:
    if (reference is None) != (candidate is None):
        raise ScoreError(f"{metric}: scores must return ids for both models or for neither")
    if reference is None or len(reference) != len(candidate):
        return  # the caller reports different lengths
    if len(set(reference.tolist())) != len(reference):
        raise ScoreError(f"{metric}: scores must return unique ids, got duplicates")
    differing = np.flatnonzero(reference != candidate)
    if len(differing):
        at = differing[0]
        raise ScoreError(
            f"{metric}: samples must come in the same order for both models: sample {at} is "
            f"{reference[at]} for the baseline and {candidate[at]} for the candidate"
        )


def judge_scores(
    evaluation: Evaluation,
    reference: Scores,
    candidate: Scores,
    limit: Limit,
    *,
    alpha: float = ALPHA,
    rows: np.ndarray[Any, Any] | None = None,
) -> Verdict:
    """Judge the scores of one evaluation.

    Args:
        evaluation: the evaluation that computed them.
        reference: the baseline's scores.
        candidate: the candidate's scores of the same samples, in the same order.
        limit: the largest drop that passes.
        alpha: significance level of each one-sided test.
        rows: indices of the samples to judge; all by default.

    Raises:
        ScoreError: if the samples differ or the scores cannot be judged.
    """
    before, after = _paired(evaluation.metric, reference, candidate, rows)
    codes = groups_of(evaluation, len(reference.values))
    if codes is not None and rows is not None:
        codes = codes[rows]
    return judge(
        before,
        after,
        limit,
        alpha=alpha,
        aggregate=evaluation.aggregate,
        worst=evaluation.worst,
        groups=codes,
        metric=evaluation.metric,
    )


def groups_of(evaluation: Evaluation, samples: int) -> Codes | None:
    """Return each sample's group number, or None if the samples are independent.

    Raises:
        ScoreError: if there is not exactly one label per sample, or only one group.
    """
    given = evaluation.groups
    if given is None:
        return None
    return group_codes(given() if callable(given) else given, samples, evaluation.metric)


def too_few_samples(evaluation: Evaluation, reference: Scores, limit: Limit) -> str | None:
    """Return a warning with the number of samples needed, if even an unchanged model cannot pass.

    Return None if it can pass, or if the baseline's scores alone do not tell.
    """
    samples = len(reference.values)
    try:
        codes = groups_of(evaluation, samples)
        needed = samples_to_pass(
            reference.values,
            limit,
            aggregate=evaluation.aggregate,
            worst=evaluation.worst,
            groups=codes,
            metric=evaluation.metric,
        )
    except ScoreError:
        # A constant baseline can have a candidate that varies. Otherwise, judge_scores() raises.
        return None
    if needed is None:
        return None
    given, asked = f"{samples} samples", f"{needed:,}"
    if codes is not None:
        groups = int(codes.max()) + 1
        given += f" in {groups} groups"
        asked += f" in {math.ceil(needed * groups / samples):,} groups"
    return (
        f"{evaluation.metric}: {given} are too few to pass the limit of {limit}, even for an "
        f"unchanged model; about {asked} are needed"
    )


def observed_drop(
    evaluation: Evaluation,
    reference: Scores,
    candidate: Scores,
    limit: Limit,
    *,
    rows: np.ndarray[Any, Any] | None = None,
) -> tuple[float, int]:
    """Return the observed drop, relative if the limit is, and the number of samples.

    Use it to choose between candidates, not for a verdict. It takes the same arguments as
    :func:`judge_scores`.

    Raises:
        ScoreError: if the samples differ, or if the limit is relative and the baseline's metric
            is not above 0.
    """
    before, after = _paired(evaluation.metric, reference, candidate, rows)
    if evaluation.aggregate is None:
        check_size(evaluation.metric, "scores", before, after)
    metric = evaluation.aggregate or np.mean
    base, drop = float(metric(before)), float(metric(before)) - float(metric(after))
    if not math.isfinite(drop):
        raise ScoreError(f"{evaluation.metric}: scores must be finite, got a drop of {drop}")
    if limit.relative:
        check_share(evaluation.metric, limit, base)
    return (drop / base if limit.relative else drop), len(before)


def _paired(
    metric: str, reference: Scores, candidate: Scores, rows: np.ndarray[Any, Any] | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    _check_ids(metric, reference.ids, candidate.ids)
    before, after = reference.values, candidate.values
    if len(before) != len(after):
        raise ScoreError(
            f"{metric}: both models must score the same samples, got {len(before)} scores for the "
            f"baseline and {len(after)} for the candidate"
        )
    return (before, after) if rows is None else (before[rows], after[rows])
