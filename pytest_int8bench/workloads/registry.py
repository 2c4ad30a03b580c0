"""Find workloads by name: check names when options are read, and load workloads when a test is set
up.

A workload is a row of :data:`WORKLOADS` or an entry point of another distribution::

    [project.entry-points."pytest_int8bench.workloads"]
    my-encoder = "my_package.bench:make"

The pytest plugin imports this module at startup, so it must not import torch or
``importlib.metadata``.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from types import ModuleType

    from pytest_int8bench.params import RunParams
    from pytest_int8bench.workloads.workload import Workload

#: Entry-point group for workloads of other distributions.
GROUP = "pytest_int8bench.workloads"
#: RunParams fields that only OlmoEarth uses.
OLMOEARTH_FIELDS = (
    *("model_size", "model_version", "image_size", "patch_size", "num_timesteps"),
    *("use_s1", "use_s2", "use_landsat"),
)
OLMOEARTH = "olmoearth"
#: The two forms of a reference, for error messages and help.
REFERENCE_FORMS = "module:callable or path.py:callable"
# This is compiled when a name is checked rather than when pytest starts.
_REFERENCE = r"(?P<module>[A-Za-z_][\w.]*|.+\.py):(?P<name>[A-Za-z_][\w.]*)"


class WorkloadRow(NamedTuple):  # created whenever pytest starts; a dataclass takes 1 ms more
    """A workload of this package, or a family of them behind a prefix such as ``timm:``."""

    name: str
    """The name, or the prefix including its colon."""
    help: str
    """Description for the documentation."""
    loader: str
    """``module:callable`` that returns the Workload; its module imports the library."""
    extra: str
    """This package's extra that installs the library."""
    takes: tuple[str, ...] = ()
    """Arguments of the loader: any of ``argument``, ``root`` (the folder that relative paths start
    from), ``eval_data`` and ``trust_remote_code``."""
    argument: str | None = None
    """Pattern for the text after the prefix; None for a plain name."""
    example: str = ""
    """Example argument, for the error message when the argument is missing."""
    is_olmoearth: bool = False
    """Whether it reads OlmoEarth's fields, which then appear in its run names and are set by
    presets. For other workloads, setting them is an error."""

    @property
    def usage(self) -> str:
        """The form in which users write the name, e.g. ``timm:NAME``."""
        return self.name if self.argument is None else f"{self.name}NAME"

    def matches(self, text: str) -> bool:
        """Return whether ``text`` names this workload."""
        return re.fullmatch(re.escape(self.name) + (self.argument or ""), text) is not None

    def load(
        self, name: str, root: Path, eval_data: Path | None, trust_remote_code: bool
    ) -> Workload:
        """Import the loader and return the workload ``name``.

        Raises:
            ValueError: one line, if the library is missing or has no such model.
        """
        module, function = split_reference(self.loader)
        try:
            loader = getattr(importlib.import_module(module), function)
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
            raise ValueError(
                f"{name} needs pip install 'pytest-int8bench[{self.extra}]' ({error})"
            ) from None
        known = {
            "argument": name.removeprefix(self.name),
            "root": root,
            "eval_data": eval_data,
            "trust_remote_code": trust_remote_code,
        }
        workload: Workload = loader(*(known[value] for value in self.takes))
        return workload


WORKLOADS = (
    WorkloadRow(
        OLMOEARTH,
        "OlmoEarth encoders, v1 to v1.3",
        "pytest_int8bench.workloads.olmoearth:olmoearth",
        "olmoearth",
        takes=("eval_data",),
        is_olmoearth=True,
    ),
    WorkloadRow(
        "digits",
        "a small ViT trained on handwritten digits, with its test set",
        "pytest_int8bench.workloads.digits:digits",
        "eval",
    ),
    WorkloadRow(
        "timm:",
        "an image model of timm",
        "pytest_int8bench.workloads.timm:timm_model",
        "timm",
        takes=("argument",),
        argument=r"\S+",
        example="vit_base_patch16_224",
    ),
    WorkloadRow(
        "hf:",
        "an encoder of Hugging Face transformers: a model type, a folder, or a repository of the "
        "hub",
        "pytest_int8bench.workloads.huggingface:huggingface",
        "hf",
        takes=("argument", "root", "trust_remote_code"),
        argument=r"\S+",
        example="bert",
    ),
)


def built_in_names() -> list[str]:
    """Return the names of this package's workloads in the form in which users write them."""
    return [row.usage for row in WORKLOADS]


def is_reference(text: str) -> bool:
    """Return whether ``text`` looks like ``module:callable`` or ``path.py:callable``."""
    return re.fullmatch(_REFERENCE, text) is not None


def check_reference(text: str) -> str:
    """Return ``text`` if it looks like ``module:callable`` or ``path.py:callable``.

    Raises:
        ValueError: if it does not.
    """
    if not is_reference(text):
        raise ValueError(f"must be {REFERENCE_FORMS}, got {text!r}")
    return text


def split_reference(reference: str) -> tuple[str, str]:
    """Split ``reference`` into its module or path and its name."""
    match = re.fullmatch(_REFERENCE, reference)
    assert match is not None, reference
    return match["module"], match["name"]


def load_object(reference: str, root: Path) -> Any:
    """Import the object that ``module:callable`` or ``path.py:callable`` names.

    Args:
        reference: checked by :func:`check_reference`.
        root: folder that relative paths start from.

    Raises:
        ValueError: one line, if the file, module or name does not exist.
    """
    module_name, name = split_reference(reference)
    if module_name.endswith(".py"):
        path = root / module_name
        if not path.is_file():
            raise ValueError(f"{reference}: there is no file {path}")
        target: Any = _load_file(path)
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


def _load_file(path: Path) -> ModuleType:
    """Import a file once per process, under a unique module name, and return the module.

    Dynamo imports the module of a compiled function by name to read its globals.
    """
    import hashlib

    digest = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()
    name = re.sub(r"\W", "_", f"{path.stem}_{digest[:8]}")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def check_workload_name(text: str) -> str:
    """Return ``text`` if it may be the name of a workload.

    Raises:
        ValueError: if it cannot be one, or if several distributions offer that name.
    """
    for row in WORKLOADS:
        if row.argument is not None and text == row.name:
            raise ValueError(f"must name a model, such as {row.name}{row.example}, got {text!r}")
    if _row(text) is not None or is_reference(text) or _entry_point(text) is not None:
        return text
    offered = sorted({point.name for point in _entry_points()})
    names = ", ".join([*built_in_names(), *offered])
    raise ValueError(f"must be {names}, {REFERENCE_FORMS}, got {text!r}")


def check_fields(workload: str, fields: Iterable[str]) -> None:
    """Reject fields that would appear in a result's label without affecting the model.

    Raises:
        ValueError: for a field that the workload ignores.
    """
    row = _row(workload)
    if row is None or row.is_olmoearth:
        return
    for field in fields:
        if field in OLMOEARTH_FIELDS:
            own = "" if row.argument is None else "; its own axes are extra.NAME=VALUE"
            raise ValueError(f"{field} is OlmoEarth's and does nothing for {workload}{own}")


def is_built_in(workload: str) -> bool:
    """Return whether a workload belongs to this package."""
    return _row(workload) is not None


def is_olmoearth(workload: str | None) -> bool:
    """Return whether a workload uses OlmoEarth's fields.

    Args:
        workload: its name; None if a fixture returns it.
    """
    row = None if workload is None else _row(workload)
    return row is not None and row.is_olmoearth


def point_for(params: RunParams, workload: str | None) -> RunParams:
    """Return the point with the run name that suits a workload, and with OlmoEarth's fields reset
    to their defaults if the workload certainly does not read them.

    Args:
        params: the point.
        workload: name of the workload; None if a fixture returns it, which may read any field.
    """
    if is_olmoearth(workload):
        return params.with_short_name(False)
    if workload is not None and _row(workload) is not None:
        default = type(params)()
        params = params.replace(**{name: getattr(default, name) for name in OLMOEARTH_FIELDS})
    return params.with_short_name()


def load_workload(
    name: str, root: Path, *, eval_data: Path | None = None, trust_remote_code: bool = False
) -> Workload:
    """Return the workload ``name``.

    Args:
        name: checked by :func:`check_workload_name`.
        root: folder that relative paths start from.
        eval_data: folder of labelled images for OlmoEarth.
        trust_remote_code: let ``hf:NAME`` run code that comes with a model.

    Raises:
        ValueError: one line, if it cannot be loaded.
    """
    row = _row(name)
    if row is not None:
        return row.load(name, root, eval_data, trust_remote_code)
    if is_reference(name):
        return _workload_from(load_object(name, root), name)
    point = _entry_point(name)
    if point is None:
        raise ValueError(f"no installed distribution offers the workload {name!r} any more")
    label = f"{name} ({point.value} of the distribution {_distribution(point)})"
    try:
        target = point.load()
    except Exception as error:
        raise ValueError(f"{label} cannot be loaded: {type(error).__name__}: {error}") from error
    return _workload_from(target, label)


def _row(name: str) -> WorkloadRow | None:
    return next((row for row in WORKLOADS if row.matches(name)), None)


def _workload_from(target: Any, label: str) -> Workload:
    """Return ``target`` if it is a Workload, else the Workload that calling it returns."""
    from pytest_int8bench.workloads.workload import Workload

    workload = target
    if callable(target):
        try:
            workload = target()
        except Exception as error:
            raise ValueError(f"{label} raised {type(error).__name__}: {error}") from error
    if not isinstance(workload, Workload):
        raise ValueError(f"{label} must give a pytest_int8bench.Workload, got {workload!r}")
    return workload


def _entry_points() -> list[EntryPoint]:
    from importlib.metadata import entry_points  # slow, and only needed for unknown names

    return list(entry_points(group=GROUP))


def _entry_point(name: str) -> EntryPoint | None:
    """Return the entry point ``name``, or None if there is none.

    Raises:
        ValueError: if several distributions have one.
    """
    found = [point for point in _entry_points() if point.name == name]
    if len(found) > 1:
        owners = " and ".join(sorted(_distribution(point) for point in found))
        raise ValueError(f"workload {name} is offered by several distributions: {owners}")
    return found[0] if found else None


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown"
