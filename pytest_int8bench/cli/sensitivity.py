"""``int8bench sensitivity``: the packaged test of layers, run by pytest in a child process."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pytest_int8bench.cli.outputs import refuse
from pytest_int8bench.processes.running import INTERRUPTED, ending, run
from pytest_int8bench.processes.scan_request import ScanRequest

_SUITE = Path(__file__).parents[1] / "suite"


def add_sensitivity(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "sensitivity",
        help="quantize one layer at a time and rank the layers by what that loses",
        description="Quantize one layer, or block, at a time and rank them by the SQNR of the "
        "model's outputs, worst first. The cost is linear in their number. Every other option "
        "is the plugin's: --int8-workload, --int8-mode, --int8-set, --int8-weights …",
    )
    parser.add_argument(
        "--by", choices=("layer", "block"), default="layer", help="what is quantized at a time"
    )
    parser.add_argument(
        "--metric",
        action="store_true",
        help="rank by the drop of the workload's metric (on its samples for selection, if any)",
    )
    parser.add_argument("--json", type=Path, help="file to save the table in")


def run_sensitivity(arguments: argparse.Namespace, pytest_args: Sequence[str]) -> int:
    """Scan the layers; pytest prints as it goes.

    Args:
        arguments: the command's own.
        pytest_args: options of the plugin, such as ``--int8-workload=digits``.

    Returns:
        pytest's exit code, or 128 and the number of the signal that ended it.
    """
    if (path := arguments.json) is not None and (path.is_dir() or not path.parent.is_dir()):
        problem = ValueError(f"--json: must be a file in an existing folder, got {str(path)!r}")
        return refuse("sensitivity", problem)
    # -P: the folder that the command is called in does not become importable.
    command = [sys.executable, "-P", "-m", "pytest", f"-c={_SUITE / 'pytest.ini'}", "--no-header"]
    # Layers run eagerly; the user's own compile mode comes later and wins.
    command += ["--int8-set=compile_mode=off", str(_SUITE / "test_sensitivity.py")]
    if arguments.json is not None:
        command.append(f"--benchmark-json={arguments.json}")
    request = ScanRequest(by=arguments.by, metric=arguments.metric)
    environ = {**os.environ, **request.to_env_vars()}
    environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    sys.stdout.flush()
    try:
        with _ending_on_sigterm():
            code = run([*command, *pytest_args], cwd=Path.cwd(), env=environ)
    except KeyboardInterrupt:
        return INTERRUPTED
    if code >= 0:
        return code
    print(f"int8bench sensitivity: {ending(code)}", file=sys.stderr)
    return 128 - code


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit for a while, so that the child process is stopped too."""
    try:
        before = signal.signal(signal.SIGTERM, _exit)
    except ValueError:  # not the main thread, where signals arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
