"""Tile sizes: the table, tuning where it is silent, and how rows are cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_int8bench.kernels import device as kernels_device
from pytest_int8bench.kernels import dispatch, table, tuning
from pytest_int8bench.kernels.dispatch import matmul_kernel
from pytest_int8bench.kernels.tile_types import Problem, Product, Specialized, Tile
from pytest_int8bench.kernels.tiles import (
    POINTER_CANDIDATES,
    TMA_CANDIDATES,
    rows,
    specialized,
)

GPU = torch.device("cuda", 0)
# Shared memory that a multiprocessor lends to its programs, by compute capability (CUDA C++
# programming guide, technical specifications).
SM90_BYTES = 227 * 1024
SM80_BYTES = 163 * 1024
SM86_BYTES = 99 * 1024

problems = st.builds(
    Problem,
    m=st.integers(1, 1 << 20),
    n=st.integers(1, 1 << 16),
    k=st.integers(1, 1 << 16),
    out_bytes=st.sampled_from([2, 4]),
    residual=st.booleans(),
)


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An A100, and tuning that is kept nowhere else."""
    pretend(monkeypatch, (8, 0), 108)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setenv("INT8BENCH_TUNING_DIR", str(tmp_path / "tuning"))
    monkeypatch.delenv("INT8BENCH_PRODUCT", raising=False)
    pytest.importorskip("triton")
    tuning.load_tuned.cache_clear()
    yield
    tuning.load_tuned.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], count: int) -> None:
    monkeypatch.setattr(kernels_device, "capability", lambda device: capability)
    monkeypatch.setattr(kernels_device, "multiprocessors", lambda device: count)


class Clock:
    """Gives each tile the time that a function says, and notes what was timed."""

    def __init__(self, seconds: Callable[[Product], float]) -> None:
        self.seconds = seconds
        self.timed: list[Product] = []

    def __call__(self, tile: Product) -> float:
        self.timed.append(tile)
        return self.seconds(tile)


def fastest(tile: Product) -> Clock:
    return Clock(lambda other: 1.0 if other == tile else 2.0)


def never(tile: Product) -> float:
    raise AssertionError("timed")


def product(
    problem: Problem, name: str, device: torch.device, time: Callable[[Any], float] | None
) -> Any:
    """Return the tiles of the first kernel, from a name on, that has tiles for the problem."""

    def timed(kernel: table.Kernel, tile: Tile) -> float:
        assert time is not None
        return time(tile)

    kernels = table.kernels_of("linear")
    kernels = kernels[[kernel.name for kernel in kernels].index(name) :]
    chosen = dispatch.kernel_and_tile(kernels, device, problem, None if time is None else timed)
    return chosen[1]


# -- the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [
        ((8, 0), "pointers"),
        ((8, 9), "pointers"),
        ((9, 0), "specialized"),
        ((10, 0), "tma"),
        ((0, 0), "pointers"),
    ],
)
def test_the_kernel_is_that_of_the_device_unless_forced(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kernel: str
) -> None:
    pretend(monkeypatch, capability, 132)
    assert matmul_kernel(GPU) == kernel
    for forced in {kernel, "pointers"}:
        monkeypatch.setenv("INT8BENCH_PRODUCT", forced)
        assert matmul_kernel(GPU) == forced
    monkeypatch.setenv("INT8BENCH_PRODUCT", "")
    assert matmul_kernel(GPU) == kernel


def test_another_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INT8BENCH_PRODUCT", "cublas")
    message = r"^INT8BENCH_PRODUCT must be one of specialized, tma, pointers, got 'cublas'$"
    with pytest.raises(ValueError, match=message):
        matmul_kernel(GPU)


def test_a_kernel_that_the_device_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INT8BENCH_PRODUCT", "tma")
    message = r"^INT8BENCH_PRODUCT=tma needs sm90 or later, this is sm80$"
    with pytest.raises(ValueError, match=message):
        matmul_kernel(GPU)


def test_roles_are_for_sm90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INT8BENCH_PRODUCT", "specialized")
    pretend(monkeypatch, (10, 0), 148)
    message = r"^INT8BENCH_PRODUCT=specialized needs sm90, this is sm100$"
    with pytest.raises(ValueError, match=message):
        matmul_kernel(GPU)


# -- problems -----------------------------------------------------------------------------------


def test_a_problem_as_text() -> None:
    assert Problem(1000, 768, 3072, 2, residual=True).key == "1024x768x3072:2:r"
    assert Problem(1024, 768, 3072, 4, residual=False).key == "1024x768x3072:4:-"
    assert Problem(1, 8, 16, 2, residual=False).key == "1x8x16:2:-"


@given(problems, problems)
def test_near_rows_share_a_key_and_nothing_else_does(one: Problem, other: Problem) -> None:
    size = int(one.key.split("x")[0])
    assert size / 2 < one.m <= size
    same = one.key == other.key
    rest = [(p.n, p.k, p.out_bytes, p.residual) for p in (one, other)]
    assert same == (size / 2 < other.m <= size and rest[0] == rest[1])


# -- the table of sm90 --------------------------------------------------------------------------


def shared_bytes(tile: Product, out_bytes: int) -> int:
    """What a program needs: each stage a tile of A and of B in INT8, and a part of the output."""
    return tile.stages * (tile.bm + tile.bn) * tile.bk + tile.bm * tile.bn // tile.parts * out_bytes


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def check_shape(tile: Product) -> None:
    for size in (tile.bm, tile.bn, tile.bk, tile.warps, tile.parts):
        assert is_power_of_two(size)
    assert tile.bm >= 16
    assert tile.bn // tile.parts >= 16
    assert tile.bk >= 32  # the depth of an INT8 instruction
    assert 1 <= tile.warps <= 32
    assert tile.parts in (1, 2, 4)


@given(problems, st.integers(1, 200))
def test_sm90_has_tiles_that_fit_for_every_problem(problem: Problem, count: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch, (9, 0), count)
        tile = product(problem, "tma", GPU, never)
    assert tile in TMA_CANDIDATES
    check_shape(tile)
    # Programs of one multiprocessor that do not fit beside each other wait for each other.
    assert shared_bytes(tile, problem.out_bytes) <= SM90_BYTES


def test_larger_problems_get_larger_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), 132)
    for residual in (False, True):
        sizes = []
        for m in (1, 64, 512, 4096, 65536, 1 << 20):
            tile = product(Problem(m, 768, 768, 2, residual), "tma", GPU, never)
            sizes.append(tile.bm * tile.bn)
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1]


# -- warps with roles ---------------------------------------------------------------------------

large = st.builds(
    Problem,
    m=st.integers(1 << 12, 1 << 18),
    n=st.integers(1, 48).map(lambda tiles: 128 * tiles),
    k=st.one_of(st.integers(16, 1024), st.integers(16, 8192)),
    out_bytes=st.just(2),
    residual=st.booleans(),
)


# H200 and H100 SXM, H100 PCIe, H20, and parts of an H100.
@given(large, st.sampled_from([132, 114, 78, 60, 32, 16]))
def test_each_tile_is_of_one_program_and_what_it_needs_fits(problem: Problem, count: int) -> None:
    found = specialized(problem, count)
    assume(found is not None)
    assert found is not None
    programs = found.slots * found.groups
    assert 0.96 * count <= programs <= count
    # As the kernel does it.
    columns = [
        turn * found.slots + slot for turn in range(found.passes) for slot in range(found.slots)
    ]
    assert sorted(columns) == list(range(problem.n // 128))
    tiles = -(-problem.m // 128)
    rows = [tile for group in range(found.groups) for tile in range(group, tiles, found.groups)]
    assert sorted(rows) == list(range(tiles))
    inputs = 2 * found.stages
    if found.stationary:
        assert not problem.residual
        inputs = found.stages + -(-problem.k // 128)
    barriers = 8 * (2 * found.stages + 4 + 2 * found.buffers)
    assert inputs * 128 * 128 + 2 * found.buffers * 128 * 64 * 2 + barriers <= SM90_BYTES - 1024
    assert found.stages >= 4


@pytest.mark.parametrize(
    ("size", "residual", "found"),
    [  # those that were measured
        ((196608, 2304, 768), False, Specialized(6, 22, 3, 6, 1, True)),
        ((196608, 3072, 768), False, Specialized(12, 11, 2, 6, 1, True)),
        ((98304, 4096, 1024), False, Specialized(32, 4, 1, 4, 1, True)),
        ((196608, 768, 768), True, Specialized(6, 22, 1, 4, 2, False)),
        ((196608, 768, 3072), True, Specialized(6, 22, 1, 6, 1, False)),
    ],
)
def test_large_problems_on_sm90_have_warps_with_roles(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], residual: bool, found: Specialized
) -> None:
    pretend(monkeypatch, (9, 0), 132)
    problem = Problem(*size, 2, residual)
    assert product(problem, "specialized", GPU, never) == found
    assert isinstance(product(problem, "tma", GPU, never), Product)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(2048, 768, 768, 2, residual=False),  # too small
        Problem(196608, 768, 768, 4, residual=False),
        Problem(196608, 768 + 64, 768, 2, residual=False),
        Problem(196608, 40 * 128, 768, 2, residual=False),  # 120 of 132 programs
        Problem(196608, 512 * 128, 768, 2, residual=False),
    ],
    ids=str,
)
def test_leaves_others_to_next_kernel(monkeypatch: pytest.MonkeyPatch, problem: Problem) -> None:
    pretend(monkeypatch, (9, 0), 132)
    assert specialized(problem, 132) is None
    tile = product(problem, "specialized", GPU, never)
    assert tile == product(problem, "tma", GPU, never)


@pytest.mark.parametrize("tile", [*TMA_CANDIDATES, *POINTER_CANDIDATES], ids=str)
def test_candidates_have_sizes_that_triton_takes(tile: Product) -> None:
    check_shape(tile)


def test_candidates_of_sm80_fit_there() -> None:
    # Pointers are loaded in stages too; what is stored needs no shared memory.
    needed = [tile.stages * (tile.bm + tile.bn) * tile.bk for tile in POINTER_CANDIDATES]
    assert max(needed) <= SM86_BYTES < SM80_BYTES
    assert len(set(POINTER_CANDIDATES)) == len(POINTER_CANDIDATES)
    assert len(set(TMA_CANDIDATES)) == len(TMA_CANDIDATES)


# -- tuning -------------------------------------------------------------------------------------

PROBLEM = Problem(1000, 768, 768, 2, residual=False)
#: The candidates for a problem with fewer than one large tile for each multiprocessor.
TIMED = [tile for tile in POINTER_CANDIDATES if tile.bm * tile.bn <= 64 * 128]


@pytest.mark.parametrize(
    ("kernel", "candidates", "capability"),
    [
        ("pointers", POINTER_CANDIDATES, (8, 0)),
        ("pointers", POINTER_CANDIDATES, (9, 0)),  # forced
        ("tma", TMA_CANDIDATES, (10, 0)),
    ],
)
def test_candidates_of_the_right_size_are_timed_once_and_the_fastest_kept(
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    candidates: tuple[Product, ...],
    capability: tuple[int, int],
) -> None:
    pretend(monkeypatch, capability, 108)
    clock = fastest(candidates[-2])
    assert product(PROBLEM, kernel, GPU, clock) == candidates[-2]
    assert clock.timed == [tile for tile in candidates if tile.bm * tile.bn <= 64 * 128]
    # Near rows are one problem, also while a CUDA graph is recorded.
    assert product(Problem(513, 768, 768, 2, False), kernel, GPU, never) == candidates[-2]
    assert product(PROBLEM, kernel, GPU, None) == candidates[-2]
    # Others are not, and many rows are worth larger tiles.
    again = fastest(candidates[0])
    assert product(Problem(100_000, 768, 768, 2, True), kernel, GPU, again) == candidates[0]
    assert again.timed == [tile for tile in candidates if tile.bm * tile.bn >= 64 * 64]


def test_what_does_not_fit_is_not_chosen() -> None:
    clock = Clock(lambda tile: 1.0 if tile == TIMED[3] else float("inf"))
    assert product(PROBLEM, "pointers", GPU, clock) == TIMED[3]


def test_tuning_is_read_again_by_another_process() -> None:
    chosen = TIMED[5]
    product(PROBLEM, "pointers", GPU, fastest(chosen))
    tuning.load_tuned.cache_clear()  # as a process that starts
    assert product(PROBLEM, "pointers", GPU, never) == chosen
    # A problem more does not lose the first.
    other = Problem(5, 5, 5, 4, residual=True)
    product(other, "pointers", GPU, fastest(TIMED[0]))
    code = f"""
import torch
from pytest_int8bench.kernels import tiles
from pytest_int8bench.kernels.tile_types import Problem
torch.cuda.get_device_name = lambda device: "A100"
for problem in ({PROBLEM!r}, {other!r}):
    print(tiles.pointer_tiles("pointers", problem, torch.device("cuda", 0), None))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(chosen), str(TIMED[0])]


def test_what_another_process_tuned_meanwhile_is_kept() -> None:
    product(PROBLEM, "pointers", GPU, fastest(TIMED[1]))
    mine = dict(tuning.load_tuned("pointers", GPU))
    other = Problem(5, 5, 5, 4, residual=True)
    tuning.load_tuned.cache_clear()
    product(other, "pointers", GPU, fastest(TIMED[0]))
    tuning.save_tuned("pointers", GPU, mine)  # of a process that knows nothing of the other one
    [section] = json.loads(tuning.tuning_file().read_text()).values()
    assert set(section) == {PROBLEM.key, other.key}


def test_tuning_is_kept_by_device_kernel_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    product(PROBLEM, "pointers", GPU, fastest(TIMED[1]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A10")
    tuning.load_tuned.cache_clear()
    product(PROBLEM, "pointers", GPU, fastest(TIMED[2]))
    saved = json.loads(tuning.tuning_file().read_text())
    assert {name: section[PROBLEM.key]["bn"] for name, section in saved.items()} == {
        f"A100, triton {triton.__version__}, pointers": TIMED[1].bn,
        f"A10, triton {triton.__version__}, pointers": TIMED[2].bn,
    }
    assert [path.name for path in tuning.tuning_file().parent.iterdir()] == ["int8-products.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\udcff",
        '{"A100, triton VERSION, pointers": 3}',
        '{"A100, triton VERSION, pointers": {"1024x768x768:2:-": {"bm": 1, "no": 2}}}',
        '{"A100, triton VERSION, pointers": {"1024x768x768:2:-": null}}',
        # Tiles that tuning never tried.
        *(
            '{"A100, triton VERSION, pointers": {"1024x768x768:2:-": {"bn": 128, "bk": 64, '
            f'"warps": 8, "stages": 3, "bm": {value}}}}}}}'
            for value in ('"__import__(1)"', "-128", "96", "1e400", "[128]", "true")
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_tuned_anew(content: str) -> None:
    import triton

    path = tuning.tuning_file()
    path.parent.mkdir()
    path.write_bytes(
        content.replace("VERSION", triton.__version__).encode(errors="surrogateescape")
    )
    assert product(PROBLEM, "pointers", GPU, fastest(TIMED[4])) == TIMED[4]
    tuning.load_tuned.cache_clear()
    assert product(PROBLEM, "pointers", GPU, never) == TIMED[4]


def test_unwritable_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INT8BENCH_TUNING_DIR", str(tmp_path / "file" / "folder"))
    assert product(PROBLEM, "pointers", GPU, fastest(TIMED[4])) == TIMED[4]
    assert product(PROBLEM, "pointers", GPU, never) == TIMED[4]  # in this process


def test_without_a_home_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("INT8BENCH_TUNING_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert product(PROBLEM, "pointers", GPU, fastest(TIMED[4])) == TIMED[4]


def test_where_tuning_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuning.tuning_file() == tmp_path / "tuning" / "int8-products.json"
    monkeypatch.delenv("INT8BENCH_TUNING_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.tuning_file() == tmp_path / "pytest-int8bench" / "int8-products.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert tuning.tuning_file() == tmp_path / ".cache" / "pytest-int8bench" / "int8-products.json"


@given(problems, st.sampled_from([1, 108]))
def test_while_a_graph_is_recorded_nothing_is_timed_or_kept(problem: Problem, count: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch, (8, 0), count)
        tile = product(problem, "pointers", GPU, None)

        def programs(tile: Product) -> int:
            return -(-problem.m // tile.bm) * -(-problem.n // tile.bn)

        busy = [other for other in POINTER_CANDIDATES if programs(other) >= count]
        largest = max(
            (other.bm * other.bn for other in busy),
            default=min(tile.bm * tile.bn for tile in POINTER_CANDIDATES),
        )
    assert tile.bm * tile.bn == largest
    assert tile in POINTER_CANDIDATES
    assert not os.path.exists(tuning.tuning_file())
    assert tuning.load_tuned("pointers", GPU) == {}


def test_on_a_cpu_there_is_one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert kernels_device.multiprocessors(torch.device("cpu")) == 1
    assert kernels_device.capability(torch.device("cpu")) == (0, 0)


# -- rows ---------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 20), st.integers(1, 32768), st.integers(1, 200))
def test_rows_are_covered_by_few_pieces(m: int, k: int, count: int) -> None:
    cut = rows(m, k, count)
    assert cut.block * cut.chunks >= k
    assert cut.block * (cut.chunks - 1) < k
    assert is_power_of_two(cut.block)
    assert is_power_of_two(cut.rows)
    assert is_power_of_two(cut.warps)
    assert cut.warps <= 32
    assert cut.chunks <= 16
    # What is held in registers: no more than 128 values a thread.
    assert cut.rows * cut.block * cut.chunks <= 128 * 32 * cut.warps


@pytest.mark.parametrize("k", [768, 1024, 3072, 4096])
def test_usual_widths_need_no_masks(k: int) -> None:
    cut = rows(1 << 17, k, 132)
    assert cut.block * cut.chunks == k


def test_few_rows_are_spread_over_the_device() -> None:
    assert rows(16 * 132 - 1, 768, 132).rows == 1
    assert rows(16 * 132, 768, 132).rows == 4
