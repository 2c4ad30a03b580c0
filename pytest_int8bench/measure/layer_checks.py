"""Prove of each quantized layer that its matmul ran as the label says.

The baseline's forward says what has to run, a forward of the candidate operator by operator what
each layer's weight was used for, the compiled graphs which of that is compiled, and on CUDA the
kernels of one compiled forward that it ran.
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
#: Work that may differ between forwards of one model is below this part of it.
_ROUNDING = 1e-6
# Templates of Inductor, which need not say what they multiply.
_TEMPLATE = re.compile(r"triton_(tem|mm)_")


def listed(names: Iterable[str]) -> str:
    """Return names for a message; the first few of many."""
    return some(list(names), _NAMES_LISTED)


def quantized(runs: LayerRuns) -> dict[str, LayerRun]:
    """Return the runs of the layers that are quantized."""
    return {name: run for name, run in runs.items() if run.quantized}


def in_other_precision(runs: LayerRuns) -> list[str]:
    """Return the quantized layers whose weights were used for anything but quantized matmuls."""
    return [
        name
        for name, run in quantized(runs).items()
        if run.was_used and not run.hidden and (run.other_work or not run.quantized_work)
    ]


def check_layers(runs: LayerRuns, params: RunParams, *, own_config: bool = False) -> None:
    """Compare what a forward did with each quantized layer with the label.

    Args:
        runs: of the candidate.
        params: the point that it was built for.
        own_config: the user configured the layers, each of which may have a precision of its own.

    Raises:
        EvidenceError: if the forward used no quantized layer, or used one, in a mode that is proven
            by its matmuls, for another matmul.
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
    """Compare how much of each layer the forwards of baseline and candidate ran.

    A router may send a row to one expert here and to another there, but to one of the same size.

    Raises:
        EvidenceError: if the candidate ran less, because it calls layers of another model, for
            example.
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
    """Compare the INT8 kernels of one profiled forward on CUDA with the layers that need one.

    Layers that share memory may share a matmul. An expert that few rows reach in one forward may
    get none in another, and is not counted.

    Args:
        evidence: the profiled forward.
        runs: of the candidate.
        params: the point that it was built for.
        dropped: layers whose results nobody uses.

    Raises:
        EvidenceError: if there are fewer kernels.
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
