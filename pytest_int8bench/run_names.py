"""Write and parse run names, the one-word names of points.

There are two forms. OlmoEarth's names begin with the model size and contain sensors, image, patch
and timesteps. Names of other workloads begin with the device and contain these fields only where
they differ from their defaults.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from pytest_int8bench.choices import COMPILE_MODES, DEVICES, MODEL_SIZES, mode_choices
from pytest_int8bench.param_values import EXTRA_NAME, escape, extra_text, to_text

#: Fields of the fixed part -> their text form.
_SENSORS = {"use_s1": "s1", "use_s2": "s2", "use_landsat": "ls"}
_SIZES = {"image_size": "is", "patch_size": "ps", "num_timesteps": "ts"}
#: Fields that follow the fixed part where they differ from their defaults.
_APPENDED = (
    "int8_mode",
    "int8_smoothquant",
    "compile_mode",
    "compile_fullgraph",
    "model_version",
    "attention",
    "int8_backend",
    "int8_attention",
    "feed",
)
#: Fields of OlmoEarth's fixed part that follow it in the names of other workloads.
_APPENDED_BY_OTHERS = ("model_size", "use_s2")
_AXIS = rf"extra\.{EXTRA_NAME.pattern}"
_ITEM = re.compile(rf"_({'|'.join([*_APPENDED_BY_OTHERS, *_APPENDED, _AXIS])})-([^_]*)")


def write(values: Mapping[str, Any], defaults: Mapping[str, Any], *, is_short: bool) -> str:
    """Return the run name of a point.

    Args:
        values: every field.
        defaults: the default of each field except ``extra``.
        is_short: whether the workload is not OlmoEarth.
    """
    is_int8 = values["int8_enabled"]
    named = [n for n in (*_SENSORS, *_SIZES) if not (is_short and values[n] == defaults[n])]
    fixed = [
        None if is_short else values["model_size"],
        values["gpu_type"],
        "bf16" if values["bf16"] else None,
        f"int8_{values['int8_mode']}" if is_int8 else None,
        "smoothq" if is_int8 and values["int8_smoothquant"] else None,
        values["compile_mode"] if is_int8 else None,
        *(short for name, short in _SENSORS.items() if name in named and values[name]),
        *(f"{short}{values[name]}" for name, short in _SIZES.items() if name in named),
        f"bs{values['batch_size']}",
    ]
    said = {"int8_mode", "int8_smoothquant", "compile_mode"} if is_int8 else set()
    appended = [
        f"{name}-{escape(to_text(values[name]))}"
        for name in (*(_APPENDED_BY_OTHERS if is_short else ()), *_APPENDED)
        if name not in said and values[name] != defaults[name]
    ]
    extra = [f"extra.{k}-{escape(extra_text(v))}" for k, v in values["extra"].items()]
    return "_".join([item for item in fixed if item] + appended + extra)


def read(name: str) -> tuple[dict[str, str], bool]:
    """Return a run name's fields as text (axes as ``extra.NAME``), and whether it is in
    the short form for workloads other than OlmoEarth.

    Raises:
        ValueError: if ``name`` is not a run name.
    """
    modes = tuple(mode_choices())
    match, is_short = _pattern(modes, False).fullmatch(name), False
    if match is None:
        match, is_short = _pattern(modes, True).fullmatch(name), True
    if match is None:
        raise ValueError(f"not a run name: {name!r}")
    found = match.groupdict()
    flags = {"bf16", "int8_enabled", "int8_smoothquant", *_SENSORS} & {*found}
    values = {flag: to_text(found[flag] is not None) for flag in flags}
    for field, text in found.items():
        if field not in (*flags, "appended") and text is not None:
            values[field] = text
    return values | {k: unquote(text) for k, text in _ITEM.findall(found["appended"])}, is_short


@functools.cache
def _pattern(modes: tuple[str, ...], is_short: bool) -> re.Pattern[str]:
    """Return the pattern for one form of run names; not a constant, as modes may register late."""
    sensors = {name: f"(?P<{name}>_{short})?" for name, short in _SENSORS.items()}
    sizes = {name: rf"_{short}(?P<{name}>\d+)" for name, short in _SIZES.items()}
    appended = [*_APPENDED, _AXIS]
    size = f"(?P<model_size>{'|'.join(MODEL_SIZES)})_"
    if is_short:
        sensors = {n: item for n, item in sensors.items() if n not in _APPENDED_BY_OTHERS}
        sizes = {name: f"(?:{item})?" for name, item in sizes.items()}
        appended = [*_APPENDED_BY_OTHERS, *appended]
        size = ""
    return re.compile(
        rf"{size}(?P<gpu_type>{'|'.join(DEVICES)})(?P<bf16>_bf16)?"
        rf"(?P<int8_enabled>_int8_(?P<int8_mode>{'|'.join(modes)})(?P<int8_smoothquant>_smoothq)?"
        rf"_(?P<compile_mode>{'|'.join(COMPILE_MODES)}))?"
        rf"{_joined(sensors)}{_joined(sizes)}_bs(?P<batch_size>\d+)"
        rf"(?P<appended>(?:_(?:{'|'.join(appended)})-[^_]*)*)"
    )


def _joined(items: Mapping[str, str]) -> str:
    return "".join(items.values())
