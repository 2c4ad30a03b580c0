"""The lines of ``int8bench doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: What a line says: all is well, look at this, nothing works before this is mended.
OK, WARNING, PROBLEM = "ok", "warning", "problem"
_MARKS = (OK, WARNING, PROBLEM)


@dataclass(frozen=True)
class Line:
    """The finding of one check, with its remedy."""

    mark: str
    text: str
    remedy: str = ""

    @classmethod
    def unknown(cls, what: str, why: str, remedy: str = "") -> Line:
        """Return the line of what cannot be found out."""
        return cls(WARNING, f"{what}: not known: {why}", remedy)

    def with_findings(self, findings: Sequence[Line]) -> Line:
        """Return this line with details: the worst mark, all texts and remedies."""
        lines = (self, *findings)
        return Line(
            max((line.mark for line in lines), key=_MARKS.index),
            "; ".join(line.text for line in lines),
            "; ".join(dict.fromkeys(line.remedy for line in lines if line.remedy)),
        )
