"""Prove that the matmul of each quantized layer ran as the label says.

The baseline's forward shows which layers must run. A forward of the candidate, recorded operator by
operator, shows how each layer's weight is used, and its compiled graphs show which of these uses
are compiled. On CUDA, the kernels of one compiled forward prove that they ran.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from pytest_int8bench.measure.evidence import Evidence, EvidenceError
from pytest_int8bench.measure.layer_runs import LayerRun, LayerRuns
from pytest_int8bench.measure.linear_calls import Size
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.modes import MODES
from pytest_int8bench.words import some

_NAMES_LISTED = 8
#: Relative difference in work that rounding may cause.
_ROUNDING = 1e-6
# Inductor's templates, whose names need not contain the dtype of the operands.
_TEMPLATE = re.compile(r"triton_(tem|mm)_")


def listed(names: Iterable[str]) -> str:
    """Return names for a message, only the first few if there are many."""
    return some(list(names), _NAMES_LISTED)


def quantized(runs: LayerRuns) -> dict[str, LayerRun]:
    """Return the runs of quantized layers."""
    return {name: run for name, run in runs.items() if run.quantized}


def in_other_precision(runs: LayerRuns) -> list[str]:
    """Return the quantized layers whose weights were used outside quantized matmuls."""
    return [
        name
        for name, run in quantized(runs).items()
        if run.was_used and not run.hidden and (run.other_work or not run.quantized_work)
    ]


def check_layers(runs: LayerRuns, params: RunParams, *, own_config: bool = False) -> None:
    """Check that a forward used each quantized layer as the label says.

    Args:
        runs: the candidate's layer runs.
        params: the point that the candidate was built for.
        own_config: whether the user's own configuration chose each layer's precision.

    Raises:
        EvidenceError: if the forward used no quantized layer, or if the mode is proven by its
            matmuls and a quantized layer ran another matmul.
    """
    mode, label = MODES[params.int8_mode], params.run_name
    layers = quantized(runs)
    if layers and not any(run.was_used for run in layers.values()):
        raise EvidenceError(
            f"{label} is labelled {mode.label}, but the forward uses none of its {len(layers)} "
            f"quantized layers: {listed(layers)}"
        )
    proof = mode.proof
    by_matmuls = proof.storage is not None and (proof.int8_matmuls or proof.kernels is not None)
    wrong = in_other_precision(runs) if by_matmuls and not own_config else []
    if wrong:
        hint = proof.hint if params.gpu_type == "cuda" else ""
        readers = sorted({reader for name in wrong for reader in layers[name].readers})
        by = f" (their weights are read by {listed(readers)})" if readers else ""
        raise EvidenceError(
            f"{label} is labelled {mode.label}, but {len(wrong)} of {len(layers)} quantized layers "
            f"ran matmuls that are not {mode.choice.precision}{hint}: {listed(wrong)}{by}; leave "
            "them out with filter_fn or --int8-filter"
        )


def check_same_work(baseline: LayerRuns, candidate: LayerRuns, params: RunParams) -> None:
    """Check that the candidate's forward does as much work in each layer as the baseline's.

    A router may send a row to different experts in the two forwards, but experts have the same
    size, so layers are compared by size first.

    Raises:
        EvidenceError: if the candidate does less, e.g. because it calls layers of another model.
    """
    before, after = _work_by_size(baseline), _work_by_size(candidate)
    fewer = [
        name
        for name, run in baseline.items()
        if after[run.size] < before[run.size] * (1 - _ROUNDING)
        and not any(run.size == other.size and other.hidden for other in candidate.values())
        and (name not in candidate or candidate[name].work < run.work * (1 - _ROUNDING))
    ]
    if fewer:
        raise EvidenceError(
            f"{params.run_name}: the candidate's forward runs less of {len(fewer)} layers than the "
            f"baseline's: {listed(fewer)}; if build keeps layers in closures, hooks or functions "
            "set on modules, a copy of the model still calls the original's"
        )


def _work_by_size(runs: LayerRuns) -> dict[Size, float]:
    work: dict[Size, float] = defaultdict(float)
    for run in runs.values():
        work[run.size] += run.work
    return work


def check_kernel_count(
    evidence: Evidence, runs: LayerRuns, params: RunParams, dropped: Iterable[str]
) -> None:
    """Check that one profiled forward on CUDA ran an INT8 kernel for each layer that needs one.

    Layers that share memory may share a matmul. An expert that gets few rows in one forward may get
    none in another, so it is not counted.

    Args:
        evidence: the profiled forward.
        runs: the candidate's layer runs.
        params: the point that the candidate was built for.
        dropped: layers whose results are unused.

    Raises:
        EvidenceError: if fewer kernels ran than layers need.
    """
    if not MODES[params.int8_mode].proof.int8_matmuls:
        return
    most: dict[Size, float] = defaultdict(float)
    layers = {
        name: run
        for name, run in quantized(runs).items()
        if run.quantized_work and name not in set(dropped)
    }
    for run in layers.values():
        most[run.size] = max(most[run.size], run.rows)
    needed = {run.storage: name for name, run in layers.items() if run.rows >= most[run.size] / 2}
    int8 = {kernel.name for kernel in evidence.int8_products}
    launched = sum(
        kernel.calls
        for kernel in evidence.kernels
        if kernel.name in int8 or _TEMPLATE.match(kernel.name)
    )
    if launched < len(needed):
        raise EvidenceError(
            f"{params.run_name}: {len(needed)} INT8 matmuls are needed for one forward, but "
            f"{launched} ran (layers: {listed(needed.values())}); kernels: {evidence.top()}"
        )
