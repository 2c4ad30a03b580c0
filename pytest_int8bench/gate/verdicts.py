"""Compare accuracy verdicts of two saved files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.outcomes import (
    ACCURACY_FAILED,
    IMPROVED,
    INCOMPARABLE,
    MISSING,
    NEW,
    NOT_JUDGED,
    PASSES,
    REGRESSED,
    REGRESSES,
    SAME,
    UNDECIDED,
    UNDECIDED_NOW,
    Compared,
)
from pytest_int8bench.results.verdicts import Accuracy


@dataclass(frozen=True, kw_only=True)
class VerdictChange(Compared):
    """An accuracy verdict on both sides."""

    metric: str
    base: str | None
    """Outcome on the base side."""
    new: str | None
    is_pipeline_check: bool = False
    """Whether the weights are random, so that nothing is judged."""


# -- verdicts -------------------------------------------------------------------------------

_WORST_VERDICT = ("FAIL", "INCONCLUSIVE", "proxy-ok", "PASS")


def compare_verdict(
    base: list[Accuracy], new: list[Accuracy], rules: Rules, why: str | None
) -> VerdictChange:
    known = (new or base)[0]
    # What random weights gave is no baseline, and nothing to judge.
    trained = [verdict for verdict in base if not verdict.is_pipeline_check]
    judged = [verdict for verdict in new if not verdict.is_pipeline_check]
    is_check = not judged and bool(new or not trained)
    outcome: str
    reason: str | None
    if is_check and trained:
        code = PASSES if rules.allow_missing else UNDECIDED
        outcome, reason = MISSING, "its weights are random now: it is a pipeline check"
    elif is_check:
        outcome, code, reason = NOT_JUDGED, PASSES, "pipeline check: the weights are random"
    else:
        outcome, code, reason = _judge_verdict(trained, judged, rules)
        if why is not None and trained and judged and code != REGRESSES:
            outcome, code, reason = INCOMPARABLE, UNDECIDED, why
    return VerdictChange(
        nodeid=known.nodeid,
        workload=known.workload,
        run_name=known.run_name,
        metric=known.metric,
        base=_worst(trained or (base if is_check else [])),
        new=_worst(judged or new),
        outcome=outcome,
        exit_code=code,
        reason=reason,
        is_pipeline_check=is_check,
    )


def _judge_verdict(
    base: list[Accuracy], new: list[Accuracy], rules: Rules
) -> tuple[str, int, str | None]:
    before, after = _worst(base), _worst(new)
    if after is None:
        code = PASSES if rules.allow_missing else UNDECIDED
        return MISSING, code, "not in the new run"
    reason = next((v.reason for v in new if v.outcome == after and v.reason), None)
    if after == "FAIL":
        if before == "FAIL":
            return ACCURACY_FAILED, PASSES, "as in the base"
        return REGRESSED, REGRESSES, reason
    if before is None:
        return NEW, PASSES, "not in the base"
    if (was := _limits(base)) != (now := _limits(new)):
        reason = f"the limit was {was} and is {now}"
    if before == after:
        return SAME, PASSES, reason
    if after == "INCONCLUSIVE" and before == "PASS":
        if rules.fail_on_inconclusive:
            return REGRESSED, REGRESSES, "its samples do not decide any more"
        return UNDECIDED_NOW, PASSES, "its samples do not decide any more"
    better = _WORST_VERDICT.index(after) > _WORST_VERDICT.index(before)
    return IMPROVED if better else SAME, PASSES, reason


def _limits(verdicts: Sequence[Accuracy]) -> str:
    return " or ".join(sorted({str(verdict.limit) for verdict in verdicts}))


def _worst(verdicts: Sequence[Accuracy]) -> str | None:
    outcomes = {verdict.outcome for verdict in verdicts}
    return next((outcome for outcome in _WORST_VERDICT if outcome in outcomes), None)
