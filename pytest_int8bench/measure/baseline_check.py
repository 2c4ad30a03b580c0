"""Check that a compiled baseline is right. Candidates are compared with its outputs, so a
miscompiled baseline would make every comparison more lenient.

Once per model, a few samples of the batch run in FP32 and eagerly in the model's own dtype. The
compiled outputs must be as close to FP32 as the eager ones (:mod:`.rounding`). If they are not, the
model also runs with noise. A baseline is only called wrong if it fails again with slightly
different weights, where borderline decisions come out differently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_int8bench.attention import FlashSDPA
from pytest_int8bench.environment import machine
from pytest_int8bench.errors import ClearError, first_line
from pytest_int8bench.measure.generators import generator_states, kept_generators, seed_generators
from pytest_int8bench.measure.memory import collect_garbage, oom_of, release
from pytest_int8bench.measure.repeats import kept_buffers
from pytest_int8bench.measure.rounding import (
    HALVES,
    Outputs,
    RoundingNoise,
    WithoutCasts,
    excess,
    outputs_of,
    real,
    where_finite,
)
from pytest_int8bench.quantization.api import is_quantized
from pytest_int8bench.tensors import call, map_tensors, same_values, tensors_of

if TYPE_CHECKING:
    from pytest_int8bench.measure.model import Model

#: How many times further off the compiled outputs may be than eager outputs with noise.
LIMIT = 2.0
#: Forwards with noise, and how often the baseline must fail with other weights.
NOISY, AGAIN = 8, 2
#: Samples that are compared.
SAMPLES = 4
_DICTS = ("_parameters", "_buffers", "_modules")
_UNUSUAL = 0x1E4D  # a seed that no model starts from
_ALONE = 0.1  # fraction of its norm by which a sample's output may change with its batch
_AT_ONCE = 1 << 24  # elements compared at once


class BaselineError(ClearError, AssertionError):
    """The compiled baseline does not compute what the model computes."""


class _UncheckedError(Exception):
    """The baseline cannot be checked, for the reason in the message."""


def check(model: Model) -> None:
    """Check a ready baseline, once, and record on it if it could not be checked.

    Raises:
        BaselineError: one line, on every call, if rounding does not explain its outputs.
    """
    if not model.is_checked:
        _check(model)
        model.is_checked = True
    if model.wrong is not None:
        raise BaselineError(model.wrong)


def _check(model: Model) -> None:
    if model.compiled.mode == "off":
        return
    try:
        if any(map(is_quantized, model.eager.modules())):
            raise _UncheckedError("its layers are already quantized")
        with kept_generators():
            is_explained = _Check(model).is_explained()
    except Exception as error:
        why = str(error) if isinstance(error, _UncheckedError) else _reason(error)
        model.unchecked = f"the compiled baseline could not be checked against eager: {why}"
        release(error)
    else:
        model.wrong = None if is_explained else _message(model)
    collect_garbage(model.device)


def _reason(error: Exception) -> str:
    if oom_of(error):
        return "out of memory"
    return f"{type(error).__name__}: {first_line(error)}"


def _message(model: Model) -> str:
    packages = machine()["packages"]
    used = ["torch", "triton"] if model.device.type == "cuda" else ["torch"]
    versions = " with ".join(f"{name} {packages[name]}" for name in used)
    return (
        f"workload {model.workload.name!r} at {model.params.run_name}: the baseline compiled by "
        f"{versions} is wrong: its outputs differ from eager outputs by more than rounding "
        "explains; try other versions or compile_mode=off"
    )


class _Check:
    """Runs one baseline in several ways, on the same inputs and from the same state."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._count = 0
        self._rows: torch.Tensor | None = None
        """The samples that are compared; None for the whole batch."""

    def is_explained(self) -> bool:
        """Return whether rounding explains the compiled outputs."""
        compiled, eager = self._choose_rows(), self._eager()
        if self._excess([eager], compiled) <= LIMIT or self._is_explained_by_noise(compiled):
            return True
        for seed in range(AGAIN):
            with _other_weights(self._model.eager, seed):
                again = outputs_of(self._cut(self._run_compiled()))
                if self._is_explained_by_noise(again):
                    return True
        return False

    def _is_explained_by_noise(self, compiled: Outputs) -> bool:
        # The first two are equal unless the model is nondeterministic.
        replicates = [self._eager(seed) for seed in (None, None, *range(NOISY))]
        return self._excess(replicates, compiled) <= LIMIT

    def _excess(self, replicates: list[Outputs], compiled: Outputs) -> float:
        reference = self._in_fp32()
        if any(_shapes(outputs) != _shapes(reference) for outputs in (compiled, *replicates)):
            raise _UncheckedError("its outputs differ in shape from those of an eager forward")
        reference = where_finite(reference, replicates[0])
        if not any(bool(tensor.isfinite().any()) for tensor in reference):
            raise _UncheckedError("its eager outputs contain no finite number")
        return excess(reference, replicates, compiled)

    # -- which samples --------------------------------------------------------------------------

    def _choose_rows(self) -> Outputs:
        """Choose the samples that differ most between compiled and eager if samples can run alone,
        and return the compiled outputs for them."""
        compiled = self._run_compiled()
        sizes = {len(t) if t.dim() else 0 for t in tensors_of(compiled)}
        self._count = sizes.pop() if len(sizes) == 1 else 0
        if self._count > SAMPLES:
            whole = None
            try:
                whole = self._run_eager(self._model.fresh_inputs())
            except Exception as error:
                if oom_of(error) is None:
                    raise
                release(error)
            if whole is None:
                self._rows = torch.arange(SAMPLES)
            elif _shapes(whole) == _shapes(compiled):
                self._rows = _most_unlike(list(tensors_of(compiled)), list(tensors_of(whole)))
                if not self._runs_alone(whole):
                    self._rows = None
        return outputs_of(self._cut(compiled))

    def _runs_alone(self, whole: Any) -> bool:
        """Return whether the chosen samples give the same outputs alone as in the batch."""
        try:
            alone = outputs_of(self._run_eager(self._cut(self._model.fresh_inputs())))
        except Exception as error:  # cut something other than a batch
            release(error)
            return False
        return _close(alone, outputs_of(self._cut(whole)))

    def _cut(self, value: Any) -> Any:
        """Return ``value`` with whole-batch tensors cut to the chosen samples."""
        rows, count = self._rows, self._count
        if rows is None:
            return value
        return map_tensors(
            lambda t: t[rows.to(t.device)] if t.dim() and len(t) == count else t, value
        )

    # -- ways to run ----------------------------------------------------------------------------

    def _run_compiled(self) -> Any:
        model = self._model
        with _kept_state(model.eager):
            model.restore()
            return call(model.compiled, model.fresh_inputs())

    def _run_eager(self, inputs: Any, *, autocast: bool = False, attention: str = "") -> Any:
        model = self._model
        with (
            _kept_state(model.eager),
            torch.compiler.set_stance("force_eager"),
            model.compiled.settings(),
            torch.autocast(model.device.type, torch.bfloat16, enabled=autocast),
            FlashSDPA(attention or model.compiled.attention),
        ):
            model.restore()
            return call(model.eager, inputs)

    def _in_fp32(self) -> Outputs:
        """Run the chosen samples in FP32, with any attention backend: on a GPU, flash does not
        support FP32."""
        self._model.restore()
        without_casts = WithoutCasts()  # type: ignore[no-untyped-call]
        with _kept_state(self._model.eager), _cast_to_fp32(self._model.eager), without_casts:
            inputs = map_tensors(_to_fp32, self._cut(self._model.fresh_inputs()))
            return outputs_of(self._run_eager(inputs, attention="auto"))

    def _eager(self, seed: int | None = None) -> Outputs:
        """Run the chosen samples eagerly, with noise if ``seed`` is given. FP32 points use BF16
        matmuls, because no INT8 model is more exact than those."""
        noise = None if seed is None else RoundingNoise(seed)
        seed_generators(_UNUSUAL, self._model.device)
        before = generator_states()
        with noise or contextlib.nullcontext():
            inputs = self._cut(self._model.fresh_inputs())
            outputs = outputs_of(self._run_eager(inputs, autocast=not self._model.params.bf16))
        drew = noise is not None and noise.saw_generator
        if drew or not same_values(before, generator_states()):
            raise _UncheckedError("the model draws random numbers")
        return outputs


# -- the model, as it is and otherwise ------------------------------------------------------------


@contextlib.contextmanager
def _kept_state(model: nn.Module) -> Iterator[None]:
    """Restore buffers and attributes that a forward changes, such as tables cached in the dtype of
    the last run."""
    dicts = [
        values
        for module in model.modules()
        for values in (vars(module), *(vars(module)[name] for name in _DICTS))
    ]
    held = [dict(values) for values in dicts]
    with kept_buffers(model):
        try:
            yield
        finally:
            for values, before in zip(dicts, held, strict=True):
                for key in values.keys() - before.keys():
                    del values[key]
                # Restore only changes: Dynamo's guards notice any write to a dictionary.
                for key, value in before.items():
                    if values.get(key, _DICTS) is not value:
                        values[key] = value


@contextlib.contextmanager
def _cast_to_fp32(model: nn.Module) -> Iterator[None]:
    """Cast parameters and buffers to FP32, then restore their original memory, whose addresses
    compiled code uses."""
    held = [(t, t.data) for t in (*model.parameters(), *model.buffers())]
    try:
        for tensor, data in held:
            tensor.data = _to_fp32(data)
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


@contextlib.contextmanager
def _other_weights(model: nn.Module, seed: int) -> Iterator[None]:
    """Change weights in place by one BF16 unit in the last place, then restore them."""
    held = [
        (parameter, parameter.detach().to("cpu", copy=True))
        for parameter in model.parameters()
        if parameter.dtype in (*HALVES, torch.float32)
    ]
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter, data in held:
            noise = 2 * torch.rand(data.shape, generator=generator) - 1
            moved = data.float() * (1 + torch.finfo(torch.bfloat16).eps * noise)
            parameter.data.copy_(moved)
        yield
    finally:
        for parameter, data in held:
            parameter.data.copy_(data)


def _to_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


# -- samples --------------------------------------------------------------------------------------


def _shapes(output: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_of(output)]


def _most_unlike(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
    """Return the rows that differ most, in the mean or in one element."""
    worst = torch.zeros(len(ours[0]), dtype=torch.double)
    for a, b in zip(ours, theirs, strict=True):
        rows = max(1, _AT_ONCE // max(1, a[0].numel()))
        parts = []
        for mine, other in zip(real(a).split(rows), real(b).split(rows), strict=True):
            differ = mine != other  # the same infinity in both is equal
            size = (mine.float() - other.float()).abs() if mine.is_floating_point() else 1.0
            unlike = torch.where(differ, size, 0.0).flatten(1)
            if unlike.shape[1]:
                unlike = unlike.nan_to_num(nan=1e30, posinf=1e30).clamp(max=1e15).cpu()
                parts.append(torch.stack([unlike.norm(dim=1), unlike.amax(1)]).double())
        if parts:
            sizes = torch.cat(parts, dim=1)
            relative = sizes / sizes.mean(1, keepdim=True).clamp(min=1e-300)
            worst = torch.maximum(worst, relative.amax(0))
    return worst.topk(SAMPLES).indices.sort().values


def _close(alone: Outputs, in_batch: Outputs) -> bool:
    """Return whether outputs are equal up to rounding, which may be large."""
    if _shapes(alone) != _shapes(in_batch):
        return False
    for a, b in zip(alone, in_batch, strict=True):
        if a.is_floating_point():
            both = a.isfinite() & b.isfinite()
            a, b = a[both], b[both]
            if float((a - b).norm()) > _ALONE * float(b.norm()):
                return False
        elif float((a != b).double().mean() if a.numel() else 0) > _ALONE:
            return False
    return True
