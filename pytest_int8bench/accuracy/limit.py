"""Parse and format the largest drop of a metric that passes."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TEXT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|pp)\s*")

#: No realistic number of samples can resolve a smaller drop.
LEAST = 1e-9


@dataclass(frozen=True)
class Limit:
    """The largest drop of a metric that passes."""

    value: float
    """0.01 for both ``1%`` and ``1pp``."""
    relative: bool
    """Whether ``value`` is a share of the baseline's metric, not an absolute difference."""

    def __post_init__(self) -> None:
        if not isinstance(self.value, int | float) or not LEAST <= self.value <= 1:  # NaN too
            raise ValueError(f"a limit must be at least {LEAST:g} and at most 1, got {self.value}")

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Parse ``1%`` (relative) or ``1pp`` (absolute).

        Raises:
            ValueError: for anything else, and for values outside 1e-7 to 100.
        """
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"must be a percentage such as 1% (relative) or 1pp (absolute), got {text!r}"
            )
        percent = float(match[1])
        if not 0 < percent <= 100:
            raise ValueError(f"must be over 0 and at most 100, got {text!r}")
        if percent / 100 < LEAST:
            raise ValueError(f"must be at least {100 * LEAST:g}, got {text!r}")
        return cls(percent / 100, relative=match[2] == "%")

    def __str__(self) -> str:
        number = f"{100 * self.value:g}"
        if "e" in number:  # parse() does not accept scientific notation
            number = f"{100 * self.value:.20f}".rstrip("0")
        return f"{number}{'%' if self.relative else 'pp'}"
