"""The table at the end of a session."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from pytest_int8bench.params import RunParams
from pytest_int8bench.report.terminal import render
from pytest_int8bench.results.records import Result, Saved
from toys import results
from toys.results import W8A8, plain, verdict

NAME = RunParams(int8_enabled=True).run_name
CPU: dict[str, Any] = {
    "gpu": None,
    "cuda": None,
    "cpu": "EPYC",
    "cpu_threads": 8,
    "packages": {"torch": "2.11.0", "triton": None, "torchao": "0.18.0"},
}
GPU = {**CPU, "gpu": {"name": "A100"}, "cuda": "12.8"}
MEASURED: dict[str, Any] = {
    "samples_per_s": 1234.6,
    "tokens_per_s": 2345678.0,
    "square_km_per_s": 505.7,
    "batch_time_s": 0.1037,
    "peak_memory_bytes": 3 * 2**30,
    "compile_s": 61.24,
    "int8_time_share": 0.421,
    "attention_kernel": "efficient",
    "speedup": 1.846,
    "speedup_low": 1.8,
    "speedup_high": 1.904,
}
FIGURES = ["1,235", "2,345,678", "506", "104", "3,072", "61.2", "42%", "efficient"]
HEADER = (
    "run samples/s tokens/s km²/s ms/batch peak MiB compile s INT8 time attention speedup [95 %]"
)


def result_of(**values: Any) -> Result:
    return results.result_of(NAME, **{"workload": "olmoearth", **values})


def lines_of(
    *results: Result,
    width: int | None = None,
    color: bool = False,
    environment: dict[str, Any] = CPU,
) -> list[str]:
    """Return the lines with each run of spaces collapsed."""
    text = render(Saved(environment, list(results), []), width=width, color=color)
    assert text.endswith("\n")
    return [" ".join(line.split()) for line in text.splitlines()]


# -- rows -------------------------------------------------------------------------------------


def test_a_measured_point() -> None:
    assert lines_of(result_of(**MEASURED), environment=GPU) == [
        HEADER,
        " ".join([NAME, *FIGURES, "1.85x [1.80, 1.90]"]),
        "A100, CUDA 12.8, torch 2.11.0, torchao 0.18.0",
    ]


@pytest.mark.parametrize(("found", "cell"), [("warm", "61.2 (warm)"), ("cold", "61.2")])
def test_a_warm_compile_cache_is_marked(found: str, cell: str) -> None:
    row = lines_of(result_of(**MEASURED, compile_cache=found))[1]
    assert f" 3,072 {cell} 42% " in row


def test_columns_line_up() -> None:
    text = render(Saved(CPU, [result_of(**MEASURED)], []), width=None, color=False)
    header, row = text.splitlines()[:2]
    for title, figure in (("samples/s", "1,235"), ("peak MiB", "3,072"), ("INT8 time", "42%")):
        assert header.index(title) + len(title) == row.index(figure) + len(figure)
    assert header.index("attention") == row.index("efficient")


def test_an_unmeasured_figure_is_a_dash() -> None:
    row = lines_of(result_of(samples_per_s=5.0), result_of(**MEASURED))[1]
    assert row == f"{NAME} 5.00 - - - - - - - -"


def test_rates_without_values_have_no_column() -> None:
    header = lines_of(result_of(samples_per_s=5.0))[0]
    assert header == HEADER.replace(" tokens/s km²/s", "")


@pytest.mark.parametrize(
    "left_out", sorted(set(MEASURED) - {"samples_per_s", "speedup_low", "speedup_high"})
)
def test_one_missing_figure_is_one_dash(left_out: str) -> None:
    results = [result_of(**{**MEASURED, left_out: None}), result_of(**MEASURED)]
    row = lines_of(*results)[1].removeprefix(NAME)
    assert row.split().count("-") == 1


def test_a_point_that_was_not_timed_has_no_row() -> None:
    assert HEADER not in lines_of(result_of(**{**MEASURED, "samples_per_s": None}))


def test_out_of_memory() -> None:
    oom = result_of(
        status="oom", requested_bytes=2**34, reason="out of memory: tried to allocate 16.00 GiB"
    )
    assert lines_of(oom) == [
        HEADER.replace(" tokens/s km²/s", ""),
        f"{NAME} OOM - - - - - -",
        f"oom: {NAME}: out of memory: tried to allocate 16.00 GiB",
        "EPYC, 8 threads, torch 2.11.0, torchao 0.18.0",
    ]


def test_a_speedup_without_interval_is_marked() -> None:
    apart = {**MEASURED, "speedup_low": None, "speedup_high": None, "speedup_method": "separate"}
    assert lines_of(result_of(**apart))[1].endswith(" efficient 1.85x (separate)")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234567.8, "1,234,568"),
        (123.45, "123"),
        (12.345, "12.3"),
        (1.2345, "1.23"),
        (0.12345, "0.123"),
        (0.012345, "0.0123"),
    ],
)
def test_figures_have_three_digits(value: float, shown: str) -> None:
    assert lines_of(result_of(samples_per_s=value))[1].split()[:2] == [NAME, shown]


@pytest.mark.parametrize("value", [0.0012345, 0.000012345])
def test_small_figures_have_three_digits(value: float) -> None:
    shown = lines_of(result_of(samples_per_s=value))[1].removeprefix(NAME).split()[0]
    assert float(shown) == pytest.approx(value, rel=0.005)


def test_rows_keep_their_order() -> None:
    names = [RunParams(batch_size=size).run_name for size in (8, 1, 4)]
    lines = lines_of(*(result_of(run_name=name, samples_per_s=1.0) for name in names))
    assert [line.split()[0] for line in lines[1:4]] == names


# -- the workload's column --------------------------------------------------------------------


def test_no_workload_column_for_olmoearth_alone() -> None:
    assert lines_of(result_of(**MEASURED))[0] == HEADER


def test_workload_column() -> None:
    lines = lines_of(result_of(**MEASURED), result_of(workload="vit", run_name="other", **MEASURED))
    assert lines[0] == f"workload {HEADER}"
    assert lines[1].startswith(f"olmoearth {NAME} 1,235 ")
    assert lines[2].startswith("vit other 1,235 ")


@pytest.mark.parametrize("name", ["vit[large]", "vit[/large]", "a:b", ":smile:", "[red]x"])
def test_workload_names_are_shown_as_they_are(name: str) -> None:
    assert lines_of(result_of(workload=name, **MEASURED))[1].startswith(f"{name} {NAME} 1,235 ")


# -- remarks ----------------------------------------------------------------------------------


def test_points_without_figures_are_remarks_only() -> None:
    lines = lines_of(
        result_of(status="skipped", reason="no modality"),
        result_of(status="failed", reason="boom [red] :smile:"),
        result_of(status="failed"),
    )
    assert lines == [
        f"skipped: {NAME}: no modality",
        f"failed: {NAME}: boom [red] :smile:",
        f"failed: {NAME}: no reason given",
        "EPYC, 8 threads, torch 2.11.0, torchao 0.18.0",
    ]


def test_tests_of_one_point_report_a_problem_once() -> None:
    problem = {"status": "failed", "reason": "boom", "workload": "unknown workload"}
    lines = lines_of(result_of(nodeid="test_a", **problem), result_of(nodeid="test_b", **problem))
    assert lines[:-1] == [f"failed: {NAME}: boom"]


def test_a_failed_point_keeps_its_figures() -> None:
    lines = lines_of(result_of(status="failed", reason="assert 1 > 2", **MEASURED))
    assert lines[1].startswith(f"{NAME} 1,235 ")
    assert lines[2] == f"failed: {NAME}: assert 1 > 2"


def test_remarks_on_a_measured_point() -> None:
    lines = lines_of(
        result_of(
            **MEASURED,
            reason="baseline and candidate do not fit in memory together",
            steady=False,
            throttled=["power brake", "thermal (hardware)"],
            regions=0,
            regions_refused="a block returns a view from the middle of a tensor",
        )
    )
    assert lines[1].startswith(f"{NAME} 1,235* ")
    assert lines[2:-1] == [
        f"note: {NAME}: baseline and candidate do not fit in memory together",
        f"* throttled: {NAME}: power brake, thermal (hardware)",
        f"unsteady: {NAME}: batch times had not settled after warm-up",
        (
            f"compiled one by one: {NAME}: repeated blocks: a block returns a view from the middle "
            "of a tensor"
        ),
    ]


@pytest.mark.parametrize(
    ("device_time_s", "told"), [(0.02, True), (0.079, True), (0.081, False), (0.11, False)]
)
def test_reports_host_bound_point(device_time_s: float, told: bool) -> None:
    lines = lines_of(result_of(**{**MEASURED, "batch_time_s": 0.1, "device_time_s": device_time_s}))
    remark = (
        f"host-bound: {NAME}: kernels run for {device_time_s * 10:.0%} of the batch time, and the "
        "GPU waits for the host the rest of the time; use a larger batch or CUDA graphs "
        "(compile_mode=reduce-overhead)"
    )
    assert (remark in lines) is told
    assert any("host-bound" in line for line in lines) is told


UPPER_BOUND: dict[str, Any] = {
    "ceiling_speedup": 1.47,
    "ceiling_reached": 0.784,
    "ceiling": {
        "baseline": {"int8_products": 0.0, "other_products": 3.8, "attention": 3.8, "rest": 2.4},
        "products_speedup": 1.154,
        "product_ratio": 1.54,
        "quantized_share": 0.982,
        "float_ops_per_s": 7e14,
        "int8_ops_per_s": 1.1e15,
        "bytes_per_s": 4.3e12,
    },
}
SHOWN = (
    "upper bound: {name}: INT8 can reach at most 1.47x, 1.15x from matmuls alone ({dtype} kernel "
    "time: matmuls 38%, attention 38%, rest 24%; 98% of the matmul time is quantized and could run "
    "1.54x as fast)"
)


def upper_bound_line(**values: Any) -> str:
    """Return the remark without its common start."""
    result = result_of(**{**MEASURED, **UPPER_BOUND, **values})
    [line] = [line for line in lines_of(result) if line.startswith("upper bound: ")]
    start = SHOWN.format(name=NAME, dtype="BF16" if result.params.get("bf16", True) else "FP32")
    assert line.startswith(start)
    return line.removeprefix(start)


def test_reports_upper_bound() -> None:
    assert upper_bound_line() == "; 78% of the possible gain achieved"


EXCEEDED = "(the bound assumes that all other kernels take as long as in the baseline)"


@pytest.mark.parametrize(
    ("values", "end"),
    [
        (
            {"ceiling_reached": 1.2},
            f"; 120% of the possible gain achieved {EXCEEDED}",
        ),
        ({"ceiling_reached": 1.2, "speedup_low": 1.46}, "; 100% of the possible gain achieved"),
        ({"ceiling_reached": 0.0}, "; none of the possible gain achieved"),
        ({"ceiling_reached": -0.4}, "; none of the possible gain achieved"),
        ({"ceiling_reached": None}, ""),
        ({"params": {"bf16": False}}, "; 78% of the possible gain achieved"),
        (
            {"params": {"attention": "math"}},
            "; 78% of the possible gain achieved; matmuls of math attention count as layer matmuls",
        ),
        (
            {"params": {"attention": "auto"}, "attention_backend": "math"},
            "; 78% of the possible gain achieved; matmuls of math attention count as layer matmuls",
        ),
    ],
    ids=["over", "over-within-noise", "nothing", "slower", "no-gain", "fp32", "math", "auto-math"],
)
def test_reports_achieved_gain(values: dict[str, Any], end: str) -> None:
    assert upper_bound_line(**values) == end


def test_reports_upper_bound_of_int8_attention() -> None:
    part = {"share": 0.75, "ratio": 1.776, "ops_per_s": 5.4e14}
    result = result_of(
        **{**MEASURED, **UPPER_BOUND, "ceiling": {**UPPER_BOUND["ceiling"], "attention": part}}
    )
    start = SHOWN.format(name=NAME, dtype="BF16").removesuffix(")")
    added = "; 75% of the attention time is in INT8 calls and could run 1.78x as fast)"
    assert f"{start}{added}; 78% of the possible gain achieved" in lines_of(result)


@pytest.mark.parametrize(("batch_time_s", "told"), [(9.0, True), (6.0, False)])
def test_reports_host_bound_upper_bound(batch_time_s: float, told: bool) -> None:
    # The baseline's kernels take 10 s, and its batches take 1.846 times as long as the candidate's.
    end = "; 78% of the possible gain achieved"
    if told:
        end += "; this covers kernels only, which run for 60% of the BF16 batch time"
    assert upper_bound_line(batch_time_s=batch_time_s) == end


def test_reports_unknown_upper_bound() -> None:
    result = result_of(**MEASURED, ceiling={"problem": "OutOfMemoryError: CUDA out of memory."})
    remark = f"upper bound: {NAME}: unknown: OutOfMemoryError: CUDA out of memory."
    assert lines_of(result)[2:-1] == [remark]


COPYING = f"{NAME}: copying a batch from the host takes 3.00 ms"
ADDED = "feeding adds {} ms to each batch"


@pytest.mark.parametrize(
    ("exposed_s", "wait_s", "workers", "remark"),
    [
        (
            0.0004,
            0.00001,
            4,
            f"host feed: {COPYING}: 2.60 ms is hidden behind compute, 0.4 ms is not",
        ),
        (
            0.0,
            0.0,
            4,
            f"host feed: {COPYING}: 3.00 ms is hidden behind compute, 0.00 ms is not",
        ),
        (
            -0.00025,
            0.00001,
            4,
            (
                f"host feed: {COPYING}, all of it hidden behind compute (feeding seems to add "
                "-0.25 ms, which is noise)"
            ),
        ),
        (0.004, 0.001, 4, f"host feed: {COPYING}, none of it hidden: {ADDED.format('4.00')}"),
        (
            0.03,
            0.029,
            4,
            (
                f"data-bound: {COPYING}, but {ADDED.format('30.0')}, as the host waits 29.0 ms for "
                "the loader (4 workers)"
            ),
        ),
        (
            0.03,
            0.03,
            0,
            (
                f"data-bound: {COPYING}, but {ADDED.format('30.0')}, as the host waits 30.0 ms for "
                "the loader (the main process)"
            ),
        ),
        # Loading runs without workers, in addition to the device's work.
        (
            0.0015,
            0.03,
            0,
            f"host feed: {COPYING}: 1.50 ms is hidden behind compute, 1.50 ms is not",
        ),
    ],
    ids=["part", "nothing", "noise", "all", "loader", "main process", "beside"],
)
def test_hidden_copies(exposed_s: float, wait_s: float, workers: int, remark: str) -> None:
    lines = lines_of(
        result_of(
            **{**MEASURED, "batch_time_s": 0.1},
            feed_workers=workers,
            feed_copy_s=0.003,
            feed_exposed_s=exposed_s,
            feed_wait_s=wait_s,
        )
    )
    assert lines[2:-1] == [remark]


@pytest.mark.parametrize(
    ("exposed_s", "low_s", "high_s", "remark"),
    [
        (
            0.001,
            0.00051,
            0.002,
            "2.00 ms is hidden behind compute, 1.00 ms [0.51, 2.00] is not",
        ),
        (
            0.004,
            0.0035,
            0.02,
            f"none of it hidden: {ADDED.format('4.00 ms [3.50, 20.0]').replace('] ms', ']')}",
        ),
    ],
)
def test_exposed_interval(exposed_s: float, low_s: float, high_s: float, remark: str) -> None:
    fed = {**MEASURED, "batch_time_s": 1.0, "feed_copy_s": 0.003, "feed_wait_s": 0.0}
    ends = {"feed_exposed_low_s": low_s, "feed_exposed_high_s": high_s}
    lines = lines_of(result_of(**fed, feed_workers=4, feed_exposed_s=exposed_s, **ends))
    (line,) = (line for line in lines if line.startswith("host feed"))
    assert line.endswith(remark)


def test_feeding_cost_within_noise_is_not_called_hidden() -> None:
    fed = {**MEASURED, "batch_time_s": 1.0, "feed_copy_s": 0.003, "feed_wait_s": 0.0}
    ends = {"feed_exposed_s": 0.01, "feed_exposed_low_s": -0.001, "feed_exposed_high_s": 0.02}
    lines = lines_of(result_of(**fed, feed_workers=4, **ends))
    (line,) = (line for line in lines if line.startswith("host feed"))
    assert line.endswith(
        "takes 3.00 ms; feeding adds 10.0 ms [-1.00, 20.0] to each batch, which may be noise"
    )


def test_no_remark_on_copies_that_were_not_measured() -> None:
    assert len(lines_of(result_of(**MEASURED, feed_workers=4, feed_wait_s=0.05))) == 3


def test_waiting_for_data_is_not_waiting_for_the_host() -> None:
    fed = {**MEASURED, "batch_time_s": 0.1, "device_time_s": 0.045, "feed_copy_s": 0.05}
    slow, host = (
        lines_of(result_of(**fed, feed_wait_s=0.0, feed_exposed_s=s)) for s in (0.05, 0.01)
    )
    assert not any(line.startswith("host-bound") for line in slow)
    assert any(line.startswith(f"host-bound: {NAME}: kernels run for 50% ") for line in host)


def test_one_remark_on_the_short_rounds_of_all_points() -> None:
    shares = {"a": 0.0123, "b": 0.0061, "c": 0.005, "d": None}
    lines = lines_of(
        *(
            result_of(run_name=n, samples_per_s=1.0, synchronization_share=s)
            for n, s in shares.items()
        )
    )
    (line,) = lines[5:-1]
    assert line.startswith("short rounds: in 2 of 4 measured points, ")
    assert ", up to 1.2% (a); raise" in line
    assert line.endswith("; raise benchmark_interval_s")


@pytest.mark.parametrize("steady", [True, None])
def test_no_remark_on_a_steady_point(steady: bool | None) -> None:
    assert len(lines_of(result_of(**MEASURED, steady=steady))) == 3


def test_no_results() -> None:
    assert lines_of() == ["EPYC, 8 threads, torch 2.11.0, torchao 0.18.0"]


# -- width and color --------------------------------------------------------------------------

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def test_no_color_has_no_escapes() -> None:
    saved = Saved(CPU, [result_of(status="oom"), result_of(**MEASURED)], [])
    for width in (None, 120):
        assert "\x1b" not in render(saved, width=width, color=False)


def test_color_does_not_change_the_text() -> None:
    saved = Saved(CPU, [result_of(status="oom"), result_of(**MEASURED)], [])
    colored = render(saved, width=120, color=True)
    assert "\x1b[31m" in colored
    stripped = [line.rstrip() for line in ESCAPE.sub("", colored).splitlines()]
    assert stripped == render(saved, width=120, color=False).splitlines()


@pytest.mark.parametrize("width", [None, 200, 140, 120, 100, 80, 60])
def test_every_width_shows_all_figures(width: int | None) -> None:
    saved = Saved(CPU, [result_of(workload="vit", **MEASURED)], [])
    text = render(saved, width=width, color=False)
    for shown in ["workload", "vit", *FIGURES, "1.85x", "[1.80,", "1.90]"]:
        assert re.search(rf"(?<!\S){re.escape(shown)}(?!\S)", text), shown
    assert "base_cuda" in text
    for title in ("samples/s", "tokens/s", "km²/s", "ms/batch", "peak MiB", "compile s"):
        assert title in text


def tables_of(text: str) -> list[list[str]]:
    """Return the lines of each table, without those of the machine below."""
    return [block.splitlines() for block in text.partition("EPYC")[0].split("\n\n")]


@pytest.mark.parametrize("width", range(40, 150, 5))
def test_a_table_fits_every_terminal(width: int) -> None:
    results = [result_of(**MEASURED), result_of(run_name="short", **MEASURED)]
    text = render(Saved(CPU, results, []), width=width, color=False)
    assert max(map(len, text.splitlines())) <= width
    titles: list[str] = []
    figures: dict[str, list[str]] = {NAME[:9]: [], "short": []}
    for header, *rows in tables_of(text):
        assert "".join(row.split()[0] for row in rows) == f"{NAME}short"
        titles += header.split()[1:]
        for name, found in figures.items():
            found += next(row for row in rows if row.startswith(name)).split()[1:]
    assert sorted(titles) == sorted(HEADER.split()[1:])
    for found in figures.values():
        assert sorted(found) == sorted([*FIGURES, "1.85x", "[1.80,", "1.90]"])


def test_a_table_that_is_too_wide_is_split() -> None:
    saved = Saved(CPU, [result_of(workload="vit", **MEASURED)], [])
    tables = tables_of(render(saved, width=80, color=False))
    assert [" ".join(table[0].split()) for table in tables] == [
        "workload run samples/s speedup [95 %] tokens/s km²/s",
        "workload run ms/batch peak MiB compile s INT8 time attention",
    ]
    for header, row, *_ in tables:
        for title, figure in (("samples/s", "1,235"), ("compile s", "61.2"), ("INT8 time", "42%")):
            if title in header:
                assert header.index(title) + len(title) == row.index(figure) + len(figure)


def test_empty_columns_are_dropped_if_there_is_no_room() -> None:
    cpu = {name: MEASURED[name] for name in ("samples_per_s", "batch_time_s", "speedup")}
    saved = Saved(CPU, [result_of(**cpu)], [])
    [narrow], [wide] = (tables_of(render(saved, width=w, color=False)) for w in (80, 120))
    assert " ".join(narrow[0].split()) == "run samples/s ms/batch speedup [95 %]"
    assert " ".join(wide[0].split()) == HEADER.replace(" tokens/s km²/s", "")


def test_a_table_of_failures_only() -> None:
    text = render(Saved(CPU, [result_of(status="oom")], []), width=50, color=False)
    [[header, row, *_]] = tables_of(text)
    assert " ".join(header.split()) == "run samples/s"
    assert row.endswith(" OOM")


def test_every_part_of_a_split_table_repeats_the_keys() -> None:
    judged = [
        verdict(W8A8, 0.014, "FAIL", metric=metric, workload="vit") for metric in ("top1", "miou")
    ]
    tables = tables_of(render(Saved(CPU, [], judged), width=80, color=False))
    assert [" ".join(table[0].split()) for table in tables] == [
        "workload accuracy metric drop [one-sided 95 %] limit verdict",
        "workload accuracy metric samples baseline INT8 worse/better",
    ]
    for table in tables:
        rows = [row.split() for row in table if row.startswith("vit ")]
        assert [row[2] for row in rows] == ["top1", "miou"]


def test_folds_a_long_workload_name() -> None:
    long = "timm:vit_large_patch14_reg4_dinov2"
    saved = Saved(CPU, [result_of(workload=long, **MEASURED)], [])
    for header, *rows in tables_of(render(saved, width=80, color=False)):
        assert len(header) <= 80
        found = [row[: header.index("run") - 1].strip() for row in rows]
        assert "".join(found).startswith(long)


def test_folded_run_name_is_complete() -> None:
    text = render(Saved(CPU, [result_of(**MEASURED)], []), width=150, color=False)
    lines = text.splitlines()
    assert all(len(line) <= 150 for line in lines)
    assert "".join(line.split()[0] for line in lines[1:-1]) == NAME
    assert NAME not in text


def test_long_remarks_fold_and_lose_nothing() -> None:
    reason = " ".join(f"word{n}" for n in range(60))
    text = render(
        Saved(CPU, [result_of(status="failed", reason=reason)], []), width=50, color=False
    )
    assert all(len(line) <= 50 for line in text.splitlines())
    assert "".join(f"failed: {NAME}: {reason}".split()) in "".join(text.split())


def test_the_fused_backend_follows_the_int8_share() -> None:
    fused = {**MEASURED, "int8_backend": "fused"}
    row = lines_of(result_of(**fused))[1]
    share = f"{MEASURED['int8_time_share']:.0%}"
    assert f" {share} fused " in row
    assert "fused" not in lines_of(result_of(**{**MEASURED, "int8_backend": "torchao"}))[1]


def test_reports_layers_not_fused_with_reasons() -> None:
    falls = {"a": "type: has forward hooks", "b": "type: has forward hooks", "c": "weight: X"}
    fused = {**MEASURED, "int8_backend": "fused", "coverage": {"fallbacks": falls}}
    said = (
        f"not fused: {NAME}: layers that run torchao's kernels: 2 type: has forward hooks, "
        "1 weight: X"
    )
    assert said in lines_of(result_of(**fused))
    torchao = {**fused, "int8_backend": "torchao"}
    assert said not in lines_of(result_of(**torchao))


def test_plain_benchmarks_have_a_separate_table() -> None:
    off = [plain(name, status="skipped", reason="ran once, not measured: off") for name in "ab"]
    off = [replace(benchmark, call_time_s=None) for benchmark in off]
    slow = plain("slow", 1.5, rounds=1, iterations=None)
    failed = plain("bad", 0.25, status="failed", reason="boom")
    saved = Saved(GPU, [], benchmarks=[slow, plain("fast", 2.5e-8), failed, *off])
    lines = [" ".join(line.split()) for line in render(saved, width=None, color=False).splitlines()]
    assert lines[:6] == [
        "benchmark time/call rounds calls/round",
        "test_a.py::slow 1.50 s 1 -",
        "test_a.py::fast 25.0 ns 20 1",
        "test_a.py::bad 250 ms 20 1",
        "failed: test_a.py::bad: boom",
        "skipped: 2 plain benchmarks: ran once, not measured: off",
    ]
    assert lines[6].startswith("timer does not wait for the GPU: test_a.py::slow and 2 more: ")
