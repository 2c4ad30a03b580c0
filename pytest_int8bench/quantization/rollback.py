"""Roll back changes to a model after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore every module's class, attributes, parameters and submodules if the block raises.
    This does not undo in-place writes to tensors."""
    before = [
        (
            module,
            type(module),
            dict(vars(module)),
            {name: dict(table) for name, table in vars(module).items() if isinstance(table, dict)},
        )
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, tables in before:
            object.__setattr__(module, "__class__", kind)
            vars(module).clear()
            vars(module).update(attributes)
            for name, table in tables.items():
                attributes[name].clear()
                attributes[name].update(table)
        raise
