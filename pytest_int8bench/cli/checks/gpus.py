"""Check the GPUs, their current state, and the kernels that run on them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pytest_int8bench import nvml
from pytest_int8bench.cli.checks.lines import OK, PROBLEM, WARNING, Line
from pytest_int8bench.cli.checks.machine import Machine
from pytest_int8bench.cli.checks.torch_probe import Device
from pytest_int8bench.errors import ClearError
from pytest_int8bench.kernels import dispatch
from pytest_int8bench.words import plural

_CPU_ONLY = "measure on the GPU that you deploy on; CPU results do not carry over"
_NO_NVML = "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility"


def gpus(machine: Machine) -> Iterator[Line]:
    """Describe each GPU and check whether anything is slowing it down."""
    seen = [device.uuid for device in machine.torch.devices if device.uuid]
    if machine.gpus is None:
        what = f"torch sees {plural(len(seen), 'GPU')}" if seen else "torch sees none"
        remedy = _NO_NVML if seen else _CPU_ONLY
        yield Line.unknown("state of the GPUs", f"NVML does not answer; {what}", remedy)
        return
    if not machine.gpus:
        yield Line(WARNING, "this machine has no GPU", _CPU_ONLY)
    for index, (gpu, uuids) in enumerate(machine.gpus):
        is_used = not seen or any(uuid.endswith(one) for one in seen for uuid in uuids)
        yield _gpu(index, gpu, uuids, is_used=is_used)
    if machine.gpus and not seen and "torch" not in machine.torch.problems:
        yield _unseen(machine)


def _unseen(machine: Machine) -> Line:
    """Return why torch sees no GPU although the machine has one."""
    problem = machine.torch.problems.get("devices") or machine.torch.cuda_problem
    names = nvml.visible()
    if nvml.VISIBLE in os.environ and not names:
        text, remedy = f"{nvml.VISIBLE}={os.environ[nvml.VISIBLE]!r} hides all GPUs", "unset it"
        return Line(WARNING, text, remedy)
    if machine.torch.cuda is None and machine.torch.hip is None:
        return Line(WARNING, "torch sees no GPU: it is built without CUDA", _CPU_ONLY)
    return Line(PROBLEM, f"torch sees no GPU: {problem or 'no reason given'}", "nvidia-smi")


def _gpu(index: int, gpu: nvml.Gpu, uuids: list[str], *, is_used: bool) -> Line:
    capability, memory = gpu.capability(), gpu.memory_bytes()
    parts = [
        f"GPU {index}, {gpu.name() or 'name not known'}",
        f"sm{capability[0]}{capability[1]}" if capability else "compute capability not known",
        f"{memory / 2**30:.0f} GiB" if memory else "memory not known",
    ]
    if not is_used:
        return Line(OK, f"{', '.join(parts)}: not visible to this process")
    findings = [_mig(gpu, uuids), _power(gpu), _clocks(gpu), _others(gpu)]
    return Line(OK, ", ".join(parts)).with_findings(findings)


def _mig(gpu: nvml.Gpu, uuids: list[str]) -> Line:
    mode = gpu.mig()
    if mode != "on":
        return Line(OK, "MIG not known" if mode is None else f"MIG {mode}")
    if not uuids:
        text, remedy = "MIG on, but no instance exists", "nvidia-smi mig -cgi ... -C, or -mig 0"
        return Line(PROBLEM, text, remedy)
    text = f"MIG on, {plural(len(uuids), 'instance')}: "
    text += "instances share clocks and power, and energy is not measured"
    return Line(WARNING, text, "nvidia-smi -mig 0 to measure the whole GPU")


def _power(gpu: nvml.Gpu) -> Line:
    limit, default = gpu.power_limit_w(), gpu.default_power_limit_w()
    if limit is None:
        return Line(OK, "power limit not known")
    if default is not None and limit < default:
        text = f"power limit {limit:.0f} W of {default:.0f} W"
        return Line(WARNING, text, f"nvidia-smi -pl {default:.0f}")
    return Line(OK, f"power limit {limit:.0f} W")


def _clocks(gpu: nvml.Gpu) -> Line:
    state, most = gpu.state(), gpu.max_sm_clock_mhz()
    clock, heat = state["sm_clock_mhz"], state["temperature_c"]
    text = "clock not known" if clock is None else f"{clock} MHz now"
    text += "" if clock is None or most is None else f" of {most} MHz"
    text += "" if heat is None else f" at {heat} C"
    reasons = gpu.throttle_reasons()
    if reasons is None:
        return Line(OK, f"{text}, throttling not known")
    if reasons:
        text = f"throttled now ({', '.join(reasons)}): {text}"
        return Line(PROBLEM, text, "let it cool down; check cooling and power supply")
    return Line(OK, text)


def _others(gpu: nvml.Gpu) -> Line:
    processes = gpu.processes()
    if processes is None:
        return Line(OK, "processes not known")
    if not processes:  # the child process that loaded torch has ended
        return Line(OK, "not in use")
    return Line(
        WARNING,
        f"in use by other processes: {len(processes)}",
        "end other processes before you measure",
    )


def kernels(machine: Machine) -> Iterator[Line]:
    """Report which kernels run here, and why others do not."""
    report = machine.torch
    try:
        forced = dispatch.forced_kernel()
    except ClearError as error:
        yield Line(PROBLEM, str(error), f"unset {dispatch.KERNEL_VARIABLE}")
        return
    if problem := report.problems.get("torch") or report.problems.get("devices"):
        yield Line.unknown("fused kernels", problem)
        return
    # Identical GPUs share one line.
    yield from dict.fromkeys(_kernels(device, forced) for device in report.devices)


def _kernels(device: Device, forced: str | None) -> Line:
    if device.problem is not None:
        text = f"{device.name} cannot run kernels: {device.problem}"
        return Line(PROBLEM, text, "install a build of torch for this GPU")
    if device.fused_problem is not None:
        return Line(WARNING, device.fused_problem, "INT8 runs on TorchAO's kernels here")
    text = f"kernels on {device.name}: {', '.join(device.kernels)}"
    text += "".join(f"; not available: {name} ({why})" for name, why in device.unmet.items())
    text += "".join(f"; failed: {name} ({why})" for name, why in device.failed.items())
    # Kernels that are meant for other devices are not a problem.
    remedy = "slower kernels run instead; install the Triton version that torch requires"
    line = Line(WARNING, text, remedy) if device.failed else Line(OK, text)
    if forced is None:
        return line
    mark = WARNING if forced in device.kernels else PROBLEM
    what = f"{dispatch.KERNEL_VARIABLE}={forced} rules out all other INT8 matmul kernels"
    return line.with_findings([Line(mark, what, f"unset {dispatch.KERNEL_VARIABLE}")])
