"""Access to private state of eager torch: active modes, tensor versions, matmul precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_FP32_DEFAULTS = ("generic", "all"), ("cuda", "all"), ("mkldnn", "all")
_FP32_MATMULS = ("cuda", "matmul"), ("mkldnn", "matmul")


def active_watchers() -> list[str]:
    """Return the names of the profilers and modes, such as a FLOP counter, that observe each
    operator of this thread.

    Torch 2.11 to 2.13 has no public way to list them (torch/_C/_autograd.pyi, torch/overrides.py,
    torch/utils/_python_dispatch.py) or to pause someone else's profiler.
    """
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    # The mode of torch.set_default_device is a setting, not an observer.
    found = [type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)]
    return (["torch.profiler"] if torch._C._autograd._profiler_enabled() else []) + found


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor or a view of it was written to; 0 for inference tensors, which have
    no such counter.

    Autograd's documentation mentions the counter, but torch 2.11 to 2.13 has no public way to read
    it.
    """
    return 0 if tensor.is_inference() else int(tensor._version)


def made_in_inference_mode(tensor: torch.Tensor) -> bool:
    """Return whether a tensor was created in inference mode, so that autograd rejects it.

    Setting ``data``, as ``Module.to`` does, makes ``is_inference()`` false, but does not give the
    tensor a version counter (c10/core/TensorImpl.cpp, ``shallow_copy_from``, torch 2.11 to 2.13).
    """
    if tensor.is_inference():
        return True
    try:
        _ = tensor._version
    except RuntimeError:
        return True
    return False


@contextlib.contextmanager
def float32_matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of FP32 matmuls as ``torch.set_float32_matmul_precision`` does, and restore
    it on exit, whichever of torch's two APIs had set it.

    ``torch.get_float32_matmul_precision`` raises if the user has set a precision through the newer
    API (``torch.backends.cuda.matmul.fp32_precision``), and ``torch.set_float32_matmul_precision``
    turns ``"none"``, which inherits the backend's precision, into ``"ieee"``, which does not. The
    public getters of the newer API return the effective precision, not whether it is inherited, and
    mkldnn's public setter sets the precision of all backends.

    Affects torch 2.11 to 2.13 (``float32MatmulPrecision``, ``float32Precision`` and
    ``setFloat32MatmulPrecision`` in aten/src/ATen/Context.cpp; ``MkldnnModule`` in
    torch/backends/mkldnn/__init__.py). We know of no upstream issue.
    """
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    defaults: dict[tuple[str, str], str] = {}
    matmuls: dict[tuple[str, str], str] = {}
    try:
        for key in _FP32_DEFAULTS:  # the generic one first, because the other two inherit from it
            defaults[key] = get(*key)
            put(*key, "none")
        for key in _FP32_MATMULS:
            matmuls[key] = get(*key)
            put(*key, "ieee")  # compatible with every precision of the older API
        older = torch.get_float32_matmul_precision()
    finally:
        for key, value in (defaults | matmuls).items():
            put(*key, value)
    try:
        torch.set_float32_matmul_precision(precision)
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for key, value in matmuls.items():
            put(*key, value)
