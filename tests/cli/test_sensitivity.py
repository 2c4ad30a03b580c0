"""Test the child process of ``int8bench sensitivity``: output, exit codes and signals.

tests/plugin/test_accuracy.py tests its results.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.cli import sensitivity
from pytest_int8bench.cli.main import main
from pytest_int8bench.processes import running
from pytest_int8bench.processes.scan_request import ScanRequest

DEADLINE_S = 120
HANGS = """
import os, signal
from pathlib import Path

def pytest_collection():
    Path("pid.part").write_text(str(os.getpid()))
    os.rename("pid.part", "pid")
    signal.pause()
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


def started(monkeypatch: pytest.MonkeyPatch, code: int, *args: str) -> tuple[int, list[str], Any]:
    """Return the exit code, and the command and environment of the child process."""
    calls: list[Any] = []

    def run(command: list[str], *, cwd: Path, env: dict[str, str], **files: Any) -> int:
        calls.append((command, env))
        return code

    monkeypatch.setattr(sensitivity, "run", run)
    returned = main(["sensitivity", *args])
    [(command, environ)] = calls
    return returned, command, environ


def test_passes_options_to_pytest_and_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--by=block", "--json=a.json", "--int8-mode=w8", "--metric", "--", "-k", "nano")
    _, command, environ = started(monkeypatch, 0, *args)
    assert command[:2] == [sys.executable, "-P"]
    assert command[4:6] == ["-m", "pytest"]
    assert command[-5:] == ["--benchmark-json=a.json", "--int8-mode=w8", "--", "-k", "nano"]
    assert command.index("--int8-set=compile_mode=off") < command.index("--int8-mode=w8")
    assert ScanRequest.from_env_vars(environ) == ScanRequest(by="block", metric=True)
    assert environ["PYTHONPATH"].split(os.pathsep) == [os.path.abspath(path) for path in sys.path]

    _, command, environ = started(monkeypatch, 0)
    assert command[-1].endswith("test_sensitivity.py")
    assert ScanRequest.from_env_vars(environ) == ScanRequest(by="layer", metric=False)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5])
def test_exits_2_if_pytest_fails(
    monkeypatch: pytest.MonkeyPatch, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(monkeypatch, code)[0] == (2 if code else 0)  # 1 would mean a regression
    assert capsys.readouterr() == ("", "")


def test_reports_a_killed_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(monkeypatch, -signal.SIGKILL)[0] == 128 + signal.SIGKILL
    assert capsys.readouterr() == ("", "int8bench sensitivity: SIGKILL\n")


@pytest.mark.parametrize("path", [".", "nowhere/a.json"])
def test_rejects_unwritable_json(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "--json", path]) == 2
    assert capsys.readouterr() == (
        "",
        f"int8bench sensitivity: --json: must be a file in an existing folder, got {path!r}\n",
    )


def test_test_can_only_be_run_by_the_command() -> None:
    with pytest.raises(
        RuntimeError, match=r"^this test can only be run by int8bench sensitivity, which "
    ):
        ScanRequest.from_env_vars({})


def test_bad_option_is_one_line_and_exits_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "--int8-mode=w4"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert [line for line in err.splitlines() if line] == [
        "ERROR: --int8-mode: must be a comma-separated list of w8a8, w8, fp8, off, got 'w4'"
    ]


@pytest.mark.slow
def test_missing_workload_exits_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "--int8-workload=missing.py:make"]) == 2
    assert "missing.py" in "".join(capfd.readouterr())


def test_forwards_output_and_tolerates_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "import sys; print('größe ' * 99999 + 'end'); print('²', file=sys.stderr)"

    def run(command: list[str], **places: Any) -> int:
        return running.run([sys.executable, "-c", says], **places)

    monkeypatch.setattr(sensitivity, "run", run)
    assert main(["sensitivity"]) == 0
    assert capsys.readouterr() == ("größe " * 99999 + "end\n", "²\n")
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["sensitivity"]) == 0
    lost = "int8bench: what is printed is lost: No space left on device\n"
    assert sorted(capsys.readouterr().err.splitlines(True)) == [lost, "²\n"]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def hanging() -> subprocess.Popen[str]:
    """Start the command and wait until its child process hangs."""
    Path("hangs.py").write_text(HANGS)
    script = "import sys; from pytest_int8bench.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "sensitivity", "-p", "hangs"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + DEADLINE_S
    while not Path("pid").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [
        (signal.SIGINT, True, 2),
        (signal.SIGINT, False, 2),
        (signal.SIGTERM, False, 143),
    ],
    ids=["ctrl-c", "interrupt", "terminate"],
)
def test_signal_leaves_no_process_behind(
    number: signal.Signals, whole_group: bool, code: int
) -> None:
    process = hanging()
    (os.killpg if whole_group else os.kill)(process.pid, number)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code
    assert "KeyboardInterrupt" in out  # pytest could finish
    assert not is_running(int(Path("pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_killing_the_command_ends_its_process() -> None:
    process = hanging()
    process.kill()
    process.communicate(timeout=DEADLINE_S)  # the pipe closes when both have ended
    deadline = time.monotonic() + DEADLINE_S
    while is_running(int(Path("pid").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_process_refuses_to_start_without_its_command() -> None:
    gone = ScanRequest(by="layer", metric=False, parent=1 << 22)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_int8bench.suite.sensitivity_side"]
    environ = {**os.environ, **gone.to_env_vars(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*command, "--markers"], capture_output=True, text=True, env=environ)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "the int8bench sensitivity that started this process has ended" in done.stderr
