"""Whether the installed packages and the driver go together."""

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
#: Those have lines of their own.
_APART = ("torch", "torchao", "pytest", "pytest-benchmark")
# torch and Triton that compute something else together on a GPU: how versions begin -> where.
_MISCOMPILES = {("2.13.", "3.7.1"): "slice assignments, as in RoPE (pytorch#193183)"}


def python(machine: Machine) -> Iterator[Line]:
    """Name Python and the system."""
    system = f"{platform.system()} {platform.machine()}"
    yield Line(OK, f"Python {platform.python_version()}, {system}")


def requirements(package: str) -> dict[str, Requirement]:
    """Return what an installed package needs on this system, by name; its extras are left out."""
    found = map(Requirement, importlib.metadata.requires(package) or ())
    return {
        canonicalize_name(needed.name): needed
        for needed in found
        if needed.marker is None or needed.marker.evaluate({"extra": ""})
    }


def installed(package: str) -> Line:
    """Return whether a package is there in a version that this one works with."""
    version = package_version(package)
    needed = requirements(OURS)[package]
    remedy = f"pip install {str(needed)!r}"
    if version is None:
        return Line(PROBLEM, f"{package} is not installed", remedy)
    if not needed.specifier.contains(version, prereleases=True):
        return Line(PROBLEM, f"{package} {version}, but {OURS} needs {needed}", remedy)
    return Line(OK, f"{package} {version}")


def others(machine: Machine) -> Iterator[Line]:
    """Check what else this package needs."""
    if (version := package_version(OURS)) is None:
        text = f"{OURS} is not installed: pytest does not find the plugin"
        yield Line(PROBLEM, text, f"pip install {OURS}")
        return
    lines = [installed(name) for name in requirements(OURS) if name not in _APART]
    yield Line(OK, f"{OURS} {version}, with {', '.join(x.text for x in lines if x.mark == OK)}")
    yield from (line for line in lines if line.mark != OK)


def torch(machine: Machine) -> Iterator[Line]:
    """Check torch: its version, and whether it can be loaded."""
    line, report = installed("torch"), machine.torch
    findings = []
    if problem := report.problems.get("torch"):
        # What is not installed cannot be loaded either.
        if package_version("torch") is not None:
            remedy = "pip install --force-reinstall torch"
            findings.append(Line(PROBLEM, f"it cannot be loaded: {problem}", remedy))
    else:
        build = f"CUDA {report.cuda}" if report.cuda else "the CPU"
        build = f"ROCm {report.hip}" if report.hip else build
        findings.append(Line(OK, f"built for {build}"))
        known = package_version("torch")
        if known and report.version and Version(known).public != Version(report.version).public:
            what = f"but Python loads torch {report.version}"
            remedy = "python -c 'import torch; print(torch.__file__)' says where that is"
            findings.append(Line(PROBLEM, what, remedy))
    yield line.with_findings(findings)


def torchao(machine: Machine) -> Iterator[Line]:
    """Check torchao: its version, and whether what is used of it can be loaded."""
    line, problem = installed("torchao"), machine.torch.problems.get("torchao")
    if line.mark != OK or "torch" in machine.torch.problems:
        yield line
        return
    remedy = f"pip install --force-reinstall {str(requirements(OURS)['torchao'])!r}"
    broken = [Line(PROBLEM, f"it cannot be loaded: {problem}", remedy)] if problem else []
    yield line.with_findings(broken)


def triton(machine: Machine) -> Iterator[Line]:
    """Check Triton against the version that this build of torch asks for."""
    needs = requirements("torch") if package_version("torch") is not None else {}
    needed = next((need for name, need in needs.items() if "triton" in name), None)
    name = "triton" if needed is None else needed.name
    version = package_version(name)
    if needed is None:
        there = "is not installed" if version is None else version
        yield Line(OK, f"{name} {there}; this build of torch asks for none")
        return
    wanted = f"{name}{needed.specifier}"
    asks, remedy = f"the installed torch asks for {wanted}", f"pip install {wanted!r}"
    if version is None:
        yield Line(PROBLEM, f"{name} is not installed, but {asks}", remedy)
    elif not needed.specifier.contains(version, prereleases=True):
        yield Line(PROBLEM, f"{name} {version}, but {asks}", remedy)
    else:
        yield Line(OK, f"{name} {version}").with_findings(_miscompiled(version))


def _miscompiled(triton: str) -> list[Line]:
    torch = package_version("torch") or ""
    return [
        Line(WARNING, f"with torch {torch} it computes wrongly: {what}", "pip install -U torch")
        for (of_torch, of_triton), what in _MISCOMPILES.items()
        if torch.startswith(of_torch) and triton.startswith(of_triton)
    ]


def cuda(machine: Machine) -> Iterator[Line]:
    """Check the driver against the CUDA that torch is built for."""
    report, known = machine.torch, nvml.driver_cuda()
    driver = machine.gpus[0][0].driver() if machine.gpus else None
    text = f"driver {driver or 'not known'}"
    text += f", for CUDA {known[0]}.{known[1]}" if known else ""
    if "torch" in report.problems:
        yield Line.unknown("CUDA of torch", "it cannot be loaded").with_findings([Line(OK, text)])
    elif report.cuda is None:
        if machine.gpus:
            remedy = "install a CUDA build of torch, see https://pytorch.org/get-started"
            yield Line(WARNING, f"{text}, but torch is built without CUDA", remedy)
        else:
            yield Line(OK, "CUDA: torch is built without CUDA, and NVML reports no GPU")
    elif report.has_cuda or known is None or known[0] >= int(report.cuda.partition(".")[0]):
        yield Line(OK if known else WARNING, f"CUDA {report.cuda}, {text}")
    else:
        remedy = f"update the driver, or install a torch for CUDA {known[0]}"
        yield Line(PROBLEM, f"CUDA {report.cuda}, but {text} and earlier", remedy)
