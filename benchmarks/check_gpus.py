"""Compare a sweep on several GPUs under pytest-xdist with the same sweep in one process.

    python benchmarks/check_gpus.py [-n WORKERS] [pytest options]

Needs as many GPUs as workers (2 by default). Both sweeps compile into empty folders of their own,
so that neither finds what the other compiled. Prints wall times, where each point ran and how far
the figures are apart. Exits with 1 if the median difference of the batch times is over 3 %, if one
is over 10 %, if points are missing, or if a GPU measured nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pytest_int8bench.environment import describe, differences
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Saved

#: Two processes on one GPU are this far apart, and two GPUs of a kind.
MEDIAN_LIMIT, LIMIT = 0.03, 0.10
#: Eight points: four baselines, each with its candidate. With CUDA graphs, so that the GPU, not the
#: host, is the limit: two workers share the host.
SWEEP = (
    "--int8-preset=seed",
    "--int8-mode=w8a8",
    "--int8-set=model_version=v1.2",
    "--int8-set=compile_mode=reduce-overhead",
    "--int8-set=benchmark_interval_s=2",
    "--int8-set=image_size=32",
    "--int8-set=batch_size=16,32,64,128",
)


def sweep(folder: Path, name: str, options: list[str]) -> tuple[float, Saved]:
    """Run the sweep in a process of its own; return the seconds it took and what it found."""
    saved = folder / f"{name}.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-q"]
    command += [str(Path(__file__).parent / "test_throughput.py"), *SWEEP, *options]
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    environ = {**os.environ, **{var: str(folder / name / part) for var, part in caches.items()}}
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    start = time.monotonic()
    code = subprocess.run([*command, f"--benchmark-json={saved}"], env=environ).returncode
    seconds = time.monotonic() - start
    if code != 0:
        sys.exit(f"the sweep ({name}) ended with exit code {code}")
    return seconds, read(saved)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-n", type=int, default=2, help="workers, one per GPU (default: 2)")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        serial_s, serial = sweep(Path(folder), "serial", options)
        spread_s, spread = sweep(Path(folder), "spread", [*options, f"-n{arguments.n}"])
    print(f"\n{describe(spread.environment)}")
    for name, (before, after) in differences(serial.environment, spread.environment).items():
        print(f"the fingerprints differ in {name}: {before} -> {after}")
    print(f"wall time: serial {serial_s:.0f} s, -n {arguments.n} {spread_s:.0f} s", end="")
    print(f" ({spread_s / serial_s:.2f} of it)")
    before = {result.nodeid: result for result in serial.results}
    same_order = [*before] == [result.nodeid for result in spread.results]
    print(f"same tests in the same order: {same_order}")
    off: list[float] = []
    used: set[str | None] = set()
    print(f"{'ms/batch':>10} {'off':>8} {'speedup':>8} {'serial':>8}  worker  gpu  run")
    for result in spread.results:
        base = before.get(result.nodeid)
        if base is None or base.batch_time_s is None or result.batch_time_s is None:
            print(f"not measured twice: {result.run_name}: {result.reason}")
            continue
        off.append(result.batch_time_s / base.batch_time_s - 1)
        where = result.worker or {}
        used.add(where.get("gpu"))
        speedups = [f"{r.speedup:.3f}x" if r.speedup else "-" for r in (result, base)]
        print(f"{result.batch_time_s * 1e3:10.3f} {off[-1]:+8.2%} {speedups[0]:>8}", end="")
        print(f" {speedups[1]:>8}  {where.get('id')}  {where.get('gpu')}  {result.run_name}")
    apart = [abs(value) for value in off] or [float("inf")]
    median = statistics.median(apart)
    print(f"batch times: median {median:.2%} apart, at most {max(apart):.2%}")
    problems = {
        "figures are apart": median > MEDIAN_LIMIT or max(apart) > LIMIT,
        "points are missing": not same_order or len(off) < len(before),
        "a GPU measured nothing": len(used) != arguments.n or None in used,
        "the fingerprints differ": bool(differences(serial.environment, spread.environment)),
    }
    for problem, is_there in problems.items():
        if is_there:
            print(f"PROBLEM: {problem}")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main())
