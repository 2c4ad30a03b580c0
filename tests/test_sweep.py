"""Test sweep keys and the points they expand to."""

from __future__ import annotations

import math
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.choices import Sweeps
from pytest_int8bench.params import RunParams
from pytest_int8bench.sweep import (
    MAX_POINTS,
    SWEEPS,
    Sweep,
    axes_of,
    expand,
    expand_modes,
    unique,
    with_baselines,
)

SMOKE = RunParams(gpu_type="cpu", model_size="nano", image_size=16, num_timesteps=3, batch_size=4)

# Values of each field that a sweep may name; some combinations are impossible.
AXES: dict[str, list[Any]] = {
    "batch_size": [1, 2, 4, 128],
    "image_size": [1, 16, 64],
    "model_size": ["nano", "base", "large"],
    "bf16": [True, False],
    "int8_enabled": [True, False],
    "int8_mode": ["w8a8", "w8"],
    "int8_smoothquant": [True, False],
    "int8_attention": [True, False],
    "compile_mode": ["default", "off"],
    "extra.width": [1, 1.0, "1", True],
}
axes_strategy = st.lists(st.sampled_from(sorted(AXES)), unique=True, max_size=4).flatmap(
    lambda names: st.fixed_dictionaries(
        {name: st.lists(st.sampled_from(AXES[name]), min_size=1, max_size=5) for name in names}
    )
)
defaults = st.sampled_from(
    [
        RunParams(),
        SMOKE,
        RunParams(int8_enabled=True, int8_mode="w8", int8_smoothquant=True),
        RunParams(extra={"width": 1, "depth": 2}),
    ]
)
modes_strategy = st.lists(st.sampled_from(["w8a8", "w8", "off"]), min_size=1, max_size=4)


def field_of(point: RunParams, name: str) -> tuple[type, Any]:
    """Return a field or axis with its type: 1, 1.0 and True are three values."""
    if name.startswith("extra."):
        value = point.extra.get(name.removeprefix("extra."))
    else:
        value = getattr(point, name)
    return type(value), value


def typed(values: list[Any]) -> set[tuple[type, Any]]:
    return {(type(value), value) for value in values}


# -- keys -------------------------------------------------------------------------------------


def test_sweep_keys() -> None:
    expected: dict[str, dict[str, list[Any]]] = {
        "batch": {"batch_size": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]},
        "image": {"image_size": [1, 2, 4, 8, 16, 32, 64, 128]},
        "patch": {"patch_size": [1, 2, 4, 8]},
        "time": {"num_timesteps": [1, 2, 4, 6, 8, 12]},
        "use_s1": {"use_s1": [True, False]},
        "use_s2": {"use_s2": [True, False]},
        "use_landsat": {"use_landsat": [True, False]},
        "bf16": {"bf16": [True, False]},
        "model_size": {"model_size": ["nano", "tiny", "base", "large"]},
        "int8_enabled": {"int8_enabled": [True, False]},
        "int8_mode": {"int8_mode": ["w8a8", "w8"]},
        "int8_smoothquant": {"int8_smoothquant": [True, False]},
        "compile_mode": {"compile_mode": ["default", "reduce-overhead", "max-autotune"]},
        "attention": {"attention": ["flash", "cudnn", "efficient", "math", "auto"]},
        "int8_backend": {"int8_backend": ["torchao", "fused"]},
        "int8_attention": {"int8_attention": [True, False]},
        "feed": {"feed": ["device", "host"]},
    }
    assert {key: axis for key, axis in SWEEPS.items() if key != "all"} == expected
    assert list(SWEEPS) == [*expected, "all"]


def test_all_is_every_axis_in_order() -> None:
    others = [axis for key, axis in SWEEPS.items() if key != "all"]
    assert list(SWEEPS["all"].items()) == [item for axis in others for item in axis.items()]


@pytest.mark.parametrize("key", sorted(set(SWEEPS) - {"all"}))
def test_each_key_gives_its_values_in_order(key: str) -> None:
    ((name, values),) = SWEEPS[key].items()
    default = RunParams(int8_enabled=True)
    points = expand(default, axes_of([key]))
    assert [getattr(point, name) for point in points] == values
    assert {point.replace(**{name: getattr(default, name)}) for point in points} == {default}


def test_axes_of_keeps_the_order_of_the_keys() -> None:
    assert list(axes_of(["time", "batch", "int8_mode"])) == [
        "num_timesteps",
        "batch_size",
        "int8_mode",
    ]
    assert axes_of([]) == {}


def test_rejects_unknown_key() -> None:
    with pytest.raises(ValueError, match=r"^unknown sweep key 'batch_size'; keys are ") as info:
        axes_of(["batch", "batch_size"])
    assert str(info.value) == (
        "unknown sweep key 'batch_size'; keys are batch, image, patch, time, use_s1, use_s2, "
        "use_landsat, bf16, model_size, int8_enabled, int8_mode, int8_smoothquant, compile_mode, "
        "attention, int8_backend, int8_attention, feed, all"
    )


DEPTH = Sweep("depth", "extra.depth", (1, 2), "layers of the model")


@pytest.fixture
def with_depth() -> Iterator[None]:
    SWEEPS.add(DEPTH)
    yield
    del SWEEPS["depth"]


def test_a_row_adds_a_key(with_depth: None) -> None:
    assert list(SWEEPS)[-2:] == ["depth", "all"]
    assert SWEEPS["depth"] == {"extra.depth": [1, 2]}
    assert SWEEPS["all"]["extra.depth"] == [1, 2]
    default = RunParams(extra={"depth": 4})
    assert [p.extra["depth"] for p in expand(default, axes_of(["depth"]))] == [1, 2]
    with pytest.raises(
        ValueError, match=r"^unknown sweep key 'x'; keys are batch, .*, depth, all$"
    ):
        axes_of(["x"])


def test_a_row_is_in_help_and_documentation(with_depth: None) -> None:
    code = "import pytest_int8bench.sweep as s; s.SWEEPS.add(s.Sweep(*{!r}))"
    code = code.format((DEPTH.key, DEPTH.field, DEPTH.values, DEPTH.help))
    show = "from pytest_int8bench.plugin.options import OPTIONS; print(OPTIONS['sweep'].help)"
    done = subprocess.run([sys.executable, "-c", f"{code}; {show}"], capture_output=True, text=True)
    assert "feed, depth, all. Default: none" in done.stdout, done.stderr
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    hooks = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "hooks.py"))
    row = "| `depth` | `extra.depth` | `1`, `2` | layers of the model |"
    assert row in hooks["sweeps"]("pytest_int8bench.sweep.SWEEPS").splitlines()


@pytest.mark.parametrize("key", ["batch", "all"])
def test_rejects_duplicate_key(key: str) -> None:
    before = dict(SWEEPS)
    with pytest.raises(ValueError, match=f"^sweep key '{key}' is taken$"):
        SWEEPS.add(Sweep(key, "patch_size", (1,), "another"))
    assert before == SWEEPS


def test_mapping_reads_like_a_dict() -> None:
    assert repr(Sweeps([DEPTH])) == repr(
        {"depth": {"extra.depth": [1, 2]}, "all": {"extra.depth": [1, 2]}}
    )


def test_assigning_or_deleting_a_key_updates_all() -> None:
    sweeps = Sweeps([DEPTH])
    sweeps["width"] = {"extra.width": [8]}
    assert sweeps["all"] == {"extra.depth": [1, 2], "extra.width": [8]}
    del sweeps["depth"]
    assert list(sweeps.items()) == [
        ("width", {"extra.width": [8]}),
        ("all", {"extra.width": [8]}),
    ]


def test_every_key_has_help() -> None:
    assert [key for key in SWEEPS if not SWEEPS.help.get(key)] == ["all"]


# -- expand -----------------------------------------------------------------------------------


def test_without_axes_gives_the_default_point() -> None:
    assert expand(SMOKE, {}) == [SMOKE]
    assert expand(SMOKE, {}, cross_product=True) == [SMOKE]


def test_one_axis_at_a_time() -> None:
    points = expand(RunParams(), {"batch_size": [64, 256], "image_size": [32, 128]})
    assert points == [
        RunParams(batch_size=64),
        RunParams(batch_size=256),
        RunParams(image_size=32),
        RunParams(image_size=128),
    ]


def test_cross_product_of_the_documented_example() -> None:
    points = expand(
        RunParams(),
        {"int8_enabled": [True, False], "batch_size": [64, 128, 256]},
        cross_product=True,
    )
    assert [(p.int8_enabled, p.batch_size) for p in points] == [
        (True, 64),
        (True, 128),
        (True, 256),
        (False, 64),
        (False, 128),
        (False, 256),
    ]


def test_default_point_of_several_axes_comes_once() -> None:
    axes = axes_of(["batch", "image", "time"])
    points = expand(RunParams(), axes)
    # 14 + 8 + 6 values, and each axis includes the default.
    assert len(points) == 14 + 8 + 6 - 2
    assert points.index(RunParams()) == 7


def test_number_of_points_of_all() -> None:
    # 64 values; 16 axes include the default (int8_backend does not), which comes once.
    assert sum(map(len, SWEEPS["all"].values())) == 64
    assert len(expand(RunParams(), SWEEPS["all"])) == 64 - 15


def test_extra_axis_keeps_other_extra_values() -> None:
    default = RunParams(extra={"width": 1, "depth": 2})
    assert expand(default, {"extra.width": [1, 8], "extra.act": ["relu"]}) == [
        default,
        default.replace(extra={"width": 8, "depth": 2}),
        default.replace(extra={"width": 1, "depth": 2, "act": "relu"}),
    ]


def test_impossible_points_are_kept() -> None:
    points = expand(RunParams(), axes_of(["image"]))
    assert [p.image_size for p in points if p.impossible_reason()] == [1, 2]


@given(defaults, axes_strategy)
def test_one_axis_at_a_time_counts(default: RunParams, axes: dict[str, list[Any]]) -> None:
    points = expand(default, axes)
    changed = sum(len(typed(v) - {field_of(default, name)}) for name, v in axes.items())
    at_default = any(field_of(default, name) in typed(v) for name, v in axes.items())
    assert len(points) == changed + (at_default or not axes)


@given(defaults, axes_strategy)
def test_cross_product_counts(default: RunParams, axes: dict[str, list[Any]]) -> None:
    points = expand(default, axes, cross_product=True)
    assert len(points) == math.prod(len(typed(values)) for values in axes.values())


@given(defaults, axes_strategy, st.booleans())
def test_unique_points(default: RunParams, axes: dict[str, list[Any]], cross_product: bool) -> None:
    points = expand(default, axes, cross_product=cross_product)
    assert len(set(points)) == len(points)
    assert len({point.run_name for point in points}) == len(points)
    assert expand(default, dict(axes), cross_product=cross_product) == points


@given(defaults, axes_strategy)
def test_every_point_has_values_of_the_axes(default: RunParams, axes: dict[str, list[Any]]) -> None:
    for point in expand(default, axes):
        differs = [name for name in axes if field_of(point, name) != field_of(default, name)]
        assert len(differs) <= 1
    for point in expand(default, axes, cross_product=True):
        assert all(field_of(point, name) in typed(v) for name, v in axes.items())


@pytest.mark.parametrize("cross_product", [False, True])
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"batch_size": []}, r"^sweep over batch_size must be a list of values, got \[\]$"),
        ({"int8_mode": "w8"}, r"^sweep over int8_mode must be a list of values, got 'w8'$"),
        ({"batch_size": 4}, r"^sweep over batch_size must be a list of values, got 4$"),
        ({"batch_size": {4}}, r"^sweep over batch_size must be a list of values, got \{4\}$"),
        ({"batch": [4]}, r"^unknown RunParams field 'batch'; fields are model_size, "),
        ({"batch_size": [4, 0]}, r"^batch_size must be at least 1, got 0$"),
        ({"int8_mode": ["w8", "w4"]}, r"^int8_mode must be one of w8a8, w8, fp8, got 'w4'$"),
        ({"extra.1x": [4]}, r"^extra names must be identifiers such as seq_len, got '1x'$"),
        ({"extra.x": [None]}, r"^extra\.x must be str, int, float or bool, got None$"),
    ],
)
def test_rejects_bad_axes(axes: dict[str, Any], message: str, cross_product: bool) -> None:
    with pytest.raises(ValueError, match=message):
        expand(RunParams(), axes, cross_product=cross_product)


# -- modes ------------------------------------------------------------------------------------


def test_mode_enables_int8() -> None:
    assert expand_modes(SMOKE, ["w8a8"], {}) == [SMOKE.replace(int8_enabled=True)]
    assert expand_modes(SMOKE, ["w8"], {}) == [SMOKE.replace(int8_enabled=True, int8_mode="w8")]


def test_mode_off_is_the_baseline() -> None:
    default = SMOKE.replace(int8_enabled=True, int8_mode="w8", int8_smoothquant=True)
    assert expand_modes(default, ["off"], {}) == [SMOKE]


def test_modes_multiply_without_a_cross_product() -> None:
    points = expand_modes(SMOKE, ["w8a8", "w8", "off"], {"batch_size": [1, 2], "bf16": [False]})
    assert [(p.int8_enabled and p.int8_mode, p.batch_size, p.bf16) for p in points] == [
        ("w8a8", 1, True),
        ("w8a8", 2, True),
        ("w8a8", 4, False),
        ("w8", 1, True),
        ("w8", 2, True),
        ("w8", 4, False),
        (False, 1, True),
        (False, 2, True),
        (False, 4, False),
    ]


def test_a_mode_given_twice_counts_once() -> None:
    points = expand_modes(SMOKE, ["w8", "w8a8", "w8"], {})
    assert [point.int8_mode for point in points] == ["w8", "w8a8"]


def test_swept_mode_is_merged_with_the_modes() -> None:
    points = expand_modes(SMOKE, ["w8a8", "w8"], axes_of(["int8_mode"]))
    assert [point.int8_mode for point in points] == ["w8a8", "w8"]


def test_int8_settings_are_merged_if_int8_is_off() -> None:
    axes = axes_of(["int8_mode", "int8_smoothquant", "int8_backend"])
    assert expand_modes(SMOKE, ["off"], axes) == [SMOKE]
    assert expand_modes(SMOKE, ["off"], axes, cross_product=True) == [SMOKE]


def test_int8_swept_off_is_one_baseline_for_all_modes() -> None:
    points = expand_modes(SMOKE, ["w8a8", "w8"], axes_of(["int8_enabled"]))
    assert points == [
        SMOKE.replace(int8_enabled=True),
        SMOKE,
        SMOKE.replace(int8_enabled=True, int8_mode="w8"),
    ]


def test_rejects_bad_mode() -> None:
    with pytest.raises(ValueError, match=r"^int8_mode must be one of w8a8, w8, fp8, got 'w4'$"):
        expand_modes(SMOKE, ["w4"], {})


@given(defaults, modes_strategy, axes_strategy, st.booleans())
def test_points_without_int8_are_plain_baselines(
    default: RunParams, modes: list[str], axes: dict[str, list[Any]], cross_product: bool
) -> None:
    points = expand_modes(default, modes, axes, cross_product=cross_product)
    assert all(point == point.baseline() for point in points if not point.int8_enabled)
    assert len({point.run_name for point in points}) == len(points)


@given(defaults, modes_strategy, axes_strategy, st.booleans())
def test_modes_multiply_points(
    default: RunParams, modes: list[str], axes: dict[str, list[Any]], cross_product: bool
) -> None:
    others = {name: axis for name, axis in axes.items() if not name.startswith("int8_")}
    points = expand_modes(default, modes, others, cross_product=cross_product)
    counts = [
        len(expand_modes(default, [mode], others, cross_product=cross_product)) for mode in modes
    ]
    assert len(set(counts)) == 1
    assert len(points) == len(set(modes)) * counts[0]


# -- baselines --------------------------------------------------------------------------------


def test_each_baseline_comes_once_and_before_its_points() -> None:
    points = expand_modes(SMOKE, ["w8a8", "w8"], {"batch_size": [1, 2]})
    both = with_baselines(points)
    assert [(p.int8_enabled and p.int8_mode, p.batch_size) for p in both] == [
        (False, 1),
        ("w8a8", 1),
        (False, 2),
        ("w8a8", 2),
        ("w8", 1),
        ("w8", 2),
    ]


@given(defaults, modes_strategy, axes_strategy, st.booleans())
def test_adding_baselines_keeps_all_points(
    default: RunParams, modes: list[str], axes: dict[str, list[Any]], cross_product: bool
) -> None:
    points = expand_modes(default, modes, axes, cross_product=cross_product)
    both = with_baselines(points)
    assert set(both) == set(points) | {point.baseline() for point in points}
    assert len(set(both)) == len(both)
    assert [p for p in both if p.int8_enabled] == [p for p in points if p.int8_enabled]
    assert all(both.index(p.baseline()) < both.index(p) for p in both if p.int8_enabled)


@given(st.lists(st.builds(RunParams, batch_size=st.integers(1, 4))))
def test_unique_keeps_the_first_of_each(points: list[RunParams]) -> None:
    kept = unique(iter(points))
    assert set(kept) == set(points)
    assert len(kept) == len(set(points))
    assert kept == sorted(kept, key=points.index)


def test_rejects_more_points_than_the_limit_with_their_number() -> None:
    message = "a sweep must have at most 100,000 points, got 165,150,720: "
    with pytest.raises(ValueError, match=message):
        expand(RunParams(), axes_of(["all"]), cross_product=True)
    with pytest.raises(ValueError, match="got 660,602,880: "):
        expand_modes(
            RunParams(), ["off", "w8", "w8a8", "fp8"], axes_of(["all"]), cross_product=True
        )
    with pytest.raises(ValueError, match="got 100,001: "):
        expand(RunParams(), {"batch_size": range(1, 100_002)})
    every = expand_modes(RunParams(), ["off", "w8"], axes_of(["all"]))
    assert 0 < len(every) < MAX_POINTS
