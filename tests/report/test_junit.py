"""JUnit XML as CI servers read it."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.report.junit import STATUSES, Case, to_xml

XML = """\
<?xml version="1.0" encoding="utf-8"?>
<testsuites>
  <testsuite name="the suite" tests="4" failures="1" errors="1" skipped="1">
    <testcase classname="test_a.py::test[x]" name="one" />
    <testcase classname="test_a.py::test[y]" name="two">
      <failure message="regressed: &lt;5% &amp; &quot;more&quot;" />
    </testcase>
    <testcase classname="c" name="three">
      <error message="missing" />
    </testcase>
    <testcase classname="c" name="four">
      <skipped message="new" />
    </testcase>
  </testsuite>
</testsuites>
"""


def test_one_suite_with_its_counts() -> None:
    cases = [
        Case(classname="test_a.py::test[x]", name="one", status="passed", message="same"),
        Case(
            classname="test_a.py::test[y]",
            name="two",
            status="failure",
            message='regressed: <5% & "more"',
        ),
        Case(classname="c", name="three", status="error", message="missing"),
        Case(classname="c", name="four", status="skipped", message="new"),
    ]
    assert to_xml("the suite", cases) == XML


def test_characters_not_allowed_in_xml_are_replaced() -> None:
    case = Case(classname="a\x00b", name="c\x1b[31md", status="error", message="e\ufffff\ud800g☃")
    root = ElementTree.fromstring(to_xml("s", [case]))
    [found] = root.iter("testcase")
    assert found.attrib == {"classname": "a?b", "name": "c?[31md"}
    [error] = root.iter("error")
    assert error.attrib == {"message": "e?f?g☃"}


@given(
    st.lists(
        st.builds(
            Case,
            classname=st.text(max_size=5),
            name=st.text(max_size=5),
            status=st.sampled_from(STATUSES),
            message=st.text(max_size=5),
        ),
        max_size=5,
    )
)
def test_any_text_is_well_formed(cases: list[Case]) -> None:
    text = to_xml("s", cases)
    root = ElementTree.fromstring(text.encode())
    [suite] = root
    assert suite.attrib["tests"] == str(len(cases)) == str(len(suite))
    for status, count in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert suite.attrib[count] == str(sum(case.status == status for case in cases))
        assert len(root.findall(f".//{status}")) == int(suite.attrib[count])
