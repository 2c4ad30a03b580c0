"""Processes that tests start and look at."""

from __future__ import annotations

from pathlib import Path


def runs(pid: int) -> bool:
    """Say whether a process runs; one that ended may be waiting for somebody to ask how."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
