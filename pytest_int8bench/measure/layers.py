"""Check how a model's linear layers ran in one forward, operator by operator and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from pytest_int8bench.compiler.graphs import Graph
from pytest_int8bench.errors import first_line
from pytest_int8bench.measure.evidence import Evidence
from pytest_int8bench.measure.layer_checks import (
    check_kernel_count,
    check_layers,
    in_other_precision,
    listed,
    quantized,
)
from pytest_int8bench.measure.layer_runs import LayerRuns, layer_runs
from pytest_int8bench.measure.memory import free_memory, oom_of, release
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import coverage
from pytest_int8bench.quantization.modes import MODES
from pytest_int8bench.quantization.stored import stored_weight

#: Fraction of kernel time outside compiled graphs above which a remark is made.
EAGER_SHARE = 0.05


@dataclass(frozen=True)
class Layers:
    """Findings about the linear layers of a model in one forward."""

    runs: LayerRuns | None = None
    """Use of each weight in a forward; None if the forward failed."""
    unused: tuple[str, ...] = ()
    """Quantized layers whose weights have no part in the outputs."""
    outside: tuple[str, ...] = ()
    """Layers that ran eagerly beside the compiled graphs."""
    other_precision: tuple[str, ...] = ()
    """Quantized layers that ran other matmuls, as the user configured them."""
    problem: str | None = None
    """Why no forward could be inspected operator by operator."""
    eager_share: float = 0.0
    """Fraction of kernel time spent outside the compiled graphs."""

    def remarks(self, precision: str) -> list[str]:
        """Return remarks for the result."""
        lines = []
        if self.problem is not None:
            lines.append(f"not proven layer by layer: {self.problem}")
        if self.eager_share > EAGER_SHARE and not self.outside:
            lines.append(
                f"{self.eager_share:.0%} of the kernels' time is spent outside the compiled graphs"
            )
        if self.runs is None:
            return lines
        count = len(quantized(self.runs))
        if self.unused:
            lines.append(
                f"the forward does not use {len(self.unused)} of {count} quantized layers: "
                f"{listed(self.unused)}"
            )
        if self.other_precision:
            lines.append(
                f"{len(self.other_precision)} of {count} quantized layers ran matmuls that are not "
                f"{precision}: {listed(self.other_precision)}"
            )
        if self.outside:
            lines.append(
                f"{len(self.outside)} of {len(self.runs)} linear layers ran eagerly, outside the "
                f"compiled graphs: {listed(self.outside)}"
            )
        return lines


@dataclass(frozen=True)
class Forward:
    """One forward, operator by operator."""

    runs: LayerRuns | None
    """Use of each weight; None if the forward failed."""
    problem: str | None = None
    """Why it failed."""

    def joined(self, eager: Forward) -> Forward:
        """Combine this forward of a model's graphs with the work outside the graphs.

        Args:
            eager: an eager forward of the same model.
        """
        if self.runs is None or eager.runs is None:
            return self if self.runs is None else eager
        more = {name: run for name, run in eager.runs.items() if run.work > self.runs[name].work}
        unseen = {name: eager.runs[name] for name, run in self.runs.items() if not run.was_used}
        return Forward({**self.runs, **unseen, **more})


def look_at_forward(
    model: nn.Module, run: Callable[[], object], graphs: Sequence[Graph] = ()
) -> Forward:
    """Run a forward of ``model`` operator by operator. A failure is not an error: it may run out of
    memory although the compiled forward fits."""
    try:
        return Forward(layer_runs(model, run, graphs))
    except Exception as error:
        problem = f"an eager forward raised {type(error).__name__}: {first_line(error)}"
        if oom_of(error) is not None:
            problem = "an eager forward ran out of memory"
        release(error)
    free_memory()
    return Forward(None, problem)


def check_every_layer(
    model: nn.Module,
    forward: Forward,
    evidence: Evidence,
    graphs: Sequence[Graph] | None,
    params: RunParams,
) -> Layers:
    """Compare a forward with the label, the graphs and the kernels that ran.

    Args:
        model: the eager model.
        forward: one forward of it, operator by operator.
        evidence: a profiled forward of the point, compiled if the point is.
        graphs: the graphs that ran in it; None for a point that is not compiled.
        params: the point.

    Raises:
        EvidenceError: if a quantized layer did not run as labelled.
    """
    runs, eager_share = forward.runs, evidence.eager_s / evidence.total_s
    if runs is None:
        return Layers(problem=forward.problem, eager_share=eager_share)
    used = [name for name, run in runs.items() if run.was_used]
    outside, dropped = _compare_graphs(model, used, graphs)
    if not params.int8_enabled:
        return Layers(runs, outside=tuple(outside), eager_share=eager_share)
    own_config = coverage(model).mode == "custom"
    check_layers(runs, params, own_config=own_config)
    if params.gpu_type == "cuda":
        check_kernel_count(evidence, runs, params, dropped)
    unused = [n for n, run in quantized(runs).items() if not run.was_used or n in dropped]
    by_matmuls = MODES[params.int8_mode].proof.int8_matmuls
    other = in_other_precision(runs) if own_config and by_matmuls else []
    return Layers(runs, tuple(unused), tuple(outside), tuple(other), eager_share=eager_share)


def _compare_graphs(
    model: nn.Module, used: Sequence[str], graphs: Sequence[Graph] | None
) -> tuple[list[str], list[str]]:
    """Return the layers in no graph and the layers that graphs drop; both empty without graphs."""
    outside: list[str] = []
    dropped: list[str] = []
    for name in used if graphs is not None else ():
        weight = stored_weight(model.get_submodule(name))
        if any(graph.computes_with(weight) for graph in graphs or ()):
            continue
        (dropped if any(graph.drops(weight) for graph in graphs or ()) else outside).append(name)
    return outside, dropped
