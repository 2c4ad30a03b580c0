"""Compare a sweep on several GPUs under pytest-xdist with the same sweep in one process.

    python benchmarks/check_gpus.py [-n WORKERS] [pytest options]

The script needs as many GPUs as workers (2 by default). Each sweep compiles into its own empty
folders, so that neither reuses compiled code from the other. The script prints wall times, where
each point ran, and how much the batch times and speedups differ. It exits with 1 if the median
difference between batch times is over 3 %, if any difference is over 10 %, if points are missing,
if a GPU measured nothing, or if the fingerprints differ.
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

#: Normal differences between two processes on one GPU, and between two GPUs of the same kind.
MEDIAN_LIMIT, LIMIT = 0.03, 0.10
#: Eight points: four baselines and a candidate for each. CUDA graphs make the GPU the bottleneck,
#: not the host, which the workers share.
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
    """Run the sweep in a new process; return its wall time in seconds and the saved results."""
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
        sys.exit(f"the {name} sweep failed: pytest exited with {code}")
    return seconds, read(saved)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-n", type=int, default=2, help="workers, one per GPU (default: 2)")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        serial_s, serial = sweep(Path(folder), "serial", options)
        parallel_s, parallel = sweep(Path(folder), "parallel", [*options, f"-n{arguments.n}"])
    print(f"\n{describe(parallel.environment)}")
    differing = differences(serial.environment, parallel.environment)
    for name, (before, after) in differing.items():
        print(f"the fingerprints differ in {name}: {before} -> {after}")
    print(f"wall time: serial {serial_s:.0f} s, -n {arguments.n} {parallel_s:.0f} s", end="")
    print(f" ({parallel_s / serial_s:.2f}x)")
    serial_results = {result.nodeid: result for result in serial.results}
    same_order = [*serial_results] == [result.nodeid for result in parallel.results]
    print(f"same tests in the same order: {'yes' if same_order else 'no'}")
    changes: list[float] = []
    used_gpus: set[str | None] = set()
    print(f"{'ms/batch':>10} {'change':>8} {'speedup':>8} {'serial':>8}  worker  gpu  run")
    for result in parallel.results:
        base = serial_results.get(result.nodeid)
        if base is None or base.batch_time_s is None or result.batch_time_s is None:
            print(f"not measured in both sweeps: {result.run_name}: {result.reason}")
            continue
        changes.append(result.batch_time_s / base.batch_time_s - 1)
        worker = result.worker or {}
        used_gpus.add(worker.get("gpu"))
        speedups = [f"{r.speedup:.3f}x" if r.speedup else "-" for r in (result, base)]
        print(f"{result.batch_time_s * 1e3:10.3f} {changes[-1]:+8.2%} {speedups[0]:>8}", end="")
        print(f" {speedups[1]:>8}  {worker.get('id')}  {worker.get('gpu')}  {result.run_name}")
    sizes = [abs(change) for change in changes] or [float("inf")]
    median = statistics.median(sizes)
    print(f"batch times differ by {median:.2%} in the median and by at most {max(sizes):.2%}")
    problems = {
        "batch times differ too much": median > MEDIAN_LIMIT or max(sizes) > LIMIT,
        "points are missing": not same_order or len(changes) < len(serial_results),
        "a GPU measured nothing": len(used_gpus) != arguments.n or None in used_gpus,
        "the fingerprints differ": bool(differing),
    }
    for problem, occurred in problems.items():
        if occurred:
            print(f"PROBLEM: {problem}")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main())
