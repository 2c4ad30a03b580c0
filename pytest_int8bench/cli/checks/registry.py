"""List the checks of ``int8bench doctor`` and run them in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pytest_int8bench.cli.checks import compilers, gpus, plugins, software
from pytest_int8bench.cli.checks.lines import Line
from pytest_int8bench.cli.checks.machine import Machine
from pytest_int8bench.errors import first_line

#: Name -> check. To add one, write a function that returns lines and add a row.
CHECKS: dict[str, Callable[[Machine], Iterable[Line]]] = {
    "python": software.python,
    "packages": software.others,
    "torch": software.torch,
    "torchao": software.torchao,
    "triton": software.triton,
    "cuda": software.cuda,
    "gpus": gpus.gpus,
    "kernels": gpus.kernels,
    "compiler": compilers.compiler,
    "folders": compilers.folders,
    "pytest": plugins.pytest,
    "plugins": plugins.plugins,
    "environment": plugins.environment,
}


def lines(machine: Machine) -> Iterator[tuple[str, Line]]:
    """Run all checks and yield each line as it comes, with the name of its check."""
    for name, check in CHECKS.items():
        try:
            for line in check(machine):
                yield name, line
        except Exception as error:  # run the other checks even if one fails
            yield name, Line.unknown(name, f"{type(error).__name__}: {first_line(error)}")
