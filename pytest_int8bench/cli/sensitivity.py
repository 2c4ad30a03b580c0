"""Implement ``int8bench sensitivity``, which runs the packaged layer scan in a pytest process."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pytest_int8bench.cli.outputs import refuse, terminal_style
from pytest_int8bench.gate.outcomes import PASSES, UNDECIDED
from pytest_int8bench.printing import show
from pytest_int8bench.processes.running import ending, run
from pytest_int8bench.processes.scan_request import ScanRequest
from pytest_int8bench.processes.signals import ENDING, exit_now, handling

_SUITE = Path(__file__).parents[1] / "suite"
#: pytest-benchmark warns about saving a file without timings just before it saves the file.
_QUIET = ("-W", "ignore:Not saving anything")
_CHUNK_BYTES = 1 << 16
_DRAIN_S = 10


def add_sensitivity(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    parser = commands.add_parser(
        "sensitivity",
        help="quantize one layer at a time and rank the layers by the accuracy lost",
        description="Quantize one layer or block at a time and rank them by the SQNR of the "
        "model's outputs, worst first. The run time is proportional to their number. All other "
        "options are passed to pytest, such as --int8-workload, --int8-mode, --int8-set and "
        "--int8-weights.",
    )
    parser.add_argument(
        "--by", choices=("layer", "block"), default="layer", help="unit to quantize at a time"
    )
    parser.add_argument(
        "--metric",
        action="store_true",
        help="rank by the drop of the workload's metric, on its selection samples if it has any",
    )
    parser.add_argument("--json", type=Path, help="file to save the table to")


def run_sensitivity(arguments: argparse.Namespace, pytest_args: Sequence[str]) -> int:
    """Scan the layers while pytest prints its progress.

    Args:
        arguments: the command's own arguments.
        pytest_args: options for pytest, such as ``--int8-workload=digits``.

    Returns:
        0, 2 if there is no table, or 128 plus the number of the signal that ended pytest.
    """
    if (path := arguments.json) is not None and (path.is_dir() or not path.parent.is_dir()):
        problem = ValueError(f"--json: must be a file in an existing folder, got {str(path)!r}")
        return refuse("sensitivity", problem)
    # -P keeps the current folder off sys.path.
    command = [sys.executable, "-P", *_QUIET, "-m", "pytest", f"-c={_SUITE / 'pytest.ini'}"]
    command.append("--no-header")
    # Run layers eagerly by default; a compile mode given by the user comes later and wins.
    command += ["--int8-set=compile_mode=off", "-p", "pytest_int8bench.suite.sensitivity_side"]
    command.append(str(_SUITE / "test_sensitivity.py"))
    if arguments.json is not None:
        command.append(f"--benchmark-json={arguments.json}")
    request = ScanRequest(by=arguments.by, metric=arguments.metric)
    environ = {**os.environ, **request.to_env_vars()}
    environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    whole = [*command, *pytest_args]
    if terminal_style()[1]:
        with handling(exit_now, *ENDING):
            code = run(whole, cwd=Path.cwd(), env=environ)
    else:
        # Relay the output: with a closed pipe or a full disk, pytest would end without a table.
        environ["PYTHONIOENCODING"] = "utf-8"
        with handling(exit_now, *ENDING), _relayed() as out, _relayed(error=True) as err:
            code = run(whole, cwd=Path.cwd(), env=environ, log=out, errors=err)
    if code >= 0:
        return UNDECIDED if code else PASSES  # a failed test (pytest's 1) is not a regression
    show(f"int8bench sensitivity: {ending(code)}", error=True)
    return 128 - code


@contextlib.contextmanager
def _relayed(*, error: bool = False) -> Iterator[IO[str]]:
    """Yield a file whose text is printed to stdout or stderr as it is written."""
    read_end, write_end = os.pipe()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def copy() -> None:
        while text := os.read(read_end, _CHUNK_BYTES):
            show(decoder.decode(text), error=error, end="")
        os.close(read_end)

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    try:
        with open(write_end, "w", encoding="utf-8") as file:
            yield file
    finally:
        # Do not wait forever: a process that outlives pytest may keep the other end open.
        reader.join(_DRAIN_S)
