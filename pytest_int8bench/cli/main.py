"""The ``int8bench`` command."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from pytest_int8bench.errors import ClearError, first_line
from pytest_int8bench.printing import one_line, show

#: Exit code of whatever is no verdict. 1 says that something got worse or, of ``doctor``, must be
#: mended, and nothing else.
_FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 if something got worse or must be mended, else
    2, whatever went wrong; 128 and its number if a signal ended it."""
    given = list(sys.argv[1:] if argv is None else argv)
    name = f"int8bench {given[0]}" if given and given[0].isalpha() else "int8bench"
    try:
        # Here: what cannot be imported is no verdict either.
        from pytest_int8bench.cli.commands import run_command

        return run_command(given)
    except KeyboardInterrupt:
        problem = "interrupted"
    except ClearError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)} ({_place(error)})"
    finally:
        # What others printed must not fail, and change the exit code, when Python ends.
        show("", end="")
        show("", error=True, end="")
    show(one_line(f"{name}: {problem}"), error=True)
    return _FAILED


def _place(error: BaseException) -> str:
    """Return where an error was raised, for a report of it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"


if __name__ == "__main__":  # python -m, where the installed command is another environment's
    sys.exit(main())
