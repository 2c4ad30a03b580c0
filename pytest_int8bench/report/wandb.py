"""Weights & Biases: one run for each measured point, logged when the session is over.

Not point by point: ``wandb.init`` starts a process and threads, and online it waits for a network.
None of that runs beside a clock if all points are measured first. The journal has them by then,
whatever becomes of the logging, with the verdicts and statuses that came later.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_int8bench.files import timestamp
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.figures import FIGURES
from pytest_int8bench.results.records import Result, Saved
from pytest_int8bench.results.verdicts import Accuracy
from pytest_int8bench.words import plural

#: The project where neither ``WANDB_PROJECT`` nor a settings file of wandb names one.
PROJECT = "int8bench"
_MAX_PROBLEM = 300
# What is logged of a verdict, as accuracy/METRIC/NAME.
_VERDICT = ("outcome", "samples", "baseline", "candidate", "limit", "drop", "drop_low", "drop_high")


@dataclass(frozen=True)
class TrackedRun:
    """What is logged of one point."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    failed: bool
    """The point's test failed."""


@dataclass(frozen=True)
class Tracked:
    """What became of it."""

    line: str
    failed: bool


def check_installed() -> None:
    """Say how to get wandb where it is not installed. Does not import it.

    Raises:
        ValueError: one line.
    """
    spec = importlib.util.find_spec("wandb")
    # wandb's own folder of runs, where Python was started, passes for a package without a file.
    if spec is None or spec.origin is None:
        raise ValueError("needs wandb: pip install 'pytest-int8bench[wandb]'")


def runs_of(saved: Saved, *, every: bool) -> list[TrackedRun]:
    """Return what to log: results that are not skipped, with the verdicts on their points, and
    points with verdicts only.

    Args:
        saved: a session.
        every: also points without ``wandb_enabled``.
    """
    verdicts: dict[tuple[str, str], list[Accuracy]] = {}
    for verdict in saved.accuracy:
        verdicts.setdefault((verdict.workload, verdict.run_name), []).append(verdict)
    runs, timed = [], set()
    for result in saved.results:
        if result.status != "skipped" and _wanted(result, every):
            point = (result.workload, result.run_name)
            timed.add(point)
            gpu = _gpu_of(result, saved.environment)
            runs.append(
                TrackedRun(
                    name=result.run_name,
                    config=_config(result, saved.environment),
                    metrics=metrics_of(result, gpu) | _judged(verdicts.get(point, ())),
                    failed=result.status in ("failed", "accuracy-failed"),
                )
            )
    for point, found in verdicts.items():
        if point not in timed and _wanted(found[0], every):
            failed = any(v.outcome == "FAIL" and not v.is_pipeline_check for v in found)
            config = _config(found[0], saved.environment)
            runs.append(TrackedRun(found[0].run_name, config, _judged(found), failed))
    return runs


def metrics_of(result: Result, gpu: str | None) -> dict[str, Any]:
    """Return the figures of a point, those of the original project under its names too. What was
    not measured is left out.

    ``mean_batch_time`` and ``mean_batch_token_rate`` (tokens over that time) are of the mean over
    all batches; rates, here and everywhere else, are of the median.
    """
    values: dict[str, Any] = {"oom_occurred": int(result.oom), "gpu_name": gpu}
    for figure in FIGURES.values():
        value = figure.of(result)
        if figure.wandb_alias:
            values[figure.wandb_alias] = value
        values[figure.field] = value
    return {name: value for name, value in values.items() if value is not None}


def log(runs: Sequence[TrackedRun], *, folder: Path, group: str | None = None) -> Tracked:
    """Log ``runs``. Nothing is raised: what was measured is saved, and an interrupt ends this only.

    Args:
        runs: what to log.
        folder: where wandb puts its own folder, unless ``WANDB_DIR`` says so.
        group: name of their group; by default ``WANDB_RUN_GROUP``, or one for this time.
    """
    if not runs:
        return Tracked("wandb: nothing logged: no point was measured", failed=False)
    done: list[Any] = []
    problem = None
    try:
        check_installed()
        with _quiet():
            for run in _log_each(runs, folder, group):
                done.append(run)
    except Exception as error:  # once, not for each run: a network may take a minute to fail
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:_MAX_PROBLEM]}"
    except KeyboardInterrupt:
        problem = "interrupted"
    if problem is not None:
        count = f"{len(done)} of {len(runs)} runs logged"
        return Tracked(f"wandb: {count}, then {problem}; the journal has them all", failed=True)
    if done[0].disabled:
        return Tracked("wandb: nothing logged: it is disabled", failed=False)
    line = f"wandb: {plural(len(done), 'run')} in group {done[0].group}{_where(done)}"
    return Tracked(line, failed=False)


def _log_each(runs: Sequence[TrackedRun], folder: Path, group: str | None) -> Iterator[Any]:
    import wandb

    settings = wandb.setup().settings
    stamp = timestamp()
    for tracked in runs:
        run = wandb.init(
            name=tracked.name,
            group=group or settings.run_group or f"int8bench-{stamp}",
            project=settings.project or PROJECT,
            dir=os.environ.get("WANDB_DIR") or str(folder),
            config=tracked.config,
            reinit="create_new",  # a run that the tests themselves have open stays as it is
            settings=wandb.Settings(
                console="off",
                silent=True,
                # Load and temperature of now are not those of when the point was measured.
                x_disable_stats=True,
            ),
        )
        try:
            run.log(tracked.metrics)
        finally:
            run.finish(exit_code=int(tracked.failed))
        yield run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep wandb from writing into pytest's output and from asking for a key: without a terminal
    it raises instead."""
    stdin = sys.stdin
    with (
        open(os.devnull, encoding="utf-8") as nothing,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin


def _where(done: Sequence[Any]) -> str:
    if not done[0].offline:
        return f": {done[0].project_url}"
    folders = Path(done[0].dir).parent.parent
    if folders.is_relative_to(Path.cwd()):
        folders = folders.relative_to(Path.cwd())
    return f", offline; to send them: wandb sync {folders.as_posix()}/offline-run-*"


def _wanted(record: Record, every: bool) -> bool:
    return every or bool(record.params.get("wandb_enabled"))


def _gpu_of(record: Record, environment: dict[str, Any]) -> str | None:
    on_gpu = record.params.get("gpu_type") == "cuda"
    return (environment.get("gpu") or {}).get("name") if on_gpu else None


def _config(record: Record, environment: dict[str, Any]) -> dict[str, Any]:
    identity = {name: getattr(record, name) for name in ("workload", "run_name", "nodeid")}
    return {**record.params, **identity, "environment": environment}


def _judged(verdicts: Sequence[Accuracy]) -> dict[str, Any]:
    return {
        f"accuracy/{verdict.metric}/{name}": value
        for verdict in verdicts
        for name in _VERDICT
        if (value := getattr(verdict, name)) is not None
    }
