"""Test points of older files, whose names had OlmoEarth's form for every workload."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.gate import renames
from pytest_int8bench.gate.compare import Comparison, compare
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.renames import Renames
from pytest_int8bench.gate.session import RegressionError, SessionGate
from pytest_int8bench.params import RunParams
from pytest_int8bench.report.page.build import build
from pytest_int8bench.report.page.sources import sources
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.locating import Run
from pytest_int8bench.results.records import Result, Saved
from pytest_int8bench.workloads.registry import OLMOEARTH_FIELDS
from toys.results import COVERAGE, saved, timed, verdict_of

SMOKE = RunParams(
    model_size="nano", image_size=16, num_timesteps=3, batch_size=4, gpu_type="cpu"
).replace(int8_enabled=True, compile_mode="default")
OLD = SMOKE.run_name
NEW = "cpu_bf16_int8_w8a8_default_bs4"
SEED = RunParams(int8_enabled=True)


def digits(name: str, slower: float = 1.0, **values: Any) -> Result:
    return timed(name, slower, **{"workload": "digits", **values})


def compared(base: list[Record], new: list[Record]) -> Comparison:
    return compare([Run(Path("a"), saved(*base))], [Run(Path("b"), saved(*new))], Rules())


def outcomes(found: Comparison) -> dict[str, str]:
    return {run.run_name: run.outcome for run in found.runs}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (OLD, NEW),
        (SEED.run_name, "cuda_bf16_int8_w8a8_max-autotune_bs128"),
        # The user also set one of the preset's fields, so the short name contains it.
        (OLD, NEW.replace("_bs4", "_is16_bs4")),
        (OLD.replace("_bs4", "_bs4_attention-auto"), NEW + "_attention-auto"),
    ],
)
def test_compares_renamed_point(old: str, new: str) -> None:
    for base, later in ((old, new), (new, old)):
        found = compared([digits(base)], [digits(later, 1.3)])
        assert outcomes(found) == {new: "regressed"}
        assert found.notes == (f"1 record has a new name: {old} is {new} now",)


def test_matches_renamed_verdicts_and_marker_labels() -> None:
    old = [digits(OLD, nodeid=f"t.py::test[a-{OLD}]"), verdict_of(point=OLD, workload="digits")]
    new = [
        digits(NEW, nodeid=f"t.py::test[a-digits-{NEW}]"),
        verdict_of(point=NEW, workload="digits"),
    ]
    found = compared([*old], [*new])
    assert outcomes(found) == {NEW: "same"}
    assert [change.outcome for change in found.accuracy] == ["same"]
    # A test of OlmoEarth in a session with another workload.
    name = SEED.run_name
    same = dataclasses.replace(digits(name), workload="olmoearth")
    labelled = dataclasses.replace(same, nodeid=f"test_a.py::test[olmoearth-{name}]")
    assert outcomes(compared([same], [labelled])) == {name: "same"}


@pytest.mark.parametrize(
    ("base", "new"),
    [
        (OLD, NEW.replace("bs4", "bs8")),
        (OLD, NEW.replace("default", "off")),
        (OLD, NEW.replace("_bs4", "_is32_bs4")),
        (OLD, NEW + "_model_size-tiny"),
        ("nothing that was a name", NEW),
        (OLD.replace("w8a8", "gone"), NEW),
    ],
)
def test_does_not_match_a_different_point(base: str, new: str) -> None:
    found = compared([digits(base)], [digits(new)])
    assert outcomes(found) == {base: "missing", new: "new"}
    assert found.notes == ()


def test_does_not_match_ambiguous_points() -> None:
    sizes = [SMOKE.replace(model_size=size).run_name for size in ("nano", "tiny")]
    found = compared([digits(name) for name in sizes], [digits(NEW)])
    assert set(outcomes(found).values()) == {"missing", "new"}
    # The point with the same fields matches, and the others are missing.
    default = SMOKE.replace(**{n: getattr(RunParams(), n) for n in OLMOEARTH_FIELDS}).run_name
    found = compared([digits(name) for name in (*sizes, default)], [digits(NEW)])
    assert outcomes(found) == {sizes[0]: "missing", sizes[1]: "missing", NEW: "same"}


def test_does_not_match_another_test_or_workload() -> None:
    for values in ({"nodeid": f"test_b.py::test[{NEW}]"}, {"workload": "timm:vit"}):
        assert outcomes(compared([digits(OLD)], [digits(NEW, **values)])) == {
            OLD: "missing",
            NEW: "new",
        }


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ({"coverage": COVERAGE}, {"coverage": COVERAGE}, None),
        ({"tokens_per_s": 8000.0}, {"tokens_per_s": 8000.0}, None),
        (
            {"coverage": COVERAGE},
            {"coverage": {**COVERAGE, "total_parameters": 5}},
            "its model or inputs differ",
        ),
        ({"pixels_per_s": 8000.0}, {"pixels_per_s": 512.0}, "its model or inputs differ"),
        ({}, {"tokens_per_s": 8000.0}, "nothing shows that it ignored them"),
    ],
)
def test_requires_the_same_model_if_it_may_read_the_fields(
    old: dict[str, Any], new: dict[str, Any], why: str | None
) -> None:
    base, later = timed(OLD, **old), timed(NEW, **new)
    found = compared([base], [later])
    if why is None:
        assert outcomes(found) == {NEW: "same"}
        return
    assert outcomes(found) == {OLD: "missing", NEW: "new"}
    [note] = found.notes
    assert note == (
        f"toy: {OLD} is not compared with {NEW}, which does not set model_size=nano, "
        f"image_size=16, num_timesteps=3: {why}"
    )
    # If both names have the same fields, nothing needs to be proven.
    kept = SMOKE.with_short_name().run_name
    assert outcomes(compared([base], [timed(kept, **new)])) == {kept: "same"}


def test_compares_records_without_a_name() -> None:
    found = compared([digits("", nodeid="")], [digits("", 1.3, nodeid="")])
    assert outcomes(found) == {"": "regressed"}


def test_does_not_search_long_ids_for_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr(renames, "is_reference", looked_at.append)
    results = [digits(OLD, nodeid=f"t.py::t[{'-x' * n}-{OLD}]") for n in (1, 5000)]
    assert set(outcomes(compared(results, results)).values()) == {"same"}
    assert len(looked_at) < 50


def test_keeps_ids_chosen_by_users() -> None:
    old, new = (digits(name, nodeid="t.py::test[small]") for name in (OLD, NEW))
    assert outcomes(compared([old], [new])) == {NEW: "same"}


@given(st.sampled_from(["nano", "base"]), st.sampled_from([16, 64]), st.booleans(), st.booleans())
def test_each_point_matches_itself(size: str, image: int, s1: bool, int8: bool) -> None:
    point = SEED.replace(model_size=size, image_size=image, use_s1=s1, int8_enabled=int8)
    others = [SEED.replace(batch_size=n) for n in (1, 2)]
    old = [timed(p.run_name) for p in (point, *others)]
    new = [timed(p.with_short_name().run_name) for p in (point, *others)]
    renames = Renames([*old, *new])
    assert [renames.of(record).identity for record in old] == [r.identity for r in new]
    assert [renames.of(record) for record in new] == new


# -- sessions -----------------------------------------------------------------------------------


def test_session_gate_finds_points_by_their_old_name() -> None:
    base = [digits(OLD), digits(SEED.run_name)]
    gate = SessionGate([Run(Path("base.json"), Saved({}, base))], Rules())
    with pytest.raises(RegressionError, match=f"^regressed: digits: {NEW}: "):
        gate.judge(digits(NEW, 1.3), {})
    seed = SEED.with_short_name().run_name
    collected = {f"test_a.py::test[{name}]" for name in (NEW, seed)}

    def problems(deselected: frozenset[str] = frozenset()) -> list[str]:
        return gate.problems(collected, deselected, by_node=False, is_gone=lambda file: False)

    assert problems() == [f"not measured, so not compared: test_a.py::test[{seed}]"]
    assert problems(frozenset(collected)) == []
    assert gate.summary()[:2] == [
        "compared with base.json: 1 regressed",
        f"1 record has a new name: {OLD} is {NEW} now",
    ]


def test_session_gate_reports_point_of_another_model_as_missing() -> None:
    gate = SessionGate([Run(Path("base.json"), Saved({}, [timed(OLD)]))], Rules())
    gate.judge(timed(NEW), {})
    assert gate.problems({timed(NEW).nodeid}, (), by_node=False, is_gone=lambda file: False) == [
        "nothing was compared with base.json",
        f"missing: {timed(OLD).nodeid} is in base.json and not in this session",
    ]


# -- reports ------------------------------------------------------------------------------------


def test_report_joins_history_of_a_renamed_point() -> None:
    files = [("1.json", saved(digits(OLD))), ("2.json", saved(digits(NEW, 1.1)))]
    view = build(sources(files))
    [history] = [section for section in view.sections if section.id == "history"]
    rates = next(t.grid for t in history.tables if t.caption.startswith("Throughput"))
    assert [row[0] for row in rates.rows] == [f"digits: {NEW}"]
    assert f"1 record has a new name: {OLD} is {NEW} now" in history.notes
    assert OLD not in str([s.tables for s in view.sections])


def test_history_titles_name_only_axes_of_their_workload() -> None:
    ours = [timed("a", params=p.to_dict(), workload="olmoearth") for p in (SMOKE,)]
    other = [
        timed("b", params=SEED.to_dict()),
        timed("c", params=SEED.replace(batch_size=1).to_dict()),
    ]
    view = build(sources([("1.json", saved(*ours, *other)), ("2.json", saved(*ours, *other))]))
    [history] = [section for section in view.sections if section.id == "history"]
    assert {chart.title for chart in history.charts} == {
        "Throughput across files: olmoearth",
        "Throughput across files: toy, batch 128",
        "Throughput across files: toy, batch 1",
    }
