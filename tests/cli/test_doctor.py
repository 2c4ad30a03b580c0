"""Test the lines of ``int8bench doctor`` on simulated machines."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench.cli.checks import registry, torch_probe
from pytest_int8bench.cli.checks.lines import OK, PROBLEM, WARNING, Line
from pytest_int8bench.cli.checks.torch_probe import Device, TorchReport
from pytest_int8bench.cli.main import main
from pytest_int8bench.kernels import dispatch, table
from toys.machines import A100, H200, HEALTHY, UUID, Nvml, put

GIB = 1 << 30
NOEXEC = getattr(os, "ST_NOEXEC", 8)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("INT8BENCH_PRODUCT", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING"):
        monkeypatch.delenv(name, raising=False)
    with_room(monkeypatch, 100 * GIB)


def with_room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def torch_says(**changes: Any) -> TorchReport:
    return dataclasses.replace(HEALTHY, **changes)


def check(capsys: pytest.CaptureFixture[str], name: str) -> tuple[int, list[Line]]:
    """Return the exit code of the command and the lines of one check."""
    code = main(["doctor", "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    block = json.loads(out)["int8bench_doctor"]
    assert (block["schema"], block["exit_code"]) == (1, code)
    lines = [dict(entry) for entry in block["lines"]]
    assert {line["check"] for line in lines} == set(registry.CHECKS)
    return code, [Line(**line) for line in lines if line.pop("check") == name]


CAN = "kernels on NVIDIA A100-SXM4-80GB: pointers, quantize_rows, dequantize"
CANNOT = (
    "not available: specialized (needs sm90, this is sm80)",
    "not available: tma (needs sm90 or later, this is sm80)",
)
GPU = "GPU 0, NVIDIA H200, sm90, 139 GiB"
FREE = "345 MHz now of 1980 MHz at 31 C; not in use"
LIMIT = "power limit 700 W"
MACHINES: dict[str, tuple[dict[str, Any], str, list[Line]]] = {
    "healthy": ({}, "gpus", [Line(OK, f"{GPU}; MIG off; {LIMIT}; {FREE}")]),
    "throttled": (
        {"nvml": Nvml(CurrentClocksEventReasons=0x40 | 0x80, ClockInfo=1200, Temperature=91)},
        "gpus",
        [
            Line(
                PROBLEM,
                f"{GPU}; MIG off; {LIMIT}; throttled now (thermal (hardware), power brake): "
                "1200 MHz now of 1980 MHz at 91 C; not in use",
                "let it cool down; check cooling and power supply",
            )
        ],
    ),
    "busy": (
        {"nvml": Nvml(ComputeRunningProcesses=[SimpleNamespace(pid=1)] * 2)},
        "gpus",
        [
            Line(
                WARNING,
                f"{GPU}; MIG off; {LIMIT}; 345 MHz now of 1980 MHz at 31 C; in use by other "
                "processes: 2",
                "end other processes before you measure",
            )
        ],
    ),
    "power": (
        {"nvml": Nvml(PowerManagementLimit=400_000)},
        "gpus",
        [
            Line(
                WARNING,
                f"{GPU}; MIG off; power limit 400 W of 700 W; {FREE}",
                "nvidia-smi -pl 700",
            )
        ],
    ),
    "mig": (
        {"nvml": Nvml(MigMode=(1, 1), MaxMigDeviceCount=1, MigDeviceHandleByIndex="instance")},
        "gpus",
        [
            Line(
                WARNING,
                f"{GPU}; MIG on, 1 instance: instances share clocks and power, and energy is "
                f"not measured; {LIMIT}; {FREE}",
                "nvidia-smi -mig 0 to measure the whole GPU",
            )
        ],
    ),
    "mig-without-instance": (
        {"nvml": Nvml(MigMode=(1, 1)), "torch": torch_says(devices=(Device("cpu"),))},
        "gpus",
        [
            Line(
                PROBLEM,
                f"{GPU}; MIG on, but no instance exists; {LIMIT}; {FREE}",
                "nvidia-smi mig -cgi ... -C, or -mig 0",
            ),
            Line(PROBLEM, "torch sees no GPU: no reason given", "nvidia-smi"),
        ],
    ),
    "nvml-knows-little": (
        {
            "nvml": Nvml(
                **dict.fromkeys(("Name", "CudaComputeCapability", "MemoryInfo", "MigMode")),
                **dict.fromkeys(("PowerManagementLimit", "ClockInfo", "Temperature")),
                **dict.fromkeys(("CurrentClocksEventReasons", "ComputeRunningProcesses")),
            )
        },
        "gpus",
        [
            Line(
                OK,
                "GPU 0, name not known, compute capability not known, memory not known; MIG not "
                "known; power limit not known; clock not known, throttling not known; processes "
                "not known",
            )
        ],
    ),
    "no-nvml": (
        {"nvml": None},
        "gpus",
        [
            Line(
                WARNING,
                "state of the GPUs: not known: NVML does not answer; torch sees 1 GPU",
                "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility",
            )
        ],
    ),
    "other-gpu": (
        {"nvml": Nvml(UUID="GPU-other", CurrentClocksEventReasons=0x40)},
        "gpus",
        [Line(OK, f"{GPU}: not visible to this process")],
    ),
    "a100": (
        {"torch": torch_says(devices=(A100, A100))},
        "kernels",
        [Line(OK, "; ".join((CAN, *CANNOT)))],
    ),
    "selftest": (
        {
            "torch": torch_says(
                devices=(dataclasses.replace(H200, kernels=("tma",), failed={"specialized": "?"}),)
            )
        },
        "kernels",
        [
            Line(
                WARNING,
                "kernels on NVIDIA H200: tma; failed: specialized (?)",
                "slower kernels run instead; install the Triton version that torch requires",
            )
        ],
    ),
    "no-image": (
        {"torch": torch_says(devices=(Device("NVIDIA X", UUID, problem="no kernel image"),))},
        "kernels",
        [
            Line(
                PROBLEM,
                "NVIDIA X cannot run kernels: no kernel image",
                "install a build of torch for this GPU",
            )
        ],
    ),
    "driver": (
        {
            "nvml": Nvml(DriverVersion="535.1", CudaDriverVersion=12020),
            "torch": torch_says(devices=(Device("cpu"),), cuda_problem="driver too old"),
        },
        "cuda",
        [
            Line(
                PROBLEM,
                "CUDA 13.0, but driver 535.1, for CUDA 12.2 and earlier",
                "update the driver, or install a torch build for CUDA 12",
            )
        ],
    ),
    "driver-of-an-earlier-minor": (
        {"nvml": Nvml(CudaDriverVersion=13000), "torch": torch_says(cuda="13.2")},
        "cuda",
        [Line(OK, "CUDA 13.2, driver 580.159, for CUDA 13.0")],
    ),
    "built-for-the-cpu": (
        {"torch": torch_says(cuda=None, devices=(Device("cpu"),))},
        "cuda",
        [
            Line(
                WARNING,
                "driver 580.159, for CUDA 13.0, but torch is built without CUDA",
                "install a CUDA build of torch, see https://pytorch.org/get-started",
            )
        ],
    ),
    "triton": (
        {"triton": "3.7.1"},
        "triton",
        [
            Line(
                PROBLEM,
                "triton 3.7.1, but the installed torch requires triton==3.6.0",
                "pip install 'triton==3.6.0'",
            )
        ],
    ),
    "no-triton": (
        {"triton": None},
        "triton",
        [
            Line(
                PROBLEM,
                "triton is not installed, but the installed torch requires triton==3.6.0",
                "pip install 'triton==3.6.0'",
            )
        ],
    ),
    "miscompiles": (
        {"torch_version": "2.13.0", "triton": "3.7.1", "asks": "triton==3.7.1"},
        "triton",
        [
            Line(
                WARNING,
                "triton 3.7.1; with torch 2.13.0 it miscompiles slice assignments, as in "
                "RoPE (pytorch#193183)",
                "pip install -U torch",
            )
        ],
    ),
    "old-torchao": (
        {"torchao": "0.15.0"},
        "torchao",
        [
            Line(
                PROBLEM,
                "torchao 0.15.0, but pytest-int8bench needs torchao>=0.18",
                "pip install 'torchao>=0.18'",
            )
        ],
    ),
    "no-torchao": (
        {"torchao": None},
        "torchao",
        [Line(PROBLEM, "torchao is not installed", "pip install 'torchao>=0.18'")],
    ),
    "broken-torchao": (
        {"torch": torch_says(problems={"torchao": "ImportError: int8"})},
        "torchao",
        [
            Line(
                PROBLEM,
                "torchao 0.18.0; it cannot be imported: ImportError: int8",
                "pip install --force-reinstall 'torchao>=0.18'",
            )
        ],
    ),
    "broken-torch": (
        {"torch": TorchReport(problems={"torch": "SIGSEGV"})},
        "torch",
        [
            Line(
                PROBLEM,
                "torch 2.11.0+cu130; it cannot be imported: SIGSEGV",
                "pip install --force-reinstall torch",
            )
        ],
    ),
    "two-torches": (
        {"torch": torch_says(version="2.12.0")},
        "torch",
        [
            Line(
                PROBLEM,
                "torch 2.11.0+cu130; built for CUDA 13.0; but Python imports torch 2.12.0",
                "find it with python -c 'import torch; print(torch.__file__)'",
            )
        ],
    ),
    "damaged-version": (
        {"torch": torch_says(version="unknown")},
        "torch",
        [Line(WARNING, "torch: not known: InvalidVersion: Invalid version: 'unknown'")],
    ),
    "plugins": (
        {"plugins": ("pytest-xdist", "Pytest_Cov", "pytest-timeout", "pytest-xdist")},
        "plugins",
        [
            Line(
                WARNING,
                "pytest-cov is installed: --cov traces Python, except while the timer runs",
                "run with --no-cov",
            ),
            Line(
                WARNING,
                "pytest-xdist is installed: with -n, processes share cores and GPUs",
                "run at most one worker per GPU",
            ),
            Line(OK, "other plugins, not known to affect timings: pytest-timeout"),
        ],
    ),
    "no-compiler": (
        {"torch": torch_says(compiler=None, problems={"compiler": "InvalidCxxCompiler: none"})},
        "compiler",
        [
            Line(
                PROBLEM,
                "no C++ compiler for torch.compile: InvalidCxxCompiler: none",
                "install a C++ compiler and Python's headers (Debian: apt install g++ python3-dev)",
            )
        ],
    ),
}


def test_each_check_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    assert [name for name in registry.CHECKS if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize("name", MACHINES)
def test_reports_findings_and_remedies(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, of, lines = MACHINES[name]
    put(monkeypatch, **{"nvml": Nvml(), **changes})
    code, found = check(capsys, of)
    assert found == lines
    assert code == 1 or PROBLEM not in {line.mark for line in lines}


def test_exits_1_if_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "CHECKS", {"one": lambda machine: [Line(WARNING, "?")]})
    assert main(["doctor"]) == 0
    monkeypatch.setattr(registry, "CHECKS", {"one": lambda machine: [Line(PROBLEM, "?", "do")]})
    assert main(["doctor"]) == 1
    assert capsys.readouterr() == ("! ?\n✗ ? -> do\n", "")


def test_failing_check_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(machine: Any) -> Any:
        yield Line(OK, "first")
        raise RuntimeError("of\nsome kind")

    checks = {"bad": fails, "good": lambda machine: [Line(OK, "größe\x1b[2J")]}
    monkeypatch.setattr(registry, "CHECKS", checks)
    assert main(["doctor"]) == 0
    said = "✓ first\n! bad: not known: RuntimeError: of\n✓ größe\\x1b[2J\n"
    assert capsys.readouterr() == (said, "")


def test_prints_ascii_on_an_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Line(OK, "größe"), Line(WARNING, "b"), Line(PROBLEM, "c")]
    monkeypatch.setattr(registry, "CHECKS", {"all": lambda machine: found})
    with Path("out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["doctor"]) == 1
    assert Path("out").read_text() == "+ gr\\xf6\\xdfe\n! b\nx c\n"


def test_writes_json_to_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "CHECKS", {"one": lambda machine: [Line(OK, "a")]})
    assert main(["doctor", "--json", "out.json"]) == 0
    assert capsys.readouterr() == ("✓ a\n", "")
    entry = {"check": "one", "mark": "ok", "text": "a", "remedy": ""}
    block = {"schema": 1, "exit_code": 0, "lines": [entry]}
    assert json.loads(Path("out.json").read_text()) == {"int8bench_doctor": block}
    assert main(["doctor", "--json", "."]) == 2
    assert capsys.readouterr() == (
        "",
        "int8bench doctor: refusing to overwrite .: not a regular file\n",
    )


# -- folders and the compiler -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "mark", "text"),
    [(9 << 20, PROBLEM, "9 MiB"), (GIB, WARNING, "1.0 GiB"), (3 * GIB, OK, "3.0 GiB")],
    ids=["full", "nearly full", "room"],
)
def test_marks_folders_by_free_disk_space(
    free: int,
    mark: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(monkeypatch, nvml=Nvml())
    with_room(monkeypatch, free)
    Path(".benchmarks/int8bench").mkdir(parents=True)  # from earlier sessions
    code, lines = check(capsys, "folders")
    assert code == (mark == PROBLEM)
    assert [line.mark for line in lines] == [mark] * 4
    results = Path.cwd() / ".benchmarks"
    assert lines[-1].text == f"folder of results, {results}: {text} free"


def test_reports_noexec_folders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, nvml=Nvml())
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=NOEXEC))
    code, lines = check(capsys, "folders")
    assert code == 1
    code_folder = Path.cwd() / "inductor"
    assert lines[0] == Line(
        PROBLEM,
        f"folder of compiled code, {code_folder}: mounted noexec, so code cannot be loaded from it",
        "set TORCHINDUCTOR_CACHE_DIR to another folder",
    )
    assert [line.mark for line in lines] == [PROBLEM, PROBLEM, OK, OK]  # results are not code


def test_reports_unwritable_folders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    put(monkeypatch, nvml=Nvml(), torch=torch_says(inductor_folder="file/below"))
    code, lines = check(capsys, "folders")
    assert (code, lines[0].mark) == (1, PROBLEM)
    assert lines[0].text.endswith("file/below: Not a directory")
    problems = {"temporary folder": "set TMPDIR to another"}
    put(monkeypatch, nvml=Nvml(), torch=torch_says(inductor_folder=None, problems=problems))
    found = check(capsys, "folders")[1]
    assert found[0] == Line(WARNING, "folder of compiled code: not known: torch did not report it")
    assert found[2] == Line(PROBLEM, "set TMPDIR to another")


def test_reports_a_deleted_current_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, nvml=Nvml())
    Path("gone").mkdir()
    os.chdir("gone")
    os.rmdir("../gone")
    code, lines = check(capsys, "folders")
    assert (code, lines[-1].remedy) == (1, "cd to another one")


def test_reports_broken_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("cxx").write_text('#!/bin/sh\necho "$1:1: fatal error: Python.h: none" >&2\nexit 1\n')
    Path("cxx").chmod(0o755)
    put(monkeypatch, nvml=Nvml(), torch=torch_says(compiler=str(Path.cwd() / "cxx")))
    code, [line] = check(capsys, "compiler")
    assert (code, line.mark) == (1, PROBLEM)
    assert line.text.endswith("line.cpp:1: fatal error: Python.h: none")
    assert line.remedy.startswith("install a C++ compiler and Python's headers")
    Path("cxx").write_text("#!/bin/sh\necho 'error: No space left on device' >&2\nexit 1\n")
    assert check(capsys, "compiler")[1][0].remedy == "free some space"
    put(monkeypatch, nvml=Nvml(), torch=torch_says(compiler="no-such-compiler"))
    code, [line] = check(capsys, "compiler")
    assert (code, line.mark) == (1, PROBLEM)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("CUDA_LAUNCH_BLOCKING", "1", "timings would include the overhead of CUDA_LAUNCH_BLOCKING"),
        (
            "TRITON_INTERPRET",
            "1",
            "TRITON_INTERPRET=1: Triton interprets its kernels instead of compiling them",
        ),
        ("TORCHDYNAMO_DISABLE", "0", "nothing in this environment adds overhead to each call"),
    ],
)
def test_reports_variables_that_slow_down_calls(
    name: str,
    value: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(monkeypatch, nvml=Nvml())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(name, value)
    _, lines = check(capsys, "environment")
    assert lines[0].text == text


@pytest.mark.parametrize(("forced", "code"), [("tma", 0), ("cublas", 1), ("tma", 1)])
def test_warns_of_forced_kernel(
    forced: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = A100 if (forced, code) == ("tma", 1) else H200
    put(monkeypatch, nvml=Nvml(), torch=torch_says(devices=(device,)))
    monkeypatch.setenv("INT8BENCH_PRODUCT", forced)
    found, [line] = check(capsys, "kernels")
    assert (found, line.remedy) == (code, "unset INT8BENCH_PRODUCT")


def test_warns_of_hidden_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, nvml=Nvml(), torch=torch_says(devices=(Device("cpu"),)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = "CUDA_VISIBLE_DEVICES='' hides all GPUs"
    assert check(capsys, "gpus")[1][1] == Line(WARNING, text, "unset it")


# -- torch's report -----------------------------------------------------------------------------


def test_probe_reports_torch_version_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    torch_probe.main()
    report = torch_probe.read(capsys.readouterr().out.encode(), "")
    assert report.problems == {}
    assert report.version == sys.modules["torch"].__version__
    assert report.compiler
    assert report.inductor_folder
    [device] = report.devices
    assert device.name == "cpu" or device.kernels


def test_crashed_probe_names_the_failing_step() -> None:
    said = b'lib\nint8bench-doctor {"values": {"version": "2.11.0"}}\nint8bench-doctor {"begins": '
    begun = said + b'"devices"}\nint8bench-doctor {"val'
    assert torch_probe.read(begun, "SIGSEGV").problems == {"devices": "SIGSEGV"}
    assert torch_probe.read(b"", "no answer").problems == {"torch": "no answer"}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise ImportError('libcudart.so.13: cannot open')", "ImportError: libcudart.so.13: "),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("import os; os._exit(3)", "no answer"),
    ],
    ids=["raises", "crashes", "exits"],
)
def test_reports_broken_torch(
    source: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    report = torch_probe.ask()
    assert report.problems["torch"].startswith(problem)
    assert (report.version, report.devices) == (None, ())


def test_kernel_reports_why_its_selftest_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    kernel = table.KERNELS[0]
    device = torch.device("cpu")

    def fails(*args: Any, **kwargs: Any) -> bool:
        import warnings

        warnings.warn("they give other bits", stacklevel=1)
        return False

    assert dispatch.selftest_failure(table.KERNELS[-1], device) is None
    monkeypatch.setattr(dispatch, "has_passed", fails)
    assert dispatch.selftest_failure(kernel, device) == "they give other bits"
    assert kernel.unmet(device) == "needs sm90, this is sm00"


@pytest.mark.slow
def test_command_does_not_load_torch() -> None:
    code = (
        "import sys; from pytest_int8bench.cli.main import main; code = main(['doctor']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stderr == ""
    assert {line[:2] for line in done.stdout.splitlines()} <= {"+ ", "! ", "x "}
    assert "+ torch " in done.stdout
