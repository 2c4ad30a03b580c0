"""Parse the arguments of ``int8bench`` and run the chosen subcommand."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pytest_int8bench.cli.ab import add_ab, run_ab
from pytest_int8bench.cli.compare import add_compare, run_compare
from pytest_int8bench.cli.doctor import add_doctor, run_doctor
from pytest_int8bench.cli.export import add_export, run_export
from pytest_int8bench.cli.report import add_report, run_report
from pytest_int8bench.cli.sensitivity import add_sensitivity, run_sensitivity
from pytest_int8bench.cli.show import add_show, run_show
from pytest_int8bench.printing import show
from pytest_int8bench.version import __version__

#: Subcommands that take no pytest options.
_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "show": run_show,
    "compare": run_compare,
    "report": run_report,
    "export": run_export,
    "doctor": run_doctor,
}


class _Parser(argparse.ArgumentParser):
    """Refuses abbreviated options, so that a misspelt limit is not taken for another one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line instead of the full usage, and exit."""
        text = message.removeprefix("argument ")
        if text == message:  # about the syntax of the command, not a value
            text += f" (see {self.prog} --help)"
        self.exit(2, f"{self.prog}: {text}\n")


def run_command(argv: Sequence[str]) -> int:
    """Run the subcommand that ``argv`` names and return its exit code.

    Raises:
        SystemExit: after ``--help`` and ``--version``, and with code 2 for invalid arguments.
    """
    parser = _Parser(prog="int8bench", description="INT8 inference benchmarks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_show(commands)
    add_sensitivity(commands)
    add_compare(commands)
    add_ab(commands)
    add_report(commands)
    add_export(commands)
    add_doctor(commands)
    arguments, rest, for_pytest = _parse(parser, argv)
    if arguments.command == "sensitivity":
        return run_sensitivity(arguments, rest)
    if arguments.command == "ab":
        return run_ab(arguments, for_pytest)
    return _COMMANDS[arguments.command](arguments)


def _parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Return the parsed arguments, unrecognized arguments, and the arguments after ``--``."""
    given, for_pytest = _split(argv)
    out, err = io.StringIO(), io.StringIO()
    try:
        # argparse fails to print characters that the terminal's encoding lacks; show() does not.
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            arguments, rest = parser.parse_known_args(given)
            if for_pytest and arguments.command != "ab":
                rest += ["--", *for_pytest]
            if rest and arguments.command != "sensitivity":
                parser.prog += f" {arguments.command}"
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
    finally:
        show(out.getvalue(), end="")
        show(err.getvalue(), error=True, end="")
    return arguments, rest, for_pytest


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after the first ``--``."""
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])
