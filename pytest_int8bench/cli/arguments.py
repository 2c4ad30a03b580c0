"""Add arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_int8bench.gate.flags import Flag


def add_flag(parser: argparse.ArgumentParser, flag: Flag, default: Any = None) -> None:
    """Add an option that pytest has too.

    Args:
        parser: the command's parser.
        flag: the option. The values of a repeatable option stay unparsed strings.
        default: value if the option is not given; switches default to False and repeatable options
            to [].
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
    """Add the option for pytest-benchmark's storage folder."""
    parser.add_argument(
        "--storage",
        type=Path,
        default=Path(".benchmarks"),
        help="pytest-benchmark's storage folder (default: .benchmarks)",
    )


def with_default(text: str, default: str) -> str:
    """Return help text with its default, escaping percent signs, which argparse would expand."""
    return f"{text} (default: {default})".replace("%", "%%")


def as_argument_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap a reader so that argparse shows the messages of its ``ValueError``."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed
