"""Check what ``torch.compile`` needs: a C++ compiler and writable folders."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pytest_int8bench.cli.checks.lines import OK, PROBLEM, WARNING, Line
from pytest_int8bench.cli.checks.machine import Machine
from pytest_int8bench.files import FileError, is_noexec, probe_report

# As Inductor's code does: Python's header, and OpenMP's where it compiles with that.
_IS_LINUX = sys.platform == "linux"
_PROGRAM = f"""#include <Python.h>
{"#include <omp.h>" if _IS_LINUX else ""}
extern "C" int int8bench() {{ return 0; }}
"""
_TIMEOUT_S = 60
_INSTALL = "install a C++ compiler and Python's headers (Debian: apt install g++ python3-dev)"
#: Code that is compiled for a sweep, its results and its report fit into the second.
_FULL_BYTES, _NEARLY_FULL_BYTES = 64 << 20, 2 << 30
_SET_TMPDIR = "set TMPDIR to another folder"


def compiler(machine: Machine) -> Iterator[Line]:
    """Compile a line with the compiler that Inductor calls."""
    problems, command = machine.torch.problems, machine.torch.compiler
    if command is None:
        if problem := problems.get("compiler"):
            yield Line(PROBLEM, f"no C++ compiler for torch.compile: {problem}", _INSTALL)
        else:
            yield Line.unknown("C++ compiler", "torch cannot be loaded")
        return
    with tempfile.TemporaryDirectory(prefix="int8bench-") as folder:
        source = Path(folder, "line.cpp")
        source.write_text(_PROGRAM)
        include = sysconfig.get_paths()["include"]
        openmp = ["-fopenmp"] if _IS_LINUX else []
        flags = [f"-I{include}", *openmp, "-shared", "-fPIC", "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run(
                [command, str(source), *flags],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            yield Line(PROBLEM, f"C++ compiler {command} does not run: {error}", _INSTALL)
            return
    if done.returncode == 0:
        yield Line(OK, f"C++ compiler {command} compiles with Python's headers")
        return
    said = done.stderr.decode(errors="replace").splitlines()
    why = next((line for line in said if "error" in line), said[-1] if said else "it says nothing")
    remedy = "free some space" if os.strerror(errno.ENOSPC) in why else _INSTALL
    yield Line(PROBLEM, f"C++ compiler {command} compiles no line: {why.strip()}", remedy)


def folders(machine: Machine) -> Iterator[Line]:
    """Check the folders that are written to."""
    try:
        Path.cwd()
    except FileNotFoundError:
        yield Line(PROBLEM, "the current folder is gone", "cd to another one")
        return
    report = machine.torch
    if report.inductor_folder is not None:
        remedy = "set TORCHINDUCTOR_CACHE_DIR to another folder"
        yield _folder("compiled code", report.inductor_folder, remedy, runs=True)
    else:
        yield Line.unknown("folder of compiled code", "torch does not say")
    if report.triton_folder is not None:
        remedy = "set TRITON_CACHE_DIR to another folder"
        yield _folder("compiled kernels", report.triton_folder, remedy, runs=True)
    if problem := report.problems.get("temporary folder"):
        yield Line(PROBLEM, problem)  # with what to do
    try:
        yield _folder("temporary files", tempfile.gettempdir(), _SET_TMPDIR)
    except FileNotFoundError as error:  # it has tried several
        yield Line(PROBLEM, f"folder of temporary files: {error.strerror}", _SET_TMPDIR)
    yield _folder("results", ".benchmarks", "call pytest in another folder")


def _folder(what: str, folder: str, remedy: str, *, runs: bool = False) -> Line:
    """Check one of them, which may not exist yet.

    Args:
        what: what is in it.
        folder: its path.
        remedy: what to do where it cannot be used.
        runs: code is loaded from it.
    """
    path = Path(folder).absolute()
    text = f"folder of {what}, {path}"
    try:
        probe_report(path / ".int8bench-doctor")
    except OSError as error:
        return Line(PROBLEM, f"{text}: {error.strerror}", remedy)
    except FileError as error:
        return Line(PROBLEM, f"{text}: {str(error).rpartition(': ')[2]}", remedy)
    if runs and is_noexec(path):
        return Line(PROBLEM, f"{text}: mounted noexec, no code can be loaded from it", remedy)
    there = next(part for part in (path, *path.parents) if part.exists())
    free = shutil.disk_usage(there).free
    text += f": {free / 2**30:.1f} GiB free" if free >= 1 << 30 else f": {free >> 20} MiB free"
    if free < _NEARLY_FULL_BYTES:
        return Line(PROBLEM if free < _FULL_BYTES else WARNING, text, f"free space, or {remedy}")
    return Line(OK, text)
