"""Simulate the error rates of ``int8bench ab`` and ``int8bench compare``.

    python benchmarks/gate_error_rates.py ab --families 1000
    python benchmarks/gate_error_rates.py compare --families 500

These commands print the tables in docs/gate.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from toys.gate_noise import MACHINES, PROCESSES, simulate_ab, simulate_compare

RUNS = 24
SLOWDOWNS: dict[str, float | list[float]] = {
    "none": 0.0,
    "1 % (the margin), all runs": 0.01,
    "2 %, all runs": 0.02,
    "3 %, all runs": 0.03,
    "5 %, one run of 24": [0.05] + [0.0] * (RUNS - 1),
    "12 %, one run of 24": [0.12] + [0.0] * (RUNS - 1),
}
FILES = ((1, 1), (2, 2), (3, 3), (5, 5), (5, 1), (8, 1))


def _print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def ab(families: int) -> None:
    """Print one line for each machine and slowdown."""
    _print_row(
        "noise between processes", "slowdown", "FAIL, of families", "FAIL, of runs that are slow",
        "PASS, of runs", "INCONCLUSIVE, of runs", "verdict blocks, mean",
    )  # fmt: skip
    _print_row(*["---"] * 7)
    for machine, noise in MACHINES.items():
        for name, slowdowns in SLOWDOWNS.items():
            found = simulate_ab(noise, families=families, runs=RUNS, slowdowns=slowdowns)
            only_first_is_slow = isinstance(slowdowns, list)
            slow = found.outcomes[:, :1] if only_first_is_slow else found.outcomes
            _print_row(
                machine,
                name,
                _percent(found.families_with("FAIL") / families),
                _percent(float((slow == "FAIL").mean())),
                _percent(found.share("PASS")),
                _percent(found.share("INCONCLUSIVE")),
                f"{found.blocks.max(axis=1).mean():.1f}",
            )


def compare(families: int) -> None:
    """Print one line for each noise level and number of files."""
    _print_row(
        "noise between processes", "files, base and new", "unchanged: regressed",
        "unchanged: suspected", "10 % slower: regressed", "suspected",
        "20 % slower: regressed", "suspected",
    )  # fmt: skip
    _print_row(*["---"] * 8)
    for machine, noise in PROCESSES.items():
        for files in FILES:
            cells = []
            for slowdown in (0.0, 0.1, 0.2):
                slowdowns = [slowdown] + [0.0] * (RUNS - 1)
                found = simulate_compare(
                    noise, files=files, families=families, runs=RUNS, slowdowns=slowdowns
                )
                for outcome in ("regressed", "suspected"):
                    hits = found == outcome
                    # Unchanged: any run of the family. Otherwise: the run that is slower.
                    counted = hits.any(axis=1) if slowdown == 0 else hits[:, 0]
                    cells.append(_percent(float(counted.mean())))
            _print_row(machine, f"{files[0]} and {files[1]}", *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("ab", "compare"), help="the command to simulate")
    parser.add_argument(
        "--families", type=int, default=500, help="simulated families of runs (default: 500)"
    )
    arguments = parser.parse_args()
    {"ab": ab, "compare": compare}[arguments.command](arguments.families)


if __name__ == "__main__":
    main()
