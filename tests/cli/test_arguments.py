"""Options that pytest and ``int8bench`` share have one meaning, one default and one reader."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from pytest_int8bench.cli.ab import add_ab
from pytest_int8bench.cli.arguments import add_flag, as_argument_type
from pytest_int8bench.cli.compare import add_compare
from pytest_int8bench.gate.flags import ALLOW, ALLOW_MISSING, GATE_FLAGS, Flag
from pytest_int8bench.plugin.options import OPTIONS
from pytest_int8bench.plugin.reading import read_settings

SHARE = Flag("max-share", "share", "largest share", "5%", "LIMIT", read=int)


def command(name: str) -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser().add_subparsers()
    {"compare": add_compare, "ab": add_ab}[name](commands)
    parser: argparse.ArgumentParser = commands.choices[name]
    return parser


def help_of(parser: argparse.ArgumentParser) -> str:
    return " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    ("name", "flag"), [*(("compare", flag) for flag in GATE_FLAGS), ("ab", ALLOW_MISSING)]
)
def test_command_and_plugin_show_the_same_help_and_default(name: str, flag: Flag) -> None:
    shown = flag.name if flag.metavar is None else f"{flag.name} {flag.metavar}"
    assert f"--{shown} {flag.help} (default: {flag.default})" in help_of(command(name))
    option = OPTIONS[flag.name]
    assert flag.help.lower() in option.help.lower()
    assert option.help.endswith(f". Default: {flag.default}")
    assert (option.metavar, option.repeatable) == (flag.metavar, flag.repeatable)


@pytest.mark.parametrize("flag", [flag for flag in GATE_FLAGS if flag.read is not None])
def test_command_and_plugin_give_the_same_error(
    flag: Flag, pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flag.read is not None
    with pytest.raises(ValueError, match=r"^must be ") as reason:
        flag.read(["nothing"] if flag.repeatable else "nothing")
    with pytest.raises(pytest.UsageError) as refused:
        read_settings(pytester.parseconfig(f"--int8-{flag.name}=nothing"))
    assert str(refused.value) == f"--int8-{flag.name}: {reason.value}"
    if flag is not ALLOW:  # read after all names are known
        with pytest.raises(SystemExit):
            command("compare").parse_args([f"--{flag.name}=nothing"])
        assert capsys.readouterr().err.endswith(f"--{flag.name}: {reason.value}\n")


@pytest.mark.parametrize(
    ("flag", "words", "value"),
    [
        (SHARE, [], ...),
        (SHARE, ["--max-share=3"], 3),
        (ALLOW, [], []),
        (ALLOW, ["--allow=a", "--allow", "b"], ["a", "b"]),
        (ALLOW_MISSING, [], False),
        (ALLOW_MISSING, ["--allow-missing"], True),
    ],
)
def test_a_flag_becomes_an_argument(flag: Flag, words: list[str], value: Any) -> None:
    parser = argparse.ArgumentParser()
    add_flag(parser, flag, default=...)
    assert vars(parser.parse_args(words)) == {flag.dest: value}


def test_argparse_shows_the_error_of_a_reader() -> None:
    def read(text: str) -> None:
        raise ValueError(f"must be less, got {text!r}")

    with pytest.raises(argparse.ArgumentTypeError, match=r"^must be less, got '5%'$"):
        as_argument_type(read)("5%")


def test_ab_help_shows_the_defaults_of_the_design() -> None:
    text = help_of(command("ab"))
    assert "--margin MARGIN largest slowdown that is never a FAIL (default: 1%)" in text
    assert "--verdict-blocks N maximum number of blocks of four processes" in text
    given = command("ab").parse_args(["main", "--noise=2%", "--screening-blocks=6"])
    assert (given.noise, given.screening_blocks, given.max_slowdown) == (0.02, 6, 0.05)
