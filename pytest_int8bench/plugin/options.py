"""Command line and ini options. A session without benchmarks pays for what this file imports."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

import pytest

from pytest_int8bench.choices import mode_choices
from pytest_int8bench.gate.flags import ALLOW, ALLOW_MISSING, LIMITS, Flag
from pytest_int8bench.sweep import SWEEPS
from pytest_int8bench.workloads.registry import (
    GROUP,
    OLMOEARTH,
    REFERENCE_FORMS,
    built_in_names,
)

#: Environment variable that forces a kernel.
FORCED_KERNEL = "INT8BENCH_PRODUCT"


@dataclass(frozen=True)
class Option:
    """One option: ``--int8-NAME`` on the command line, ``int8_NAME`` in the ini file."""

    name: str
    help: str
    metavar: str | None = None
    """None makes a flag."""
    repeatable: bool = False

    @property
    def flag(self) -> str:
        return "--int8-" + self.name

    @property
    def dest(self) -> str:
        return "int8_" + self.name.replace("-", "_")

    def read(self, config: pytest.Config) -> Any:
        """Return the command line's value, else the ini file's, else None."""
        value = config.getoption(self.dest)
        if value not in (None, []):
            return value
        ini = config.getini(self.dest)
        return ini if ini not in ("", [], None) else None

    def source(self, config: pytest.Config) -> str:
        """Return how the user wrote this option, for error messages."""
        return self.flag if config.getoption(self.dest) not in (None, []) else self.dest


def _gate_option(flag: Flag, text: str) -> Option:
    """Return pytest's option for one that ``int8bench`` takes too; ``text`` has a place for its
    help."""
    meaning = text.format(flag.help)
    meaning = meaning[0].upper() + meaning[1:]
    return Option(flag.name, f"{meaning}. Default: {flag.default}", flag.metavar, flag.repeatable)


_MODES = ", ".join(f"{name} ({choice.summary})" for name, choice in mode_choices().items())

OPTIONS = {
    option.name: option
    for option in (
        Option(
            "mode",
            f"INT8 modes by comma: {_MODES} or off (BF16 only). Default: w8a8",
            "MODES",
        ),
        Option("smoothquant", "Apply SmoothQuant after a calibration pass. Default: off"),
        Option(
            "sweep",
            f"Sweep keys by comma, one axis at a time: {', '.join(SWEEPS)}. Default: none",
            "KEYS",
        ),
        Option(
            "cross-product", "Sweep all combinations instead of one axis at a time. Default: off"
        ),
        Option(
            "set",
            "Set a RunParams field, e.g. batch_size=64, or an axis of your workload, "
            "extra.NAME=VALUE. Repeatable; commas in VALUE sweep it. Default: none",
            "NAME=VALUE",
            repeatable=True,
        ),
        Option(
            "preset",
            "Where the parameters start: seed (base, batch 128, image 64, max-autotune, CUDA), "
            "smoke (nano, batch 4, image 16, 3 timesteps, compile mode default, CPU) or auto "
            "(seed with CUDA, else smoke). Default: auto",
            "NAME",
        ),
        Option(
            "workload",
            f"What to measure: {', '.join(built_in_names())}, a name of the entry-point group "
            f"{GROUP}, or {REFERENCE_FORMS} returning a Workload. Default: {OLMOEARTH}",
            "NAME",
        ),
        Option(
            "trust-remote-code",
            "Let hf:NAME run Python code that comes with a model (auto_map in its config.json). "
            "Default: off, such models are refused",
        ),
        Option(
            "weights",
            "random (seeded), hub (pretrained), or a path: a state dict, read without running code "
            "from it, or for olmoearth and hf:NAME a folder as on the hub. Default: random",
            "WEIGHTS",
        ),
        Option(
            "filter",
            "module:callable that takes (module, name) and says which layers to quantize. "
            "Default: attention projections and MLP layers",
            "REFERENCE",
        ),
        Option(
            "compile-cache",
            "Folder to keep compiled code in from session to session, with a part for each kind "
            "of machine, versions and attention backend; it may be copied to another machine of "
            "that kind. Default: torch's own, for this machine",
            "DIR",
        ),
        Option("no-baseline", "Leave out BF16 baselines and the speedup. Default: off"),
        Option(
            "max-drop",
            "Largest drop of a metric against BF16 that an accuracy test passes: 1% of the "
            "baseline's metric (relative) or 1pp (absolute). Default: 1%",
            "LIMIT",
        ),
        Option(
            "inconclusive",
            "What an accuracy test does when its samples cannot decide: fail, warn or skip. "
            "Default: fail",
            "ACTION",
        ),
        Option(
            "eval-data",
            "Labelled images for OlmoEarth's accuracy: a folder with a folder of 13-band GeoTIFFs "
            "for each class, as EuroSAT. Default: generated scenes",
            "PATH",
        ),
        Option(
            "remedy",
            "When accuracy dropped too much, try SmoothQuant, BF16 for the worst layers, and W8, "
            "and print what passes. Default: off",
        ),
        Option(
            "compare",
            "Fail each point that got worse than in a saved file of the same machine and software: "
            "a file, a folder, or a number of pytest-benchmark such as 0003. Repeatable: several "
            "runs of the base show the noise. Default: none",
            "BASE",
            repeatable=True,
        ),
        *(_gate_option(limit, "With --int8-compare, {}") for limit in LIMITS),
        _gate_option(
            ALLOW,
            "{}. It counts for a file that is compared with, and between workers of pytest-xdist. "
            "Repeatable",
        ),
        _gate_option(ALLOW_MISSING, "With --int8-compare, {}"),
        Option(
            "profile",
            "Write a trace of one forward of each point, for Perfetto or chrome://tracing, and a "
            "table of its kernels into this folder (with --int8-set profiler_enabled=true alone "
            "into .benchmarks/int8bench/profiles). Default: none",
            "DIR",
        ),
        Option(
            "wandb",
            "Log each measured point to Weights & Biases as a run, when the session is over; "
            "WANDB_PROJECT, WANDB_RUN_GROUP, WANDB_MODE=offline and the like say where to. "
            "Default: off",
        ),
        Option(
            "report",
            "Write what was measured as one page, FILE.html (needs the extra report), or as "
            "Markdown, FILE.md. Repeatable. Default: none",
            "FILE",
            repeatable=True,
        ),
        Option(
            "lean",
            "Measure throughput only: no other tests, no baselines, no speedup, no look at the "
            "kernels, no profiles, nothing to Weights & Biases, 2 s a point unless "
            "benchmark_interval_s is set; for int8bench ab. Default: off",
        ),
        Option(
            "journal",
            "File that every finished point is written to at once; it must not be there yet. "
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
    """Return whether the command line has one of our options: an ini file applies to every
    session, including those without benchmarks."""
    return any(getattr(options, one.dest, None) not in (None, []) for one in OPTIONS.values())


def are_given(config: pytest.Config) -> bool:
    """Return whether the command line, the ini file or the environment sets anything of ours."""
    return FORCED_KERNEL in os.environ or any(
        option.read(config) is not None for option in OPTIONS.values()
    )
