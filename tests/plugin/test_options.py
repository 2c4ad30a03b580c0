"""Test command-line and ini options, and what the plugin costs suites that do not use it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.rules import ALLOWABLE, METRICS
from pytest_int8bench.params import FIELD_TYPES, RunParams
from pytest_int8bench.plugin.options import OPTIONS
from pytest_int8bench.plugin.reading import read_settings
from pytest_int8bench.plugin.session import Session
from pytest_int8bench.plugin.settings import PRESETS, Settings
from pytest_int8bench.results.records import Saved
from pytest_int8bench.sweep import SWEEPS

W8A8 = RunParams(int8_enabled=True)
FIELDS = ", ".join(FIELD_TYPES)
NAMES = "must be olmoearth, digits, timm:NAME, hf:NAME, module:callable or path.py:callable, got "
REFERENCE = "must be module:callable or path.py:callable, got "

PERCENTAGE = "must be a percentage such as 1% (relative) or 1pp (absolute)"
# Option -> bad value -> error.
BAD_VALUES: dict[str, dict[str, str]] = {
    "mode": {
        "w4": "must be a comma-separated list of w8a8, w8, fp8, off, got 'w4'",
        "w8,W8A8": "must be a comma-separated list of w8a8, w8, fp8, off, got 'W8A8'",
        "w8,": "must not have an empty item, got 'w8,'",
    },
    "sweep": {
        "batch,size": f"unknown sweep key 'size'; keys are {', '.join(SWEEPS)}",
        "batch,,time": "must not have an empty item, got 'batch,,time'",
    },
    "set": {
        "batch_size": "must be NAME=VALUE, got 'batch_size'",
        "=4": "must be NAME=VALUE, got '=4'",
        "batch_size=": "must not have an empty item, got ''",
        "batch_size=4,": "must not have an empty item, got '4,'",
        "batch_size=0": "batch_size must be at least 1, got 0",
        "batch_size=4,x": "batch_size must be a whole number, got 'x'",
        "batch_size=1.5": "batch_size must be a whole number, got '1.5'",
        "bf16=maybe": "bf16 must be true or false, got 'maybe'",
        "benchmark_interval_s=soon": "benchmark_interval_s must be a number, got 'soon'",
        "benchmark_interval_s=-1": (
            "benchmark_interval_s must be a finite number above 0, got -1.0"
        ),
        "model_size=huge": ("model_size must be one of nano, tiny, small, base, large, got 'huge'"),
        "model_version=1": "model_version must look like v1 or v1.2, got '1'",
        "batch=4": f"unknown RunParams field 'batch'; fields are {FIELDS}, extra.NAME",
        "extra=4": f"unknown RunParams field 'extra'; fields are {FIELDS}, extra.NAME",
        "extra.1x=4": "extra names must be identifiers such as seq_len, got '1x'",
        "extra.x=NaN": "extra.x must be finite, got nan",
        "extra.x=1,Infinity": "extra.x must be finite, got inf",
        "benchmark_interval_s=1,5": (
            "benchmark_interval_s must be a single value, got 'benchmark_interval_s=1,5': it is "
            "not part of the run name and cannot be swept"
        ),
        "int8_mode=w8": "int8_mode must be set by --int8-mode, got 'int8_mode=w8'",
        "int8_enabled=true": "int8_enabled must be set by --int8-mode, got 'int8_enabled=true'",
    },
    "preset": {"fast": "must be one of auto, seed, smoke, got 'fast'"},
    "workload": {
        "digit": NAMES + "'digit'",
        "a:": NAMES + "'a:'",
        "my-module:f": NAMES + "'my-module:f'",
        "module:1f": NAMES + "'module:1f'",
    },
    "weights": {"none.pth": "must be random, hub or an existing path, got 'none.pth'"},
    "filter": {"olmoearth": REFERENCE + "'olmoearth'", ":f": REFERENCE + "':f'"},
    "compile-cache": {
        "/dev/null": "must be a writable directory, got '/dev/null'",
        "/dev/null/cache": "must be a writable directory, got '/dev/null/cache'",
    },
    "profile": {
        "/dev/null": "must be a writable directory, got '/dev/null'",
        "/dev/null/profiles": "must be a writable directory, got '/dev/null/profiles'",
    },
    "max-drop": {
        "1": f"{PERCENTAGE}, got '1'",
        "-1%": f"{PERCENTAGE}, got '-1%'",
        "101%": "must be over 0 and at most 100, got '101%'",
        "0pp": "must be over 0 and at most 100, got '0pp'",
    },
    "inconclusive": {"pass": "must be one of fail, warn, skip, got 'pass'"},
    "eval-data": {"nowhere": "must be an existing directory, got 'nowhere'"},
    "compare": {
        "nowhere.json": "nowhere.json does not exist",
        "0007": ".benchmarks contains no file with number 0007",
    },
    **{
        metric.option: {
            "5": "must be a percentage such as 5%, or off, got '5'",
            "-5%": "must be a percentage such as 5%, or off, got '-5%'",
        }
        for metric in METRICS.values()
    },
    "allow": {
        "gpus": f"must be one of {', '.join(ALLOWABLE)}, got 'gpus'",
        "commit": "commit may always differ",
    },
    "report": {
        "report.pdf": "must be a file that ends in .html or .md, got 'report.pdf'",
        "nowhere/report.md": (
            "must be in an existing, writable directory, got 'nowhere/report.md'"
        ),
    },
    "journal": {"/": "must be a writable file that does not exist yet, got '/'"},
}
# Flags have a value only in the ini file.
BAD_FLAGS = {
    name: {"maybe": "must be true or false, got 'maybe'"}
    for name in (
        "smoothquant",
        "cross-product",
        "no-baseline",
        "remedy",
        "allow-missing",
        "wandb",
        "lean",
        "trust-remote-code",
    )
}
CASES = [(name, text, why) for name, bad in BAD_VALUES.items() for text, why in bad.items()]
FLAG_CASES = [(name, text, why) for name, bad in BAD_FLAGS.items() for text, why in bad.items()]
# Each costs a process, so test one option with a value, one that checks files, and one flag.
FEW = [(name, *next(iter(BAD_VALUES[name].items()))) for name in ("mode", "compare")]


def settings_of(pytester: pytest.Pytester, *args: str, ini: str = "") -> Settings:
    pytester.makeini(f"[pytest]\n{ini}")
    return read_settings(pytester.parseconfig(*args))


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run pytest without other plugins, which load modules that this one must not."""
    others = ("hypothesispytest", "randomly", "codspeed")
    without = [option for name in others for option in ("-p", f"no:{name}")]
    return pytester.runpytest_subprocess(*without, *args)


def test_every_option_has_a_bad_value() -> None:
    assert {*BAD_VALUES, *BAD_FLAGS} == set(OPTIONS)


# -- bad values -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text", "why"), CASES)
def test_rejects_bad_value(pytester: pytest.Pytester, name: str, text: str, why: str) -> None:
    with pytest.raises(pytest.UsageError, match=rf"^{re.escape(f'--int8-{name}: {why}')}$"):
        settings_of(pytester, f"--int8-{name}={text}")


@pytest.mark.parametrize(("name", "text", "why"), CASES + FLAG_CASES)
def test_rejects_bad_ini_value(pytester: pytest.Pytester, name: str, text: str, why: str) -> None:
    stem = f"int8_{name.replace('-', '_')}"
    with pytest.raises(pytest.UsageError, match=rf"^{re.escape(f'{stem}: {why}')}$"):
        settings_of(pytester, ini=f"{stem} = {text}")


@pytest.mark.parametrize("name", [name for name in BAD_VALUES if name not in ("set", "workload")])
def test_empty_value_on_the_command_line(pytester: pytest.Pytester, name: str) -> None:
    with pytest.raises(pytest.UsageError, match=rf"^--int8-{name}: .*, got ''$"):
        settings_of(pytester, f"--int8-{name}=")


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("name", "text", "why"), FEW)
def test_bad_option_exits_4(pytester: pytest.Pytester, name: str, text: str, why: str) -> None:
    result = run(pytester, f"--int8-{name}={text}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line] == [f"ERROR: --int8-{name}: {why}"]
    assert result.outlines == []


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("name", "text", "why"), FEW + FLAG_CASES[:1])
def test_bad_ini_value_exits_4(pytester: pytest.Pytester, name: str, text: str, why: str) -> None:
    stem = f"int8_{name.replace('-', '_')}"
    pytester.makeini(f"[pytest]\n{stem} = {text}")
    result = run(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line] == [f"ERROR: {stem}: {why}"]
    assert result.outlines == []


# -- good values ------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked")
def test_unknown_kernel_exits_4(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INT8BENCH_PRODUCT", "foo")
    result = run(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line] == [
        "ERROR: INT8BENCH_PRODUCT must be one of specialized, tma, pointers, got 'foo'"
    ]
    for value in ("tma", ""):
        monkeypatch.setenv("INT8BENCH_PRODUCT", value)
        assert settings_of(pytester) == Settings()


def test_default_settings(pytester: pytest.Pytester) -> None:
    settings = settings_of(pytester)
    assert settings == Settings(
        preset="auto",
        modes=("w8a8",),
        changes={},
        axes={},
        cross_product=False,
        workload="olmoearth",
        weights="random",
        filter=None,
        baseline=True,
        journal=None,
    )
    assert settings.points("seed") == [W8A8]


def test_cross_product_needs_a_sweep(pytester: pytest.Pytester) -> None:
    flag = "--int8-cross-product"
    with pytest.raises(pytest.UsageError) as caught:
        settings_of(pytester, flag, "--int8-set=batch_size=4")
    assert str(caught.value) == f"{flag}: needs --int8-sweep, or --int8-set with several values"
    for sweep in ("--int8-sweep=batch", "--int8-set=batch_size=4,8"):
        assert settings_of(pytester, flag, sweep).cross_product
    # In an ini file it only applies if there is a sweep.
    assert settings_of(pytester, ini="int8_cross_product = yes").cross_product


EVERYTHING = Settings(
    preset="smoke",
    modes=("w8", "off"),
    changes={
        "int8_smoothquant": True,
        "profiler_enabled": True,
        "batch_size": 8,
        "extra.act": "relu",
    },
    axes={"num_timesteps": [1, 2, 4, 6, 8, 12], "image_size": [16, 32], "extra.width": [1, 2.5]},
    cross_product=True,
    workload="pkg.mod:make.it",
    weights="hub",
    filter="filters/mine.py:keep",
    compile_cache=Path("/tmp/int8bench/cache"),
    profile=Path("/tmp/int8bench/profiles"),
    baseline=False,
    reports=(Path("/tmp/report.md"), Path("/tmp/other.md")),
    journal="out/journal.jsonl",
)


def test_reads_every_option_from_the_command_line(pytester: pytest.Pytester) -> None:
    settings = settings_of(
        pytester,
        "--int8-mode=w8, off,w8",
        "--int8-smoothquant",
        "--int8-sweep=time",
        "--int8-cross-product",
        "--int8-set=batch_size=8",
        "--int8-set",
        "image_size = 16, 32",
        "--int8-set=extra.width=1,2.5",
        "--int8-set=extra.act=relu",
        "--int8-preset=smoke",
        "--int8-workload=pkg.mod:make.it",
        "--int8-weights=hub",
        "--int8-filter=filters/mine.py:keep",
        "--int8-compile-cache=/tmp/int8bench/cache",
        "--int8-profile=/tmp/int8bench/profiles",
        "--int8-no-baseline",
        "--int8-report=/tmp/report.md",
        "--int8-report=/tmp/other.md",
        "--int8-journal=out/journal.jsonl",
    )
    assert settings == EVERYTHING


INI = """
    int8_mode = w8, off,w8
    int8_smoothquant = true
    int8_sweep = time
    int8_cross_product = yes
    int8_set =
        batch_size=8
        image_size = 16, 32
        extra.width=1,2.5
        extra.act=relu
    int8_preset = smoke
    int8_workload = pkg.mod:make.it
    int8_weights = hub
    int8_filter = filters/mine.py:keep
    int8_compile_cache = /tmp/int8bench/cache
    int8_profile = /tmp/int8bench/profiles
    int8_no_baseline = 1
    int8_report =
        /tmp/report.md
        /tmp/other.md
    int8_journal = out/journal.jsonl
"""


def test_reads_every_option_from_the_ini_file(pytester: pytest.Pytester) -> None:
    assert settings_of(pytester, ini=INI.replace("\n    ", "\n")) == EVERYTHING


def test_command_line_overrides_ini_file(pytester: pytest.Pytester) -> None:
    settings = settings_of(
        pytester,
        "--int8-mode=w8a8",
        "--int8-sweep=batch",
        "--int8-set=patch_size=2",
        "--int8-preset=seed",
        "--int8-workload=olmoearth",
        "--int8-weights=random",
        "--int8-filter=a:b",
        "--int8-compile-cache=cache",
        "--int8-profile=profiles",
        "--int8-journal=mine.jsonl",
        ini=INI.replace("\n    ", "\n"),
    )
    assert settings == Settings(
        preset="seed",
        modes=("w8a8",),
        changes={"int8_smoothquant": True, "profiler_enabled": True, "patch_size": 2},
        axes=SWEEPS["batch"],
        cross_product=True,
        workload="olmoearth",
        weights="random",
        filter="a:b",
        compile_cache=pytester.path / "cache",
        profile=pytester.path / "profiles",
        baseline=False,
        reports=(Path("/tmp/report.md"), Path("/tmp/other.md")),
        journal="mine.jsonl",
    )


@pytest.mark.parametrize("option", ["--int8-set=image_size=32", "--int8-sweep=image"])
def test_rejects_fields_a_library_ignores(pytester: pytest.Pytester, option: str) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        settings_of(pytester, option, "--int8-workload=hf:bert")
    assert str(caught.value) == (
        "--int8-workload: image_size is OlmoEarth's and does nothing for hf:bert; "
        "its own axes are extra.NAME=VALUE"
    )


def test_every_library_accepts_the_sweep_of_all_keys(pytester: pytest.Pytester) -> None:
    settings_of(pytester, "--int8-sweep=all", "--int8-workload=hf:bert")
    with pytest.raises(pytest.UsageError, match="patch_size is OlmoEarth's"):
        settings_of(
            pytester, "--int8-sweep=all", "--int8-set=patch_size=2", "--int8-workload=digits"
        )


@pytest.mark.parametrize(
    ("workload", "count"), [("olmoearth", 8), ("digits", 1), ("toy.py:make", 8), (None, 8)]
)
def test_points_that_differ_in_unread_fields_are_merged(workload: str | None, count: int) -> None:
    settings = Settings(preset="smoke", axes={"image_size": SWEEPS["image"]["image_size"]})
    place = SimpleNamespace(dir=Path())
    config: Any = SimpleNamespace(invocation_params=place, inipath=None, rootpath=Path())
    points = Session(config, settings).points({}, workload, baselines=False)
    assert len({point.run_name for point in points}) == len(points) == count
    assert {point.model_size for point in points} == {"nano" if workload == "olmoearth" else "base"}


def test_weights_are_relative_to_the_starting_folder(pytester: pytest.Pytester) -> None:
    path = pytester.path / "weights.pth"
    path.touch()
    assert settings_of(pytester, "--int8-weights=weights.pth").weights == str(path)


def test_command_line_hides_bad_ini_value(pytester: pytest.Pytester) -> None:
    assert settings_of(pytester, "--int8-mode=w8", ini="int8_mode = w4").modes == ("w8",)


def test_flags_of_the_ini_file_can_be_false(pytester: pytest.Pytester) -> None:
    ini = "int8_smoothquant = off\nint8_cross_product = no\nint8_no_baseline = false"
    assert settings_of(pytester, ini=ini) == Settings()


def test_set_turns_off_what_an_ini_file_turns_on(pytester: pytest.Pytester) -> None:
    ini = "int8_profile = profiles\nint8_wandb = true"
    off = ("--int8-set=profiler_enabled=false", "--int8-set=wandb_enabled=no")
    changes = settings_of(pytester, *off, ini=ini).changes
    assert changes == {"profiler_enabled": False, "wandb_enabled": False}


def test_lean_session_writes_no_reports(pytester: pytest.Pytester) -> None:
    ini = "int8_profile = profiles\nint8_wandb = true"
    settings = settings_of(pytester, "--int8-lean", ini=ini)
    assert (settings.changes, settings.profile) == ({}, None)


@pytest.mark.parametrize(
    ("option", "said"),
    [("--int8-wandb", "--int8-wandb"), ("--int8-set=wandb_enabled=true", "--int8-set")],
)
def test_wandb_must_be_installed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, option: str, said: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(pytest.UsageError) as caught:
        settings_of(pytester, option)
    assert str(caught.value) == f"{said}: needs wandb: pip install 'pytest-int8bench[wandb]'"


def test_last_set_option_wins(pytester: pytest.Pytester) -> None:
    one, several = "--int8-set=batch_size=4", "--int8-set=batch_size=4,8"
    assert settings_of(pytester, several, one).changes == {"batch_size": 4}
    assert settings_of(pytester, several, one).axes == {}
    assert settings_of(pytester, one, several).changes == {}
    assert settings_of(pytester, one, several).axes == {"batch_size": [4, 8]}


def test_set_replaces_the_values_of_a_sweep_key(pytester: pytest.Pytester) -> None:
    settings = settings_of(pytester, "--int8-sweep=batch,time", "--int8-set=batch_size=3,5")
    assert list(settings.axes) == ["batch_size", "num_timesteps"]
    assert settings.axes["batch_size"] == [3, 5]


def test_set_smoothquant_overrides_the_flag(pytester: pytest.Pytester) -> None:
    settings = settings_of(pytester, "--int8-smoothquant", "--int8-set=int8_smoothquant=false")
    assert settings.changes == {"int8_smoothquant": False}


@pytest.mark.parametrize(
    ("text", "value"), [("12", 12), ("0.5", 0.5), ("true", True), ('"12"', "12"), ("relu", "relu")]
)
def test_axes_keep_their_types(pytester: pytest.Pytester, text: str, value: Any) -> None:
    settings = settings_of(pytester, f"--int8-set=extra.x={text}")
    assert settings.default_params("seed").extra == {"x": value}


# -- the gate ---------------------------------------------------------------------------------

TABLE = """
[tool.int8bench.gate]
max-slowdown = "15%"
max-p95-growth = "20%"
allow = ["driver"]
runs = { "*_bs1" = { max-slowdown = "30%" } }
"""


@pytest.fixture
def base(pytester: pytest.Pytester) -> Path:
    path = pytester.path / "base.json"
    path.write_text(json.dumps({"benchmarks": [], "int8bench": Saved({}, []).to_dict()}))
    return path


def test_gate_is_off_by_default(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml(TABLE.replace("15%", "bad"))  # not even opened
    settings = settings_of(pytester)
    assert (settings.compare, settings.rules, settings.lean) == ((), Rules(), False)


def test_command_line_limits_override_ini_limits(pytester: pytest.Pytester, base: Path) -> None:
    runs = (("*_bs1", {"throughput": 0.3}),)
    pytester.makepyprojecttoml(TABLE)
    settings = settings_of(pytester, "--int8-compare=base.json")
    assert settings.compare == (Path("base.json"),)
    assert settings.rules == Rules(
        limits={"throughput": 0.15, "p95": 0.2}, runs=runs, allow=frozenset({"driver"})
    )
    settings = settings_of(
        pytester,
        "--int8-compare=base.json",
        "--int8-max-slowdown=7%",
        "--int8-max-memory-growth=off",
        "--int8-allow=cuda",
        "--int8-allow=cudnn",
        "--int8-allow-missing",
        ini="int8_max_slowdown = 9%\nint8_max_compile_growth = 50%",
    )
    assert settings.rules == Rules(
        limits={"throughput": 0.07, "p95": 0.2, "memory": None, "compile": 0.5},
        runs=runs,
        allow=frozenset({"driver", "cuda", "cudnn"}),
        allow_missing=True,
    )


def test_rejects_bad_table(pytester: pytest.Pytester, base: Path) -> None:
    path = pytester.makepyprojecttoml(TABLE.replace("15%", "15"))
    with pytest.raises(pytest.UsageError) as caught:
        settings_of(pytester, "--int8-compare=base.json")
    assert str(caught.value) == (
        f"--int8-compare: {path}: tool.int8bench.gate: max-slowdown: must be a percentage such as "
        "5%, or off, got '15'"
    )


def test_finds_files_to_compare_with(pytester: pytest.Pytester, base: Path) -> None:
    stored = pytester.path / ".benchmarks" / "Linux" / "0003_run.json"
    stored.parent.mkdir(parents=True)
    base.rename(stored)
    relative = stored.relative_to(pytester.path)
    assert settings_of(pytester, "--int8-compare=0003").compare == (relative,)
    ini = "int8_compare =\n    .benchmarks/Linux"
    assert settings_of(pytester, ini=ini).compare == (relative,)
    twice = ("--int8-compare=0003", f"--int8-compare={relative}")
    with pytest.raises(pytest.UsageError) as caught:
        settings_of(pytester, *twice)
    assert str(caught.value) == (
        f"--int8-compare: one side has the same file twice: {relative}, {relative}"
    )


@pytest.mark.parametrize(
    "option", [*(f"max-{name}=5%" for name in ("slowdown", "memory-growth")), "allow-missing"]
)
def test_limits_need_a_file_to_compare_with(pytester: pytest.Pytester, option: str) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(pytest.UsageError, match=rf"^--int8-{name}: needs --int8-compare$"):
        settings_of(pytester, f"--int8-{option}")
    # In an ini file it only applies with that option.
    ini = f"int8_{name.replace('-', '_')} = {value or 'yes'}"
    assert settings_of(pytester, ini=ini).rules == Rules()


def test_allowed_names_in_benchmark_compare(pytester: pytest.Pytester) -> None:
    assert settings_of(pytester, "--int8-allow=driver").rules == Rules(allow=frozenset({"driver"}))


def test_rejects_sweep_with_too_many_points_at_start(pytester: pytest.Pytester) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        settings_of(pytester, "--int8-sweep=all", "--int8-cross-product", "--int8-mode=w8,w8a8")
    assert str(caught.value) == (
        "--int8-sweep: a sweep must have at most 100,000 points, got 330,301,440: sweep over fewer "
        "keys or values, or not over their cross product"
    )


@pytest.mark.parametrize("option", ["--int8-compare=base.json", "--int8-lean"])
@pytest.mark.parametrize(
    ("obstacle", "name"),
    [
        ("-pno:benchmark", "-p no:benchmark"),
        ("--benchmark-disable", "--benchmark-disable"),
        ("--benchmark-skip", "--benchmark-skip"),
    ],
)
def test_rejects_options_that_measure_nothing(
    pytester: pytest.Pytester, base: Path, option: str, obstacle: str, name: str
) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        settings_of(pytester, option, obstacle)
    flag = option.partition("=")[0]
    assert str(caught.value) == f"{flag}: cannot be combined with {name}: nothing would be measured"


def test_rejects_plugins_that_prevent_timing(pytester: pytest.Pytester, base: Path) -> None:
    for flag, dest, value, name in (
        ("--int8-compare=base.json", "codspeed", True, "--codspeed"),
        ("--int8-lean", "dist", "load", "pytest-xdist (-n)"),
    ):
        config = pytester.parseconfig(flag)
        setattr(config.option, dest, value)
        with pytest.raises(pytest.UsageError) as caught:
            read_settings(config)
        option = flag.partition("=")[0]
        assert str(caught.value) == (
            f"{option}: cannot be combined with {name}: nothing would be measured"
        )


def test_lean_disables_comparison(pytester: pytest.Pytester) -> None:
    (pytester.path / "base.json").touch()
    ini = "int8_compare = base.json\nint8_max_slowdown = 3%"
    assert settings_of(pytester, ini=ini).rules.limits == {"throughput": 0.03}
    settings = settings_of(pytester, "--int8-lean", ini=ini)
    assert (settings.compare, settings.rules) == ((), Rules())


def test_benchmark_enable_overrides_benchmark_disable(pytester: pytest.Pytester) -> None:
    options = ("--benchmark-disable", "--benchmark-enable")
    assert settings_of(pytester, "--int8-lean", *options).lean


def test_lean_ignores_the_compile_cache(pytester: pytest.Pytester) -> None:
    options = ["--int8-compile-cache=cache"]
    assert settings_of(pytester, *options).compile_cache == pytester.path / "cache"
    assert settings_of(pytester, "--int8-lean", *options).compile_cache is None
    assert not (pytester.path / "cache").exists()


def test_lean_measures_two_seconds_without_baselines(pytester: pytest.Pytester) -> None:
    settings = settings_of(pytester, "--int8-lean")
    assert (settings.lean, settings.baseline) == (True, False)
    assert settings.default_params("smoke").benchmark_interval_s == 2.0
    settings = settings_of(pytester, "--int8-lean", "--int8-set=benchmark_interval_s=0.5")
    assert settings.default_params("smoke").benchmark_interval_s == 0.5
    assert Settings().default_params("smoke").benchmark_interval_s == 10.0


# -- points -----------------------------------------------------------------------------------


def test_presets() -> None:
    assert Settings().default_params("seed") == RunParams()
    assert Settings().default_params("smoke") == RunParams(
        model_size="nano",
        image_size=16,
        num_timesteps=3,
        batch_size=4,
        compile_mode="default",
        gpu_type="cpu",
    )
    assert set(PRESETS) == {"seed", "smoke"}


def test_auto_preset_depends_on_the_device() -> None:
    assert Settings().resolved_preset(lambda: True) == "seed"
    assert Settings().resolved_preset(lambda: False) == "smoke"


@pytest.mark.parametrize("preset", ["seed", "smoke"])
def test_named_preset_does_not_query_the_device(preset: str) -> None:
    def never() -> bool:
        raise AssertionError("the device was looked at")

    assert Settings(preset=preset).resolved_preset(never) == preset


def test_changes_override_the_preset() -> None:
    changes = {"batch_size": 2, "gpu_type": "cuda", "extra.width": 8}
    params = Settings(changes=changes).default_params("smoke")
    assert (params.batch_size, params.gpu_type, params.model_size) == (2, "cuda", "nano")
    assert params.extra == {"width": 8}


def test_points_are_modes_times_axes() -> None:
    axes = {"batch_size": [1, 2], "num_timesteps": [6]}
    settings = Settings(modes=("w8", "off"), axes=axes)
    assert [(p.int8_enabled, p.batch_size, p.num_timesteps) for p in settings.points("seed")] == [
        (True, 1, 12),
        (True, 2, 12),
        (True, 128, 6),
        (False, 1, 12),
        (False, 2, 12),
        (False, 128, 6),
    ]
    crossed = Settings(modes=("w8", "off"), axes=axes, cross_product=True).points("seed")
    assert [(p.int8_enabled, p.batch_size, p.num_timesteps) for p in crossed] == [
        (True, 1, 6),
        (True, 2, 6),
        (False, 1, 6),
        (False, 2, 6),
    ]


# -- help -------------------------------------------------------------------------------------

DEFAULTS = {
    "mode": "w8a8",
    "smoothquant": "off",
    "sweep": "none",
    "cross-product": "off",
    "set": "none",
    "preset": "auto",
    "workload": "olmoearth",
    "weights": "random",
    "filter": "attention projections and MLP layers",
    "compile-cache": "torch's own, for this machine",
    "no-baseline": "off",
    "max-drop": "1%",
    "inconclusive": "fail",
    "eval-data": "generated scenes",
    "remedy": "off",
    "compare": "none",
    "max-slowdown": "5%",
    "max-batch-time-growth": "off",
    "max-p95-growth": "off",
    "max-memory-growth": "5%",
    "max-compile-growth": "off",
    "max-energy-growth": "off",
    "max-call-time-growth": "5%",
    "allow": "none",
    "allow-missing": "off",
    "profile": "none",
    "wandb": "off",
    "report": "none",
    "lean": "off",
    "trust-remote-code": "off",
    "journal": "a new file in .benchmarks/int8bench",
}


@pytest.fixture
def help_text(pytester: pytest.Pytester, forked: None) -> str:
    """Return the help without its line breaks."""
    result = run(pytester, "--help")
    assert result.ret == pytest.ExitCode.OK
    return " ".join(" ".join(result.outlines).split())


def test_help_lists_options_with_defaults(help_text: str) -> None:
    assert set(DEFAULTS) == set(OPTIONS)
    found = {}
    for name, option in OPTIONS.items():
        flag = option.flag if option.metavar is None else f"{option.flag}={option.metavar}"
        entry = help_text.partition(f" {flag} {option.help} ")
        assert entry[1], flag
        found[name] = option.help.rpartition("Default: ")[2]
    assert found == DEFAULTS


def test_help_lists_ini_values(help_text: str) -> None:
    for option in OPTIONS.values():
        kind = "linelist" if option.repeatable else "string"
        assert f" {option.dest} ({kind}): Same as {option.flag} " in help_text


@pytest.mark.usefixtures("forked")
def test_markers_show_int8(pytester: pytest.Pytester) -> None:
    result = run(pytester, "--markers")
    assert result.ret == pytest.ExitCode.OK
    line = "@pytest.mark.int8(**overrides): set RunParams fields "
    assert sum(text.startswith(line) for text in result.outlines) == 1


# -- lazy imports -----------------------------------------------------------------------------

HEAVY = (
    "torch",
    "torchao",
    "numpy",
    "scipy",
    "rich",
    "hypothesis",
    "pynvml",
    "wandb",
    "jinja2",
    "matplotlib",
)
CONFTEST = f"""
import sys
from pathlib import Path

def pytest_unconfigure(config):
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    ours = [name for name in ["pytest_int8bench.plugin.hooks"] if name in sys.modules]
    Path("loaded.txt").write_text(" ".join(ours + heavy))
"""
UNRELATED = """
import pytest

@pytest.mark.parametrize("x", [1, 2])
def test_unrelated(x, tmp_path, benchmark):
    benchmark.pedantic(lambda: x)
"""


def loaded(pytester: pytest.Pytester, *args: str) -> list[str]:
    """Return the heavy modules and our own modules that are loaded at the end of a run."""
    pytester.makeconftest(CONFTEST)
    result = run(pytester, *args)
    assert result.ret == pytest.ExitCode.OK
    return Path("loaded.txt").read_text().split()


@pytest.mark.parametrize("args", [(), ("--help",), ("--markers",), ("--collect-only",)])
def test_unrelated_suite_loads_no_heavy_libraries(
    pytester: pytest.Pytester, args: tuple[str, ...]
) -> None:
    pytester.makepyfile(UNRELATED)
    theirs = loaded(pytester, *args, "-p", "no:int8bench")
    assert "pytest_int8bench.plugin.hooks" not in theirs
    assert set(loaded(pytester, *args)) - set(theirs) == {"pytest_int8bench.plugin.hooks"}


#: Our modules that a session without our fixtures may load; each costs every suite time.
IDLE = (
    "pytest_int8bench",
    "pytest_int8bench.choices",
    "pytest_int8bench.gate",
    "pytest_int8bench.gate.flags",
    "pytest_int8bench.plugin",
    "pytest_int8bench.plugin.fixtures",
    "pytest_int8bench.plugin.guarding",
    "pytest_int8bench.plugin.hooks",
    "pytest_int8bench.plugin.options",
    "pytest_int8bench.plugin.state",
    "pytest_int8bench.results",
    "pytest_int8bench.results.figure",
    "pytest_int8bench.results.figures",
    "pytest_int8bench.workloads",
    "pytest_int8bench.workloads.registry",
)
LISTING = """
import sys
from pathlib import Path

def pytest_unconfigure(config):
    ours = [name for name in sys.modules if name.partition(".")[0] == "pytest_int8bench"]
    Path("loaded.txt").write_text(" ".join(sorted(ours)))
"""


def test_unrelated_suite_loads_few_of_our_modules(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(UNRELATED + "\ndef test_fails():\n    assert False\n")
    pytester.makeconftest(LISTING)
    assert run(pytester).ret == pytest.ExitCode.TESTS_FAILED
    assert tuple(Path("loaded.txt").read_text().split()) == IDLE


def test_options_load_no_heavy_libraries(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_unrelated(): pass")
    args = ["--int8-mode=w8", "--int8-sweep=all", "--int8-workload=olmoearth", "--int8-filter=a:b"]
    args += ["--int8-report=r.html"]
    assert loaded(pytester, *args) == ["pytest_int8bench.plugin.hooks"]


def test_collecting_with_named_preset_loads_no_heavy_libraries(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_throughput(int8_throughput): pass")
    assert loaded(pytester, "--collect-only", "--int8-preset=seed", "--int8-sweep=all") == [
        "pytest_int8bench.plugin.hooks"
    ]


def test_loaded_modules_helper_detects_torch(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import torch\ndef test_torch(): pass")
    assert {"pytest_int8bench.plugin.hooks", "torch"} <= set(loaded(pytester))


def test_rejects_compile_cache_mounted_noexec(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_int8bench.files.is_noexec", lambda folder: True)
    with pytest.raises(pytest.UsageError) as caught:
        settings_of(pytester, "--int8-compile-cache=my cache")
    assert str(caught.value) == (
        "--int8-compile-cache: must be a directory that code can be loaded from, got 'my cache', "
        "which is on a file system mounted noexec"
    )
