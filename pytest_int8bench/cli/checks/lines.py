"""Represent the lines that ``int8bench doctor`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Marks of lines: all is well; look at this; fix this before you measure.
OK, WARNING, PROBLEM = "ok", "warning", "problem"
_MARKS = (OK, WARNING, PROBLEM)


@dataclass(frozen=True)
class Line:
    """A finding of a check, with its remedy."""

    mark: str
    text: str
    remedy: str = ""

    @classmethod
    def unknown(cls, what: str, why: str, remedy: str = "") -> Line:
        """Return a warning that ``what`` could not be determined."""
        return cls(WARNING, f"{what}: not known: {why}", remedy)

    def with_findings(self, findings: Sequence[Line]) -> Line:
        """Return this line merged with findings: the worst mark, and all texts and remedies."""
        lines = (self, *findings)
        return Line(
            max((line.mark for line in lines), key=_MARKS.index),
            "; ".join(line.text for line in lines),
            "; ".join(dict.fromkeys(line.remedy for line in lines if line.remedy)),
        )
