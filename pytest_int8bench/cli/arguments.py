"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_int8bench.gate.flags import Flag


def add_flag(parser: argparse.ArgumentParser, flag: Flag, default: Any = None) -> None:
    """Add an option that pytest takes too.

    Args:
        parser: the command's parser.
        flag: the option. The texts of a repeatable one are left to be read together.
        default: value of an option that is not given; a switch has False, a repeatable one [].
    """
    kind: dict[str, Any]
    if flag.read is None:
        kind = {"action": "store_true"}
    elif flag.repeatable:
        kind = {"action": "append", "default": [], "metavar": flag.metavar}
    else:
        reader = as_argument_type(flag.read)
        kind = {"type": reader, "default": default, "metavar": flag.metavar}
    text = with_default(flag.help, flag.default)
    parser.add_argument(f"--{flag.name}", dest=flag.dest, help=text, **kind)


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Add the folder of pytest-benchmark."""
    parser.add_argument(
        "--storage",
        type=Path,
        default=Path(".benchmarks"),
        help="pytest-benchmark's storage folder (default: .benchmarks)",
    )


def with_default(text: str, default: str) -> str:
    """Return the help of an option for argparse, which takes a percent sign for a field."""
    return f"{text} (default: {default})".replace("%", "%%")


def as_argument_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader whose errors argparse shows."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed
