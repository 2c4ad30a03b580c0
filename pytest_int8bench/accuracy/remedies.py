"""Search for a remedy for an accuracy drop.

The order is: attention in BF16, SmoothQuant, BF16 for the worst layers, and another mode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pytest_int8bench.accuracy.guardrail import Guardrail
from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.scores import groups_of, judge_scores, observed_drop
from pytest_int8bench.accuracy.sensitivity import SensitivityScan
from pytest_int8bench.accuracy.statistics.verdict import ALPHA, Verdict
from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.errors import ClearError, first_line
from pytest_int8bench.measure.memory import oom_of, release
from pytest_int8bench.measure.steps import interleave
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.quantization.modes import MODES
from pytest_int8bench.results.verdicts import Accuracy
from pytest_int8bench.workloads.workload import Evaluation, Workload

ATTENTION = "attention in BF16"
SMOOTHQUANT, WORST_LAYERS = "SmoothQuant", "BF16 for the worst layers"
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
#: Remedies certified besides attention in BF16. The significance level is divided among all of them
#: (Bonferroni), so that trying several does not raise the error rate.
CERTIFIED = 3
#: Share of the limit within which a selection of layers must stay on the small selection split.
MARGIN = 0.5
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Trial:
    """One way to quantize, and its drop on the selection split."""

    workload: Workload
    params: RunParams
    rung: str
    setting: str
    configuration: str
    """Code or options that the user can paste."""
    ordered: bool = False
    """Whether later trials of the remedy cost more speed, so that the first good one is best."""
    drop: float = math.inf
    """Drop on the selection split, relative if the limit is; infinite if it was not tried."""
    samples: int | None = None
    problem: str | None = None
    """Why it could not be tried."""


class Remedies:
    """Tries remedies in order: selects on one split of the samples, certifies on the other.

    Args:
        guardrail: builds and scores the models.
        limit: the largest drop that passes.
        record: called with the updated verdict after each remedy.
        tell: called with progress messages before long steps.
    """

    def __init__(
        self,
        guardrail: Guardrail,
        limit: Limit,
        *,
        record: Callable[[Accuracy], None] = lambda verdict: None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._guardrail = guardrail
        self._limit = limit
        self._record = record
        self._tell = tell
        self._level = ALPHA / CERTIFIED

    def walk(
        self, workload: Workload, params: RunParams, index: int, verdict: Accuracy
    ) -> Accuracy:
        """Try remedies until one passes, and return ``verdict`` with all trials added.

        Args:
            workload: the workload that failed.
            params: the point that failed.
            index: index of the evaluation that failed.
            verdict: the verdict of that evaluation.
        """
        tried: list[dict[str, Any]] = []
        self._level = ALPHA / (CERTIFIED + params.int8_attention)
        remedies = {
            ATTENTION: self._attention,
            SMOOTHQUANT: self._smoothquant,
            WORST_LAYERS: self._without_worst_layers,
            _next_mode_name(params): self._next_mode,
        }
        for name, trials in remedies.items():
            try:
                tried += self._try(trials(workload, params), index)
            except Exception as error:
                tried.append(_row(Trial(workload, params, name, "", "", problem=_reason(error))))
            verdict = dataclasses.replace(verdict, remedies=list(tried))
            self._record(verdict)
            if any(row["outcome"] == "PASS" for row in tried):
                break
        return verdict

    def _try(self, trials: Iterator[Trial], index: int) -> Iterator[dict[str, Any]]:
        """Select the best trial of one remedy and certify it; yield a row for each trial."""
        found = []
        for trial in trials:
            self._tell(f"trying {trial.rung} ({trial.setting})")
            found.append(self._select(trial, index))
            if trial.ordered and found[-1].drop <= MARGIN * self._limit.value:
                break
        best = min(found, key=lambda trial: trial.drop, default=None)
        for trial in found:
            row = _row(trial)
            if trial is best and trial.drop <= self._limit.value:
                row |= self._certify(trial, index)
            yield row

    # -- remedies ---------------------------------------------------------------------------

    def _attention(self, workload: Workload, params: RunParams) -> Iterator[Trial]:
        if params.int8_attention:
            yield Trial(
                workload,
                params.replace(int8_attention=False),
                rung=ATTENTION,
                setting="int8_attention=False",
                configuration="--int8-set int8_attention=false",
            )

    def _smoothquant(self, workload: Workload, params: RunParams) -> Iterator[Trial]:
        if not MODES[params.int8_mode].smoothquant_helps or workload.brings_quantization:
            return
        for alpha in ALPHAS:
            yield Trial(
                dataclasses.replace(workload, smoothquant_alpha=alpha),
                params.replace(int8_smoothquant=True),
                rung=SMOOTHQUANT,
                setting=f"alpha={alpha:g}",
                configuration=(
                    f"Workload(..., smoothquant_alpha={alpha:g})  # and --int8-smoothquant"
                ),
            )

    def _without_worst_layers(self, workload: Workload, params: RunParams) -> Iterator[Trial]:
        if workload.brings_quantization:
            return
        # Attention is a remedy of its own, not a layer that the filter could leave in BF16.
        scan = SensitivityScan(self._guardrail, workload, params.replace(int8_attention=False))
        ranked = [row["name"] for row in scan.run(nodeid="", tell=self._tell).layers]
        count = 1
        while count <= len(ranked) // 2:
            kept = frozenset(ranked[:count])
            yield Trial(
                _without(workload, kept),
                params,
                rung=WORST_LAYERS,
                setting=", ".join(sorted(kept)),
                configuration=filter_text(sorted(kept), own=workload.filter_fn is not None),
                ordered=True,
            )
            count *= 2

    def _next_mode(self, workload: Workload, params: RunParams) -> Iterator[Trial]:
        mode = MODES[params.int8_mode].next_mode
        if mode is not None and not workload.brings_quantization:
            yield Trial(
                workload,
                params.replace(int8_mode=mode, int8_smoothquant=False),
                rung=_next_mode_name(params),
                setting=mode,
                configuration=f"--int8-mode={mode}",
            )

    # -- judging ----------------------------------------------------------------------------

    def _select(self, trial: Trial, index: int) -> Trial:
        guardrail = self._guardrail
        evaluation = guardrail.evaluations(trial.workload, trial.params)[index]
        try:
            reference = guardrail.baseline_scores(
                trial.workload, trial.params, index, selection=True
            )
            model = guardrail.pool.variant(trial.workload, trial.params)
            scores = guardrail.scores(model, index, selection=True)
            rows = _half(evaluation, len(reference.values), 0)
            drop, samples = observed_drop(evaluation, reference, scores, self._limit, rows=rows)
        except Exception as error:
            return dataclasses.replace(trial, problem=_reason(error))
        return dataclasses.replace(trial, drop=drop, samples=samples)

    def _certify(self, trial: Trial, index: int) -> dict[str, Any]:
        """Judge the compiled model on the other split by every metric, and measure its speedup."""
        guardrail, workload, params = self._guardrail, trial.workload, trial.params
        try:
            verdicts = [
                self._judge(trial, number)
                for number in range(len(guardrail.evaluations(workload, params)))
            ]
            guardrail.candidate(workload, params).evidence()
        except Exception as error:
            return {"problem": _reason(error)}
        verdict = verdicts[index]
        row: dict[str, Any] = {
            "outcome": verdict.outcome,
            "drop": verdict.drop,
            "drop_low": verdict.drop_low,
            "drop_high": verdict.drop_high,
            "samples": verdict.samples,
            "needed": verdict.needed,
        }
        for number, other in enumerate(verdicts):
            if row["outcome"] == "PASS" and other.outcome != "PASS":
                metric = guardrail.evaluations(workload, params)[number].metric
                row |= {"outcome": other.outcome, "problem": f"{metric}: {other.outcome}"}
        return row | self._speedup(workload, params)

    def _judge(self, trial: Trial, index: int) -> Verdict:
        guardrail, workload, params = self._guardrail, trial.workload, trial.params
        evaluation = guardrail.evaluations(workload, params)[index]
        reference = guardrail.baseline_scores(workload, params, index)
        scores = guardrail.scores(guardrail.candidate(workload, params), index)
        return judge_scores(
            evaluation,
            reference,
            scores,
            self._limit,
            alpha=self._level,
            rows=_half(evaluation, len(reference.values), 1),
        )

    def _speedup(self, workload: Workload, params: RunParams) -> dict[str, Any]:
        try:
            speedup = interleave(
                self._guardrail.ready(workload, params.baseline()),
                self._guardrail.ready(workload, params),
                synchronized_perf_counter,
                params.benchmark_interval_s,
            )
        except Exception as error:
            return {"speed_problem": _reason(error)}
        return {
            "speedup": speedup.ratio,
            "speedup_low": speedup.low,
            "speedup_high": speedup.high,
        }


def filter_text(kept: list[str], *, own: bool) -> str:
    """Return Python source of a ``filter_fn`` that leaves layers in BF16.

    Args:
        kept: names of the layers to leave in BF16.
        own: whether the workload already has a filter, which the new one then calls.
    """
    base = "your_filter" if own else "is_transformer_linear"
    lines = [] if own else ["from pytest_int8bench import is_transformer_linear", ""]
    lines += [
        "IN_BF16 = {",
        *[f"    {name!r}," for name in kept],
        "}",
        "",
        "def filter_fn(module, name):",
        f"    return name not in IN_BF16 and {base}(module, name)",
    ]
    return "\n".join(lines)


def _next_mode_name(params: RunParams) -> str:
    """Return the name of the last remedy, such as ``weights only``."""
    name = MODES[params.int8_mode].next_mode
    return "another mode" if name is None else MODES[name].choice.summary


def _reason(error: Exception) -> str:
    """Return an expected error as one line; re-raise any other error."""
    if not isinstance(error, ClearError) and oom_of(error) is None:
        raise error
    text = first_line(error)
    release(error)
    return text


def _without(workload: Workload, kept: frozenset[str]) -> Workload:
    base = workload.filter_fn or is_transformer_linear
    return dataclasses.replace(
        workload, filter_fn=lambda module, name: name not in kept and base(module, name)
    )


def _half(evaluation: Evaluation, samples: int, half: int) -> np.ndarray[Any, Any] | None:
    """Return the indices of the samples for selection (0) or certification (1), None for all.

    The random split is reproducible and does not divide groups.
    """
    if evaluation.selection is not None:
        return None
    codes = groups_of(evaluation, samples)
    codes = np.arange(samples) if codes is None else codes
    units = int(codes.max()) + 1
    order = np.random.default_rng(_SPLIT_SEED).permutation(units)
    chosen = order[: units // 2] if half == 0 else order[units // 2 :]
    return np.flatnonzero(np.isin(codes, chosen))


def _row(trial: Trial) -> dict[str, Any]:
    return {
        "rung": trial.rung,
        "setting": trial.setting,
        "configuration": trial.configuration,
        "selection_drop": trial.drop if trial.samples else None,
        "selection_samples": trial.samples,
        "problem": trial.problem,
        "outcome": None,
    }
