"""Which layers lose most: each layer, or block, quantized alone."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from pytest_int8bench.accuracy.guardrail import Guardrail, Scores
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.models import Model, ModelPool, calibration_inputs
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantize import call, coverage
from pytest_int8bench.results import Sensitivity
from pytest_int8bench.tensors import tensors_of
from pytest_int8bench.workloads import Workload

BY = ("layer", "block")


class SensitivityScan:
    """Quantizes one layer, or block, of a workload's model at a time.

    Args:
        guardrail: where models and scores come from.
        workload: what to scan.
        params: the point; SmoothQuant is left out.
        by: ``layer`` or ``block``.

    Raises:
        WorkloadError: if the workload itself says which layers are quantized, and how.
        ValueError: for another ``by``.
    """

    def __init__(
        self, guardrail: Guardrail, workload: Workload, params: RunParams, *, by: str = "layer"
    ) -> None:
        if by not in BY:
            raise ValueError(f"by must be one of {', '.join(BY)}, got {by!r}")
        if workload.prequantized or workload.quant_config is not None:
            raise WorkloadError(
                f"workload {workload.name!r} brings its own quantization: its layers cannot be "
                "quantized one at a time"
            )
        self._guardrail = guardrail
        self._pool: ModelPool = guardrail.pool
        self._workload = workload
        self._params = params.replace(int8_smoothquant=False)
        self._by = by
        whole = self._pool.variant(workload, self._params)
        names = [layer.name for layer in coverage(whole.eager).converted]
        self.groups: dict[str, tuple[str, ...]] = grouped(names, by)

    def run(
        self, *, nodeid: str, metric: bool = False, tell: Callable[[str], None] = lambda text: None
    ) -> Sensitivity:
        """Measure every group.

        Args:
            nodeid: identity of the table.
            metric: score each on the samples for selection too, which takes longer.
            tell: called with what it is going to cost, before it does.

        Raises:
            WorkloadError: for ``metric`` where the workload has no labels.
        """
        start = time.perf_counter()
        evaluations = self._guardrail.evaluations(self._workload, self._params)
        if metric and not evaluations:
            raise WorkloadError(
                f"workload {self._workload.name!r} has no evaluation at {self._params.run_name}: "
                "layers can be ranked by SQNR only"
            )
        baseline = self._pool.get(self._workload, self._params.baseline())
        batches = calibration_inputs(self._workload, self._params, baseline.inputs, baseline.device)
        begun = time.perf_counter()
        reference = [_eager(baseline, batch) for batch in batches]
        scores = self._scores() if metric else None
        once_s = time.perf_counter() - begun
        tell(
            f"{len(self.groups)} {self._by}s, one pass each: about "
            f"{len(self.groups) * once_s:.0f} s if a pass takes as long as the baseline's"
        )
        rows = []
        for name, layers in self.groups.items():
            model = self._pool.variant(self._only(layers), self._params)
            row: dict[str, Any] = {
                "name": name,
                "layers": list(layers),
                "sqnr_db": _sqnr_db(reference, [_eager(model, batch) for batch in batches]),
            }
            if scores is not None:
                row |= self._loss(model, scores)
            rows.append(row)
            del model
        samples = sum(_samples(batch) for batch in reference)
        return Sensitivity(
            nodeid=nodeid,
            workload=self._workload.name,
            run_name=self._params.run_name,
            params=self._params.to_dict(),
            by=self._by,
            metric=evaluations[0].metric if metric else None,
            samples=len(scores.values) if scores is not None else samples,
            layers=sorted(rows, key=_badness, reverse=True),
            seconds=time.perf_counter() - start,
        )

    def _only(self, layers: Collection[str]) -> Workload:
        chosen = frozenset(layers)
        return dataclasses.replace(self._workload, filter_fn=lambda module, name: name in chosen)

    def _scores(self) -> Scores:
        return self._guardrail.baseline_scores(self._workload, self._params, 0, selection=True)

    def _loss(self, model: Model, reference: Scores) -> dict[str, Any]:
        evaluation = self._guardrail.evaluations(self._workload, self._params)[0]
        scores = self._guardrail.scores(model, 0, selection=True)
        metric = evaluation.aggregate or np.mean
        drop = float(metric(reference.values)) - float(metric(scores.values))
        worse = reference.values > scores.values
        better = reference.values < scores.values
        return {
            "drop": drop,
            "lost": int(worse.reshape(len(worse), -1).any(1).sum()),
            "gained": int(better.reshape(len(better), -1).any(1).sum()),
        }


def grouped(names: Sequence[str], by: str) -> dict[str, tuple[str, ...]]:
    """Return the layers of each group, by the group's name.

    A block is what the first number in a layer's name counts, as in ``encoder.blocks.3.attn.q``;
    a layer without one is in the block of its parent.
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


def _eager(model: Model, batch: Any) -> Any:
    with model.compiled.settings():
        return [t.double() for t in tensors_of(call(model.eager, batch)) if t.is_floating_point()]


def _sqnr_db(reference: list[Any], outputs: list[Any]) -> float | None:
    """Return power of the reference over power of the difference, over all batches, in dB; None
    for equal outputs."""
    signal = noise = 0.0
    for ours, theirs in zip(reference, outputs, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            signal += float(a.square().sum())
            noise += float((a - b).square().sum())
    if not math.isfinite(noise):
        return -math.inf
    return None if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def _samples(outputs: Any) -> int:
    return len(outputs[0]) if outputs and outputs[0].dim() else 0


def _badness(row: dict[str, Any]) -> tuple[float, float]:
    sqnr = row["sqnr_db"]
    return (row.get("drop", 0.0), math.inf * -1 if sqnr is None else -sqnr)
