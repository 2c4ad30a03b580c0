"""Pick runs as pytest's ``-k`` picks tests. What pytest does that with is private, and only the
plugin imports pytest."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection

#: What ``-k`` takes for a name, an operator or a parenthesis.
_TOKEN = re.compile(r"\s*([\w:+\-.\[\]\\/]+|[()])\s*")
_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.Not),
    *(ast.Subscript, ast.Name, ast.Constant, ast.expr_context),
)
_OPERATORS = ("and", "or", "not", "(", ")")


def parse_expression(text: str) -> Callable[[Collection[str]], bool]:
    """Return what says whether a run is picked, by its names: part of one, in any case.

    Raises:
        ValueError: naming the rule and the value.
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
