"""Check that the installed packages and the driver are compatible."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pytest_int8bench import nvml
from pytest_int8bench.cli.checks.lines import OK, PROBLEM, WARNING, Line
from pytest_int8bench.cli.checks.machine import Machine
from pytest_int8bench.environment import package_version

OURS = "pytest-int8bench"
#: Packages that other checks report on a line of their own.
_CHECKED_SEPARATELY = ("torch", "torchao", "pytest", "pytest-benchmark")
# Prefixes of a torch and a Triton version that together give wrong results on a GPU -> for which
# code.
_MISCOMPILES = {("2.13.", "3.7.1"): "slice assignments, as in RoPE (pytorch#193183)"}


def python(machine: Machine) -> Iterator[Line]:
    """Report the Python version and the operating system."""
    system = f"{platform.system()} {platform.machine()}"
    yield Line(OK, f"Python {platform.python_version()}, {system}")


def requirements(package: str) -> dict[str, Requirement]:
    """Map names to an installed package's requirements on this system, ignoring its extras."""
    found = map(Requirement, importlib.metadata.requires(package) or ())
    return {
        canonicalize_name(needed.name): needed
        for needed in found
        if needed.marker is None or needed.marker.evaluate({"extra": ""})
    }


def installed(package: str) -> Line:
    """Check that a package is installed in a version that this package supports."""
    version = package_version(package)
    needed = requirements(OURS)[package]
    remedy = f"pip install {str(needed)!r}"
    if version is None:
        return Line(PROBLEM, f"{package} is not installed", remedy)
    if not needed.specifier.contains(version, prereleases=True):
        return Line(PROBLEM, f"{package} {version}, but {OURS} needs {needed}", remedy)
    return Line(OK, f"{package} {version}")


def others(machine: Machine) -> Iterator[Line]:
    """Check the other packages that this package requires."""
    if (version := package_version(OURS)) is None:
        text = f"{OURS} is not installed, so pytest does not find the plugin"
        yield Line(PROBLEM, text, f"pip install {OURS}")
        return
    lines = [installed(name) for name in requirements(OURS) if name not in _CHECKED_SEPARATELY]
    yield Line(OK, f"{OURS} {version}, with {', '.join(x.text for x in lines if x.mark == OK)}")
    yield from (line for line in lines if line.mark != OK)


def torch(machine: Machine) -> Iterator[Line]:
    """Check torch's version and whether it can be imported."""
    line, report = installed("torch"), machine.torch
    findings = []
    if problem := report.problems.get("torch"):
        # If torch is not installed, do not report the failed import as a second problem.
        if package_version("torch") is not None:
            remedy = "pip install --force-reinstall torch"
            findings.append(Line(PROBLEM, f"it cannot be imported: {problem}", remedy))
    else:
        build = f"CUDA {report.cuda}" if report.cuda else "the CPU"
        build = f"ROCm {report.hip}" if report.hip else build
        findings.append(Line(OK, f"built for {build}"))
        known = package_version("torch")
        if known and report.version and Version(known).public != Version(report.version).public:
            what = f"but Python imports torch {report.version}"
            remedy = "find it with python -c 'import torch; print(torch.__file__)'"
            findings.append(Line(PROBLEM, what, remedy))
    yield line.with_findings(findings)


def torchao(machine: Machine) -> Iterator[Line]:
    """Check torchao's version and whether the parts used here can be imported."""
    line, problem = installed("torchao"), machine.torch.problems.get("torchao")
    if line.mark != OK or "torch" in machine.torch.problems:
        yield line
        return
    remedy = f"pip install --force-reinstall {str(requirements(OURS)['torchao'])!r}"
    broken = [Line(PROBLEM, f"it cannot be imported: {problem}", remedy)] if problem else []
    yield line.with_findings(broken)


def triton(machine: Machine) -> Iterator[Line]:
    """Check Triton against the version that this build of torch requires."""
    needs = requirements("torch") if package_version("torch") is not None else {}
    needed = next((need for name, need in needs.items() if "triton" in name), None)
    name = "triton" if needed is None else needed.name
    version = package_version(name)
    if needed is None:
        there = "is not installed" if version is None else version
        yield Line(OK, f"{name} {there}; this build of torch does not require it")
        return
    wanted = f"{name}{needed.specifier}"
    asks, remedy = f"the installed torch requires {wanted}", f"pip install {wanted!r}"
    if version is None:
        yield Line(PROBLEM, f"{name} is not installed, but {asks}", remedy)
    elif not needed.specifier.contains(version, prereleases=True):
        yield Line(PROBLEM, f"{name} {version}, but {asks}", remedy)
    else:
        yield Line(OK, f"{name} {version}").with_findings(_miscompiled(version))


def _miscompiled(triton: str) -> list[Line]:
    torch = package_version("torch") or ""
    return [
        Line(WARNING, f"with torch {torch} it miscompiles {what}", "pip install -U torch")
        for (of_torch, of_triton), what in _MISCOMPILES.items()
        if torch.startswith(of_torch) and triton.startswith(of_triton)
    ]


def cuda(machine: Machine) -> Iterator[Line]:
    """Check that the driver supports the CUDA version for which torch is built."""
    report, known = machine.torch, nvml.driver_cuda()
    driver = machine.gpus[0][0].driver() if machine.gpus else None
    text = f"driver {driver or 'not known'}"
    text += f", for CUDA {known[0]}.{known[1]}" if known else ""
    if "torch" in report.problems:
        unknown = Line.unknown("torch's CUDA version", "torch cannot be imported")
        yield unknown.with_findings([Line(OK, text)])
    elif report.cuda is None:
        if machine.gpus:
            remedy = "install a CUDA build of torch, see https://pytorch.org/get-started"
            yield Line(WARNING, f"{text}, but torch is built without CUDA", remedy)
        else:
            yield Line(OK, "CUDA: torch is built without CUDA, and NVML reports no GPU")
    elif report.has_cuda or known is None or known[0] >= int(report.cuda.partition(".")[0]):
        yield Line(OK if known else WARNING, f"CUDA {report.cuda}, {text}")
    else:
        remedy = f"update the driver, or install a torch build for CUDA {known[0]}"
        yield Line(PROBLEM, f"CUDA {report.cuda}, but {text} and earlier", remedy)
