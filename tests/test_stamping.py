"""Equal blocks are read once, and whatever could come to another graph is read by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytest_int8bench import stamping
from pytest_int8bench.compilation import CompiledModel, compile_for_a100
from pytest_int8bench.fused.modules import Int8Linear
from pytest_int8bench.quantize import apply_int8_quant

DIM = 16
X = torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(0))
EVERYWHERE = torch.randn(DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Blocks that Dynamo reads, with a torch that reads each, and a backend that is quick."""
    from torch._dynamo.backends.debugging import aot_eager
    from torch._dynamo.variables.higher_order_ops import InvokeSubgraphHigherOrderVariable

    found: list[str] = []
    create = InvokeSubgraphHigherOrderVariable.create_wrapped_node

    def created(self: Any, tx: Any, function: Any, args: Any, *rest: Any, **named: Any) -> Any:
        found.append(args[0].source.name)
        return create(self, tx, function, args, *rest, **named)

    def quick(self: Any, model_: torch.fx.GraphModule, inputs_: Any, **kwargs: Any) -> Any:
        return aot_eager(model_, inputs_)

    monkeypatch.setattr(InvokeSubgraphHigherOrderVariable, "create_wrapped_node", created)
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", quick)
    monkeypatch.setattr(stamping, "LIBRARIES", {*stamping.LIBRARIES, __name__.partition(".")[0]})
    torch.manual_seed(0)
    return found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.act: Any = functools.partial(F.leaky_relu, negative_slope=0.5)
        self.scale = 2.0
        self.register_buffer("shift", torch.randn(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.act(self.mlp(self.norm(x)) + self.shift)


class Blocks(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


def compared(model: nn.Module, *inputs: torch.Tensor) -> CompiledModel:
    """Compile a model, compare its outputs with eager ones, and return it."""
    model.eval().requires_grad_(False)
    inputs = inputs or (X,)
    compiled = compile_for_a100(model, mode="default")
    with torch.inference_mode():
        expected = model(*(x.clone() for x in inputs))
    for _ in range(2):
        torch.testing.assert_close(compiled(*(x.clone() for x in inputs)), expected)
    assert (compiled.regions > 0, compiled.regions_refused) == (True, None)
    return compiled


def test_equal_blocks_are_read_once(reads: list[str]) -> None:
    compiled = compared(Blocks(*(Block() for _ in range(5))))
    assert (compiled.regions, len(reads)) == (5, 1)
    # Weights are no constants.
    compiled.model.load_state_dict({n: t + 1 for n, t in compiled.model.state_dict().items()})
    with torch.inference_mode(), compiled.no_compilation():
        torch.testing.assert_close(compiled(X), compiled.model(X))


def test_quantized_blocks_are_read_once(reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_int8bench.quantize.fused_problem", lambda *_: None)
    model = Blocks(*(Block() for _ in range(3))).eval()
    apply_int8_quant(model, backend="fused", filter_fn=lambda *_: True)
    layer = model.blocks[0].mlp[0]
    assert isinstance(layer, Int8Linear)
    assert (
        repr(layer)
        == "Int8Linear(\n  in_features=16, out_features=16, bias=True\n  (block): Block()\n)"
    )
    compared(model)
    assert len(reads) == 1


class Numbered(Block):
    """Knows which one it is, and may look."""

    def __init__(self, number: int, looks: bool = False) -> None:
        super().__init__()
        self.number, self.looks = number, looks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (self.number if self.looks else 0)


@pytest.mark.parametrize(("looks", "read"), [(False, 1), (True, 4)])
def test_numbers_of_blocks_count_where_they_are_read(
    looks: bool, read: int, reads: list[str]
) -> None:
    compared(Blocks(*(Numbered(number, looks) for number in range(4))))
    assert len(reads) == read


class Last(Block):
    """Asks whether it is the last one."""

    def __init__(self, owner: list[nn.Module]) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self is self.owner[-1] else torch.relu(y)


def test_blocks_that_ask_which_one_they_are_are_each_read(reads: list[str]) -> None:
    owner: list[nn.Module] = []
    owner += [Last(owner) for _ in range(3)]
    compared(Blocks(*owner))
    assert len(reads) == 3


def test_blocks_of_unknown_code_are_each_read(
    reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamping, "LIBRARIES", {"torch"})
    compared(Blocks(*(Block() for _ in range(3))))
    assert len(reads) == 3


class Named(Blocks):
    """Knows a part of its first block by another name."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__(*blocks)
        self.first = blocks[0].norm

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(self.first(x))


def test_parts_that_others_hold_too_make_a_block_its_own_kind(reads: list[str]) -> None:
    compared(Named(*(Block() for _ in range(4))))
    assert len(reads) == 2


def _own(block: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, block.block.shift)


def _from(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, torch.cat([y.flatten(), y.flatten()])[: y.numel()].view(y.shape))


def _from_further(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, torch.cat([y.flatten(), y.flatten()])[1 : y.numel() + 1].view(y.shape))


def _everywhere(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, EVERYWHERE)


class Collecting(Blocks):
    """Has hooks that append to a list which its forward makes, as transformers does."""

    found: Any = None

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        for block in self.blocks:
            block.register_forward_hook(self._collect)

    def _collect(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.found is not None:
            self.found.append(output)

    def forward(self, x: torch.Tensor) -> Any:
        self.found = []
        x = super().forward(x)
        found, self.found = self.found, None
        return x, *found


def test_what_blocks_write_to_something_new_is_not_lost(reads: list[str]) -> None:
    model = Collecting(*(Block() for _ in range(3))).eval().requires_grad_(False)
    compiled = compile_for_a100(model, mode="default")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(X), model(X))


class Noting(Blocks):
    """Writes before its blocks and after them, not in between."""

    noted: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        self.noted = len(x)
        x = super().forward(x)
        self.noted = None
        return x


def test_what_was_written_before_all_blocks_is_the_same_for_all(reads: list[str]) -> None:
    compared(Noting(*(Block() for _ in range(3))))
    assert len(reads) == 1


def test_tensors_without_memory_of_their_own_are_no_matter(reads: list[str]) -> None:
    model = Blocks(*(Block() for _ in range(3)))
    model.register_buffer("sparse", torch.eye(DIM).to_sparse())
    compared(model)
    assert len(reads) == 1


def unlike(change: Callable[[Block], object]) -> Blocks:
    """Return four blocks of which the third is changed."""
    model = Blocks(*(Block() for _ in range(4))).eval().requires_grad_(False)
    change(model.blocks[2])  # type: ignore[arg-type]
    return model


def _hooked(block: Block) -> None:
    block.register_forward_hook(lambda module, args, output: 2 * output)


def _tied(block: Block) -> None:
    block.mlp[2].bias = block.mlp[0].bias


def _strided(block: Block) -> None:
    block.mlp[0].weight = nn.Parameter(block.mlp[0].weight.t().contiguous().t())


CHANGES: dict[str, Callable[[Block], object]] = {
    "a number": lambda block: setattr(block, "scale", 3.0),
    "the type of a number": lambda block: setattr(block, "scale", 2),
    "a function": lambda block: setattr(block, "act", torch.relu),
    "an argument": lambda block: setattr(
        block, "act", functools.partial(F.leaky_relu, negative_slope=0.25)
    ),
    "a hook": _hooked,
    "strides": _strided,
    "a method of its own": lambda block: setattr(block, "act", block.mlp[1].forward),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_differs_is_read_by_itself(change: str, reads: list[str]) -> None:
    compared(unlike(CHANGES[change]))
    assert [name for name in reads if "'2'" in name] == reads[1:]
    assert len(reads) == 2


def test_blocks_with_parameters_that_are_tied_are_another_kind(reads: list[str]) -> None:
    compared(unlike(_tied))  # its structure differs: it is no region
    assert len(reads) == 1
    reads.clear()
    model = Blocks(*(Block() for _ in range(3)))
    for block in model.blocks:
        _tied(block)  # type: ignore[arg-type]
    compared(model)
    assert len(reads) == 1


@pytest.mark.parametrize("tied", [(0, 1), (2, 3)])
def test_blocks_that_are_tied_and_blocks_that_are_not_are_told_apart(
    tied: tuple[int, int], reads: list[str]
) -> None:
    model = Blocks(*(Block() for _ in range(4)))
    for index in tied:
        _tied(model.blocks[index])  # type: ignore[arg-type]
    compared(model)
    assert len(reads) == 2


def test_what_blocks_share_and_what_is_everywhere_stays_what_it_is(reads: list[str]) -> None:
    class Reads(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + EVERYWHERE

    compared(Blocks(*(Reads() for _ in range(3))))
    assert len(reads) == 1
    reads.clear()
    model = Blocks(*(Block() for _ in range(4)))
    for block in model.blocks[2:]:
        block.mlp[0].weight = model.blocks[1].mlp[0].weight  # type: ignore[index]
    compared(model)
    assert len(reads) == 4  # who knows what else holds it


class Counting(Block):
    """Has a side effect."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_blocks_that_write_are_each_read(reads: list[str]) -> None:
    model = Blocks(*(Counting() for _ in range(3))).eval()
    with torch.inference_mode():
        first, second = model(X), model(X)
    for block in model.blocks:
        block.calls = 0  # type: ignore[assignment]
    compiled = compile_for_a100(model, mode="default")
    torch.testing.assert_close(compiled(X), first)
    torch.testing.assert_close(compiled(X), second)
    assert len(set(reads)) == 3


class Rescaled(Blocks):
    """Writes to what its blocks read."""

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
            for other in self.blocks:
                other.scale = 1.5  # type: ignore[assignment]
        return x


def test_blocks_after_something_was_written_are_read(reads: list[str]) -> None:
    model = Rescaled(*(Block() for _ in range(3))).eval()
    compiled = compile_for_a100(model, mode="default")
    got = compiled(X)
    for block in model.blocks:
        block.scale = 2.0  # type: ignore[assignment]
    with torch.inference_mode():
        torch.testing.assert_close(got, model(X))


class Autocast(Blocks):
    """Turns autocast on for some of its blocks."""

    def __init__(self, *blocks: nn.Module, on: tuple[bool, ...]) -> None:
        super().__init__(*blocks)
        self.on = on

    def forward(self, x: torch.Tensor) -> Any:
        for block, on in zip(self.blocks, self.on, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                x = block(x)
        return x.float()


def test_settings_that_all_blocks_run_under_are_no_matter(reads: list[str]) -> None:
    compared(Autocast(*(Block() for _ in range(3)), on=(True, True, True)))
    assert len(reads) == 1


def test_settings_of_the_process_count(reads: list[str]) -> None:
    model = Autocast(*(Block() for _ in range(3)), on=(False, True, False))
    model.eval().requires_grad_(False)
    compiled = compile_for_a100(model, mode="default")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(X), model(X))
    assert compiled.regions_refused == "blocks run under different settings, such as autocast"


class Between(nn.Module):
    """Takes two tensors and an option, and returns two."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(
        self, x: torch.Tensor, y: Any, *, swap: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(y, tuple | list):
            y, (factor, _) = y
            y = factor * y
        a, b = self.block(x), 2 * y
        return (b, a) if swap else (a, b)


class Pairs(Blocks):
    def __init__(self, calls: list[Callable[..., Any]]) -> None:
        super().__init__(*(Between() for _ in calls))
        self.calls = calls

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        for block, call in zip(self.blocks, self.calls, strict=True):
            x, y = call(block, x, y)
        return x, y


def _plain(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, y)


def _swapped(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, y, swap=True)


def _twice_the_same(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, x)


def _half(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x[:1], y[:1])


def _by_name(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(y=x, x=y)


def _in_a_tuple(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, (y, (2.0, x)))


def _other_in_a_tuple(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, (y, (3.0, x)))


def _in_a_list(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, [y, (2.0, x)])


@pytest.mark.parametrize(
    ("calls", "read"),
    [
        ([_plain, _plain, _plain], 1),
        ([_plain, _swapped, _plain, _swapped], 2),
        ([_plain, _twice_the_same, _plain], 2),
        ([_plain, _half, _half], 2),
        ([_plain, _by_name, _by_name], 2),
        ([_own, _own, _plain, _plain], 3),
        ([_everywhere, _everywhere, _plain, _plain], 2),
        ([_from, _from, _from_further, _from_further], 2),
        ([_in_a_tuple, _in_a_tuple, _in_a_list, _in_a_list, _other_in_a_tuple], 4),
    ],
)
def test_arguments_count(calls: list[Callable[..., Any]], read: int, reads: list[str]) -> None:
    compared(Pairs(calls), X, X + 1)
    assert len(reads) == read


def test_another_batch_size_is_compiled_like_the_first() -> None:
    model = Pairs([_plain, _by_name, _by_name]).eval().requires_grad_(False)
    compiled = compile_for_a100(model, mode="default")
    for x in (X, torch.cat([X, X])):
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x, x + 1), model(x, x + 1))


def test_a_block_that_is_called_twice_is_read_once(reads: list[str]) -> None:
    block = Block()
    compared(Blocks(block, Block(), block))
    assert len(reads) == 1


def test_dynamo_reads_each_block_as_before_outside(reads: list[str]) -> None:
    from torch._dynamo.variables.higher_order_ops import InvokeSubgraphHigherOrderVariable

    def raises() -> None:
        with stamping.stamped(set()):
            assert InvokeSubgraphHigherOrderVariable._call_function is not before
            raise ValueError("out of the middle")

    before = InvokeSubgraphHigherOrderVariable._call_function
    with pytest.raises(ValueError, match="out of the middle"):
        raises()
    assert InvokeSubgraphHigherOrderVariable._call_function is before
