"""Save profiles of points: a trace of one forward and a table of its kernels.

Both come from the forward that provides the evidence, which runs after the timing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import profile

from pytest_int8bench.errors import first_line
from pytest_int8bench.files import replace_text
from pytest_int8bench.measure.evidence import Keep, Kernel
from pytest_int8bench.params import RunParams
from pytest_int8bench.printing import one_line
from pytest_int8bench.results.journal import journal_folder
from pytest_int8bench.workloads.registry import OLMOEARTH

_TRACE, _TABLE = ".trace.json.gz", ".kernels.csv"
#: Columns of the table. Times are in microseconds; ``share`` is the fraction (0 to 1) of the sum of
#: ``total_us``.
COLUMNS = ("device", "kernel", "calls", "total_us", "share", "us_per_call")
# File systems allow 255 bytes, which must also hold a number and the suffix.
_LONGEST = 200
_UNSAFE = re.compile(r"[^A-Za-z0-9.,+=_-]+")


class Profiles:
    """Writes the profiles of a session.

    Failures here raise no errors, because the point has already been measured.

    Attributes:
        traces: locations of the written traces, including those of points that failed later.
        problems: what could not be written, and why.

    Args:
        folder: output folder, created if missing; None for ``profiles`` beside the journals.
        every: also profile points without ``profiler_enabled``.
        root: the project's folder, which holds the journals.
        start: the session's working directory, to which trace paths are relative.
    """

    def __init__(self, folder: Path | None, *, every: bool, root: Path, start: Path) -> None:
        self.traces: list[str] = []
        self.problems: list[str] = []
        self._every = every
        self._folder = folder
        self._root = root
        self._start = start

    def wants(self, params: RunParams) -> bool:
        """Return whether to profile the point."""
        return self._every or params.profiler_enabled

    def writer(self, workload: str, run_name: str, device: torch.device) -> Keep:
        """Return a function that writes a point's profile and returns the path of its trace."""

        def keep(profiler: profile, kernels: Sequence[Kernel]) -> str | None:
            made: list[Path] = []
            try:
                trace = self._new_file(workload, run_name)
                made.append(trace)
                profiler.export_chrome_trace(str(trace))
                made.append(trace.with_name(trace.name.removesuffix(_TRACE) + _TABLE))
                _write_table(made[1], kernels, device)
            except (OSError, RuntimeError) as error:
                for path in made:  # remove partial files
                    path.unlink(missing_ok=True)
                self.problems.append(f"{run_name}: {type(error).__name__}: {first_line(error)}")
                return None
            self.traces.append(_from(self._start, trace))
            return self.traces[-1]

        return keep

    def _new_file(self, workload: str, run_name: str) -> Path:
        """Create an empty trace file with an unused name: existing traces belong to saved results,
        and other processes may write here too."""
        folder = self._folder or journal_folder(self._root) / "profiles"
        folder.mkdir(parents=True, exist_ok=True)
        stem = file_stem(workload, run_name)
        number = 1
        while True:
            path = folder / f"{stem}{f'-{number}' if number > 1 else ''}{_TRACE}"
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                number += 1
            else:
                return path


def file_stem(workload: str, run_name: str) -> str:
    """Return the start of a point's file name, safe in every file system, shell and URL. Names that
    had to be changed carry a hash, so that they stay distinct."""
    name = run_name if workload == OLMOEARTH else f"{workload}_{run_name}"
    safe = _UNSAFE.sub("-", name).lstrip(".-")
    if safe != name or len(safe) > _LONGEST:
        safe = f"{safe[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return safe


def _from(start: Path, path: Path) -> str:
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:  # another drive
        return path.as_posix()


def _write_table(path: Path, kernels: Sequence[Kernel], device: torch.device) -> None:
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else "CPU operators"
    total_s = sum(kernel.seconds for kernel in kernels)
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for kernel in kernels:
        micros = kernel.seconds * 1e6
        figures = (f"{micros:.3f}", f"{kernel.seconds / total_s:.6f}")
        texts = (_defused(name), _defused(kernel.name))
        table.writerow((*texts, kernel.calls, *figures, f"{micros / kernel.calls:.3f}"))
    replace_text(path, text.getvalue())


def _defused(text: str) -> str:
    """Return one line that a spreadsheet does not run as a formula: formulas get a leading quote,
    as OWASP recommends (owasp.org/www-community/attacks/CSV_Injection)."""
    line = one_line(text)  # csv does not quote a lone carriage return, which would start a new row
    return f"'{line}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else line
