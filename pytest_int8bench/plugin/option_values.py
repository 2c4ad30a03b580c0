"""Parse the text of each option into fields of Settings.

Each reader raises a ValueError that names the rule and the value. Readers import modules only when
they run, so that a session pays only for the options it uses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_int8bench.choices import mode_choices
from pytest_int8bench.gate.flags import GATE_FLAGS, Flag
from pytest_int8bench.plugin.pytest_benchmark import STORAGE
from pytest_int8bench.plugin.settings import PRESETS
from pytest_int8bench.sweep import axes_of

INCONCLUSIVE = ("fail", "warn", "skip")


def _read_modes(text: str) -> dict[str, Any]:
    valid = (*mode_choices(), "off")
    modes = _split(text)
    for mode in modes:
        if mode not in valid:
            raise ValueError(f"must be a comma-separated list of {', '.join(valid)}, got {mode!r}")
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
            raise ValueError(f"{name} must be set by --int8-mode, got {item!r}")
        if name.startswith("extra."):
            parsed: list[Any] = [parse_extra(part) for part in _split(text)]
            for value in parsed:
                RunParams(extra={name.removeprefix("extra."): value})
        else:
            parsed = [parse_field(name, part) for part in _split(text)]
        if name in MEASURING_FIELDS and len(parsed) > 1:
            raise ValueError(
                f"{name} must be a single value, got {item!r}: it is not part of the run name and "
                "cannot be swept"
            )
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
        raise ValueError(f"must be random, hub or an existing path, got {text!r}")
    return {"weights": str(Path(text).absolute())}


def _read_compile_cache(text: str) -> dict[str, Any]:
    from pytest_int8bench.files import is_noexec

    read = _folder_reader("compile_cache")(text)
    if is_noexec(read["compile_cache"]):
        raise ValueError(
            f"must be a directory that code can be loaded from, got {text!r}, which is on a file "
            "system mounted noexec"
        )
    return read


def _folder_reader(name: str) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        path = Path(text).absolute()
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        if not text or not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"must be a writable directory, got {text!r}")
        return {name: path}

    return read


def _read_max_drop(text: str) -> dict[str, Any]:
    from pytest_int8bench.accuracy.limit import Limit

    return {"max_drop": Limit.parse(text)}


def _read_inconclusive(text: str) -> dict[str, Any]:
    if text not in INCONCLUSIVE:
        raise ValueError(f"must be one of {', '.join(INCONCLUSIVE)}, got {text!r}")
    return {"inconclusive": text}


def _read_eval_data(text: str) -> dict[str, Any]:
    if not text or not Path(text).is_dir():
        raise ValueError(f"must be an existing directory, got {text!r}")
    return {"eval_data": Path(text).absolute()}


def _read_journal(text: str) -> dict[str, Any]:
    if os.path.lexists(text) or not text:
        raise ValueError(f"must be a writable file that does not exist yet, got {text!r}")
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


def _read_compare(items: list[str]) -> dict[str, Any]:
    from pytest_int8bench.results.locating import find_side

    return {"compare": tuple(find_side(items, STORAGE))}


def _read_workload(text: str) -> dict[str, Any]:
    from pytest_int8bench.workloads.registry import check_workload_name

    return {"workload": check_workload_name(text)}


def _read_filter(text: str) -> dict[str, Any]:
    from pytest_int8bench.workloads.registry import check_reference

    return {"filter": check_reference(text)}


def _split(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"must not have an empty item, got {text!r}")
    return parts


READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "mode": _read_modes,
    "smoothquant": _read_flag("smoothquant"),
    "sweep": lambda text: {"sweep": axes_of(_split(text))},
    "cross-product": _read_flag("cross_product"),
    "set": _read_set,
    "preset": _read_preset,
    "workload": _read_workload,
    "trust-remote-code": _read_flag("trust_remote_code"),
    "weights": _read_weights,
    "filter": _read_filter,
    "compile-cache": _read_compile_cache,
    "no-baseline": _read_flag("baseline", on=False),
    "max-drop": _read_max_drop,
    "inconclusive": _read_inconclusive,
    "eval-data": _read_eval_data,
    "remedy": _read_flag("remedy"),
    "compare": _read_compare,
    **{flag.name: _gate_reader(flag) for flag in GATE_FLAGS},
    "profile": _folder_reader("profile"),
    "wandb": _read_flag("wandb"),
    "report": _read_reports,
    "lean": _read_flag("lean"),
    "journal": _read_journal,
}
