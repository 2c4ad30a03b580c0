"""Keep errors in our hooks from ending a session prematurely.

pytest reports an error in a hook as INTERNALERROR and runs no further tests. A ``guarded`` hook
adds the error to the terminal summary instead, and the session fails when it ends. Hooks that
decide which tests run are not guarded, because a session that lost tests would look complete.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest

from pytest_int8bench.plugin.state import RECORDER, recorder_of

if TYPE_CHECKING:
    from pytest_int8bench.plugin.recorder import Recorder

Hook = TypeVar("Hook", bound=Callable[..., Any])
#: Exceptions with which a hook ends a session on purpose.
_INTENDED = (pytest.UsageError, pytest.exit.Exception)


def guarded(what: str) -> Callable[[Hook], Hook]:
    """Return a decorator that guards a hook or hook wrapper. Its errors are shown as ``WHAT failed:
    …``."""

    def decorate(hook: Hook) -> Hook:
        guard = _guarded_wrapper if inspect.isgeneratorfunction(hook) else _guarded_call
        made: Any = functools.wraps(hook)(guard(what, hook))
        made.is_guarded = True
        return cast("Hook", made)

    return decorate


def _guarded_call(what: str, hook: Callable[..., Any]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except _INTENDED:
            raise
        except Exception as error:
            _note(what, error, (*args, *kwargs.values()))
            return None

    return call


def _guarded_wrapper(what: str, hook: Callable[..., Generator[None, Any, Any]]) -> Any:
    def wrap(*args: Any, **kwargs: Any) -> Generator[None, Any, Any]:
        values = (*args, *kwargs.values())
        steps = hook(*args, **kwargs)
        try:
            next(steps)
        except _INTENDED:
            raise
        except Exception as error:
            _note(what, error, values)
            return (yield)
        try:
            result = yield
        except BaseException as inner:  # raised by an inner hook: pass it on
            try:
                steps.throw(inner)
            except StopIteration as end:
                return end.value
            except BaseException as error:
                if error is not inner:
                    _note(what, error, values)
            raise
        try:
            steps.send(result)
        except StopIteration as end:
            return end.value
        except _INTENDED:
            raise
        except Exception as error:
            _note(what, error, values)
        return result

    return wrap


def _note(what: str, error: BaseException, arguments: Iterable[Any]) -> None:
    """Report an Exception to the session's recorder. Raise the error if it is of any other kind, or
    if there is no recorder."""
    recorder = next(_recorders(arguments), None)
    if recorder is None or not isinstance(error, Exception):
        raise error
    recorder.note_failure(what, error)


def _recorders(arguments: Iterable[Any]) -> Iterator[Recorder]:
    from pytest_int8bench.plugin.recorder import Recorder

    for value in arguments:
        if isinstance(value, Recorder):
            yield value
        found = value[0] if isinstance(value, list) and value else value
        config = found if isinstance(found, pytest.Config) else getattr(found, "config", None)
        if isinstance(config, pytest.Config) and RECORDER in config.stash:
            yield recorder_of(config)
