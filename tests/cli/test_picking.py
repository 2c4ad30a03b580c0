"""Test that ``compare -k`` evaluates expressions exactly like pytest."""

from __future__ import annotations

import pytest
from _pytest.mark.expression import Expression
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_int8bench.cli.picking import parse_expression

RUN = ("test_a.py::TestBert::test_x[cuda_bf16_max-autotune_bs128]", "hf:bert", "cuda_bf16_bs128")
words = st.sampled_from([*"()", "and", "or", "not", "bert", "W8", "BS128]", "a-b", "test_x[", "$"])


@settings(max_examples=60)
@given(st.lists(words, min_size=1, max_size=7).map(" ".join))
def test_evaluates_expressions_like_pytest(text: str) -> None:
    try:
        expected = Expression.compile(text).evaluate(
            lambda name, **_: any(name.lower() in of_run.lower() for of_run in RUN)
        )
    except Exception:  # the exception type depends on the version
        with pytest.raises(ValueError, match="must be an expression"):
            parse_expression(text)
    else:
        assert parse_expression(text)(RUN) == expected


@pytest.mark.parametrize(
    "text", ["", "bert and", "a(b)", "()", "a, b", "__import__('os')", "(" * 400]
)
def test_rejects_invalid_expressions(text: str) -> None:
    with pytest.raises(ValueError, match="must be an expression such as 'bert and not"):
        parse_expression(text)
