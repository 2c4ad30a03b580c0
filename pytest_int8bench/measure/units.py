"""Count the units of one batch."""

from __future__ import annotations

import math

from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.ready import Ready
from pytest_int8bench.results.parts import Units
from pytest_int8bench.workloads.workload import UNITS


def units_of(model: Model, ready: Ready) -> Units:
    """Return the number of samples, tokens and other units in a batch.

    Raises:
        WorkloadError: if the workload's units are not valid numbers.
    """
    units = dict(model.workload.units(model.workload.with_axes(model.params)))
    if ready.tokens is not None:
        units["tokens"] = ready.tokens
    unknown = set(units) - set(UNITS)
    if unknown or "samples" not in units:
        raise WorkloadError(
            f"workload {model.workload.name!r}: units must include samples and may include "
            f"{', '.join(UNITS[1:])}; got {', '.join(units) or 'nothing'}"
        )
    for unit, count in units.items():
        if not 0 < float(count) < math.inf:
            raise WorkloadError(
                f"workload {model.workload.name!r}: {unit} must be a number above 0, got {count!r}"
            )
    return Units(**{unit: float(count) for unit, count in units.items()})
