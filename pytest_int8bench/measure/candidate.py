"""Build a candidate's model before quantization: its own layers with exactly the baseline's
weights.

``build`` is called again, with the same seed, and the baseline's tensors are loaded into what it
returns. A copy of the baseline comes second: ``copy.deepcopy`` does not copy functions, so that a
``forward`` or a hook which refers to a layer of the baseline would run that layer, in BF16, under
the candidate's label; and it fails for models that hold a lock or a module object.

Neither way is trusted: an eager forward of the candidate has to leave all other models alone and
to return what the baseline returns.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pytest_int8bench.errors import WorkloadError, first_line
from pytest_int8bench.measure.memory import free_memory, oom_of, release
from pytest_int8bench.tensors import cloned, tensors_of

#: A copy may differ from the baseline by this part of the output's norm: how tensors lie in memory
#: can change the order in which libraries add.
_ROUNDING = 0.03
_OWN_OF_MODULES = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Origin:
    """The source of a candidate."""

    workload: str
    """Name of the workload, for messages."""
    baseline: nn.Module
    build: Callable[[], nn.Module]
    """Build the model again, as the baseline was built."""
    run: Callable[[nn.Module], Any]
    """Run one eager forward, each time on the same values and with the same seeds."""
    built: Collection[nn.Module]
    """Live models. None of them may run in another's forward."""


class DifferentError(Exception):
    """A model cannot replace the baseline. The message completes a sentence that begins "it"."""


def make_candidate(origin: Origin, *, copy_first: bool = False) -> nn.Module:
    """Return a model with the weights of the baseline that shares nothing with it.

    Args:
        origin: what it is made from.
        copy_first: try a copy before building again, which takes longer for large models.

    Raises:
        WorkloadError: if neither way gives such a model.
        torch.OutOfMemoryError: or another error that ``memory.oom_of`` knows.
    """
    ways = {"the model that build returned the second time": _built_again}
    ways["a copy of the baseline"] = _copied
    problems = []
    for name, way in reversed(ways.items()) if copy_first else ways.items():
        try:
            return way(origin)
        except Exception as error:
            if oom_of(error) is not None or isinstance(error, _BaselineError):
                raise
            problems.append(f"{name} cannot be used: {_reason(error)}")
            release(error)
        free_memory()  # the model that cannot be used
    raise WorkloadError(
        f"workload {origin.workload!r}: build must return a new model each time, with the same "
        f"layers but sharing none, so that the candidate can get the baseline's weights; "
        f"{'; '.join(problems)}"
    )


class _BaselineError(WorkloadError):
    """The baseline itself runs layers of another model."""


def _reason(error: Exception) -> str:
    text = first_line(error)
    return text if isinstance(error, DifferentError) else f"{type(error).__name__}: {text}"


# -- the two ways -------------------------------------------------------------------------------


def _built_again(origin: Origin) -> nn.Module:
    model = origin.build()
    _check_apart(model, origin.baseline)
    try:
        _load(model, origin.baseline)
    except DifferentError:
        origin.run(model)  # makes what the baseline made in its own first forward
        _load(model, origin.baseline)
    _check_runs(origin, model, tolerance=0.0)
    return model


def _copied(origin: Origin) -> nn.Module:
    model = copy.deepcopy(origin.baseline)
    _check_apart(model, origin.baseline)
    if shared := _named(origin.baseline).keys() & _named(model).keys():
        raise DifferentError(f"it shares {_named(model)[min(shared)]!r} with the baseline")
    _check_runs(origin, model, tolerance=_ROUNDING)
    return model


def _check_runs(origin: Origin, model: nn.Module, *, tolerance: float) -> None:
    """Run the model and the baseline, and compare what they return.

    Raises:
        DifferentError: if the model runs layers of another one, fails, or returns something else.
        WorkloadError: if the baseline runs layers of another model.
    """
    mine = _observe(origin, model)
    theirs = _observe(origin, origin.baseline)
    if theirs.foreign is not None:
        raise _BaselineError(
            f"workload {origin.workload!r}: build must return models that share nothing, but the "
            f"baseline runs {theirs.foreign!r} of a model that build returned later"
        )
    if mine.foreign is not None:
        raise DifferentError(f"it runs {mine.foreign!r} of another model")
    if mine.out_of_memory or theirs.out_of_memory or theirs.error is not None:
        return  # measuring the models will report the problem
    if mine.error is not None:
        raise DifferentError(f"its forward fails, unlike the baseline's: {mine.error}")
    if not _same(mine.outputs, theirs.outputs, tolerance):
        again = _observe(origin, origin.baseline)
        if _same(theirs.outputs, again.outputs, tolerance):  # else nothing can be compared
            raise DifferentError("its output differs from the baseline's")


# -- weights ------------------------------------------------------------------------------------


def _check_apart(model: nn.Module, baseline: nn.Module) -> None:
    """Raise ``DifferentError`` if the two share a module that holds tensors."""
    own = {id(module) for module in model.modules()}
    for name, module in baseline.named_modules():
        holds = itertools.chain(module.parameters(), module.buffers())
        if id(module) in own and next(holds, None) is not None:
            raise DifferentError(f"it shares {name or type(module).__name__!r} with the baseline")


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _load(model: nn.Module, baseline: nn.Module) -> None:
    """Load every tensor of the baseline's modules, including tensors outside the state dict.

    Raises:
        DifferentError: if the two do not have the same modules and tensors.
    """
    mine, theirs = _modules(model), _modules(baseline)
    if [*mine] != [*theirs]:
        odd = next(iter([*(mine.keys() ^ theirs.keys()), *mine]))
        raise DifferentError(f"its modules differ from the baseline's, for example {odd!r}")
    loaded: dict[int, torch.Tensor] = {}
    with torch.inference_mode():  # a forward may have made some of them
        for name, module in mine.items():
            if _kind(module) != _kind(theirs[name]):
                raise DifferentError(
                    f"its {name!r} is a {_kind(module)}, the baseline's a {_kind(theirs[name])}"
                )
            for of in ("_parameters", "_buffers"):
                _load_tensors(getattr(module, of), getattr(theirs[name], of), name, loaded)
            _load_attributes(vars(module), vars(theirs[name]))


def _kind(module: nn.Module) -> str:
    # By name: build may make classes, as parametrizations of torch do for each module.
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _load_tensors(
    mine: dict[str, Any], theirs: dict[str, Any], module: str, loaded: dict[int, torch.Tensor]
) -> None:
    """Load the parameters or buffers of one module.

    Args:
        mine: changed in place.
        theirs: the baseline's.
        module: name of the module.
        loaded: by the id of each tensor of the baseline, what it was loaded into.
    """
    if mine.keys() != theirs.keys():
        raise DifferentError(f"the tensors of its {module!r} differ from the baseline's")
    for name, source in theirs.items():
        target, dotted = mine[name], f"{module}.{name}".lstrip(".")
        if source is None or target is None:
            if source is not target:
                raise DifferentError(f"{dotted!r} is None in only one of it and the baseline")
            continue
        if _form(source) != _form(target):
            raise DifferentError(f"its {dotted!r} differs in shape, dtype or device")
        if target is source:  # a constant that each build takes from one place
            mine[name] = target = loaded.setdefault(id(source), cloned(source))
        if loaded.setdefault(id(source), target) is not target:
            raise DifferentError(f"its {dotted!r} is not tied like the baseline's")
        _copy(target, source)
    if len({id(loaded[id(t)]) for t in theirs.values() if t is not None}) != len(
        {id(t) for t in theirs.values() if t is not None}
    ):
        raise DifferentError(f"it ties tensors of {module!r} that the baseline does not tie")


def _load_attributes(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Load tensors that a module holds as plain attributes."""
    for name, source in theirs.items():
        target = mine.get(name)
        if name in _OWN_OF_MODULES or target is source:
            continue
        if not isinstance(source, torch.Tensor) or not isinstance(target, torch.Tensor):
            continue
        if _form(source) == _form(target):
            _copy(target, source)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy in place, so that views and other references to the tensor stay valid."""
    if target.layout != torch.strided or not torch.equal(target, source):
        target.copy_(source)


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout)


# -- what a forward runs ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Observed:
    """Record of one forward."""

    outputs: tuple[torch.Tensor, ...] = ()
    foreign: str | None = None
    """A tensor of another model that it used."""
    error: str | None = None
    out_of_memory: bool = False


def _observe(origin: Origin, model: nn.Module) -> _Observed:
    """Run one forward of ``model``, and see what it uses."""
    own = _named(model)
    foreign = {
        key: name
        for other in [*origin.built, origin.baseline]
        if other is not model
        for key, name in _named(other).items()
        if key not in own
    }
    with _Watch(foreign) as watch:
        try:
            outputs = tuple(tensors_of(origin.run(model)))
        except Exception as error:
            text, out_of_memory = _reason(error), oom_of(error) is not None
            release(error)
        else:
            return _Observed(outputs, watch.found)
    if out_of_memory:
        free_memory()
    return _Observed(foreign=watch.found, error=text, out_of_memory=out_of_memory)


class _Watch(TorchFunctionMode):
    """Sees which tensors operators are called with. It leaves the modules alone: a hook would make
    their compiled graphs compile again."""

    def __init__(self, foreign: dict[Any, str]) -> None:
        super().__init__()
        self._foreign = foreign
        self.found: str | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Reading an attribute, such as a dtype, runs nothing; .T and .data give views.
        if self.found is None and getattr(func, "__name__", "") != "__get__":
            for tensor in tensors_of((args, kwargs)):
                for key in _keys(tensor):
                    self.found = self.found or self._foreign.get(key)
        return func(*args, **kwargs)


def _named(model: nn.Module) -> dict[Any, str]:
    """Return the names of the model's tensors by what they can be known by."""
    named: Iterator[tuple[str, torch.Tensor]] = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {key: name for name, tensor in named for key in _keys(tensor)}


def _keys(tensor: torch.Tensor) -> Iterator[tuple[str, int]]:
    """Yield what a tensor can be known by: itself and, for its views, where its numbers are."""
    yield "tensor", id(tensor)
    try:
        address = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass that holds others
        return
    if address:
        yield "storage", address


def _same(
    mine: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], tolerance: float
) -> bool:
    """Return whether two outputs are equal, NaN included, or apart by a part of their norm."""
    forms = [[(t.shape, t.dtype) for t in output] for output in (mine, theirs)]
    return forms[0] == forms[1] and all(
        torch.equal(a, b) or (a.is_floating_point() and _close(a, b, tolerance))
        for a, b in zip(mine, theirs, strict=True)
    )


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    if torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
        return True
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())
