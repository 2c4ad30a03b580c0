"""Format the records of quote.py as tables."""

from __future__ import annotations

from typing import Any

from pytest_int8bench.environment import flat

BEST = "bf16-best"
PROXY = "sm80-proxy-"
PROXY_NOTE = (
    f"{PROXY}*: instructions of sm80 on this GPU. Their ratio is an estimate of what an A100 "
    "shows, not a measurement of one."
)
#: Columns of the table of GPUs: variant -> header.
ROW = {
    "bf16-flash": "BF16, flash",
    "bf16-cudnn": "BF16, cuDNN",
    BEST: "bf16-best",
    "fused": "W8A8, cuDNN",
    "fused-best": "W8A8, fastest attention",
    "w8": "W8",
}
_VERSIONS = ("driver", "cuda", "torch", "triton", "torchao", "pytest-int8bench")


def table(records: list[dict[str, Any]], order: list[str]) -> str:
    """Return a Markdown table of times and speedups, with the variants as columns in ``order``."""
    points = _by_point(records)
    names = [name for name in order if any(name in point for point in points.values())]
    lines = _header("point", *names)
    for title, point in points.items():
        cells = []
        for name in names:
            cell, record = _cell(point, name), point.get(name, {})
            if "batch_time_s" in record:
                cell += f", {record['sqnr_db']:.0f} dB, compile {record['compile_s']:.1f} s"
            cells.append(cell)
        lines.append(_row(title, *cells))
    if any(name.startswith(PROXY) for name in names):
        lines += ["", PROXY_NOTE]
    return "\n".join(lines)


def markdown(machine: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """Return rows for the table of GPUs in docs/fused.md, with a header, and a list of errors."""
    lines = []
    for title, point in _by_point(records).items():
        if any("batch_time_s" in point.get(name, {}) for name in ROW):
            cells = (_cell(point, name) for name in ROW)
            lines.append(_row(_gpu(machine), title, *cells, _versions(machine)))
    if lines:
        lines = [*_header("GPU", "point", *ROW.values(), "versions"), *lines]
    else:
        lines = ["no rows: none of the variants in this table was measured"]
    failed = [f"{r['point']}, {r['variant']}: {r['error']}" for r in records if "error" in r]
    return "\n".join([*lines, *([""] if failed else []), *failed])


def _gpu(machine: dict[str, Any]) -> str:
    """Return the name of the GPU with its MIG profile and power limit."""
    known = flat(machine)
    parts = [str(known["gpu"])]
    if known["mig"] not in (None, "off"):
        parts.append(f"MIG {known['mig']}")
    if known["power_limit_w"]:
        parts.append(f"{known['power_limit_w']:.0f} W")
    return ", ".join(parts)


def _versions(machine: dict[str, Any]) -> str:
    known = flat(machine)
    parts = [f"{name} {known[name]}" for name in _VERSIONS if known[name]]
    if known["commit"]:
        parts.append(f"commit {known['commit'][:9]}" + (", changed" if known["dirty"] else ""))
    return ", ".join(parts)


def _by_point(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return point -> variant -> record."""
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        points.setdefault(record["point"], {})[record["variant"]] = record
    return points


def _cell(point: dict[str, dict[str, Any]], name: str) -> str:
    """Return the time of a variant and its speedups over the baselines at the same point."""
    if name not in point:
        return "–"
    if "error" in point[name]:
        return "failed"
    times = {n: record["batch_time_s"] for n, record in point.items() if "error" not in record}
    if name.startswith(PROXY):
        plain, best = [f"{PROXY}bf16"], None
    else:
        plain, best = ["bf16-flash", "bf16-cudnn"], times.get(BEST)
    fastest = min((times[other] for other in plain if other in times), default=None)
    bases = [(fastest, "×" + f" of {plain[0]}" * (len(plain) == 1)), (best, f"× of {BEST}")]
    seconds = times[name]
    ratios = ", ".join(f"{base / seconds:.3g}{unit}" for base, unit in bases if base)
    return f"{seconds * 1e3:.4g} ms" + (f" ({ratios})" if ratios else "")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _header(*names: str) -> list[str]:
    return [_row(*names), "|---" * len(names) + "|"]
