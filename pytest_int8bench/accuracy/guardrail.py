"""Judge a candidate's accuracy against its baseline's."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeAlias

from pytest_int8bench.accuracy.forward import Forward
from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.outputs import Distance, distance, nan_remark, problem
from pytest_int8bench.accuracy.scores import Scores, judge_scores, read_scores, too_few_samples
from pytest_int8bench.accuracy.statistics.verdict import Verdict
from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.errors import ClearError, WorkloadError
from pytest_int8bench.measure.memory import oom_of, release
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.pool import Key, ModelPool, part_key
from pytest_int8bench.measure.repeats import joined
from pytest_int8bench.measure.steps import Step, built, warmed
from pytest_int8bench.measure.timing import Timer
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.modes import MODES
from pytest_int8bench.results.base import point_label
from pytest_int8bench.results.verdicts import NO_LABELS, Accuracy
from pytest_int8bench.tensors import call, map_tensors, tensors_of
from pytest_int8bench.workloads.weights import RANDOM
from pytest_int8bench.workloads.workload import Evaluation, Workload

#: Maximum number of output elements to compare when there are no labels.
MAX_COMPARED = 1 << 26
#: Identifies a baseline and its evaluations across tests.
_Key: TypeAlias = tuple[Key, Any]


class Guardrail:
    """Scores and judges the models of one pool; computes each baseline's scores only once.

    Args:
        pool: the pool that builds and keeps the models.
        limit: the largest drop that passes.
        timer: a timer that synchronizes with the device.
        step: a context manager entered around each long step.
    """

    def __init__(
        self,
        pool: ModelPool,
        limit: Limit,
        *,
        timer: Timer = synchronized_perf_counter,
        step: Step = lambda action, name: nullcontext(),
    ) -> None:
        self.pool = pool
        self.limit = limit
        self._timer = timer
        self.step = step
        self._evaluations: dict[_Key, list[Evaluation]] = {}
        self._baselines: dict[tuple[_Key, int, bool], Scores] = {}
        self._fitted: dict[tuple[_Key, int], Any] = {}
        self._warned: set[tuple[_Key, int, Limit]] = set()
        self._scoring_s = 0.0
        self._nan: set[Key] = set()
        # One Forward per model, so that evaluations can cache outputs by it.
        self._forwards: weakref.WeakKeyDictionary[Model, Forward] = weakref.WeakKeyDictionary()

    def check(
        self,
        workload: Workload,
        params: RunParams,
        *,
        nodeid: str,
        limit: Limit | None = None,
        record: Callable[[Accuracy], None] = lambda verdict: None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> list[Accuracy]:
        """Judge the compiled candidate of a point against its compiled baseline.

        Args:
            workload: the workload to judge.
            params: the candidate's point.
            nodeid: node id to store with the verdicts.
            limit: the largest drop that passes; overrides the guardrail's limit.
            record: called with each verdict as soon as it is known.
            tell: called with a warning if there are too few samples to pass, before the candidate
                is built.

        Returns:
            One verdict per evaluation of the workload. Without labels or with random weights, there
            is also a verdict from comparing outputs, which can fail a model but not pass it. Random
            weights are scored on the smaller selection split, and these verdicts decide nothing.

        Raises:
            ValueError: if ``params`` is a baseline.
            EvidenceError: if the kernels that ran contradict the candidate's label.
            ScoreError: if the scores cannot be judged.
            torch.OutOfMemoryError: or another error that ``memory.oom_of`` recognizes.
        """
        if not params.int8_enabled:
            raise ValueError(f"params must be a candidate, got the baseline {params.run_name}")
        point = self._point(workload, params, nodeid)
        verdicts: list[Accuracy] = []
        for values in self._verdicts(workload, params, limit, tell, point["random_weights"]):
            verdicts.append(Accuracy(**point, **values))
            record(verdicts[-1])
        return verdicts

    def _verdicts(
        self,
        workload: Workload,
        params: RunParams,
        limit: Limit | None,
        tell: Callable[[str], None],
        is_random: bool,
    ) -> Iterator[dict[str, Any]]:
        """Yield the fields of each verdict of :meth:`check`, as soon as they are known."""
        evaluations = self.evaluations(workload, params)
        compared = not evaluations or is_random
        # Finish with the baseline first, because it may be evicted to make room for the candidate.
        outputs = self._baseline_outputs(workload, params) if compared else None
        spent_s = [
            self._scoring_time_s(
                partial(self.baseline_scores, workload, params, index, selection=is_random)
            )
            for index in range(len(evaluations))
        ]
        if not is_random:
            self._warn_too_few(workload, params, limit or self.limit, tell)
        candidate = self.candidate(workload, params)
        candidate.evidence()
        if self.pool.holds(workload, params.baseline()):
            candidate.check_against(self.pool.get(workload, params.baseline()))
        for index, evaluation in enumerate(evaluations):
            before_s = self._scoring_s
            verdict = self.judge(workload, params, index, limit=limit, selection=is_random)
            step = next_step(workload, params) if verdict.outcome == "FAIL" else None
            yield {
                **_fields(verdict, evaluation.metric),
                "reason": joined(step, self._nan_remark(workload, params)),
                "seconds": spent_s[index] + self._scoring_s - before_s,
            }
        if outputs is not None:
            yield _compared(candidate, *outputs)

    def _warn_too_few(
        self, workload: Workload, params: RunParams, limit: Limit, tell: Callable[[str], None]
    ) -> None:
        """Warn about evaluations with too few samples to pass, once per baseline and limit."""
        for index, evaluation in enumerate(self.evaluations(workload, params)):
            key = (self._key(workload, params), index, limit)
            if key not in self._warned:
                self._warned.add(key)
                reference = self.baseline_scores(workload, params, index)
                if (text := too_few_samples(evaluation, reference, limit)) is not None:
                    tell(text)

    def _point(self, workload: Workload, params: RunParams, nodeid: str) -> dict[str, Any]:
        """Return the fields that all verdicts of a point share."""
        return {
            "nodeid": nodeid,
            "workload": workload.name,
            "run_name": params.run_name,
            "params": params.to_dict(),
            "random_weights": has_random_weights(workload, self.pool.weights),
        }

    def _nan_remark(self, workload: Workload, params: RunParams) -> str | None:
        """Return a remark on models whose outputs held NaN, which their scores may not show."""
        roles = {"baseline": params.baseline(), "candidate": params}
        found = [
            role for role, point in roles.items() if self.pool.key(workload, point) in self._nan
        ]
        return f"outputs of the {' and the '.join(found)} hold NaN" if found else None

    def _scoring_time_s(self, score: Callable[[], Any]) -> float:
        before_s = self._scoring_s
        score()
        return self._scoring_s - before_s

    def evaluations(self, workload: Workload, params: RunParams) -> list[Evaluation]:
        """Return the workload's evaluations at a point, empty if it has none.

        Raises:
            WorkloadError: if the workload's ``evaluation`` has another type.
        """
        key = self._key(workload, params)
        if key not in self._evaluations:
            given: Any = workload.evaluation
            if callable(given):
                given = given(workload.with_axes(params.baseline()))
            given = [] if given is None else given
            found = [given] if isinstance(given, Evaluation) else given
            if not isinstance(found, Sequence) or not all(
                isinstance(item, Evaluation) for item in found
            ):
                raise WorkloadError(
                    f"workload {workload.name!r}: evaluation must be an Evaluation, a sequence of "
                    f"them, or None, got {given!r}"
                )
            self._evaluations[key] = list(found)
        return self._evaluations[key]

    def judge(
        self,
        workload: Workload,
        params: RunParams,
        index: int,
        *,
        limit: Limit | None = None,
        selection: bool = False,
    ) -> Verdict:
        """Judge the compiled candidate by one evaluation; see :meth:`scores`."""
        reference = self.baseline_scores(workload, params, index, selection=selection)
        candidate = self.candidate(workload, params)
        scores = self.scores(candidate, index, selection=selection)
        return judge_scores(
            self.evaluations(workload, params)[index], reference, scores, limit or self.limit
        )

    def baseline_scores(
        self, workload: Workload, params: RunParams, index: int, *, selection: bool = False
    ) -> Scores:
        """Return the baseline's scores, computing them on the first call."""
        key = self._key(workload, params)
        selection = selection and self.evaluations(workload, params)[index].selection is not None
        if (key, index, selection) not in self._baselines:
            self.pool.evict_other_candidate(workload, params)
            baseline = self.ready(workload, params.baseline())
            self._baselines[key, index, selection] = self.scores(
                baseline, index, selection=selection
            )
        return self._baselines[key, index, selection]

    def scores(self, model: Model, index: int, *, selection: bool = False) -> Scores:
        """Score a model.

        Args:
            model: a compiled and warm model.
            index: index of the evaluation in :meth:`evaluations`.
            selection: whether to score the samples on which remedies are chosen, if the evaluation
                has such a split.
        """
        workload, params = model.workload, model.params
        evaluation = self.evaluations(workload, params)[index]
        forward = self._forwards.setdefault(model, Forward(model))
        score = evaluation.scores
        if selection and evaluation.selection is not None:
            score = evaluation.selection
        arguments: tuple[Any, ...] = (forward,)
        key = (self._key(workload, params), index)
        start = time.perf_counter()
        with self.step("evaluating", point_label(workload.name, params.run_name)):
            try:
                if evaluation.fit is not None:
                    if key not in self._fitted:
                        assert not params.int8_enabled, "the baseline is scored first"
                        self._fitted[key] = evaluation.fit(forward)
                    arguments = (forward, self._fitted[key])
                owner = "candidate" if params.int8_enabled else "baseline"
                found = read_scores(score(*arguments), evaluation.metric, owner)
            except Exception as error:
                if not isinstance(error, ClearError) and oom_of(error) is None:
                    error.add_note(
                        f"raised by evaluation {evaluation.metric!r} of workload "
                        f"{workload.name!r} at {params.run_name}"
                    )
                raise
        self._scoring_s += time.perf_counter() - start
        if forward.has_nan:
            self._nan.add(self.pool.key(workload, params))
        return found

    def _key(self, workload: Workload, params: RunParams) -> _Key:
        return self.pool.key(workload, params).baseline(), part_key(workload.evaluation)

    def candidate(self, workload: Workload, params: RunParams) -> Model:
        """Return the compiled and warm candidate; evict the baseline if both do not fit."""
        try:
            return self.ready(workload, params)
        except Exception as error:
            if oom_of(error) is None:
                raise
            release(error)
        # The baseline can go, because its scores are cached already.
        self.pool.evict("candidate")
        self.pool.evict("baseline")
        return self.ready(workload, params)

    def ready(self, workload: Workload, params: RunParams) -> Model:
        """Return a compiled and warm model."""
        model = built(self.pool, workload, params, self.step)
        warmed(model, self._timer, self.step)
        return model

    def _baseline_outputs(
        self, workload: Workload, params: RunParams
    ) -> tuple[Any, Distance, str | None]:
        """Return the compiled baseline's outputs, the noise floor (the eager baseline's distance
        from them), and why the baseline could not be checked, or None."""
        self.pool.evict_other_candidate(workload, params)
        baseline = self.ready(workload, params.baseline())
        outputs = _outputs(baseline)
        baseline.restore()
        with baseline.compiled.eager_settings():
            eager = call(baseline.eager, baseline.fresh_inputs())
        return outputs, distance(outputs, _first(eager)), baseline.unchecked


def _compared(
    candidate: Model, reference: Any, floor: Distance, unchecked: str | None
) -> dict[str, Any]:
    start = time.perf_counter()
    found = distance(reference, _outputs(candidate))
    why = problem(found, floor)
    return {
        "metric": NO_LABELS,
        "outcome": "FAIL" if why else "proxy-ok",
        "reason": joined(why, nan_remark(reference), unchecked),
        "samples": found.samples,
        "distance": found.to_dict(),
        "floor": floor.to_dict(),
        "seconds": time.perf_counter() - start,
    }


def _outputs(model: Model) -> Any:
    return _first(call(Forward(model), model.inputs))


def _first(outputs: Any) -> Any:
    """Truncate outputs to ``MAX_COMPARED`` elements, because encoders can return gigabytes."""
    each = [t[0].numel() for t in tensors_of(outputs) if t.dim() > 0 and len(t)]
    samples = max(1, MAX_COMPARED // max(1, sum(each)))
    # A view would keep the whole output alive.
    return map_tensors(lambda t: t[:samples].clone() if t.dim() > 0 else t, outputs)


def has_random_weights(workload: Workload, weights: str) -> bool:
    """Return whether a library's model has random weights; those of user workloads are unknown."""
    return weights == RANDOM and workload.load is not None


def next_step(workload: Workload, params: RunParams) -> str:
    """Return a hint on what to try if accuracy dropped too much."""
    mode = MODES[params.int8_mode]
    if params.int8_attention:
        step = "attention in BF16 (--int8-set int8_attention=false, int8_attention=False)"
    elif workload.brings_quantization:
        step = "leave more layers in BF16 in the workload's own quantization"
    elif mode.smoothquant_helps and not params.int8_smoothquant:
        step = "SmoothQuant (--int8-smoothquant, int8_smoothquant=True)"
    elif mode.next_mode is not None:
        name = mode.next_mode
        step = f"{MODES[name].choice.summary} (--int8-mode={name}, int8_mode={name!r})"
    else:
        step = (
            "a filter that keeps the worst layers in BF16, often the first and last "
            "(--int8-filter, filter_fn); `int8bench sensitivity` ranks them"
        )
    return f"next step: {step}"


def _fields(verdict: Verdict, metric: str) -> dict[str, Any]:
    return {
        "metric": metric,
        "outcome": verdict.outcome,
        "samples": verdict.samples,
        "baseline": verdict.reference,
        "candidate": verdict.candidate,
        "limit": str(verdict.limit),
        "drop": verdict.drop,
        "drop_low": verdict.drop_low,
        "drop_high": verdict.drop_high,
        "lost": verdict.lost,
        "gained": verdict.gained,
        "needed": verdict.needed,
        "method": verdict.method,
        "groups": verdict.groups,
    }
