"""Run the ``int8bench`` command."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from pytest_int8bench.errors import ClearError, first_line
from pytest_int8bench.printing import one_line, show

#: Exit code of errors. Code 1 is reserved for regressions and for problems that ``doctor`` found.
_FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Returns:
        0; 1 for a regression or a problem that ``doctor`` found; 2 for anything else that went
        wrong; or 128 plus the number of the signal that ended it.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    name = f"int8bench {given[0]}" if given and given[0].isalpha() else "int8bench"
    try:
        # Import here, so that an import error is reported with exit code 2.
        from pytest_int8bench.cli.commands import run_command

        return run_command(given)
    except KeyboardInterrupt:
        problem = "interrupted"
    except ClearError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)} ({_place(error)})"
    finally:
        # Flush now: a failing flush when Python exits would change the exit code.
        show("", end="")
        show("", error=True, end="")
    show(one_line(f"{name}: {problem}"), error=True)
    return _FAILED


def _place(error: BaseException) -> str:
    """Return the file and line where an error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"


if __name__ == "__main__":  # python -m, if the int8bench on PATH belongs to another environment
    sys.exit(main())
