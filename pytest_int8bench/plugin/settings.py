"""Read options and ini values into Settings, once, at the edge."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.choices import mode_choices
from pytest_int8bench.gate.flags import GATE_FLAGS, Flag
from pytest_int8bench.gate.rules import Rules, find_pyproject, read_rules
from pytest_int8bench.plugin.options import (
    OPTIONS,
    check_fields,
    check_forced_product,
    check_workload,
    read_compare,
    read_filter,
    read_workload,
)
from pytest_int8bench.plugin.pytest_benchmark import is_benchmark_disabled
from pytest_int8bench.results.figures import METRICS
from pytest_int8bench.sweep import axes_of, expand_modes

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams


INCONCLUSIVE = ("fail", "warn", "skip")
PRESETS: dict[str, dict[str, Any]] = {
    "seed": {},
    "smoke": {
        "model_size": "nano",
        "image_size": 16,
        "num_timesteps": 3,
        "batch_size": 4,
        "compile_mode": "default",
        "gpu_type": "cpu",
    },
}

#: What ``--int8-lean`` starts from: two seconds of one process vary less than two processes do.
LEAN: dict[str, Any] = {"benchmark_interval_s": 2.0}


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked."""

    preset: str = "auto"
    """``auto``, ``seed`` or ``smoke``."""
    modes: tuple[str, ...] = ("w8a8",)
    """INT8 modes to run, ``off`` among them."""
    changes: dict[str, Any] = field(default_factory=dict)
    """RunParams fields set to one value; ``extra.NAME`` for axes of the workload."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """RunParams fields to sweep, with their values."""
    cross_product: bool = False
    workload: str = "olmoearth"
    weights: str = "random"
    """``random``, ``hub`` or an absolute path."""
    filter: str | None = None
    compile_cache: Path | None = None
    """Absolute path of a folder to keep compiled code in."""
    baseline: bool = True
    """Add BF16 twins and measure the speedup."""
    max_drop: Limit = field(default_factory=lambda: Limit.parse("1%"))
    """Largest drop of a metric."""
    inconclusive: str = "fail"
    """``fail``, ``warn`` or ``skip``."""
    eval_data: Path | None = None
    """Absolute path of a folder of labelled images."""
    remedy: bool = False
    compare: tuple[Path, ...] = ()
    """Saved files to hold each point to."""
    rules: Rules = field(default_factory=Rules)
    """Limits of that comparison, those of ``pyproject.toml`` among them, and what may differ from
    a file that is compared with."""
    profile: Path | None = None
    """Absolute path of the folder for profiles; None for the default one."""
    reports: tuple[Path, ...] = ()
    """Absolute paths of reports to write."""
    lean: bool = False
    """Measure throughput only, for ``int8bench ab``."""
    journal: str | None = None
    """Path of the journal, from the folder that pytest was started in."""

    def resolved_preset(self, cuda_available: Callable[[], bool]) -> str:
        """Return the preset's name, ``auto`` decided by ``cuda_available``."""
        if self.preset != "auto":
            return self.preset
        return "seed" if cuda_available() else "smoke"

    def default_params(self, preset: str) -> RunParams:
        """Return the point that all others are changed from."""
        from pytest_int8bench.params import RunParams

        changes = {k: v for k, v in self.changes.items() if not k.startswith("extra.")}
        extra = {k.removeprefix("extra."): v for k, v in self.changes.items() if k not in changes}
        start = {**PRESETS[preset], **(LEAN if self.lean else {})}
        return RunParams(**{**start, **changes, "extra": extra})

    def points(self, preset: str) -> list[RunParams]:
        """Return the points to run, without BF16 twins."""
        return expand_modes(
            self.default_params(preset), self.modes, self.axes, cross_product=self.cross_product
        )


def read_settings(config: pytest.Config) -> Settings:
    """Read and check all options, and the environment variable that forces a kernel.

    Raises:
        pytest.UsageError: one line that names option, rule and value.
    """
    check_forced_product()
    values: dict[str, Any] = {}
    for option in OPTIONS.values():
        raw = option.read(config)
        if raw is None or (option.name == "journal" and hasattr(config, "workerinput")):
            # The journal is written by the process that started this worker.
            continue
        try:
            values |= _READERS[option.name](raw)
        except ValueError as error:
            raise pytest.UsageError(f"{option.source(config)}: {error}") from None
    on = {field: True for name, field in _SWITCHES.items() if name in values}
    values["changes"] = {**on, **values.get("changes", {})}  # --int8-set may say otherwise
    for name in ("smoothquant", "wandb"):
        values.pop(name, None)
    check_workload(values)
    values["rules"] = _read_rules(config, values)
    if values.get("lean"):
        if config.getoption("dist", "no") != "no":
            raise pytest.UsageError(
                f"{OPTIONS['lean'].flag}: nothing is measured with pytest-xdist (-n)"
            )
        _check_measuring(config, OPTIONS["lean"].flag)
        values["baseline"] = False
        values.pop("reports", None)
        values.pop("compile_cache", None)  # the sides of an A/B share no compiled code
        values.pop("profile", None)
        for name in ("profiler_enabled", "wandb_enabled"):
            values["changes"].pop(name, None)
    if values["changes"].get("wandb_enabled"):
        _check_wandb(config)
    # The sweep's axes come first, as they were named first in the documentation's examples;
    # an axis of --int8-set replaces the sweep key's values.
    values["axes"] = {**values.pop("sweep", {}), **values.get("axes", {})}
    crossing = OPTIONS["cross-product"]
    if (
        values.get("cross_product")
        and not values["axes"]
        and crossing.source(config) == crossing.flag
    ):
        # In an ini file it waits for a sweep.
        raise pytest.UsageError(
            f"{crossing.flag}: needs --int8-sweep, or --int8-set with several values"
        )
    check_fields(values)
    return Settings(**values)


def _check_wandb(config: pytest.Config) -> None:
    from pytest_int8bench.report.wandb import check_installed

    option = OPTIONS["wandb" if OPTIONS["wandb"].read(config) else "set"]
    try:
        check_installed()
    except ValueError as error:
        raise pytest.UsageError(f"{option.source(config)}: {error}") from None


def _read_rules(config: pytest.Config, values: dict[str, Any]) -> Rules:
    """Take the options of the gate out of ``values``; return the rules they make."""
    if values.get("lean"):
        values.pop("compare", None)  # of an ini file: two revisions are compared, not with a file
    limits = {name: values.pop(name) for name in METRICS if name in values}
    allow = values.pop("allow", frozenset())
    allow_missing = values.pop("allow_missing", False)
    if not values.get("compare"):
        given = [METRICS[name].option for name in limits]
        for name in (*given, *(["allow-missing"] if allow_missing else [])):
            # In an ini file they wait for the option.
            if (option := OPTIONS[name]).source(config) == option.flag:
                raise pytest.UsageError(f"{option.flag}: needs --int8-compare")
        return Rules(allow=allow)
    _check_measuring(config, OPTIONS["compare"].flag)
    target = config.getoption("benchmark_json", None)
    if target is not None:
        # An open file before pytest-benchmark 5.3, a path since.
        path = Path(target if isinstance(target, str | Path) else target.name)
        if path.resolve() in {base.resolve() for base in values["compare"]}:
            raise pytest.UsageError(
                f"--benchmark-json: {path} is compared with (--int8-compare), and not overwritten"
            )
    try:
        rules = read_rules(find_pyproject(config.rootpath))
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--int8-compare: {error}") from None
    return replace(
        rules,
        limits={**rules.limits, **limits},
        allow=rules.allow | allow,
        allow_missing=rules.allow_missing or allow_missing,
    )


def _check_measuring(config: pytest.Config, flag: str) -> None:
    """Refuse options under which nothing is measured, so that everything would pass."""
    obstacles = {
        "-p no:benchmark": not config.pluginmanager.hasplugin("benchmark"),
        "--codspeed": config.getoption("codspeed", False),  # it sets --benchmark-disable
        "--benchmark-disable": is_benchmark_disabled(config),
        "--benchmark-skip": config.getoption("benchmark_skip", False),
    }
    for obstacle, is_there in obstacles.items():
        if is_there:
            raise pytest.UsageError(f"{flag}: nothing is measured with {obstacle}")


def _read_modes(text: str) -> dict[str, Any]:
    valid = (*mode_choices(), "off")
    modes = _split(text)
    for mode in modes:
        if mode not in valid:
            raise ValueError(f"must be one or more of {', '.join(valid)} by comma, got {mode!r}")
    return {"modes": tuple(dict.fromkeys(modes))}


def _read_set(items: list[str]) -> dict[str, Any]:
    from pytest_int8bench.param_values import parse_extra
    from pytest_int8bench.params import MEASURING_FIELDS, RunParams, parse_field

    changes: dict[str, Any] = {}
    axes: dict[str, list[Any]] = {}
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"must be NAME=VALUE, got {item!r}")
        if name in ("int8_enabled", "int8_mode"):
            raise ValueError(f"{name} is set by --int8-mode, got {item!r}")
        if name.startswith("extra."):
            parsed: list[Any] = [parse_extra(part) for part in _split(text)]
            for value in parsed:
                RunParams(extra={name.removeprefix("extra."): value})
        else:
            parsed = [parse_field(name, part) for part in _split(text)]
        if name in MEASURING_FIELDS and len(parsed) > 1:
            raise ValueError(f"{name} is no part of a run's name and cannot be swept, got {item!r}")
        changes.pop(name, None)
        axes.pop(name, None)
        if len(parsed) == 1:
            changes[name] = parsed[0]
        else:
            axes[name] = parsed
    return {"changes": changes, "axes": axes}


def _read_preset(text: str) -> dict[str, Any]:
    if text not in ("auto", *PRESETS):
        raise ValueError(f"must be one of auto, {', '.join(PRESETS)}, got {text!r}")
    return {"preset": text}


def _read_weights(text: str) -> dict[str, Any]:
    if text in ("random", "hub"):
        return {"weights": text}
    if not text or not Path(text).exists():
        raise ValueError(f"must be random, hub or a path that is there, got {text!r}")
    return {"weights": str(Path(text).absolute())}


def _folder_reader(name: str) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        path = Path(text).absolute()
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        if not text or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"must be a folder that can be written to, got {text!r}")
        return {name: path}

    return read


def _read_max_drop(text: str) -> dict[str, Any]:
    return {"max_drop": Limit.parse(text)}


def _read_inconclusive(text: str) -> dict[str, Any]:
    if text not in INCONCLUSIVE:
        raise ValueError(f"must be one of {', '.join(INCONCLUSIVE)}, got {text!r}")
    return {"inconclusive": text}


def _read_eval_data(text: str) -> dict[str, Any]:
    if not text or not Path(text).is_dir():
        raise ValueError(f"must be a folder that is there, got {text!r}")
    return {"eval_data": Path(text).absolute()}


def _read_journal(text: str) -> dict[str, Any]:
    if Path(text).exists():
        raise ValueError(f"must be a file that is not there yet, got {text!r}")
    return {"journal": text}


def _read_reports(items: list[str]) -> dict[str, Any]:
    from pytest_int8bench.report.write import check_output

    return {"reports": tuple(dict.fromkeys(check_output(text).absolute() for text in items))}


def _read_flag(name: str, on: Any = True) -> Callable[[bool | str], dict[str, Any]]:
    def read(value: bool | str) -> dict[str, Any]:
        if isinstance(value, str):
            from pytest_int8bench.param_values import parse_bool

            value = parse_bool(value)
        return {name: on} if value else {}

    return read


def _gate_reader(flag: Flag) -> Callable[[Any], dict[str, Any]]:
    read = flag.read
    return _read_flag(flag.dest) if read is None else lambda raw: {flag.dest: read(raw)}


def _split(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"must not have an empty item, got {text!r}")
    return parts


#: Option -> RunParams field that it turns on.
_SWITCHES = {
    "smoothquant": "int8_smoothquant",
    "profile": "profiler_enabled",
    "wandb": "wandb_enabled",
}

_READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "mode": _read_modes,
    "smoothquant": _read_flag("smoothquant"),
    "sweep": lambda text: {"sweep": axes_of(_split(text))},
    "cross-product": _read_flag("cross_product"),
    "set": _read_set,
    "preset": _read_preset,
    "workload": read_workload,
    "weights": _read_weights,
    "filter": read_filter,
    "compile-cache": _folder_reader("compile_cache"),
    "no-baseline": _read_flag("baseline", on=False),
    "max-drop": _read_max_drop,
    "inconclusive": _read_inconclusive,
    "eval-data": _read_eval_data,
    "remedy": _read_flag("remedy"),
    "compare": read_compare,
    **{flag.name: _gate_reader(flag) for flag in GATE_FLAGS},
    "profile": _folder_reader("profile"),
    "wandb": _read_flag("wandb"),
    "report": _read_reports,
    "lean": _read_flag("lean"),
    "journal": _read_journal,
}
