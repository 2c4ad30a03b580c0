"""Workloads and callables by name: checked when options are read, loaded when a test is set up."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytest_int8bench.workloads import Workload

#: RunParams fields that models of a library do not read.
OLMOEARTH_FIELDS = (
    *("model_size", "model_version", "image_size", "patch_size", "num_timesteps"),
    *("use_s1", "use_s2", "use_landsat"),
)
OLMOEARTH, DIGITS = "olmoearth", "digits"
_LIBRARY = re.compile(r"(?P<library>timm|hf):(?P<name>\S+)")
_REFERENCE = re.compile(r"(?P<module>[A-Za-z_][\w.]*|.+\.py):(?P<name>[A-Za-z_][\w.]*)")


def check_reference(text: str) -> str:
    """Return ``text`` if it looks like ``module:callable`` or ``path.py:callable``.

    Raises:
        ValueError: if it does not.
    """
    if not _REFERENCE.fullmatch(text):
        raise ValueError(f"must be module:callable or path.py:callable, got {text!r}")
    return text


def check_workload_name(text: str) -> str:
    """Return ``text`` if it may name a workload.

    Raises:
        ValueError: if it may not.
    """
    if text in ("timm:", "hf:"):
        raise ValueError(f"must name a model, such as timm:vit_base_patch16_224, got {text!r}")
    known = text in (OLMOEARTH, DIGITS)
    if not known and not (_LIBRARY.fullmatch(text) or _REFERENCE.fullmatch(text)):
        raise ValueError(
            "must be olmoearth, digits, timm:NAME, hf:NAME, module:callable or path.py:callable, "
            f"got {text!r}"
        )
    return text


def check_fields(workload: str, fields: Iterable[str]) -> None:
    """Refuse fields that would label a model without changing it.

    Raises:
        ValueError: for a field of OlmoEarth with digits or a model of timm or transformers.
    """
    for field in fields:
        if field in OLMOEARTH_FIELDS and (workload == DIGITS or _LIBRARY.fullmatch(workload)):
            own = "" if workload == DIGITS else "; its own axes are extra.NAME=VALUE"
            raise ValueError(f"{field} is OlmoEarth's and does nothing for {workload}{own}")


def load_object(reference: str, root: Path) -> Any:
    """Import what ``module:callable`` or ``path.py:callable`` names.

    Args:
        reference: checked by :func:`check_reference`.
        root: folder that relative paths start from.

    Raises:
        ValueError: one line, if there is no such file, module or name.
    """
    match = _REFERENCE.fullmatch(reference)
    assert match is not None, reference
    module_name, name = match["module"], match["name"]
    if module_name.endswith(".py"):
        path = root / module_name
        if not path.is_file():
            raise ValueError(f"{reference}: there is no file {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        target: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(target)
    else:
        try:
            target = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{reference}: {error}") from None
    for part in name.split("."):
        if not hasattr(target, part):
            raise ValueError(f"{reference}: {module_name} has no {name!r}")
        target = getattr(target, part)
    return target


def load_workload(name: str, root: Path, *, eval_data: Path | None = None) -> Workload:
    """Return the workload that ``name`` says.

    Args:
        name: checked by :func:`check_workload_name`.
        root: folder that relative paths start from.
        eval_data: folder of labelled images for OlmoEarth.

    Raises:
        ValueError: one line, if it cannot be had.
    """
    if name == OLMOEARTH:
        try:
            from pytest_int8bench.workloads.olmoearth import olmoearth
        except ImportError as error:
            raise ValueError(_needs(name, "olmoearth", error)) from None
        return olmoearth(eval_data)
    if name == DIGITS:
        try:
            from pytest_int8bench.workloads.digits import digits
        except ImportError as error:
            raise ValueError(_needs(name, "eval", error)) from None
        return digits()
    if match := _LIBRARY.fullmatch(name):
        if match["library"] == "hf":
            try:
                from pytest_int8bench.workloads.huggingface import huggingface
            except ImportError as error:
                raise ValueError(_needs(name, "hf", error)) from None
            return huggingface(match["name"], root)
        try:
            from pytest_int8bench.workloads.timm import timm_model
        except (ImportError, RuntimeError) as error:  # torchvision for another torch
            raise ValueError(_needs(name, "timm", error)) from None
        return timm_model(match["name"])
    target = load_object(name, root)
    workload = target
    if callable(target):
        try:
            workload = target()
        except Exception as error:
            raise ValueError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(workload, Workload):
        raise ValueError(f"{name} must give a pytest_int8bench.Workload, got {workload!r}")
    return workload


def _needs(name: str, extra: str, error: Exception) -> str:
    return f"{name} needs pip install 'pytest-int8bench[{extra}]' ({error})"
