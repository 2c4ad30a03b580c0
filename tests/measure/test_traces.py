"""Test traces and tables of kernels: their content and their file names."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.measure.evidence import Evidence, Keep, Kernel, profile_forward
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.measure.traces import COLUMNS, Profiles, file_stem
from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads import Workload

CPU = torch.device("cpu")
POINT = RunParams(gpu_type="cpu", compile_mode="off", attention="auto", batch_size=2)
NAME = POINT.run_name


def linear() -> torch.nn.Module:
    return torch.nn.Linear(8, 8)


def profiled(keep: Keep) -> Evidence:
    layer, x = linear(), torch.ones(4, 8)
    return profile_forward(lambda: layer(x), CPU, keep)


@pytest.fixture
def profiles(tmp_path: Path) -> Profiles:
    return Profiles(tmp_path / "out" / "profiles", every=False, root=tmp_path, start=tmp_path)


def rows_of(trace: Path) -> list[dict[str, str]]:
    table = trace.with_name(trace.name.replace(".trace.json.gz", ".kernels.csv"))
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_writes_trace_and_kernel_table(profiles: Profiles, tmp_path: Path) -> None:
    evidence = profiled(profiles.writer("olmoearth", NAME, CPU))
    assert evidence.trace == f"out/profiles/{NAME}.trace.json.gz"
    assert (profiles.traces, profiles.problems) == ([evidence.trace], [])

    with gzip.open(tmp_path / evidence.trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    drawn = [event for event in events if event.get("ph") == "X"]
    assert "aten::addmm" in {event["name"] for event in drawn}
    assert all(event["dur"] >= 0 for event in drawn)

    rows = rows_of(tmp_path / evidence.trace)
    assert tuple(rows[0]) == COLUMNS
    assert {row["device"] for row in rows} == {"CPU operators"}
    assert [row["kernel"] for row in rows] == [kernel.name for kernel in evidence.kernels]
    for row, kernel in zip(rows, evidence.kernels, strict=True):
        assert int(row["calls"]) == kernel.calls
        assert float(row["total_us"]) == pytest.approx(kernel.seconds * 1e6, abs=1e-3)
        assert float(row["us_per_call"]) == pytest.approx(
            kernel.seconds * 1e6 / kernel.calls, abs=1e-3
        )
        assert float(row["share"]) == pytest.approx(kernel.seconds / evidence.total_s, abs=1e-6)
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-4)


def test_kernel_table_contains_no_formulas(profiles: Profiles, tmp_path: Path) -> None:
    names = ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "a\r=1", "gemm-1", "'=1"]
    kernels = [Kernel(name=name, calls=1, seconds=0.0) for name in names]
    kernels.append(Kernel(name="mm", calls=2, seconds=-1e-6))
    keep = profiles.writer("olmoearth", NAME, CPU)
    with torch.profiler.profile() as profiler:
        pass
    trace = keep(profiler, kernels)
    assert trace is not None

    rows = rows_of(tmp_path / trace)
    shown = ["'=1+1", "'+1", "'-1", "'@SUM(1)", "' =1", "' =1", "' =1", "a =1", "gemm-1", "'=1"]
    assert [row["kernel"] for row in rows] == [*shown, "mm"]
    assert rows[-1]["total_us"] == "-1.000"  # numbers stay numbers


def test_profiles_do_not_overwrite_each_other(profiles: Profiles, tmp_path: Path) -> None:
    points = [("olmoearth", NAME)] * 3 + [("toy", NAME)]
    traces = [profiled(profiles.writer(*point, CPU)).trace for point in points]
    assert [Path(trace or "").name.removesuffix(".trace.json.gz") for trace in traces] == [
        NAME,
        f"{NAME}-2",
        f"{NAME}-3",
        f"toy_{NAME}",
    ]
    assert len([*(tmp_path / "out" / "profiles").iterdir()]) == 2 * len(points)


def test_profiles_requested_points_or_all(tmp_path: Path) -> None:
    def wanted(every: bool) -> list[bool]:
        profiles = Profiles(None, every=every, root=tmp_path, start=tmp_path)
        return [profiles.wants(p) for p in (POINT, POINT.replace(profiler_enabled=True))]

    assert wanted(False) == [False, True]
    assert wanted(True) == [True, True]
    assert list(tmp_path.iterdir()) == []  # nothing is created before there is something to write


def test_default_folder_is_next_to_the_journals(tmp_path: Path) -> None:
    start = tmp_path / "below"
    profiles = Profiles(None, every=False, root=tmp_path, start=start)
    trace = profiled(profiles.writer("olmoearth", NAME, CPU)).trace
    assert trace == f"../.benchmarks/int8bench/profiles/{NAME}.trace.json.gz"
    assert (tmp_path / ".benchmarks" / "int8bench" / ".gitignore").read_text() == "*\n"


def test_failed_write_is_reported_and_keeps_evidence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    profiles = Profiles(tmp_path / "file" / "in", every=False, root=tmp_path, start=tmp_path)
    evidence = profiled(profiles.writer("olmoearth", NAME, CPU))
    assert (evidence.trace, evidence.int8_time_share) == (None, 0)
    [problem] = profiles.problems
    assert problem.startswith(f"{NAME}: NotADirectoryError: ")


def test_removes_incomplete_profile(
    profiles: Profiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("pytest_int8bench.measure.traces._write_table", full)
    assert profiled(profiles.writer("olmoearth", NAME, CPU)).trace is None
    assert profiles.traces == []
    assert profiles.problems == [f"{NAME}: OSError: No space left on device"]
    assert list((tmp_path / "out" / "profiles").iterdir()) == []


def test_profiles_a_model_once(profiles: Profiles, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Keep | None] = []

    def counted(
        run: object, device: torch.device, keep: Keep | None = None, **more: bool
    ) -> Evidence:
        calls.append(keep)
        return profile_forward(run, device, keep, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("pytest_int8bench.measure.model.profile_forward", counted)
    workload = Workload(
        name="toy",
        build=lambda p: linear(),
        inputs=lambda p, device: (torch.ones(p.batch_size, 8, device=device),),
    )
    keep = profiles.writer("toy", NAME, CPU)

    kept = ModelPool().get(workload, POINT)
    first = kept.evidence(keep)
    assert first.trace is not None
    assert kept.evidence(keep) is kept.evidence() is first
    assert calls == [keep]

    other = ModelPool().get(workload, POINT)
    assert other.evidence().trace is None
    assert other.evidence(keep).trace is not None
    assert calls == [keep, None, keep]


# -- file names -------------------------------------------------------------------------------


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)


@given(names, names)
def test_file_names_are_portable_and_unique(one: str, other: str) -> None:
    stems = [file_stem(name, NAME) for name in (one, other)]
    assert all(re.fullmatch(r"[A-Za-z0-9+=,_][A-Za-z0-9.,+=_-]{0,219}", stem) for stem in stems)
    assert (stems[0] == stems[1]) is (one == other)


def test_keeps_safe_names() -> None:
    assert file_stem("olmoearth", NAME) == NAME
    assert file_stem("digits", NAME) == f"digits_{NAME}"
    encoded = POINT.replace(extra={"path": "a/b c"}).run_name
    assert "%2F" in encoded
    assert "%" not in file_stem("olmoearth", encoded)
    assert file_stem("olmoearth", encoded).startswith(f"{NAME}_extra.path-a-2Fb-20c-")
