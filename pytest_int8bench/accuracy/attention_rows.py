"""Run attention with INT8 queries and keys in selected modules only."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from pytest_int8bench.compiler.fusion.int8_attention import AttentionCoverage, EagerInt8Attention


class SelectiveInt8Attention(EagerInt8Attention):
    """Torch function mode that runs attention in INT8 when a selected module calls it.

    Args:
        model: an eager model.
        chosen: names of the selected modules.
    """

    def __init__(self, model: nn.Module, chosen: Collection[str] = ()) -> None:
        self.coverage = AttentionCoverage()
        super().__init__(self.coverage)
        self._names = {module: name for name, module in model.named_modules()}
        self._chosen = frozenset(chosen)
        self._running = [""]
        self.callers: dict[str, None] = {}
        """Names of the modules that called attention that INT8 supports, in order of first call."""

    def refusal(self, q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> str | None:
        reason = super().refusal(q, k, v, given)
        if reason is not None:
            return reason
        self.callers[self._running[-1]] = None
        return None if self._running[-1] in self._chosen else "outside the selected modules"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the mode and track the running module.

        Use it for eager forwards only: global module hooks would recompile compiled modules.
        """

        def enter(module: nn.Module, args: object) -> None:
            self._running.append(self._names.get(module, self._running[-1]))

        def leave(module: nn.Module, args: object, output: object) -> None:
            self._running.pop()

        before = register_module_forward_pre_hook(enter)
        after = register_module_forward_hook(leave, always_call=True)
        try:
            with self:
                yield
        finally:
            before.remove()
            after.remove()
            self._running = [""]
