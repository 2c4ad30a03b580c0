"""Test RunParams: values, names and environment variables."""

from __future__ import annotations

import dataclasses
import doctest
import math
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench import params as params_module
from pytest_int8bench.choices import (
    ATTENTION_BACKENDS,
    COMPILE_MODES,
    DEVICES,
    FEEDS,
    INT8_BACKENDS,
    INT8_MODES,
    MODEL_SIZES,
)
from pytest_int8bench.param_values import FrozenDict, parse_bool, parse_extra
from pytest_int8bench.params import (
    ENV_PREFIX,
    FIELD_TYPES,
    MEASURING_FIELDS,
    RunParams,
    parse_field,
)

# -- strategies -------------------------------------------------------------------------------

positive = st.integers(min_value=1, max_value=10**9)
axis_names = st.from_regex(r"[A-Za-z][A-Za-z0-9]{0,4}(_[A-Za-z0-9]{1,4}){0,2}", fullmatch=True)
nasty_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text("_-%/:[]=.+,\\ \t\n\"'{}°²é0123456789eE", max_size=12),
    st.sampled_from(
        ["", "true", "null", "NaN", "-Infinity", "1", "1.0", "1e999", '"1"', "[1]", "{}", " 12 "]
    ),
    st.sampled_from(["%5F", "%", "a_extra.b-c", "_int8_mode-w8", "int8_w8a8", "_bs1", "☃"]),
)
scalars = st.one_of(
    nasty_text,
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
FIELD_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model_size": st.sampled_from(MODEL_SIZES),
    "use_s1": st.booleans(),
    "use_s2": st.booleans(),
    "use_landsat": st.booleans(),
    "image_size": positive,
    "patch_size": positive,
    "num_timesteps": positive,
    "batch_size": positive,
    "gpu_type": st.sampled_from(DEVICES),
    "bf16": st.booleans(),
    "int8_enabled": st.booleans(),
    "int8_mode": st.sampled_from(INT8_MODES),
    "int8_smoothquant": st.booleans(),
    "int8_attention": st.booleans(),
    "compile_mode": st.sampled_from(COMPILE_MODES),
    "compile_fullgraph": st.booleans(),
    "model_version": st.from_regex(r"v[0-9]{1,3}(\.[0-9]{1,3}){0,3}", fullmatch=True),
    "attention": st.sampled_from(ATTENTION_BACKENDS),
    "int8_backend": st.sampled_from(INT8_BACKENDS),
    "feed": st.sampled_from(FEEDS),
    "extra": st.dictionaries(axis_names, scalars, max_size=3),
    "benchmark_interval_s": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    "min_batches_per_interval": positive,
    "profiler_enabled": st.booleans(),
    "wandb_enabled": st.booleans(),
}
# Most fields at their defaults, so that pairs of points are often equal or close.
run_params = st.builds(
    lambda values, is_short: RunParams(**values).with_short_name(is_short),
    st.one_of(
        st.fixed_dictionaries(FIELD_VALUES), st.fixed_dictionaries({}, optional=FIELD_VALUES)
    ),
    st.booleans(),
)


def test_every_field_has_a_strategy() -> None:
    assert set(FIELD_VALUES) == {spec.name for spec in dataclasses.fields(RunParams)}
    assert set(FIELD_VALUES) == {*FIELD_TYPES, "extra"}


# -- laws -------------------------------------------------------------------------------------


@given(run_params)
def test_run_name_round_trip(params: RunParams) -> None:
    read = RunParams.from_run_name(params.run_name)
    assert read == params.identity()
    assert (read.run_name, read.has_short_name) == (params.run_name, params.has_short_name)


@given(run_params)
def test_env_vars_round_trip(params: RunParams) -> None:
    variables = params.to_env_vars()
    assert set(variables) == {ENV_PREFIX + name.upper() for name in FIELD_VALUES}
    assert RunParams.from_env_vars(variables) == params


@given(run_params)
def test_env_vars_can_be_set(params: RunParams) -> None:
    assert all("\0" not in text for text in params.to_env_vars().values())


@given(run_params)
def test_dict_round_trip(params: RunParams) -> None:
    values = params.to_dict()
    assert set(values) == set(FIELD_VALUES)
    assert type(values["extra"]) is dict
    assert RunParams.from_dict(values) == params


@given(run_params, run_params)
def test_name_is_the_identity(one: RunParams, other: RunParams) -> None:
    is_same = one.identity() == other.identity()
    assert (one.run_name == other.run_name) == (
        is_same and one.has_short_name == other.has_short_name
    )


@given(run_params)
def test_a_short_name_begins_with_the_device(params: RunParams) -> None:
    assert params.with_short_name().run_name.split("_")[0] == params.gpu_type


@given(run_params, scalars, scalars)
def test_types_of_extra_values_change_the_name(params: RunParams, one: Any, other: Any) -> None:
    names = {params.replace(extra={"axis": value}).run_name for value in (one, other)}
    assert len(names) == (1 if FrozenDict({"axis": one}) == {"axis": other} else 2)


@given(run_params)
def test_names_contain_no_separator(params: RunParams) -> None:
    assert not re.search(r"[/:\[\]\s]", params.run_name)
    assert params.run_name.isascii()
    assert params.run_name.isprintable()


@given(run_params)
def test_names_omit_measuring_fields(params: RunParams) -> None:
    assert params.identity().run_name == params.run_name
    assert {getattr(params.identity(), n) == getattr(RunParams(), n) for n in MEASURING_FIELDS} == {
        True
    }


@given(run_params)
def test_baseline_resets_int8_and_nothing_else(params: RunParams) -> None:
    twin = params.baseline()
    changed = {n for n, v in twin.to_dict().items() if v != params.to_dict()[n]}
    of_int8 = ("enabled", "mode", "smoothquant", "backend", "attention")
    assert changed <= {f"int8_{name}" for name in of_int8}
    assert (twin.int8_enabled, twin.int8_mode) == (False, "w8a8")
    assert (twin.int8_smoothquant, twin.int8_backend) == (False, "auto")
    assert twin.baseline() == twin


@given(run_params)
def test_equal_points_have_equal_hashes(params: RunParams) -> None:
    copy = RunParams.from_dict(params.to_dict())
    assert copy is not params
    assert hash(copy) == hash(params)


@given(scalars)
def test_extra_values_round_trip_through_names(value: Any) -> None:
    params = RunParams(extra={"x": value})
    assert dict(RunParams.from_run_name(params.run_name).extra) == {"x": value}
    assert type(RunParams.from_run_name(params.run_name).extra["x"]) is type(value)


# -- names ------------------------------------------------------------------------------------

W8A8 = "base_cuda_bf16_int8_w8a8_max-autotune_s2_is64_ps4_ts12_bs128"
PLAIN = "base_cuda_bf16_s2_is64_ps4_ts12_bs128"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"int8_enabled": True}, W8A8),
        (
            {"int8_enabled": True, "int8_smoothquant": True},
            "base_cuda_bf16_int8_w8a8_smoothq_max-autotune_s2_is64_ps4_ts12_bs128",
        ),
        ({}, PLAIN),
        ({"bf16": False}, "base_cuda_s2_is64_ps4_ts12_bs128"),
        (
            {"model_size": "nano", "gpu_type": "cpu", "use_s1": True, "use_landsat": True},
            "nano_cpu_bf16_s1_s2_ls_is64_ps4_ts12_bs128",
        ),
        (
            {"image_size": 16, "patch_size": 2, "num_timesteps": 3, "batch_size": 4},
            "base_cuda_bf16_s2_is16_ps2_ts3_bs4",
        ),
        # Without INT8, its settings are not in the fixed format.
        ({"compile_mode": "default"}, f"{PLAIN}_compile_mode-default"),
        ({"int8_mode": "w8"}, f"{PLAIN}_int8_mode-w8"),
        (
            {"int8_enabled": True, "int8_mode": "w8", "compile_mode": "off"},
            "base_cuda_bf16_int8_w8_off_s2_is64_ps4_ts12_bs128",
        ),
        (
            {"int8_enabled": True, "compile_fullgraph": False, "model_version": "v1.1"},
            f"{W8A8}_compile_fullgraph-false_model_version-v1.1",
        ),
        (
            {"attention": "math", "int8_backend": "torchao", "feed": "host"},
            f"{PLAIN}_attention-math_int8_backend-torchao_feed-host",
        ),
        (
            {"extra": {"seq_len": 128, "dtype": "a_b"}},
            f"{PLAIN}_extra.dtype-a%5Fb_extra.seq_len-128",
        ),
        ({"extra": {"x": "128"}}, f"{PLAIN}_extra.x-%22128%22"),
        ({"extra": {"x": ""}}, f"{PLAIN}_extra.x-%22%22"),
        ({"extra": {"x": True, "y": 0.5}}, f"{PLAIN}_extra.x-true_extra.y-0.5"),
        ({"extra": {"x": "a/b:c[d] e"}}, f"{PLAIN}_extra.x-a%2Fb%3Ac%5Bd%5D%20e"),
    ],
)
def test_run_names(changes: dict[str, Any], name: str) -> None:
    params = RunParams(**changes)
    assert params.run_name == name
    assert RunParams.from_run_name(name) == params


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "cuda_bf16_bs128"),
        ({"int8_enabled": True}, "cuda_bf16_int8_w8a8_max-autotune_bs128"),
        (
            {"int8_enabled": True, "int8_smoothquant": True, "gpu_type": "cpu", "bf16": False},
            "cpu_int8_w8a8_smoothq_max-autotune_bs128",
        ),
        ({"image_size": 224}, "cuda_bf16_is224_bs128"),
        ({"image_size": 16, "patch_size": 2, "num_timesteps": 3}, "cuda_bf16_is16_ps2_ts3_bs128"),
        ({"use_s1": True, "use_landsat": True}, "cuda_bf16_s1_ls_bs128"),
        (
            {"use_s2": False, "model_size": "nano", "model_version": "v1.1", "extra": {"x": 1}},
            "cuda_bf16_bs128_model_size-nano_use_s2-false_model_version-v1.1_extra.x-1",
        ),
        ({"compile_mode": "off"}, "cuda_bf16_bs128_compile_mode-off"),
    ],
)
def test_short_run_names(changes: dict[str, Any], name: str) -> None:
    params = RunParams(**changes)
    assert params.with_short_name().run_name == name
    assert RunParams.from_run_name(name) == params
    # Points derived from it have short names, too.
    made = RunParams.from_run_name(name).baseline().identity().replace(batch_size=1)
    assert made.has_short_name
    assert not made.with_short_name(False).has_short_name
    assert pickle.loads(pickle.dumps(made)).run_name == made.run_name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "test_foo",
        PLAIN + "_",
        PLAIN + "\n",
        " " + PLAIN,
        PLAIN + "_batch_size-4",
        PLAIN + "_int8_enabled-true",
        PLAIN + "_extra.1x-4",
        PLAIN.replace("base", "huge"),
        PLAIN.replace("cuda", "mps"),
        PLAIN.replace("is64", "is-64"),
        W8A8.replace("_max-autotune", ""),
        W8A8.replace("w8a8_max", "w8a8_smoothq_smoothq_max"),
        PLAIN.replace("bf16", "bf16_smoothq"),
        # Each form of name has its own items.
        PLAIN + "_model_size-nano",
        PLAIN + "_use_s2-false",
        PLAIN.replace("_is64", ""),
        PLAIN.replace("_ts12", ""),
        PLAIN.removeprefix("base_"),
        "cuda_bf16_s2_bs128",
        "cuda_bf16",
        "bf16_bs128",
        "cuda_bf16_bs128_image_size-224",
        "cuda_bf16_ps2_is16_bs128",
    ],
)
def test_rejects_invalid_run_names(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^not a run name: {re.escape(repr(name))}$"):
        RunParams.from_run_name(name)


def test_names_the_bad_value_in_a_run_name() -> None:
    with pytest.raises(ValueError, match=r"^feed must be one of device, host, got 'disk'$"):
        RunParams.from_run_name(PLAIN + "_feed-disk")
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, got 0$"):
        RunParams.from_run_name(PLAIN.replace("bs128", "bs0"))


# -- defaults and baselines --------------------------------------------------------------------


def test_defaults() -> None:
    assert RunParams().to_dict() == {
        "model_size": "base",
        "use_s1": False,
        "use_s2": True,
        "use_landsat": False,
        "image_size": 64,
        "patch_size": 4,
        "num_timesteps": 12,
        "batch_size": 128,
        "gpu_type": "cuda",
        "bf16": True,
        "int8_enabled": False,
        "int8_mode": "w8a8",
        "int8_smoothquant": False,
        "compile_mode": "max-autotune",
        "compile_fullgraph": True,
        "model_version": "v1",
        "attention": "flash",
        "int8_backend": "auto",
        "int8_attention": False,
        "feed": "device",
        "benchmark_interval_s": 10.0,
        "min_batches_per_interval": 10,
        "profiler_enabled": False,
        "wandb_enabled": False,
        "extra": {},
    }


def test_modes_share_one_baseline() -> None:
    point = RunParams(int8_enabled=True, batch_size=7, compile_mode="default", extra={"x": 1})
    twins = {
        point.replace(int8_mode=mode, int8_smoothquant=smooth, int8_backend=backend).baseline()
        for mode in INT8_MODES
        for smooth in (False, True)
        for backend in INT8_BACKENDS
    }
    assert twins == {RunParams(batch_size=7, compile_mode="default", extra={"x": 1})}


def test_fields_cannot_be_assigned_or_given_by_position() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunParams().batch_size = 4  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        RunParams("base")  # type: ignore[misc]


def test_replace_leaves_the_original() -> None:
    params = RunParams(extra={"x": 1})
    assert params.replace(batch_size=4, extra={"y": 2}) == RunParams(batch_size=4, extra={"y": 2})
    assert params == RunParams(extra={"x": 1})


# -- rejected ---------------------------------------------------------------------------------

CHOICES = {
    "model_size": "nano, tiny, small, base, large",
    "gpu_type": "cuda, cpu",
    "int8_mode": "w8a8, w8, fp8",
    "compile_mode": "default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs, off",
    "attention": "flash, cudnn, efficient, math, short, auto",
    "int8_backend": "torchao, fused, auto",
    "feed": "device, host",
}
BOOLS = [name for name, kind in FIELD_TYPES.items() if kind is bool]
INTS = [name for name, kind in FIELD_TYPES.items() if kind is int]
TEXTS = [name for name, kind in FIELD_TYPES.items() if kind is str]

REJECTED: list[tuple[str, Any, str]] = [
    *[(name, "w4", f"must be one of {valid}, got 'w4'") for name, valid in CHOICES.items()],
    *[(name, "", f"must be one of {valid}, got ''") for name, valid in CHOICES.items()],
    *[(name, 8, "must be text, got 8") for name in TEXTS],
    *[(name, None, "must be text, got None") for name in TEXTS],
    *[(name, 0, "must be at least 1, got 0") for name in INTS],
    *[(name, -3, "must be at least 1, got -3") for name in INTS],
    *[(name, 1.0, "must be a whole number, got 1.0") for name in INTS],
    *[(name, True, "must be a whole number, got True") for name in INTS],
    *[(name, "8", "must be a whole number, got '8'") for name in INTS],
    *[(name, 1, "must be True or False, got 1") for name in BOOLS],
    *[(name, "true", "must be True or False, got 'true'") for name in BOOLS],
    ("model_version", "1.1", "must look like v1 or v1.2, got '1.1'"),
    ("model_version", "v1.", "must look like v1 or v1.2, got 'v1.'"),
    ("model_version", "v1\n", r"must look like v1 or v1.2, got 'v1\n'"),
    ("benchmark_interval_s", 0.0, "must be a finite number above 0, got 0.0"),
    ("benchmark_interval_s", -1, "must be a finite number above 0, got -1.0"),
    ("benchmark_interval_s", math.inf, "must be a finite number above 0, got inf"),
    ("benchmark_interval_s", math.nan, "must be a finite number above 0, got nan"),
    ("benchmark_interval_s", "10", "must be a number, got '10'"),
    ("benchmark_interval_s", True, "must be a number, got True"),
]


@pytest.mark.parametrize(("name", "value", "rule"), REJECTED)
def test_rejects_invalid_values(name: str, value: Any, rule: str) -> None:
    message = rf"^{re.escape(f'{name} {rule}')}$"
    with pytest.raises(ValueError, match=message):
        RunParams(**{name: value})
    with pytest.raises(ValueError, match=message):
        RunParams().replace(**{name: value})


def test_accepts_integers_as_floats() -> None:
    interval = RunParams(benchmark_interval_s=3).benchmark_interval_s
    assert (interval, type(interval)) == (3.0, float)


def test_a_number_too_large_for_a_float_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^benchmark_interval_s must be a finite number above 0"):
        RunParams(benchmark_interval_s=10**400)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([1], "extra must be a mapping of names to values, got [1]"),
        (None, "extra must be a mapping of names to values, got None"),
        ({"": 1}, "extra names must be identifiers such as seq_len, got ''"),
        ({"1x": 1}, "extra names must be identifiers such as seq_len, got '1x'"),
        ({"a b": 1}, "extra names must be identifiers such as seq_len, got 'a b'"),
        ({"a-b": 1}, "extra names must be identifiers such as seq_len, got 'a-b'"),
        ({"a_": 1}, "extra names must be identifiers such as seq_len, got 'a_'"),
        ({"a__b": 1}, "extra names must be identifiers such as seq_len, got 'a__b'"),
        ({"é": 1}, "extra names must be identifiers such as seq_len, got 'é'"),
        ({3: 1}, "extra names must be identifiers such as seq_len, got 3"),
        ({"x": None}, "extra.x must be str, int, float or bool, got None"),
        ({"x": [1]}, "extra.x must be str, int, float or bool, got [1]"),
        ({"x": math.nan}, "extra.x must be finite, got nan"),
        ({"x": -math.inf}, "extra.x must be finite, got -inf"),
    ],
)
def test_rejects_invalid_extra(extra: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        RunParams(extra=extra)


def test_replace_rejects_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"^unknown RunParams field 'batch'; fields are ") as info:
        RunParams().replace(batch=4)
    assert str(info.value) == (
        "unknown RunParams field 'batch'; fields are model_size, use_s1, use_s2, use_landsat, "
        "image_size, patch_size, num_timesteps, batch_size, gpu_type, bf16, int8_enabled, "
        "int8_mode, int8_smoothquant, compile_mode, compile_fullgraph, model_version, attention, "
        "int8_backend, int8_attention, feed, benchmark_interval_s, min_batches_per_interval, "
        "profiler_enabled, wandb_enabled, extra"
    )
    with pytest.raises(ValueError, match=r"^unknown RunParams field 'later'; "):
        RunParams.from_dict({"later": 1})


# -- impossible -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"use_s2": False}, "no modality: use_s1, use_s2 and use_landsat are all false"),
        ({"use_s2": False, "use_s1": True}, None),
        ({"use_s2": False, "use_landsat": True}, None),
        ({"image_size": 2}, "image_size=2 is smaller than patch_size=4"),
        ({"image_size": 4}, None),
        ({"image_size": 10}, "image_size=10 is not a multiple of patch_size=4"),
        (
            {"attention": "cudnn", "gpu_type": "cpu"},
            "attention=cudnn exists on CUDA only, gpu_type=cpu",
        ),
        (
            {"attention": "efficient", "gpu_type": "cpu"},
            "attention=efficient exists on CUDA only, gpu_type=cpu",
        ),
        ({"attention": "flash", "gpu_type": "cpu", "bf16": False}, None),
        ({"bf16": False}, "flash attention takes 16-bit inputs only, bf16=False"),
        (
            {"bf16": False, "attention": "cudnn"},
            "cudnn attention takes 16-bit inputs only, bf16=False",
        ),
        ({"bf16": False, "attention": "efficient"}, None),
        ({"bf16": False, "attention": "math"}, None),
        ({"bf16": False, "attention": "auto"}, None),
        (
            {"int8_smoothquant": True},
            "int8_smoothquant=True without int8_enabled has nothing to smooth",
        ),
        ({"int8_smoothquant": True, "int8_enabled": True}, None),
        (
            {"int8_attention": True},
            "int8_attention=True without int8_enabled has no baseline to compare with",
        ),
        ({"int8_attention": True, "int8_enabled": True}, None),
        (
            {"int8_backend": "fused", "int8_enabled": True, "int8_mode": "w8"},
            "int8_backend=fused runs w8a8, int8_mode=w8",
        ),
        (
            {"int8_backend": "fused", "int8_enabled": True, "gpu_type": "cpu"},
            "int8_backend=fused runs on CUDA only, gpu_type=cpu",
        ),
        ({"int8_backend": "fused", "int8_enabled": True}, None),
        ({"int8_backend": "auto", "int8_enabled": True, "gpu_type": "cpu"}, None),
        ({"int8_backend": "fused", "gpu_type": "cpu"}, None),
        ({"int8_backend": "torchao", "int8_enabled": True}, None),
    ],
)
def test_impossible_reason(changes: dict[str, Any], reason: str | None) -> None:
    assert RunParams(**changes).impossible_reason() == reason


@pytest.mark.parametrize("changes", [{"image_size": 30}, {"image_size": 2}, {"use_s2": False}])
def test_images_of_other_workloads_ignore_olmoearth_limits(changes: dict[str, Any]) -> None:
    assert RunParams(**changes).impossible_reason() is not None
    assert RunParams(**changes).with_short_name().impossible_reason() is None


# -- environment variables --------------------------------------------------------------------


def test_absent_variables_give_defaults() -> None:
    assert RunParams.from_env_vars({}) == RunParams()
    assert RunParams.from_env_vars({"INT8BENCH_BATCH_SIZE": "4", "BATCH_SIZE": "8"}) == RunParams(
        batch_size=4
    )


def test_variables_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    point = RunParams(batch_size=7, extra={"x": "a b"}, bf16=False)
    for name, text in point.to_env_vars().items():
        monkeypatch.setenv(name, text)
    assert RunParams.from_env_vars() == point


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("INT8BENCH_BATCH_SIZE", "many", "batch_size must be a whole number, got 'many'"),
        ("INT8BENCH_BF16", "maybe", "bf16 must be true or false, got 'maybe'"),
        ("INT8BENCH_INT8_MODE", "w4", "int8_mode must be one of w8a8, w8, fp8, got 'w4'"),
        (
            "INT8BENCH_BENCHMARK_INTERVAL_S",
            "soon",
            "benchmark_interval_s must be a number, got 'soon'",
        ),
        ("INT8BENCH_EXTRA", "{", "INT8BENCH_EXTRA: must be a JSON object, got '{'"),
    ],
)
def test_rejects_invalid_variables(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(message)}$"):
        RunParams.from_env_vars({name: text})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("INT8BENCH_BATCH_SIZE", "many"),
        ("INT8BENCH_BF16", "maybe"),
        ("INT8BENCH_EXTRA", "{"),
        ("INT8BENCH_EXTRA", "[1]"),
        ("INT8BENCH_EXTRA", '{"x": null}'),
    ],
)
def test_error_names_the_invalid_variable(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=name):
        RunParams.from_env_vars({name: text})


# -- parsing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, True) for text in ("true", "True", "1", "yes", "on", " TRUE ")],
        *[(text, False) for text in ("false", "False", "0", "no", "off", " Off ")],
    ],
)
def test_parse_bool(text: str, value: bool) -> None:
    assert parse_bool(text) is value


@pytest.mark.parametrize("text", ["", "2", "truee", "y"])
def test_parse_bool_rejects(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^must be true or false, got {re.escape(repr(text))}$"):
        parse_bool(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("12", 12),
        ("-0.5", -0.5),
        ("1.0", 1.0),
        ('"12"', "12"),
        ("relu", "relu"),
        ("None", "None"),
        ("null", "null"),
        ("[1]", "[1]"),
        ("{}", "{}"),
        ("", ""),
    ],
)
def test_parse_extra(text: str, value: Any) -> None:
    parsed = parse_extra(text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("batch_size", " 64 ", 64),
        ("bf16", "off", False),
        ("benchmark_interval_s", "2", 2.0),
        ("model_version", "v1.1", "v1.1"),
    ],
)
def test_parse_field(name: str, text: str, value: Any) -> None:
    parsed = parse_field(name, text)
    assert (parsed, type(parsed)) == (value, type(value))


def test_parse_field_rejects_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"^unknown RunParams field 'extra'; .*, extra\.NAME$"):
        parse_field("extra", "1")


# -- FrozenDict -------------------------------------------------------------------------------


def test_frozen_dict_equality_compares_types() -> None:
    assert FrozenDict({"x": 1}) == FrozenDict({"x": 1})
    assert FrozenDict({"x": 1}) == {"x": 1}
    assert FrozenDict({"x": 1}) != FrozenDict({"x": True})
    assert FrozenDict({"x": 1}) != {"x": 1.0}
    plain: dict[str, object] = {"x": 1}
    assert plain == FrozenDict({"x": 1})
    assert plain != FrozenDict({"x": True})
    assert FrozenDict({"x": 1}) != FrozenDict({"x": "1"})
    assert FrozenDict() != 0


def test_frozen_dict_ignores_order() -> None:
    one, other = FrozenDict({"b": 1, "a": 2}), FrozenDict({"a": 2, "b": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert list(one) == ["a", "b"]
    assert repr(one) == "{'a': 2, 'b': 1}"


def test_frozen_dict_does_not_change_with_its_source() -> None:
    source: dict[str, Any] = {"x": 1}
    params = RunParams(extra=source)
    source["x"] = 2
    assert params.extra == {"x": 1}
    with pytest.raises(TypeError):
        params.extra["x"] = 3  # type: ignore[index]


def test_points_that_differ_only_in_type_are_distinct() -> None:
    points = {RunParams(extra={"x": value}) for value in (1, 1.0, True, "1")}
    assert len(points) == 4
    assert len({point.run_name for point in points}) == 4


# -- documentation ----------------------------------------------------------------------------


def test_documented_examples() -> None:
    results = doctest.testmod(params_module)
    assert results.attempted >= 3
    assert results.failed == 0
