"""Test judging candidates against baselines: what is scored, how often, and what is rejected."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pytest_int8bench.accuracy.forward import Forward
from pytest_int8bench.accuracy.guardrail import Guardrail, next_step
from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.sensitivity import SensitivityScan
from pytest_int8bench.accuracy.statistics.checks import ScoreError
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import is_quantized
from pytest_int8bench.report.verdict_text import beside_row, describe, message
from pytest_int8bench.results.verdicts import Accuracy
from pytest_int8bench.workloads import Evaluation, Workload
from toys.models import Mlp, make_workload

BF16 = RunParams(gpu_type="cpu", compile_mode="off", batch_size=32, model_size="nano")
W8A8 = BF16.replace(int8_enabled=True)
W8 = W8A8.replace(int8_mode="w8")
ONE_PERCENT = Limit.parse("1%")
SAMPLES = 2000


def toy() -> Mlp:
    return Mlp(out=8)


def is_candidate(forward: Forward) -> bool:
    return any(map(is_quantized, forward._model.eager.modules()))


def flips(lost: int, gained: int = 0, samples: int = SAMPLES) -> Callable[[Forward], Any]:
    """Return scores of a baseline with 90 % right and a candidate that loses and gains some."""

    def scores(forward: Forward) -> np.ndarray[Any, Any]:
        forward(torch.ones(3, 32))  # the model exists
        right = np.ones(samples)
        right[: samples // 10] = 0
        if is_candidate(forward):
            right[samples - lost :] = 0
            right[:gained] = 1
        return right

    return scores


def check(
    evaluation: Any, params: RunParams = W8A8, limit: str = "1%", **changes: Any
) -> list[Accuracy]:
    guardrail = Guardrail(ModelPool(), Limit.parse(limit))
    return guardrail.check(
        make_workload(toy, evaluation=evaluation, **changes), params, nodeid="test.py::test"
    )


# -- NaN ----------------------------------------------------------------------------------------


class Breaks(Mlp):
    """Return NaN in the first output of the last row."""

    def __init__(self) -> None:
        super().__init__(out=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        y[-1, 0] = float("nan")
        return y


def test_verdict_reports_nan_in_both_models() -> None:
    evaluation = Evaluation(metric="top1", scores=flips(lost=4))
    guardrail = Guardrail(ModelPool(), ONE_PERCENT)

    def judge(samples: int) -> str | None:
        def scores(forward: Forward) -> Any:
            forward(torch.ones(samples, 32))
            return flips(lost=4)(forward)

        workload = make_workload(Breaks, evaluation=Evaluation(metric="top1", scores=scores))
        return guardrail.check(workload, W8A8, nodeid="t")[0].reason

    assert judge(32) == "outputs of the baseline and the candidate hold NaN"
    assert check(evaluation)[0].reason is None


def test_reports_nan_in_outputs_without_labels() -> None:
    [found] = Guardrail(ModelPool(), ONE_PERCENT).check(make_workload(Breaks), W8A8, nodeid="t")
    assert (found.outcome, found.reason) == (
        "proxy-ok",
        "the baseline's own outputs hold NaN (1 of 256 values, excluded from the comparison)",
    )


# -- verdicts -----------------------------------------------------------------------------------


def test_verdict_has_every_figure() -> None:
    [found] = check(Evaluation(metric="top1", scores=flips(lost=4, gained=2)))
    assert (found.nodeid, found.workload, found.run_name) == ("test.py::test", "toy", W8A8.run_name)
    assert (found.metric, found.outcome, found.method) == ("top1", "PASS", "exact")
    assert (found.samples, found.lost, found.gained) == (SAMPLES, 4, 2)
    assert (found.baseline, found.candidate) == (0.9, pytest.approx(0.899))
    assert found.drop == pytest.approx(0.001 / 0.9)
    assert found.drop_low < found.drop < found.drop_high < 0.01
    assert (found.limit, found.needed, found.reason) == ("1%", None, None)
    assert found.random_weights is False
    assert Accuracy.from_dict(found.to_dict()) == found


def test_two_percent_drop_fails_with_next_step() -> None:
    [found] = check(Evaluation(metric="top1", scores=flips(lost=54, gained=18)))
    assert found.outcome == "FAIL"
    first, figures, step = describe(found)
    assert first.startswith(f"FAIL: toy: {W8A8.run_name}: top1 dropped by 2.00% [1.")
    assert first.endswith("], limit 1%")
    assert figures.strip() == (
        "BF16 0.9000, INT8 0.8820, 2000 samples: 54 got worse, 18 better (one-sided 95 % bounds)"
    )
    assert step.strip() == "next step: SmoothQuant (--int8-smoothquant, int8_smoothquant=True)"
    assert message([found], remedied=False).endswith(
        "--int8-remedy tries SmoothQuant, BF16 for the worst layers, and W8"
    )
    assert "--int8-remedy" not in message([found], remedied=True)


def test_inconclusive_verdict_says_how_many_samples_are_needed() -> None:
    [found] = check(Evaluation(metric="top1", scores=flips(lost=0, samples=40)))
    assert found.outcome == "INCONCLUSIVE"
    assert found.needed > 40
    undecided = f"40 samples are too few to decide; about {found.needed:,} are needed"
    assert describe(found)[-1] == f"  {undecided}"
    # The table shows everything else, including the outcome.
    assert beside_row(found) == [f"undecided: toy: {W8A8.run_name}: top1: {undecided}"]


def test_verdict_counts_groups() -> None:
    videos = [f"video {index // 20}" for index in range(SAMPLES)]
    for groups in (videos, lambda: videos):
        [found] = check(Evaluation(metric="top1", scores=flips(4, 2), groups=groups))
        assert (found.outcome, found.samples, found.groups) == ("INCONCLUSIVE", SAMPLES, 100)
        assert found.needed > SAMPLES
    assert describe(found)[1].strip() == (
        "BF16 0.9000, INT8 0.8990, 2000 samples in 100 groups: 4 got worse, 2 better "
        "(one-sided 95 % bounds)"
    )
    assert describe(found)[-1].strip() == (
        f"2000 samples in 100 groups are too few to decide; about {found.needed:,} in "
        f"{found.needed // 20:,} groups are needed"
    )
    assert Accuracy.from_dict(found.to_dict()) == found


def test_evaluations_with_different_groups_are_judged_separately() -> None:
    guardrail = Guardrail(ModelPool(), ONE_PERCENT)
    scores = flips(4, 2)

    def judged(groups: Any) -> Any:
        evaluation = Evaluation(metric="top1", scores=scores, groups=groups)
        workload = make_workload(toy, evaluation=evaluation)
        return guardrail.check(workload, W8A8, nodeid="test.py::test")[0].groups

    each = np.arange(SAMPLES)
    assert [judged(each // size) for size in (20, 40)] == [100, 50]
    assert judged(list(each // 50)) == 40
    assert judged(None) is None


def test_groups_need_a_label_for_each_sample() -> None:
    with pytest.raises(ScoreError, match=r"^top1: groups must be one label per sample, got 3 "):
        check(Evaluation(metric="top1", scores=flips(0), groups=[1, 2, 3]))


def f1(rows: np.ndarray[Any, Any]) -> float:
    right, wrong = rows.sum(axis=0)
    return float(2 * right / (2 * right + wrong))


def told(evaluation: Evaluation, limit: str) -> list[str]:
    """Return the lines about samples, after checking that they precede building the candidate."""
    guardrail = Guardrail(ModelPool(), Limit.parse(limit))
    workload, said = make_workload(toy, evaluation=evaluation), []

    def tell(text: str) -> None:
        assert not any(model.params.int8_enabled for model in guardrail._forwards)
        said.append(text)

    for params in (W8A8, W8):
        guardrail.check(workload, params, nodeid="test.py::test", tell=tell)
    return said


def test_warns_of_too_few_images_before_building_candidate() -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([rng.poisson(30, 300) + 1, rng.poisson(3, 300)], axis=1)
    found = Evaluation(metric="F1", scores=lambda forward: rows, aggregate=f1)
    [text] = told(found, "1%")
    match = re.fullmatch(
        r"F1: 300 samples are too few to pass the limit of 1%, even for an unchanged model; "
        r"about (\d+) are needed",
        text,
    )
    assert match is not None
    assert 730 <= int(match[1]) < 1000
    assert told(found, "10%") == []
    more = Evaluation(
        metric="F1", scores=lambda forward: np.resize(rows, (int(match[1]), 2)), aggregate=f1
    )
    assert told(more, "1%") == []


def test_warns_of_too_few_samples_and_groups() -> None:
    [text] = told(Evaluation(metric="top1", scores=flips(0, samples=40)), "1%")
    assert text.startswith("top1: 40 samples are too few to pass the limit of 1%, even for an ")
    groups = np.arange(SAMPLES) // 20
    [text] = told(Evaluation(metric="top1", scores=flips(0), groups=groups), "1%")
    assert text.startswith("top1: 2000 samples in 100 groups are too few to pass the limit of 1%")
    assert text.endswith(" groups are needed")
    assert told(Evaluation(metric="top1", scores=flips(0)), "1%") == []
    # A constant baseline does not tell how many samples are needed, but its candidate does.
    constant = Evaluation(metric="top1", scores=lambda forward: 1.0 - is_candidate(forward) * GOOD)
    assert told(constant, "1%") == []


def test_improved_metric_has_negative_drop() -> None:
    [found] = check(Evaluation(metric="top1", scores=flips(lost=0, gained=9)))
    assert (found.outcome, found.drop) == ("PASS", pytest.approx(-0.005))
    assert f"{W8A8.run_name}: top1 rose by 0.50% (drop [-" in describe(found)[0]
    assert describe(found)[0].endswith("%]), limit 1%")


def test_limits_are_relative_or_absolute() -> None:
    evaluation = Evaluation(metric="top1", scores=flips(lost=18))
    assert check(evaluation, limit="1%")[0].drop == pytest.approx(0.01)
    assert check(evaluation, limit="1pp")[0].drop == pytest.approx(0.009)
    assert check(evaluation, limit="5%")[0].outcome == "PASS"
    assert "dropped by 0.90pp [" in describe(check(evaluation, limit="0.1pp")[0])[0]


def test_scores_may_be_continuous_or_aggregated() -> None:
    noise = np.random.default_rng(0).uniform(0.4, 0.8, SAMPLES)

    def scores(forward: Forward) -> Any:
        return torch.tensor(noise - 0.1 * is_candidate(forward)).bfloat16().double()

    [found] = check(Evaluation(metric="iou", scores=scores))
    assert (found.method, found.outcome) == ("mean", "FAIL")

    def counts(forward: Forward) -> Any:
        hits = np.random.default_rng(0).binomial(90, 0.9, size=400)
        return np.stack([hits, np.full(400, 10)], axis=1)

    f1 = Evaluation(
        metric="F1",
        scores=counts,
        aggregate=lambda rows: 2 * rows[:, 0].sum() / (2 * rows[:, 0] + rows[:, 1]).sum(),
    )
    [found] = check(f1, limit="5%")
    assert (found.method, found.outcome, found.samples) == ("jackknife", "PASS", 400)


def test_each_of_several_evaluations_is_judged() -> None:
    pair = [
        Evaluation(metric="good", scores=flips(lost=0)),
        Evaluation(metric="bad", scores=flips(lost=200)),
    ]
    assert [(v.metric, v.outcome) for v in check(pair)] == [("good", "PASS"), ("bad", "FAIL")]
    asked: list[RunParams] = []

    def evaluation(p: RunParams) -> list[Evaluation]:
        asked.append(p)
        return pair

    workload = make_workload(toy, evaluation=evaluation, axes={"depth": 3})
    guardrail = Guardrail(ModelPool(), ONE_PERCENT)
    assert len(guardrail.check(workload, W8A8, nodeid="a")) == 2
    guardrail.check(workload, W8, nodeid="b")
    assert asked == [BF16.replace(extra={"depth": 3})]  # once for all modes


def test_marks_random_weights_of_a_library() -> None:
    evaluation = Evaluation(metric="top1", scores=flips(lost=0))
    judged, compared = check(evaluation, load=lambda p, weights: toy())
    assert judged.random_weights
    assert judged.is_pipeline_check
    assert describe(judged)[0].endswith("limit 1% (pipeline check: random weights)")
    # Only this can fail a model with random weights.
    assert (compared.metric, compared.outcome) == ("outputs", "proxy-ok")
    assert not compared.is_pipeline_check


@pytest.mark.parametrize(
    ("params", "step"),
    [
        (W8A8, "SmoothQuant (--int8-smoothquant, int8_smoothquant=True)"),
        (W8A8.replace(int8_smoothquant=True), "weights only (--int8-mode=w8, int8_mode='w8')"),
        (W8, "a filter that keeps the worst layers in BF16, often the first and last"),
        (W8.replace(int8_attention=True), "attention in BF16 (--int8-set int8_attention=false"),
    ],
    ids=["w8a8", "smoothquant", "w8", "attention"],
)
def test_next_step_follows_the_order_of_remedies(params: RunParams, step: str) -> None:
    assert next_step(make_workload(), params).startswith(f"next step: {step}")


def test_next_step_of_prequantized_workload() -> None:
    # Its layers cannot be ranked one at a time.
    own = "next step: leave more layers in BF16 in the workload's own quantization"
    assert next_step(make_workload(prequantized=True), W8A8) == own


# -- what runs -----------------------------------------------------------------------------------


def test_baseline_is_scored_once_for_all_candidates() -> None:
    scored: list[str] = []

    def scores(forward: Forward) -> Any:
        scored.append("candidate" if is_candidate(forward) else "baseline")
        return flips(lost=0)(forward)

    guardrail = Guardrail(ModelPool(), ONE_PERCENT)
    workload = make_workload(toy, evaluation=Evaluation(metric="top1", scores=scores))
    for params in (W8A8, W8, W8A8.replace(int8_smoothquant=True)):
        guardrail.check(workload, params, nodeid="a")
    assert scored == ["baseline", "candidate", "candidate", "candidate"]


def test_candidate_is_scored_with_the_fit_of_the_baseline() -> None:
    fitted: list[bool] = []

    def fit(forward: Forward) -> str:
        fitted.append(is_candidate(forward))
        return "probe"

    def scores(forward: Forward, probe: str) -> Any:
        assert probe == "probe"
        return flips(lost=0)(forward)

    check(Evaluation(metric="top1", scores=scores, fit=fit))
    assert fitted == [False]


def test_evaluations_share_one_forward_per_model() -> None:
    seen: list[Forward] = []

    def scores(forward: Forward) -> Any:
        seen.append(forward)
        return flips(lost=0)(forward)

    check([Evaluation(metric=name, scores=scores) for name in ("a", "b")])
    assert [seen.index(forward) for forward in seen] == [0, 0, 2, 2]


def test_models_that_do_not_fit_together_are_scored_separately(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = ModelPool()
    build, refused = pool._build, []

    def tight(workload: Workload, params: RunParams, inputs: Any) -> Any:
        if params.int8_enabled and "baseline" in pool._models:
            refused.append(params)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(workload, params, inputs)

    monkeypatch.setattr(pool, "_build", tight)
    workload = make_workload(toy, evaluation=Evaluation(metric="top1", scores=flips(lost=0)))
    [found] = Guardrail(pool, ONE_PERCENT).check(workload, W8A8, nodeid="a")
    assert (found.outcome, len(refused)) == ("PASS", 1)


def test_several_evaluations_are_scored_separately_on_oom(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ModelPool()
    build = pool._build

    def tight(workload: Workload, params: RunParams, inputs: Any) -> Any:
        if pool._models:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(workload, params, inputs)

    monkeypatch.setattr(pool, "_build", tight)
    pair = [Evaluation(metric=name, scores=flips(lost=0)) for name in ("a", "b")]
    found = Guardrail(pool, ONE_PERCENT).check(
        make_workload(toy, evaluation=pair), W8A8, nodeid="a"
    )
    assert [verdict.outcome for verdict in found] == ["PASS", "PASS"]


def test_each_verdict_is_recorded_immediately() -> None:
    def fails(forward: Forward) -> Any:
        if is_candidate(forward):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return flips(lost=0)(forward)

    pair = [
        Evaluation(metric="first", scores=flips(lost=200)),
        Evaluation(metric="second", scores=fails),
    ]
    kept: list[Accuracy] = []
    guardrail = Guardrail(ModelPool(), ONE_PERCENT)
    with pytest.raises(torch.OutOfMemoryError):
        guardrail.check(make_workload(toy, evaluation=pair), W8A8, nodeid="a", record=kept.append)
    assert [(verdict.metric, verdict.outcome) for verdict in kept] == [("first", "FAIL")]


def test_evaluation_may_reuse_its_score_buffer() -> None:
    buffer = np.zeros(SAMPLES)

    def scores(forward: Forward) -> Any:
        buffer[:] = flips(lost=200)(forward)
        return buffer

    [found] = check(Evaluation(metric="top1", scores=scores))
    assert (found.outcome, found.lost) == ("FAIL", 200)


@pytest.mark.parametrize("compile_mode", ["default", "off"])
def test_variants_share_the_fit(compile_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Skip the warm-up.
    monkeypatch.setattr(Guardrail, "ready", lambda self, w, p: self.pool.get(w, p))
    monkeypatch.setattr(Forward, "__call__", lambda self, x: self._model.eager(x.bfloat16()))
    asked: list[RunParams] = []

    def evaluation(p: RunParams) -> Evaluation:
        asked.append(p)
        return Evaluation(
            metric="top1",
            scores=lambda forward, fitted: flips(lost=0)(forward),
            fit=lambda forward: "probe",
        )

    guardrail = Guardrail(ModelPool(), ONE_PERCENT)
    scan = SensitivityScan(
        guardrail,
        make_workload(toy, evaluation=evaluation),
        W8A8.replace(compile_mode=compile_mode),
    )
    assert len(scan.run(nodeid="a", metric=True).layers) == 2
    assert len(asked) == 1


def test_reports_long_steps() -> None:
    steps: list[tuple[str, str]] = []

    @contextmanager
    def step(action: str, name: str) -> Any:
        steps.append((action, name.removeprefix("toy: ")))
        yield

    workload = make_workload(toy, evaluation=Evaluation(metric="top1", scores=flips(lost=0)))
    Guardrail(ModelPool(), ONE_PERCENT, step=step).check(workload, W8A8, nodeid="a")
    assert steps == [
        (action, params.run_name)
        for params in (BF16, W8A8)
        for action in ("building", "warming up", "evaluating")
    ]


def test_a_baseline_is_not_judged() -> None:
    with pytest.raises(
        ValueError, match=f"^params must be a candidate, got the baseline {BF16.run_name}$"
    ):
        check(Evaluation(metric="top1", scores=flips(lost=0)), BF16)


# -- without labels -----------------------------------------------------------------------------


def test_without_labels_outputs_are_compared_and_nothing_is_passed() -> None:
    [found] = check(None)
    assert (found.metric, found.outcome, found.reason) == ("outputs", "proxy-ok", None)
    assert (found.samples, found.limit, found.drop) == (32, None, None)
    assert 20 < found.distance["sqnr_db"] < 60
    assert found.floor["sqnr_db"] is None  # eager against eager
    text = "\n".join(describe(found))
    assert text.startswith(
        f"proxy-ok: toy: {W8A8.run_name}: its outputs are close to the baseline's, which does not "
        "measure accuracy\n"
        "  cosine 0."
    )
    assert " (without INT8: 1.00000, infinite, " in text
    assert "drop" not in text


def test_evaluation_of_none_compares_outputs() -> None:
    [found] = check(lambda p: None)
    assert found.outcome == "proxy-ok"


def test_outputs_far_from_the_baseline_fail() -> None:
    def outliers(p: RunParams) -> nn.Module:
        model = toy()
        with torch.no_grad():
            model.fc1.bias[0] = 1e5  # takes up the whole range of a row
            model.fc2.weight[:, 0] = 0  # and does not affect the output
            model.fc2.bias.zero_()
        return model

    [found] = check(None, build=outliers)
    assert found.outcome == "FAIL"
    assert found.reason == f"SQNR must be at least 10 dB, got {found.distance['sqnr_db']:.1f} dB"


# -- what cannot be judged ----------------------------------------------------------------------


def by_role(baseline: Any, candidate: Any) -> Evaluation:
    return Evaluation(
        metric="top1", scores=lambda forward: candidate if is_candidate(forward) else baseline
    )


GOOD = np.arange(100) % 2
IDS = np.arange(100)
BAD = {
    "lengths": (by_role(GOOD, GOOD[1:]), "top1: .*100.*99"),
    "order": (
        by_role((IDS, GOOD), (IDS[::-1], GOOD)),
        (
            "top1: samples must come in the same order for both models: sample 0 is 0 for the "
            "baseline and 99 for the candidate"
        ),
    ),
    "ids of one": (
        by_role((IDS, GOOD), GOOD),
        "top1: scores must return ids for both models or for neither",
    ),
    "ids twice": (
        by_role((IDS // 2, GOOD), (IDS // 2, GOOD)),
        "top1: scores must return unique ids, got duplicates",
    ),
    "too few ids": (
        by_role((IDS[1:], GOOD), (IDS, GOOD)),
        "top1: scores must return one id per score, got 99 ids for 100 scores",
    ),
    "three": (
        by_role((IDS, GOOD, GOOD), GOOD),
        r"top1: scores must return one score per sample or \(ids, scores\), got a tuple of 3",
    ),
    "a number": (by_role(0.9, 0.9), "top1: scores must be one per sample, got the number 0.9"),
    "ids of ids": (
        by_role((list(zip(IDS, IDS, strict=True)), GOOD), GOOD),
        "top1: ids must be a list of names or numbers, got ",
    ),
    "text": (by_role("good", "bad"), "top1: scores must be numbers, got str"),
    "not finite": (
        by_role(GOOD, np.where(IDS == 3, np.nan, GOOD)),
        "top1: scores must be finite, got 1 non-finite score for the candidate",
    ),
    "complex": (
        by_role(GOOD + 1j, GOOD),
        "top1: scores must be numbers, got complex128 for the baseline",
    ),
    "numbers as text": (
        by_role(GOOD.astype(str), GOOD),
        "top1: scores must be numbers, got <U",
    ),
    "masked": (
        by_role(GOOD, np.ma.masked_array(GOOD, mask=IDS < 3)),
        "top1: scores must not be masked, got 3 masked scores for the candidate",
    ),
    "huge": (
        by_role(GOOD, torch.full((100,), 1e155, dtype=torch.float64)),
        r"top1: scores and worst must be at most 1e\+100 in magnitude, got 1e\+155",
    ),
    "log likelihoods": (
        Evaluation(metric="loglik", scores=lambda forward: -IDS / 7, worst=float("-inf")),
        "loglik: worst must be a finite number, got -inf; clip scores without",
    ),
    "one": (by_role(GOOD[:1], GOOD[:1]), "top1: .*2 samples"),
    "constant": (
        by_role(np.ones(100), np.ones(100)),
        "top1: every sample of both models scores 1: a constant metric",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_rejects_unusable_scores_in_one_line(name: str) -> None:
    evaluation, expected = BAD[name]
    with pytest.raises(ScoreError, match=f"^{expected}") as caught:
        check(evaluation)
    assert "\n" not in str(caught.value)


def test_rejects_what_is_not_an_evaluation() -> None:
    with pytest.raises(
        WorkloadError,
        match=r"^workload 'toy': evaluation must be an Evaluation, a sequence of them, or None, "
        r"got 'top1'$",
    ):
        check("top1")


def test_names_the_evaluation_that_raises() -> None:
    def scores(forward: Forward) -> Any:
        raise KeyError("labels")

    with pytest.raises(KeyError) as caught:
        check(Evaluation(metric="top1", scores=scores))
    [note] = caught.value.__notes__
    assert note == f"raised by evaluation 'top1' of workload 'toy' at {BF16.run_name}"
