"""Select runs with the syntax of pytest's ``-k``.

It is implemented here because pytest's parser is private and only the plugin may import pytest.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection

#: A name, an operator or a parenthesis, as ``-k`` defines them.
_TOKEN = re.compile(r"\s*([\w:+\-.\[\]\\/]+|[()])\s*")
_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.Not),
    *(ast.Subscript, ast.Name, ast.Constant, ast.expr_context),
)
_OPERATORS = ("and", "or", "not", "(", ")")


def parse_expression(text: str) -> Callable[[Collection[str]], bool]:
    """Parse an expression into a predicate on the names of a run.

    A name in the expression matches if it is part of any of the run's names, ignoring case.

    Raises:
        ValueError: if ``text`` is not a valid expression.
    """
    tokens, place = [], 0
    while match := _TOKEN.match(text, place):
        tokens.append(match[1])
        place = match.end()
    names = [token.lower() for token in tokens if token not in _OPERATORS]
    numbers = iter(range(len(names)))
    code = " ".join(t if t in _OPERATORS else f"found[{next(numbers)}]" for t in tokens)
    try:
        if place < len(text):
            raise SyntaxError
        tree = ast.parse(code, "-k", "eval")
        if not all(isinstance(node, _ALLOWED) for node in ast.walk(tree)):  # a(b), ()
            raise SyntaxError
        rule = compile(tree, "-k", "eval")
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(
            f"must be an expression such as 'bert and not (bs1 or bs8)', got {text!r}"
        ) from None

    def is_picked(of_run: Collection[str]) -> bool:
        lowered = [name.lower() for name in of_run]
        found = [any(name in other for other in lowered) for name in names]
        return bool(eval(rule, {"found": found}))

    return is_picked
