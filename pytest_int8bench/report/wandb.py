"""Log each measured point as a run of Weights & Biases at the end of the session.

``wandb.init`` starts a process and threads, and waits for the network when online, so logging
earlier would disturb measurements. By then, the journal holds every point with its final status and
verdicts, even if logging fails.
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

#: Project used if neither ``WANDB_PROJECT`` nor wandb's settings files name one.
PROJECT = "int8bench"
_MAX_PROBLEM = 300
# Fields of a verdict that are logged, as accuracy/METRIC/NAME.
_VERDICT = ("outcome", "samples", "baseline", "candidate", "limit", "drop", "drop_low", "drop_high")


@dataclass(frozen=True)
class TrackedRun:
    """A point as logged."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    failed: bool
    """Whether the point's test failed."""


@dataclass(frozen=True)
class Tracked:
    """The outcome of logging."""

    line: str
    failed: bool


def check_installed() -> None:
    """Check that wandb is installed, without importing it.

    Raises:
        ValueError: if it is not; one line that says how to install wandb.
    """
    spec = importlib.util.find_spec("wandb")
    # A folder of runs that wandb created in the working directory looks like a package without an
    # origin.
    if spec is None or spec.origin is None:
        raise ValueError("needs wandb: pip install 'pytest-int8bench[wandb]'")


def runs_of(saved: Saved, *, every: bool) -> list[TrackedRun]:
    """Return the runs to log: results that were not skipped, with their verdicts, and points that
    have only verdicts.

    Args:
        saved: the session's records.
        every: whether to include points without ``wandb_enabled``.
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
    """Return the measured figures of a point, some also under the original project's names.

    ``mean_batch_time`` is the mean over all batches, and ``mean_batch_token_rate`` uses it. All
    other rates use the median.
    """
    values: dict[str, Any] = {"oom_occurred": int(result.oom), "gpu_name": gpu}
    for figure in FIGURES.values():
        value = figure.of(result)
        if figure.wandb_alias:
            values[figure.wandb_alias] = value
        values[figure.field] = value
    return {name: value for name, value in values.items() if value is not None}


def log(runs: Sequence[TrackedRun], *, folder: Path, group: str | None = None) -> Tracked:
    """Log ``runs`` without raising, as the results are already saved. An interrupt ends only the
    logging.

    Args:
        runs: the runs to log.
        folder: parent of the folder that wandb creates, unless ``WANDB_DIR`` is set.
        group: name of the group of runs; None for ``WANDB_RUN_GROUP`` or, if unset, a timestamp.
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
    except Exception as error:  # stop at the first error: a network may take a minute to fail
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:_MAX_PROBLEM]}"
    except KeyboardInterrupt:
        problem = "interrupted"
    if problem is not None:
        count = f"{len(done)} of {len(runs)} runs logged"
        line = f"wandb: {count}, then {problem}; the journal has all results"
        return Tracked(line, failed=True)
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
            reinit="create_new",  # leave alone a run that the tests themselves have open
            settings=wandb.Settings(
                console="off",
                silent=True,
                # The point was measured earlier, so the current load and temperature are
                # irrelevant.
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
    """Keep wandb from writing to pytest's output and from prompting for an API key: without a
    terminal, it raises an error instead."""
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
    return f", offline; to upload them: wandb sync {folders.as_posix()}/offline-run-*"


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
