"""Write JUnit XML for CI servers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from pytest_int8bench.gate.outcomes import PASSES, REGRESSES

STATUSES = ("passed", "failure", "error", "skipped")
# Characters that XML 1.0 does not allow.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test case."""

    classname: str
    name: str
    status: str
    """One of :data:`STATUSES`."""
    message: str = ""


def case_status(exit_code: int, *, is_skipped: bool) -> str:
    """Return the status of a case from its exit code.

    Args:
        exit_code: what the case alone contributes to the exit code of the comparison.
        is_skipped: whether to report a passing case as skipped.
    """
    if exit_code == PASSES:
        return "skipped" if is_skipped else "passed"
    return "failure" if exit_code == REGRESSES else "error"


def to_xml(suite: str, cases: Sequence[Case]) -> str:
    """Return the text of a JUnit file with one test suite."""
    count = {status: sum(case.status == status for case in cases) for status in STATUSES}
    root = ElementTree.Element("testsuites")
    element = ElementTree.SubElement(
        root,
        "testsuite",
        name=suite,
        tests=str(len(cases)),
        failures=str(count["failure"]),
        errors=str(count["error"]),
        skipped=str(count["skipped"]),
    )
    for case in cases:
        entry = ElementTree.SubElement(
            element, "testcase", classname=_clean(case.classname), name=_clean(case.name)
        )
        if case.status != "passed":
            ElementTree.SubElement(entry, case.status, message=_clean(case.message))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
