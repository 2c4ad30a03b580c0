"""Rank layers or blocks, and their attention, by the accuracy lost when only one is quantized."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from pytest_int8bench.accuracy.attention_rows import SelectiveInt8Attention
from pytest_int8bench.accuracy.guardrail import Guardrail
from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.outputs import OutputsError, sqnr_db
from pytest_int8bench.accuracy.scores import Scores, observed_drop
from pytest_int8bench.errors import ClearError, WorkloadError
from pytest_int8bench.measure.building import calibration_inputs, check_dense, run_once
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.measure.repeats import repeats, sample_of
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import coverage
from pytest_int8bench.results.verdicts import Sensitivity
from pytest_int8bench.tensors import tensors_of
from pytest_int8bench.words import plural
from pytest_int8bench.workloads.workload import Workload

BY = ("layer", "block")
_ABSOLUTE = Limit(1.0, relative=False)  # makes drops absolute differences


class ScanError(ClearError, ValueError):
    """Raised for a scan that is not possible."""


class SensitivityScan:
    """Quantizes one layer or block of a workload's model at a time.

    With INT8 attention, it also runs the attention of one module or block at a time in INT8.

    Args:
        guardrail: builds and scores the models.
        workload: the workload to scan.
        params: the point to scan; SmoothQuant is turned off.
        by: ``layer`` or ``block``.

    Raises:
        WorkloadError: if the workload brings its own quantization.
        ScanError: if ``by`` has another value.
    """

    def __init__(
        self, guardrail: Guardrail, workload: Workload, params: RunParams, *, by: str = "layer"
    ) -> None:
        if by not in BY:
            raise ScanError(f"by must be one of {', '.join(BY)}, got {by!r}")
        if workload.brings_quantization:
            raise WorkloadError(
                f"workload {workload.name!r} brings its own quantization, so its layers cannot be "
                "quantized one at a time"
            )
        self._guardrail = guardrail
        self._pool: ModelPool = guardrail.pool
        self._workload = workload
        self._params = params.replace(int8_smoothquant=False)
        self._by = by
        whole = self._pool.variant(workload, self._params.replace(int8_attention=False))
        names = [layer.name for layer in coverage(whole.eager).converted]
        self.groups: dict[str, tuple[str, ...]] = grouped(names, by)

    def run(
        self,
        *,
        nodeid: str,
        metric: bool = False,
        tell: Callable[[str], None] = lambda text: None,
        record: Callable[[Sensitivity], None] = lambda table: None,
    ) -> Sensitivity:
        """Measure every group and return the table, worst group first.

        Args:
            nodeid: node id to store with the table.
            metric: whether to score each group on the selection split as well, which takes longer.
            tell: called after the first group with an estimate of the total time.
            record: called with the table after each group.

        Raises:
            WorkloadError: if ``metric`` is set and the workload has no evaluation.
            ScanError: if the point has INT8 attention and the model has none that INT8 supports.
        """
        start = time.perf_counter()
        evaluations = self._guardrail.evaluations(self._workload, self._params)
        if metric and not evaluations:
            raise WorkloadError(
                f"workload {self._workload.name!r} has no evaluation at {self._params.run_name}: "
                "layers can only be ranked by SQNR"
            )
        baseline = self._pool.get(self._workload, self._params.baseline())
        batches = calibration_inputs(self._workload, self._params, baseline.inputs, baseline.device)
        reference = _repeatable(baseline, batches)
        groups = self._groups(baseline, batches[0])
        scores = self._scores() if metric else None
        samples = sum(len(outputs[0]) for outputs in reference if outputs and outputs[0].dim())
        table = Sensitivity(
            nodeid=nodeid,
            workload=self._workload.name,
            run_name=self._params.run_name,
            params=self._params.to_dict(),
            by=self._by,
            metric=evaluations[0].metric if metric else None,
            samples=len(scores.values) if scores is not None else samples,
            layers=[],
        )
        for count, (name, (layers, callers)) in enumerate(groups.items()):
            group_start = time.perf_counter()
            row = self._row(name, layers, callers, batches, reference, scores)
            table = dataclasses.replace(
                table,
                layers=sorted([*table.layers, row], key=_rank, reverse=True),
                seconds=time.perf_counter() - start,
            )
            record(table)
            if count == 0:
                each_s = time.perf_counter() - group_start
                counted, all_s = plural(len(self.groups), self._by), len(groups) * each_s
                if more := len(groups) - len(self.groups):
                    counted += f" and the attention of {more}"
                tell(f"{counted}: about {all_s:.0f} s ({each_s:.1f} s for the first)")
        return table

    def _groups(
        self, baseline: Model, batch: Any
    ) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Return the layers and the attention callers of each group, by the group's name."""
        none: tuple[str, ...] = ()
        groups = {name: (layers, none) for name, layers in self.groups.items()}
        if not self._params.int8_attention:
            return groups
        mode = SelectiveInt8Attention(baseline.eager)
        with mode.entered():
            _eager(baseline, batch)
        if not mode.callers:
            raise ScanError(f"int8_attention=True: {mode.coverage}")
        for name, callers in grouped(list(mode.callers), self._by).items():
            groups[f"{name} (attention)".strip()] = none, callers
        return groups

    def _row(
        self,
        name: str,
        layers: tuple[str, ...],
        callers: tuple[str, ...],
        batches: Sequence[Any],
        reference: Sequence[list[torch.Tensor]],
        scores: Scores | None,
    ) -> dict[str, Any]:
        """Measure the loss when only one group is quantized."""
        model = self._model(layers)
        model.restore()
        signal = noise = 0.0
        with SelectiveInt8Attention(model.eager, callers).entered() if callers else nullcontext():
            for batch, ours in zip(batches, reference, strict=True):
                for a, b in zip(ours, _eager(model, batch), strict=True):
                    masked = a.isinf() & (a == b)  # for example, logits of masked classes
                    a, b = a.masked_fill(masked, 0), b.masked_fill(masked, 0)
                    signal += float(a.square().sum(dtype=torch.float64))
                    noise += float((a - b).square().sum(dtype=torch.float64))
            if not math.isfinite(signal + noise):
                raise OutputsError("the outputs hold NaN or infinity: layers cannot be ranked")
            loss = {} if scores is None else self._loss(model, scores)
        row: dict[str, Any] = {"name": name, "layers": list(layers)}
        row["sqnr_db"] = sqnr_db(signal, noise) if noise else None  # JSON has no infinity
        return row | loss

    def _model(self, layers: tuple[str, ...]) -> Model:
        """Return a candidate in which only ``layers`` are quantized, possibly none."""
        params = self._params.replace(int8_attention=False)
        if layers:
            return self._pool.variant(self._only(layers), params)
        return self._pool.variant(self._workload, params, quantize=False)

    def _only(self, layers: Collection[str]) -> Workload:
        chosen = frozenset(layers)
        return dataclasses.replace(self._workload, filter_fn=lambda module, name: name in chosen)

    def _scores(self) -> Scores:
        return self._guardrail.baseline_scores(self._workload, self._params, 0, selection=True)

    def _loss(self, model: Model, reference: Scores) -> dict[str, Any]:
        evaluation = self._guardrail.evaluations(self._workload, self._params)[0]
        scores = self._guardrail.scores(model, 0, selection=True)
        drop, _ = observed_drop(evaluation, reference, scores, _ABSOLUTE)
        worse = reference.values > scores.values
        better = reference.values < scores.values
        return {
            "drop": drop,
            "lost": int(worse.reshape(len(worse), -1).any(1).sum()),
            "gained": int(better.reshape(len(better), -1).any(1).sum()),
        }


def grouped(names: Sequence[str], by: str) -> dict[str, tuple[str, ...]]:
    """Group layers by name.

    A block's name ends at the first number in the layer's name: ``encoder.blocks.3.attn.q`` belongs
    to ``encoder.blocks.3``. A layer without a number belongs to the block of its parent.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for name in names:
        key = name if by == "layer" else _block(name)
        groups[key] = (*groups.get(key, ()), name)
    return groups


def _block(name: str) -> str:
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def _repeatable(model: Model, batches: Sequence[Any]) -> list[list[torch.Tensor]]:
    """Return the eager outputs of a model.

    Raises:
        OutputsError: if a second call returns different outputs, for example because the model
            keeps state in Python. Otherwise the difference would be attributed to the layers.
    """
    model.restore()
    outputs = [_eager(model, batch) for batch in batches]
    model.restore()
    again = [_eager(model, batch) for batch in batches]
    if repeats(sample_of(outputs), sample_of(again)) is not None:
        raise OutputsError(
            "two calls with the same inputs gave different outputs: layers cannot be ranked"
        )
    return outputs


def _eager(model: Model, batch: Any) -> list[torch.Tensor]:
    with model.compiled.eager_settings():
        output = run_once(model.eager, batch, model.device)  # seeds models that draw random numbers
    check_dense(model.workload, "outputs", output)
    return [t.float() for t in tensors_of(output) if t.is_floating_point()]


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    sqnr = row["sqnr_db"]
    return (row.get("drop", 0.0), -math.inf if sqnr is None else -sqnr)
