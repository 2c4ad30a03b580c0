"""Show on the terminal which long step is running, and for how long."""

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
#: Steps that are timed: a thread that redraws the line would disturb the measurement.
_TIMED = ("measuring", "comparing")
#: Steps for which a log gets a line.
_LOGGED = ("compiling",)


def terminal_steps(config: pytest.Config, clock: Callable[[], float] = time.monotonic) -> Step:
    """Return a factory of context managers that show steps as far as this session's output allows.

    On a terminal, a step is a live line that disappears when the step ends. If the output is not a
    terminal, or tests also print to it, only compilations are shown, as one plain line each. With
    ``-q`` and in pytest-xdist workers, nothing is shown.
    """
    quiet = config.get_verbosity() < 0 or hasattr(config, "workerinput")
    if quiet or not config.pluginmanager.hasplugin("terminalreporter"):
        return lambda action, name: nullcontext()
    terminal = _Terminal(config, clock)
    return terminal.live if _is_live(config) else terminal.plain


def write_line(config: pytest.Config, text: str) -> None:
    """Write a line immediately, bypassing pytest's capture; write nothing with ``-q``."""
    if config.get_verbosity() >= 0 and config.pluginmanager.hasplugin("terminalreporter"):
        _Terminal(config, time.monotonic).write_line(text)


def _is_live(config: pytest.Config) -> bool:
    """Return whether the output is a terminal that nothing else writes to while a test runs."""
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
    """Shows steps between lines of pytest's own output, and restores the line that pytest has
    begun."""

    def __init__(self, config: pytest.Config, clock: Callable[[], float]) -> None:
        self._writer = config.get_terminal_writer()
        self._capture = config.pluginmanager.getplugin("capturemanager")
        self._clock = clock

    def write_line(self, text: str) -> None:
        """Write a line below the one that pytest has begun, then repeat the latter."""
        begun = self._writer._current_line
        self._write(("\n" if begun else "") + f"int8bench: {text}\n{begun}")

    def plain(self, action: Action, name: str) -> AbstractContextManager[None]:
        """Write one line for each step in ``_LOGGED``, with its duration."""
        return self._plain(f"{action} {name}") if action in _LOGGED else nullcontext()

    @contextmanager
    def _plain(self, text: str) -> Iterator[None]:
        begun = self._writer._current_line
        start = self._clock()
        # Write the beginning immediately, so that a log that breaks off shows the running step.
        self._write(("\n" if begun else "") + f"int8bench: {text} ...")
        try:
            yield
        finally:
            self._write(f" {self._clock() - start:.0f} s\n{begun}")

    def _write(self, text: str) -> None:
        encoding = getattr(self._writer._file, "encoding", None)
        # Output errors must not keep a point from being measured.
        with self._uncaptured(), suppress(OSError, ValueError):
            self._writer.write(printable(text, encoding), flush=True)

    @contextmanager
    def live(self, action: Action, name: str) -> Iterator[None]:
        """Show a step below the line that pytest has begun, and remove it when the step ends."""
        # Import rich here, inside kept_generators: it draws from Python's random generator.
        from rich.console import Console
        from rich.control import Control
        from rich.live import Live
        from rich.text import Text

        with self._uncaptured():
            self._writer.flush()
            columns = shutil.get_terminal_size().columns
            # While a test runs, pytest redirects stdout, so duplicate the real one now.
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
                    console.show_cursor(True)  # or it stays hidden if the run is killed
                    shown.refresh()
                    yield
            finally:
                # If pytest's line fills its last row exactly, the cursor is already on the next
                # row.
                if column := begun % columns:
                    console.control(Control.move_to_column(column, -1))

    def _uncaptured(self) -> AbstractContextManager[None]:
        return self._capture.global_and_fixture_disabled() if self._capture else nullcontext()
