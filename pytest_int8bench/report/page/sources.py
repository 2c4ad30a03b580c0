"""The files that a report is made of, and which of their records count."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pytest_int8bench.results.base import Record
from pytest_int8bench.results.records import Result, Saved
from pytest_int8bench.results.verdicts import Accuracy, Sensitivity

_RecordT = TypeVar("_RecordT", bound=Record)
_COMMIT_DIGITS = 7
# What XML, and so SVG, cannot hold: control characters, such as those of colors in a reason, and
# halves of characters, as in file names that are not UTF-8.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Source:
    """One saved file, or the session that is ending."""

    name: str
    """The file's name, without its folders where that is enough."""
    label: str
    """Short and unique: the commit, or the name."""
    saved: Saved


@dataclass(frozen=True)
class Found(Generic[_RecordT]):
    """A record and where it is from."""

    source: Source
    record: _RecordT

    @property
    def device(self) -> str:
        """Name of the GPU or CPU that it was measured on."""
        return device(self.source.saved.environment)


def sources(named: Sequence[tuple[str, Saved]]) -> tuple[Source, ...]:
    """Return the sources of files, by their paths or another name."""
    names = [clean(Path(name).name or name) for name, _ in named]
    if len(set(names)) < len(names):
        names = [clean(name) for name, _ in named]
    cleaned = [_cleaned(saved) for _, saved in named]
    found: list[Source] = []
    taken: set[str] = set()
    for name, saved in zip(names, cleaned, strict=True):
        start = label = _label(name, saved.environment)
        again = 2
        while label in taken:
            label, again = f"{start} #{again}", again + 1
        taken.add(label)
        found.append(Source(name, label, saved))
    return tuple(found)


def current(
    given: Iterable[Source], records: Callable[[Saved], Sequence[_RecordT]]
) -> list[Found[_RecordT]]:
    """Return each record of the last file that has it. Another device is another record."""
    latest: dict[tuple[Any, ...], Found[_RecordT]] = {}
    for source in given:
        for record in records(source.saved):
            found = Found(source, record)
            key = (found.device, record.run_name, *record.identity)
            latest.pop(key, None)
            latest[key] = found
    return list(latest.values())


def device(environment: dict[str, Any]) -> str:
    """Return the name of the GPU, or of the CPU without one."""
    gpu = environment.get("gpu") or {}
    return str(gpu.get("name") or environment.get("cpu") or "unknown device")


def clean(text: str) -> str:
    """Return ``text`` without what a page or a picture cannot hold."""
    return _UNPRINTABLE.sub("\ufffd", text)


def _cleaned(saved: Saved) -> Saved:
    values = _clean_values(saved.to_dict())
    return Saved(
        values["environment"],
        [Result.from_dict(record) for record in values["results"]],
        [Accuracy.from_dict(record) for record in values["accuracy"]],
        [Sensitivity.from_dict(record) for record in values["sensitivity"]],
    )


def _clean_values(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(str(name)): _clean_values(entry) for name, entry in value.items()}
    return [_clean_values(entry) for entry in value] if isinstance(value, list) else value


def _label(name: str, environment: dict[str, Any]) -> str:
    commit = environment.get("commit")
    if not isinstance(commit, str) or not commit:
        return name
    return commit[:_COMMIT_DIGITS] + ("+" if environment.get("dirty") else "")
