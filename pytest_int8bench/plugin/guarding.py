"""The rule of the hooks: what reports, records or looks at the machine never ends a session.

pytest answers an error in a hook with INTERNALERROR, and later tests never run. A hook that is
``guarded`` turns it into a line at the end of the session, which then fails. Not guarded are hooks
that decide which tests run: a session without those tests would look complete.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar, cast

import pytest

from pytest_int8bench.plugin.recorder import RECORDER, Recorder

Hook = TypeVar("Hook", bound=Callable[..., Any])
#: How a hook ends a session on purpose.
_INTENDED = (pytest.UsageError, pytest.exit.Exception)


def guarded(what: str) -> Callable[[Hook], Hook]:
    """Return a decorator for a hook, also for a wrapper; ``what`` it does stands in the line."""

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
        except BaseException as inner:  # of the hooks inside, to be passed on
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
    """Tell the session's recorder; raise ``error`` where there is none, or where it is no
    Exception."""
    recorder = next(_recorders(arguments), None)
    if recorder is None or not isinstance(error, Exception):
        raise error
    recorder.note_failure(what, error)


def _recorders(arguments: Iterable[Any]) -> Iterator[Recorder]:
    """Yield the recorder of the session that a hook's arguments belong to."""
    for value in arguments:
        if isinstance(value, Recorder):
            yield value
        found = value[0] if isinstance(value, list) and value else value
        config = found if isinstance(found, pytest.Config) else getattr(found, "config", None)
        if isinstance(config, pytest.Config) and RECORDER in config.stash:
            yield config.stash[RECORDER]
