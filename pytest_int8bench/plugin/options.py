"""Command-line and ini options.

Every pytest session imports this file, including those without benchmarks: keep its imports cheap.
"""

from __future__ import annotations

import argparse
import os
from typing import Any, NamedTuple

import pytest

from pytest_int8bench.choices import SWEEPS, mode_choices
from pytest_int8bench.gate.flags import ALLOW, ALLOW_MISSING, LIMITS, Flag
from pytest_int8bench.workloads.registry import (
    GROUP,
    OLMOEARTH,
    REFERENCE_FORMS,
    built_in_names,
)

#: Environment variable that forces a kernel.
FORCED_KERNEL = "INT8BENCH_PRODUCT"


class Option(NamedTuple):  # created whenever pytest starts; a dataclass takes 1 ms more
    """An option: ``--int8-NAME`` on the command line, ``int8_NAME`` in the ini file."""

    name: str
    help: str
    metavar: str | None = None
    """None for a flag, which takes no value."""
    repeatable: bool = False

    @property
    def flag(self) -> str:
        return "--int8-" + self.name

    @property
    def dest(self) -> str:
        return "int8_" + self.name.replace("-", "_")

    def read(self, config: pytest.Config) -> Any:
        """Return the value from the command line or else the ini file; None if neither has one."""
        value = config.getoption(self.dest)
        if value not in (None, []):
            return value
        ini = config.getini(self.dest)
        return ini if ini not in ("", [], None) else None

    def source(self, config: pytest.Config) -> str:
        """Return the name under which the user set the option (flag or ini key), for error
        messages."""
        return self.flag if config.getoption(self.dest) not in (None, []) else self.dest


def _gate_option(flag: Flag, text: str) -> Option:
    """Return the pytest option for a flag that the ``int8bench`` command also takes. ``text`` is a
    template for its help, with one placeholder for the help of ``flag``."""
    meaning = text.format(flag.help)
    meaning = meaning[0].upper() + meaning[1:]
    return Option(flag.name, f"{meaning}. Default: {flag.default}", flag.metavar, flag.repeatable)


_MODES = ", ".join(f"{name} ({choice.summary})" for name, choice in mode_choices().items())

OPTIONS = {
    option.name: option
    for option in (
        Option(
            "mode",
            f"Comma-separated quantization modes: {_MODES} or off (BF16 only). Default: w8a8",
            "MODES",
        ),
        Option("smoothquant", "Calibrate and apply SmoothQuant before quantizing. Default: off"),
        Option(
            "sweep",
            "Comma-separated sweep keys, each varied while the others stay fixed: "
            f"{', '.join(SWEEPS)}. Default: none",
            "KEYS",
        ),
        Option(
            "cross-product",
            "Measure every combination of the swept values instead of varying one axis at a time. "
            "Default: off",
        ),
        Option(
            "set",
            "Set a RunParams field, such as batch_size=64, or an axis of your own workload, "
            "extra.NAME=VALUE. Several values, separated by commas, are swept. Repeatable. "
            "Default: none",
            "NAME=VALUE",
            repeatable=True,
        ),
        Option(
            "preset",
            "Starting parameters: seed (model size base, batch 128, image 64, max-autotune, CUDA), "
            "smoke (model size nano, batch 4, image 16, 3 timesteps, compile mode default, CPU) or "
            "auto (seed if CUDA is available, else smoke). Default: auto",
            "NAME",
        ),
        Option(
            "workload",
            f"Workload to measure: {', '.join(built_in_names())}, a name from the entry-point "
            f"group {GROUP}, or a {REFERENCE_FORMS} that returns a Workload. Default: {OLMOEARTH}",
            "NAME",
        ),
        Option(
            "trust-remote-code",
            "Let hf:NAME run the Python code that a model ships (auto_map in its config.json). "
            "Without this option, such models are refused. Default: off",
        ),
        Option(
            "weights",
            "Weights to load: random (seeded), hub (pretrained), or a path to a state dict, which "
            "is read without running code from it. olmoearth and hf:NAME also take a path to a "
            "directory laid out as on the hub. Default: random",
            "WEIGHTS",
        ),
        Option(
            "filter",
            f"{REFERENCE_FORMS} that takes (module, name) and returns whether to quantize that "
            "layer. Default: attention projections and MLP layers",
            "REFERENCE",
        ),
        Option(
            "compile-cache",
            "Directory that keeps compiled code between sessions, in a subdirectory for each "
            "combination of machine type, software versions and attention backend. You can copy it "
            "to another machine of the same type. Default: torch's own, for this machine",
            "DIR",
        ),
        Option("no-baseline", "Do not measure BF16 baselines, and report no speedup. Default: off"),
        Option(
            "max-drop",
            "Largest drop of a metric below its BF16 baseline that passes an accuracy test, either "
            "relative to the baseline, such as 1%, or absolute, such as 1pp. Default: 1%",
            "LIMIT",
        ),
        Option(
            "inconclusive",
            "Outcome of an accuracy test that has too few samples to decide: fail, warn or skip. "
            "Default: fail",
            "ACTION",
        ),
        Option(
            "eval-data",
            "Labelled images to measure OlmoEarth's accuracy on: a directory with one subdirectory "
            "of 13-band GeoTIFFs per class, as in EuroSAT. Default: generated scenes",
            "PATH",
        ),
        Option(
            "remedy",
            "If accuracy drops too much, try SmoothQuant, BF16 for the worst layers, and W8, and "
            "print the configurations that pass. Default: off",
        ),
        Option(
            "compare",
            "Fail each point that is worse than in a saved run on the same machine and software. "
            "BASE is a file, a directory, or the number of a pytest-benchmark run, such as 0003. "
            "Repeatable: several base runs are used to estimate the noise. Default: none",
            "BASE",
            repeatable=True,
        ),
        *(_gate_option(limit, "With --int8-compare, the {}") for limit in LIMITS),
        _gate_option(
            ALLOW,
            "{}. Applies to files given by --int8-compare and to results of several pytest-xdist "
            "workers. Repeatable",
        ),
        _gate_option(ALLOW_MISSING, "With --int8-compare, {}"),
        Option(
            "profile",
            "Profile one forward pass of each point, and write its trace (for Perfetto or "
            "chrome://tracing) and a table of its kernels to this directory. To write them to "
            ".benchmarks/int8bench/profiles, use --int8-set profiler_enabled=true instead. "
            "Default: none",
            "DIR",
        ),
        Option(
            "wandb",
            "Log each measured point to Weights & Biases as a run at the end of the session. "
            "Configure the destination with W&B's environment variables, such as WANDB_PROJECT, "
            "WANDB_RUN_GROUP and WANDB_MODE=offline. Default: off",
        ),
        Option(
            "report",
            "Write a report: FILE.html for a single HTML page (needs pip install "
            "'pytest-int8bench[report]') or FILE.md for Markdown. Repeatable. Default: none",
            "FILE",
            repeatable=True,
        ),
        Option(
            "lean",
            "Measure throughput only, for 2 s per point unless benchmark_interval_s is set. Skips "
            "other tests, baselines, speedups, kernel evidence, profiles and Weights & Biases. "
            "Used by int8bench ab. Default: off",
        ),
        Option(
            "journal",
            "File to which each point is written as soon as it finishes; it must not exist yet. "
            "Default: a new file in .benchmarks/int8bench",
            "PATH",
        ),
    )
}


def add_options(parser: pytest.Parser) -> None:
    """Register every option and its ini value."""
    group = parser.getgroup("int8bench", "INT8 inference benchmarks")
    for option in OPTIONS.values():
        text = option.help.replace("%", "%%")
        kind: dict[str, Any] = {"dest": option.dest, "help": text, "default": None}
        if option.metavar is None:
            group.addoption(option.flag, action="store_true", **kind)
        else:
            action = "append" if option.repeatable else "store"
            group.addoption(option.flag, action=action, metavar=option.metavar, **kind)
        ini_type: Any = "linelist" if option.repeatable else "string"
        parser.addini(option.dest, f"Same as {option.flag}", type=ini_type, default=None)


def are_on_command_line(options: argparse.Namespace) -> bool:
    """Return whether the command line has any of our options. Ini values do not count: they apply
    to every session, including those without benchmarks."""
    return any(getattr(options, one.dest, None) not in (None, []) for one in OPTIONS.values())


def are_given(config: pytest.Config) -> bool:
    """Return whether the command line, the ini file or the environment sets any of our options."""
    return FORCED_KERNEL in os.environ or any(
        option.read(config) is not None for option in OPTIONS.values()
    )
