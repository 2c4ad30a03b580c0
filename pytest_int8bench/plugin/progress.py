"""Long steps on the terminal: what runs, and for how long."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from pytest_int8bench.printing import printable

if TYPE_CHECKING:
    import pytest
    from rich.text import Text

    from pytest_int8bench.measure.steps import Action, Step


_REFRESH_PER_S = 4
_SPINNER = "|/-\\"
#: A clock runs in these: a thread that draws would take part in what is measured.
_TIMED = ("measuring", "comparing")
#: What is worth a line of a log.
_LOGGED = ("compiling",)


def terminal_steps(config: pytest.Config, clock: Callable[[], float] = time.monotonic) -> Step:
    """Return what shows steps as this session's output allows.

    A live line, gone when its step ends, on a terminal; a plain line for each compilation where
    the output is no terminal or is shared with what tests print; nothing with ``-q`` and in the
    workers of pytest-xdist.
    """
    quiet = config.get_verbosity() < 0 or hasattr(config, "workerinput")
    if quiet or not config.pluginmanager.hasplugin("terminalreporter"):
        return lambda action, name: nullcontext()
    terminal = _Terminal(config, clock)
    return terminal.live if _is_live(config) else terminal.plain


def say(config: pytest.Config, text: str) -> None:
    """Write a line at once, past pytest's capturing; not with ``-q``."""
    if config.get_verbosity() >= 0 and config.pluginmanager.hasplugin("terminalreporter"):
        _Terminal(config, time.monotonic).say(text)


def _is_live(config: pytest.Config) -> bool:
    """Return whether the output is a terminal on which nothing is printed while a test runs."""
    plugins = config.pluginmanager
    reporter = plugins.getplugin("terminalreporter")
    live_logs = plugins.hasplugin("logging-plugin") and (
        config.getini("log_cli") or config.getoption("log_cli_level") is not None
    )
    return (
        bool(reporter.isatty)
        and os.environ.get("TERM") != "dumb"
        and config.getoption("capture", "no") == "fd"
        and not live_logs
    )


class _Terminal:
    """Shows steps between what pytest writes, and leaves the line that pytest has begun as it
    was."""

    def __init__(self, config: pytest.Config, clock: Callable[[], float]) -> None:
        self._writer = config.get_terminal_writer()
        self._capture = config.pluginmanager.getplugin("capturemanager")
        self._clock = clock

    def say(self, text: str) -> None:
        """Write a line below the one that pytest has begun, and begin that again."""
        begun = self._writer._current_line
        self._write(("\n" if begun else "") + f"int8bench: {text}\n{begun}")

    def plain(self, action: Action, name: str) -> AbstractContextManager[None]:
        """Write one line for a step that is worth it."""
        return self._plain(f"{action} {name}") if action in _LOGGED else nullcontext()

    @contextmanager
    def _plain(self, text: str) -> Iterator[None]:
        begun = self._writer._current_line
        start = self._clock()
        # The start at once, so that a log that ends here says where.
        self._write(("\n" if begun else "") + f"int8bench: {text} ...")
        try:
            yield
        finally:
            self._write(f" {self._clock() - start:.0f} s\n{begun}")

    def _write(self, text: str) -> None:
        encoding = getattr(self._writer._file, "encoding", None)
        # A point is measured also where nobody can read along.
        with self._uncaptured(), suppress(OSError, ValueError):
            self._writer.write(printable(text, encoding), flush=True)

    @contextmanager
    def live(self, action: Action, name: str) -> Iterator[None]:
        """Show a step below the line that pytest has begun, and remove it when it ends."""
        # Here, where random generators are kept: rich draws from Python's when it is imported.
        from rich.console import Console
        from rich.control import Control
        from rich.live import Live
        from rich.text import Text

        with self._uncaptured():
            self._writer.flush()
            columns = shutil.get_terminal_size().columns
            # While the test runs, stdout goes to where pytest captures it.
            descriptor, encoding = os.dup(sys.stdout.fileno()), sys.stdout.encoding
        start = self._clock()
        timed = action in _TIMED
        since = time.strftime("%H:%M:%S")

        def line() -> Text:
            seconds = self._clock() - start
            turn = int(seconds * _REFRESH_PER_S) % len(_SPINNER)
            head = f"{action} {name}" if timed else f"{_SPINNER[turn]} {action} {name}"
            tail = f" since {since}" if timed else f" ... {seconds:.0f} s"
            text = Text(head, no_wrap=True)
            text.truncate(max(columns - 1 - len(tail), 0))
            return text.append(tail)

        begun = self._writer.width_of_current_line
        with open(descriptor, "w", encoding=encoding, errors="replace") as stream:
            console = Console(
                file=stream,
                width=columns,
                force_terminal=True,
                color_system=None,
                legacy_windows=False,
            )
            if begun:
                console.line()
            try:
                with Live(
                    get_renderable=line,
                    console=console,
                    auto_refresh=not timed,
                    refresh_per_second=_REFRESH_PER_S,
                    redirect_stdout=False,
                    redirect_stderr=False,
                    transient=True,
                ) as shown:
                    console.show_cursor(True)  # a run that is killed would leave it hidden
                    shown.refresh()
                    yield
            finally:
                # A line that fills its last row goes on in the one below, where the cursor is.
                if column := begun % columns:
                    console.control(Control.move_to_column(column, -1))

    def _uncaptured(self) -> AbstractContextManager[None]:
        return self._capture.global_and_fixture_disabled() if self._capture else nullcontext()
