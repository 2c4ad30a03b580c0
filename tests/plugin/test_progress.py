"""Test that the terminal shows long steps while they run, without losing pytest's output."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pytest_int8bench.measure.steps import Step
from pytest_int8bench.plugin.progress import terminal_steps
from toys.projects import make_project

COLUMNS = 100
#: Without the plugins that write to the terminal, and Hypothesis, which takes a second to load.
OTHERS = ("randomly", "codspeed", "xdist", "hypothesispytest")
ALONE = [option for name in OTHERS for option in ("-p", f"no:{name}")]
ESCAPE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")
COLOR = re.compile(r"\x1b\[[\d;]*m")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def screen(output: str, columns: int = COLUMNS) -> list[str]:
    """Return the lines that a terminal shows after ``output``, up to the last non-empty one."""
    rows: list[list[str]] = [[]]
    row = column = 0
    position = 0
    while position < len(output):
        if match := ESCAPE.match(output, position):
            argument, command = match.groups()
            if command == "A":
                row -= int(argument or 1)
                assert row >= 0
            elif command == "G":
                column = int(argument or 1) - 1
            elif command == "K":
                assert argument == "2", "only whole lines are erased"
                rows[row] = []
            else:
                assert command == "m" or match[0] in ("\x1b[?25l", "\x1b[?25h"), match[0]
            position = match.end()
            continue
        character = output[position]
        position += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
        else:
            if column == columns:
                row, column = row + 1, 0
            rows += [[] for _ in range(row - len(rows) + 1)]
            rows[row] += " " * (column - len(rows[row]))
            rows[row][column : column + 1] = character
            column += 1
        rows += [[] for _ in range(row - len(rows) + 1)]
    return "\n".join("".join(line).rstrip() for line in rows).rstrip("\n").split("\n")


def drain(descriptor: int) -> str:
    """Return the text written to the other end of a pseudo-terminal."""
    os.set_blocking(descriptor, False)
    found = b""
    while True:
        try:
            found += os.read(descriptor, 4096)
        except BlockingIOError:
            return found.decode()


# -- one step -----------------------------------------------------------------------------------


ACTIONS = ("building", "compiling", "warming up", "measuring", "comparing")


class Session:
    """The output of a session, and its steps."""

    def __init__(self, config: pytest.Config, descriptor: int) -> None:
        self.config = config
        self.clock = Clock()
        self.step: Step = terminal_steps(config, self.clock)
        self.writer = config.get_terminal_writer()
        self._descriptor = descriptor

    def output(self) -> str:
        """Return the text written since the last call."""
        return drain(self._descriptor)


@pytest.fixture
def descriptors() -> Iterator[tuple[int, int]]:
    """Return the two ends of a pseudo-terminal 40 columns wide."""
    ends = pty.openpty()
    termios.tcsetwinsize(ends[1], (24, 40))
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def start(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, descriptors: tuple[int, int]
) -> Iterator[Any]:
    """Start a session with the given arguments on a terminal."""
    master, slave = descriptors
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    for name in ("NO_COLOR", "FORCE_COLOR", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)

    def make(*args: str) -> Session:
        monkeypatch.setattr("sys.stdout", stream)
        # That plugin collects garbage several times at the end of its session.
        config = pytester.parseconfigure("-p", "no:unraisableexception", *args)
        return Session(config, master)

    with open(slave, "w", encoding="utf-8", closefd=False) as stream:
        yield make
        monkeypatch.undo()


def test_shows_step_with_its_seconds(start: Any) -> None:
    session = start()
    with session.step("compiling", "toy"):
        output = session.output()
        assert screen(output) == ["| compiling toy ... 0 s"]
        # The cursor stays visible in case the run is killed.
        assert output.startswith("\x1b[?25l\x1b[?25h")
        session.clock.now = 43.3
    # Drawn once more at its end, with the spinner a quarter turn further.
    assert "\r\x1b[2K/ compiling toy ... 43 s" in session.output()


@pytest.mark.parametrize("width", [0, 1, 12, 39, 40, 41, 79, 80, 81])
@pytest.mark.parametrize("action", ["compiling", "measuring"])
def test_resumes_pytest_line_after_a_step(start: Any, width: int, action: Any) -> None:
    session = start()
    begun = "".join(chr(ord("a") + index % 26) for index in range(width))
    session.writer.write("one\n" + begun)
    with session.step(action, "toy"):
        before = session.output()
        *above, last = screen(before, 40)
        assert f"{action} toy" in last
        assert above == screen("one\r\n" + begun, 40)
    session.writer.write("PASSED\ntwo\n", flush=True)
    after = screen(before + session.output(), 40)
    assert after == screen(f"one\r\n{begun}PASSED\r\ntwo", 40)


def test_truncates_long_name_but_not_the_seconds(start: Any) -> None:
    session = start()
    with session.step("compiling", "toy" * 20):
        session.clock.now = 120
    assert f"| compiling {('toy' * 20)[:17]} ... 120 s" in session.output()
    with session.step("measuring", "toy" * 20):
        [line] = screen(session.output())
    assert re.fullmatch(r"measuring toytoytoytoyto since \d\d:\d\d:\d\d", line)


@pytest.mark.parametrize("action", ["measuring", "comparing"])
def test_no_thread_runs_during_timing(start: Any, action: Any) -> None:
    session = start()
    before = threading.enumerate()
    with session.step(action, "toy"):
        assert threading.enumerate() == before
        [line] = screen(session.output())
        assert re.fullmatch(rf"{action} toy since \d\d:\d\d:\d\d", line)
    with session.step("compiling", "toy"):
        [drawing] = set(threading.enumerate()) - set(before)
    drawing.join(timeout=10)
    assert not drawing.is_alive()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_step_clears_its_line(start: Any, error: type[BaseException]) -> None:
    session = start()
    session.writer.write("test_one.py ")
    with pytest.raises(error, match="mine"), session.step("compiling", "toy"):
        raise error("mine")
    session.writer.write("F", flush=True)
    assert screen(session.output()) == ["test_one.py F"]


def test_step_closes_its_file_descriptors(start: Any) -> None:
    session = start()
    free = os.dup(1)
    os.close(free)
    with session.step("compiling", "toy"):
        pass
    again = os.dup(1)
    os.close(again)
    assert again == free


# -- where steps are shown ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "changes"),
    [
        (["-s"], {}),
        (["--capture=sys"], {}),
        (["--capture=tee-sys"], {}),
        (["--log-cli-level=INFO"], {}),
        (["-o", "log_cli=true"], {}),
        ([], {"TERM": "dumb"}),
    ],
)
def test_uses_plain_lines_if_others_write_to_the_terminal(
    start: Any, monkeypatch: pytest.MonkeyPatch, args: list[str], changes: dict[str, str]
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    session = start(*args)
    with session.step("compiling", "toy"):
        pass
    assert session.output() == "int8bench: compiling toy ... 0 s\r\n"


@pytest.mark.parametrize("args", [["-q"], ["-qq"], ["-q", "-s"], ["-p", "no:logging", "-q"]])
def test_quiet_shows_nothing(start: Any, args: list[str]) -> None:
    session = start(*args)
    for action in ACTIONS:
        with session.step(action, "toy"):
            pass
    assert session.output() == ""


@pytest.mark.parametrize("args", [[], ["-s"]])
def test_xdist_workers_show_nothing(start: Any, args: list[str]) -> None:
    session = start(*args)
    session.config.workerinput = {}
    step = terminal_steps(session.config)
    for action in ACTIONS:
        with step(action, "toy"):
            pass
    assert session.output() == ""


def test_works_without_a_reporter(start: Any) -> None:
    session = start()
    session.config.pluginmanager.unregister(name="terminalreporter")
    with terminal_steps(session.config)("compiling", "toy"):
        pass
    assert session.output() == ""


def test_uses_the_terminal_without_the_logging_plugin(start: Any) -> None:
    session = start("-p", "no:logging")
    with session.step("compiling", "toy"):
        assert screen(session.output()) == ["| compiling toy ... 0 s"]


# -- plain lines --------------------------------------------------------------------------------


def test_plain_line_starts_immediately_and_ends_with_seconds(start: Any) -> None:
    session = start("-s")
    session.writer.write("test_one.py ..")
    with session.step("compiling", "toy"):
        assert session.output() == "test_one.py ..\r\nint8bench: compiling toy ..."
        session.clock.now = 43.3
    session.writer.write(".", flush=True)
    assert session.output() == " 43 s\r\ntest_one.py ..."


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_plain_line_ends_if_its_step_fails(start: Any, error: type[BaseException]) -> None:
    session = start("-s")
    with pytest.raises(error, match="mine"), session.step("compiling", "toy"):
        raise error("mine")
    assert session.output() == "int8bench: compiling toy ... 0 s\r\n"


def test_other_steps_have_no_plain_line(start: Any) -> None:
    session = start("-s")
    for action in {*ACTIONS} - {"compiling"}:
        with session.step(action, "toy"):
            pass
    assert session.output() == ""


# -- within a session ---------------------------------------------------------------------------

CONFTEST = """
import os
from contextlib import nullcontext

import pytest

from pytest_int8bench.plugin.progress import terminal_steps


class Steps:
    def __init__(self, config):
        self.step = terminal_steps(config)

    def __call__(self, action, name):
        return nullcontext() if "NO_STEPS" in os.environ else self.step(action, name)

    def __repr__(self):  # tracebacks show it: without an address
        return "Steps()"


@pytest.fixture
def step(request):
    return Steps(request.config)
"""
TESTS = """
import os
import sys

import pytest


@pytest.mark.parametrize("name", ["short", "long" * 30])
def test_passes(step, name):
    print("before")
    for action in ("building", "compiling", "measuring"):
        with step(action, name):
            print("inside")
            os.write(2, b"inside\\n")


def test_fails(step):
    print("before")
    with step("compiling", "three"):
        print("inside")
        raise ValueError("mine")


def test_captures(step, capfd):
    print("before")
    with step("compiling", "four"):
        print("inside")
        os.write(2, b"inside\\n")
    assert capfd.readouterr() == ("before\\ninside\\n", "inside\\n")


def test_captures_python(step, capsys):
    with step("compiling", "five"):
        print("inside")
    assert capsys.readouterr().out == "inside\\n"
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """Return a project whose tests run steps without measuring anything."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_one=TESTS, test_two="def test_plain(): pass")
    return pytester


def environment(**changes: str) -> dict[str, str]:
    unset = ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "PYTEST_ADDOPTS")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {**kept, "TERM": "xterm", "COLUMNS": str(COLUMNS), **changes}


def run(pytester: pytest.Pytester, *args: str, **changes: str) -> str:
    """Return the output of a session, including errors, through a pipe."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *ALONE, *args],
        cwd=pytester.path,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return without_times(done.stdout)


def run_on_terminal(pytester: pytest.Pytester, *args: str, **changes: str) -> str:
    """Return the output of a session on a pseudo-terminal."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, COLUMNS))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *ALONE, *args],
        cwd=pytester.path,
        env=environment(**changes),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    found = b""
    try:
        while part := os.read(master, 4096):
            found += part
    except OSError:  # Linux reports that the other end is closed
        pass
    finally:
        os.close(master)
        process.wait()
    return without_times(found.decode())


def without_times(output: str) -> str:
    output = re.sub(r"\.\.\. \d+ s", "... 0 s", output)
    return re.sub(r" in \d+\.\d+s", " in 0.00s", output)


def report(output: str) -> list[str]:
    """Return the lines that a terminal shows, ignoring the length of the last: it has seconds."""
    return [re.sub("={4,}", "====", line) for line in screen(output)]


@pytest.mark.parametrize(
    ("args", "changes", "colored"),
    [
        ([], {}, True),
        (["-v"], {}, True),
        (["--color=no"], {}, False),
        ([], {"NO_COLOR": "1"}, False),
    ],
    ids=["default", "verbose", "color-no", "NO_COLOR"],
)
def test_terminal_shows_steps_then_unchanged_output(
    project: pytest.Pytester, args: list[str], changes: dict[str, str], colored: bool
) -> None:
    output = run_on_terminal(project, *args, **changes)
    for text in ("building short", "compiling short", "compiling three", "compiling five"):
        assert re.search(rf"[-|/\\] {text} \.\.\. 0 s", output)
    assert re.search(r"measuring short since \d\d:\d\d:\d\d", output)
    plain = run_on_terminal(project, *args, **changes, NO_STEPS="1")
    assert "compiling short" not in plain
    assert report(output) == report(plain)
    shown = "\n".join(report(output))
    assert "1 failed, 5 passed in 0.00s" in shown
    assert "Captured stdout call -" in shown
    assert bool(COLOR.search(output)) is colored


def test_quiet_does_not_change_the_output(project: pytest.Pytester) -> None:
    output = run_on_terminal(project, "-q")
    assert output == run_on_terminal(project, "-q", NO_STEPS="1")
    assert "5 passed" in output


def test_pipe_gets_plain_lines(project: pytest.Pytester) -> None:
    output = run(project)
    assert "\x1b" not in output
    assert "\r" not in output
    lines = output.splitlines()
    first = lines.index("test_one.py ")
    assert [line.rstrip() for line in lines[first : first + 12]] == [
        "test_one.py",
        "int8bench: compiling short ... 0 s",
        "test_one.py .",
        f"int8bench: compiling {'long' * 30} ... 0 s",
        "test_one.py ..",
        "int8bench: compiling three ... 0 s",
        "test_one.py ..F",
        "int8bench: compiling four ... 0 s",
        "test_one.py ..F.",
        "int8bench: compiling five ... 0 s",
        f"{'test_one.py ..F..':<{COLUMNS - 8}} [ 83%]",
        f"{'test_two.py .':<{COLUMNS - 8}} [100%]",
    ]
    # From there on, the output is as without steps, including captured sections.
    plain = run(project, NO_STEPS="1")
    assert report(output.partition("[100%]")[2]) == report(plain.partition("[100%]")[2])
    assert "Captured stdout call" in output


def test_a_pipe_with_verbose_repeats_the_test(project: pytest.Pytester) -> None:
    lines = [line.rstrip() for line in run(project, "-v", "-k", "short").splitlines()]
    first = lines.index("test_one.py::test_passes[short]")
    assert lines[first + 1 : first + 3] == [
        "int8bench: compiling short ... 0 s",
        f"{'test_one.py::test_passes[short] PASSED':<{COLUMNS - 8}} [100%]",
    ]


# -- while points are measured ------------------------------------------------------------------

THROUGHPUT = """
def test_throughput(int8_throughput, capfd):
    int8_throughput()
    assert capfd.readouterr().out == ""
"""
SMOKE = ("--int8-preset=smoke", "--int8-set=benchmark_interval_s=0.05")
BF16 = "toy: cpu_bf16_bs4"
W8A8 = "toy: cpu_bf16_int8_w8a8_off_bs4"


@pytest.fixture
def toy(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    return make_project(pytester, monkeypatch, test_one=THROUGHPUT)


@pytest.mark.slow
def test_a_terminal_shows_each_step_of_each_point(toy: pytest.Pytester) -> None:
    output = run_on_terminal(toy, *SMOKE, "--int8-set=compile_mode=off")
    steps = re.findall(r"\r?(building|compiling|warming up|measuring|comparing) (toy: \S+)", output)
    assert list(dict.fromkeys(steps)) == [
        ("building", f"{BF16}_compile_mode-off"),
        ("warming up", f"{BF16}_compile_mode-off"),
        ("measuring", f"{BF16}_compile_mode-off"),
        ("building", W8A8),
        ("warming up", W8A8),
        ("measuring", W8A8),
        ("comparing", W8A8),
    ]
    lines = screen(output)
    assert f"{'test_one.py ..':<{COLUMNS - 8}} [100%]" in lines
    [title] = [line for line in lines if line.strip("-") == " int8bench "]
    assert lines[lines.index(title) + 1].startswith("workload run ")
    assert not any(" building " in line or " warming up " in line for line in lines)


@pytest.mark.slow
def test_a_pipe_gets_one_line_for_each_compilation(toy: pytest.Pytester) -> None:
    output = run(toy, *SMOKE, "--int8-mode=off")
    assert "\x1b" not in output
    name = f"{BF16}_compile_mode-default"
    [line] = re.findall(r"^int8bench: .*\.\.\..*$", output, re.MULTILINE)
    assert line == f"int8bench: compiling {name} ... 0 s"
    assert output.partition(line)[2].startswith("\ntest_one.py . ")
    assert "1 passed" in output
