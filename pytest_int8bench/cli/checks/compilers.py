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

# Inductor's code includes Python's header, and OpenMP's header if Inductor compiles with OpenMP.
_IS_LINUX = sys.platform == "linux"
_PROGRAM = f"""#include <Python.h>
{"#include <omp.h>" if _IS_LINUX else ""}
extern "C" int int8bench() {{ return 0; }}
"""
_TIMEOUT_S = 60
_INSTALL = "install a C++ compiler and Python's headers (Debian: apt install g++ python3-dev)"
#: With less free space than the first, a disk counts as full; the second has room for a sweep's
#: compiled code and results.
_FULL_BYTES, _NEARLY_FULL_BYTES = 64 << 20, 2 << 30
_SET_TMPDIR = "set TMPDIR to another folder"


def compiler(machine: Machine) -> Iterator[Line]:
    """Compile a test program with the compiler that Inductor uses."""
    problems, command = machine.torch.problems, machine.torch.compiler
    if command is None:
        if problem := problems.get("compiler"):
            yield Line(PROBLEM, f"no C++ compiler for torch.compile: {problem}", _INSTALL)
        else:
            yield Line.unknown("C++ compiler", "torch cannot be imported")
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
    why = next((line for line in said if "error" in line), said[-1] if said else "no message")
    remedy = "free some space" if os.strerror(errno.ENOSPC) in why else _INSTALL
    text = f"C++ compiler {command} cannot compile a test program: {why.strip()}"
    yield Line(PROBLEM, text, remedy)


def folders(machine: Machine) -> Iterator[Line]:
    """Check the folders to which files are written."""
    try:
        Path.cwd()
    except FileNotFoundError:
        yield Line(PROBLEM, "the current folder no longer exists", "cd to another one")
        return
    report = machine.torch
    if report.inductor_folder is not None:
        remedy = "set TORCHINDUCTOR_CACHE_DIR to another folder"
        yield _folder("compiled code", report.inductor_folder, remedy, runs=True)
    else:
        yield Line.unknown("folder of compiled code", "torch did not report it")
    if report.triton_folder is not None:
        remedy = "set TRITON_CACHE_DIR to another folder"
        yield _folder("compiled kernels", report.triton_folder, remedy, runs=True)
    if problem := report.problems.get("temporary folder"):
        yield Line(PROBLEM, problem)  # the problem includes its remedy
    try:
        yield _folder("temporary files", tempfile.gettempdir(), _SET_TMPDIR)
    except FileNotFoundError as error:  # none of the folders that Python tries is usable
        yield Line(PROBLEM, f"folder of temporary files: {error.strerror}", _SET_TMPDIR)
    yield _folder("results", ".benchmarks", "run pytest in another folder")


def _folder(what: str, folder: str, remedy: str, *, runs: bool = False) -> Line:
    """Check a folder, which may not exist yet.

    Args:
        what: a description of the folder's contents.
        folder: its path.
        remedy: what to do if the folder cannot be used.
        runs: whether code is loaded from the folder.
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
        return Line(PROBLEM, f"{text}: mounted noexec, so code cannot be loaded from it", remedy)
    there = next(part for part in (path, *path.parents) if part.exists())
    free = shutil.disk_usage(there).free
    text += f": {free / 2**30:.1f} GiB free" if free >= 1 << 30 else f": {free >> 20} MiB free"
    if free < _NEARLY_FULL_BYTES:
        return Line(PROBLEM if free < _FULL_BYTES else WARNING, text, f"free space, or {remedy}")
    return Line(OK, text)
