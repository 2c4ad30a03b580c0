"""Read options and ini values into Settings, and check them against each other."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from pytest_int8bench.choices import ALL
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.plugin.option_values import READERS
from pytest_int8bench.plugin.options import FORCED_KERNEL, OPTIONS
from pytest_int8bench.plugin.pytest_benchmark import find_obstacle, json_target
from pytest_int8bench.plugin.settings import Settings
from pytest_int8bench.results.figures import METRICS
from pytest_int8bench.sweep import check_count

#: Option -> the RunParams field that it turns on.
_SWITCHES = {
    "smoothquant": "int8_smoothquant",
    "profile": "profiler_enabled",
    "wandb": "wandb_enabled",
}


def read_settings(config: pytest.Config) -> Settings:
    """Read and check all options, and the environment variable that forces a kernel.

    Raises:
        pytest.UsageError: one line that names the option, the rule and the value.
    """
    _check_forced_kernel()
    values = _read_values(config)
    _check_eval_data(values)
    values["rules"] = _take_rules(config, values)
    if values.get("lean"):
        _check_lean(config)
        _make_lean(values)
    if values["changes"].get("wandb_enabled"):
        _check_wandb(config)
    _check_fields(config, values)
    # Points run in the order of these axes: first those of --int8-sweep, then those of --int8-set.
    # If both have a field, the values are those of --int8-set.
    values["axes"] = {**values.pop("sweep", {}), **values.get("axes", {})}
    _check_cross_product(config, values)
    _check_count(values)
    return Settings(**values)


def _read_values(config: pytest.Config) -> dict[str, Any]:
    """Return the values of all given options: fields of Settings, and intermediate values that
    are turned into fields later."""
    values: dict[str, Any] = {}
    for option in OPTIONS.values():
        raw = option.read(config)
        if raw is None or (option.name == "journal" and hasattr(config, "workerinput")):
            continue  # the controller writes the journal; its workers do not
        try:
            values |= READERS[option.name](raw)
        except ValueError as error:
            raise pytest.UsageError(f"{option.source(config)}: {error}") from None
    on = {field: True for name, field in _SWITCHES.items() if name in values}
    values["changes"] = {**on, **values.get("changes", {})}  # --int8-set takes precedence
    for name in ("smoothquant", "wandb"):
        values.pop(name, None)
    return values


def _take_rules(config: pytest.Config, values: dict[str, Any]) -> Rules:
    """Remove the gate's options from ``values`` and return the Rules that they set."""
    if values.get("lean"):
        # This comes from an ini file, but `int8bench ab` compares two revisions rather than a
        # revision and a file.
        values.pop("compare", None)
    limits = {name: values.pop(name) for name in METRICS if name in values}
    allow = values.pop("allow", frozenset())
    allow_missing = values.pop("allow_missing", False)
    if not values.get("compare"):
        given = [METRICS[name].option for name in limits]
        for name in (*given, *(["allow-missing"] if allow_missing else [])):
            # In an ini file, limits may stand alone: they apply once --int8-compare is given.
            if (option := OPTIONS[name]).source(config) == option.flag:
                raise pytest.UsageError(f"{option.flag}: needs --int8-compare")
        return Rules(allow=allow)
    _check_measuring(config, OPTIONS["compare"].flag)
    from pytest_int8bench.files import real_path

    target = json_target(config)
    if target is not None and real_path(target) in {real_path(base) for base in values["compare"]}:
        raise pytest.UsageError(
            f"--benchmark-json: must be another file than those of --int8-compare, got {target}"
        )
    from pytest_int8bench.gate.rules import find_pyproject, read_rules

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


def _make_lean(values: dict[str, Any]) -> None:
    """Remove from ``values`` everything that is not needed to measure throughput."""
    values["baseline"] = False
    values.pop("reports", None)
    values.pop("compile_cache", None)  # the two sides of an A/B must not share compiled code
    values.pop("profile", None)
    for name in ("profiler_enabled", "wandb_enabled"):
        values["changes"].pop(name, None)


# -- checks -------------------------------------------------------------------------------------


def _check_forced_kernel() -> None:
    if FORCED_KERNEL not in os.environ:
        return
    from pytest_int8bench.kernels.dispatch import KernelError, forced_kernel

    try:
        forced_kernel()
    except KernelError as error:
        raise pytest.UsageError(str(error)) from None


def _check_eval_data(values: dict[str, Any]) -> None:
    """Reject ``--int8-eval-data`` with any workload other than OlmoEarth."""
    if "eval_data" in values and "workload" in values:
        from pytest_int8bench.workloads.registry import OLMOEARTH

        if values["workload"] != OLMOEARTH:
            raise pytest.UsageError(
                f"--int8-eval-data: needs the workload {OLMOEARTH}, got {values['workload']!r}"
            )


def _check_lean(config: pytest.Config) -> None:
    flag = OPTIONS["lean"].flag
    if config.getoption("dist", "no") != "no":
        raise _would_measure_nothing(flag, "pytest-xdist (-n)")
    _check_measuring(config, flag)


def _check_measuring(config: pytest.Config, flag: str) -> None:
    """Reject options that turn measuring off: without measurements, every test would pass."""
    obstacle = find_obstacle(config)
    if obstacle is not None:
        raise _would_measure_nothing(flag, obstacle)


def _would_measure_nothing(flag: str, obstacle: str) -> pytest.UsageError:
    return pytest.UsageError(
        f"{flag}: cannot be combined with {obstacle}: nothing would be measured"
    )


def _check_wandb(config: pytest.Config) -> None:
    from pytest_int8bench.report.wandb import check_installed

    option = OPTIONS["wandb" if OPTIONS["wandb"].read(config) else "set"]
    try:
        check_installed()
    except ValueError as error:
        raise pytest.UsageError(f"{option.source(config)}: {error}") from None


def _check_cross_product(config: pytest.Config, values: dict[str, Any]) -> None:
    option = OPTIONS["cross-product"]
    if not values.get("cross_product") or values["axes"] or option.source(config) != option.flag:
        return  # in an ini file, it applies once something is swept
    raise pytest.UsageError(f"{option.flag}: needs --int8-sweep, or --int8-set with several values")


def _check_count(values: dict[str, Any]) -> None:
    """Reject a sweep of too many points before the points are created."""
    modes = len(values.get("modes", Settings.modes))
    try:
        check_count(values["axes"], cross_product=values.get("cross_product", False), modes=modes)
    except ValueError as error:
        raise pytest.UsageError(f"--int8-sweep: {error}") from None


def _check_fields(config: pytest.Config, values: dict[str, Any]) -> None:
    """Reject fields that the workload does not use. ``--int8-sweep=all`` skips such fields, so
    there they are not an error."""
    if "workload" in values:
        from pytest_int8bench.workloads.registry import check_fields

        keys = str(OPTIONS["sweep"].read(config) or "").split(",")
        swept = () if ALL in [key.strip() for key in keys] else values.get("sweep", ())
        try:
            check_fields(values["workload"], (*values["changes"], *values.get("axes", ()), *swept))
        except ValueError as error:
            raise pytest.UsageError(f"--int8-workload: {error}") from None
