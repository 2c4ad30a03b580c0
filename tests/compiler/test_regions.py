"""Test that repeated blocks compile once, and everything else compiles as before."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.compiled_model import CompiledModel
from pytest_int8bench.compiler.regions import Regions, reason_left_out, repeated_blocks
from pytest_int8bench.quantization.api import apply_int8_quant

DIM = 16
X = torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Other(Block):
    pass


class Blocks(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# -- which blocks -------------------------------------------------------------------------------


def test_finds_children_of_one_class_and_structure() -> None:
    a, b, c, alone, wide = Block(), Block(), Block(), Other(), Block(2 * DIM)
    model = Blocks(a, alone, b, wide)
    model.head = nn.Sequential(nn.Linear(4, 4), c)
    assert repeated_blocks(model) == [a, b]  # the same class elsewhere belongs to another list


def test_finds_outermost_blocks_of_a_sequential() -> None:
    def stage() -> nn.Module:
        return nn.Sequential(Block(), Block())

    stages = [stage(), stage()]
    assert repeated_blocks(nn.Sequential(*stages)) == stages
    assert repeated_blocks(nn.Sequential(stages[0], nn.Linear(4, 4))) == list(stages[0])


def test_excludes_layers_that_fuse_with_their_surroundings() -> None:
    assert repeated_blocks(Block()) == []
    assert repeated_blocks(Blocks(nn.Linear(4, 4), nn.Linear(4, 4))) == []


def test_blocks_of_different_dtypes_do_not_repeat() -> None:
    assert repeated_blocks(Blocks(Block(), Block().bfloat16())) == []


def test_block_used_twice_does_not_repeat() -> None:
    block = Block()
    assert repeated_blocks(Blocks(block, block)) == []


def test_excludes_blocks_with_tensor_subclasses() -> None:
    model = Blocks(Block(), Block(), Block(), Block()).eval()
    first, second, *others = model.blocks
    apply_int8_quant(model, filter_fn=lambda m, name: name.startswith(("blocks.2", "blocks.3")))
    assert repeated_blocks(model) == [first, second]
    assert not set(others) & set(repeated_blocks(model))
    kind = type(model.blocks[2].mlp[0].weight).__name__  # type: ignore[index]
    assert (
        reason_left_out(model)
        == f"a block holds tensors of type {kind}, which regions do not support"
    )


def test_excludes_blocks_with_an_instance_forward() -> None:
    blocks = [Block(), Block()]
    for block in blocks:
        block.forward = block.mlp.forward  # type: ignore[method-assign]
    assert repeated_blocks(Blocks(*blocks)) == []
    assert reason_left_out(Blocks(*blocks)) == "a block has a forward set on the instance"
    # A single block does not repeat, and neither does its only eligible neighbour.
    assert reason_left_out(Blocks(blocks[0])) is None
    assert repeated_blocks(Blocks(blocks[0], Block())) == []

    class Marked(Block):
        forward = torch.compiler.nested_compile_region(Block.forward)

    assert repeated_blocks(Blocks(Marked(), Marked())) == []
    assert reason_left_out(Blocks(Marked(), Marked())) is None


# -- the context --------------------------------------------------------------------------------


def test_blocks_are_regions_only_inside_the_context() -> None:
    model = Blocks(Block(), Block(), Other(), Other())
    state = [dict(vars(block)) for block in model.blocks]
    regions = Regions(repeated_blocks(model))
    assert len(regions) == 4
    for _ in range(2):
        with regions:
            forwards = [vars(block)["forward"].__func__ for block in model.blocks]
            assert forwards[0] is forwards[1] is not forwards[2] is forwards[3]
            assert [type(block) for block in model.blocks] == [Block, Block, Other, Other]
            assert torch.equal(model(X), copy.deepcopy(model)(X))
        assert [dict(vars(block)) for block in model.blocks] == state


def test_restores_blocks_after_an_exception() -> None:
    model = Blocks(Block(), Block())
    with pytest.raises(KeyError), Regions(list(model.blocks)):
        raise KeyError
    assert not any("forward" in vars(block) for block in model.blocks)


# -- compiled -----------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Collect Dynamo's graphs with a backend that is faster than Inductor."""
    found: list[torch.fx.GraphModule] = []

    def quick(self: Any, model_: torch.fx.GraphModule, inputs_: Any, **kwargs: Any) -> Any:
        found.append(model_)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(model_, inputs_)

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", quick)
    return found


def calls(graph: torch.fx.GraphModule) -> int:
    """Return the number of regions that a graph calls."""
    return sum("invoke_subgraph" in str(node.target) for node in graph.graph.nodes)


class Shortened(nn.Module):
    """Return a view without the first token, which starts inside the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(X.shape[-1], X.shape[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)[:, 1:]


def test_blocks_returning_views_are_not_regions(graphs: list[torch.fx.GraphModule]) -> None:
    x = torch.randn(2, 6, X.shape[-1])
    compiled = compiled_and_eager(nn.Sequential(*(Shortened() for _ in range(3))), x)
    assert compiled.regions == 0
    assert compiled.regions_refused is not None
    assert "a block returns a view from the middle of a tensor" in compiled.regions_refused
    assert calls(graphs[-1]) == 0


def compiled_and_eager(model: nn.Module, x: torch.Tensor = X, **options: Any) -> CompiledModel:
    """Compile ``model``, compare its outputs with the eager ones, and return it."""
    model.eval().requires_grad_(False)
    expected = model(x.clone())
    compiled = compile_for_a100(model, mode="default", **options)
    for _ in range(2):
        torch.testing.assert_close(compiled(x.clone()), expected)
    torch.testing.assert_close(model(x.clone()), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    return compiled


def test_blocks_are_traced_as_one_region(graphs: list[torch.fx.GraphModule]) -> None:
    compiled = compiled_and_eager(Blocks(*(Block() for _ in range(5))))
    assert (compiled.regions, compiled.regions_refused) == (5, None)
    [graph] = graphs
    assert calls(graph) == 5
    assert len([name for name, _ in graph.named_children() if "subgraph" in name]) == 1


def test_compiles_two_models_that_share_blocks(graphs: list[torch.fx.GraphModule]) -> None:
    blocks = [Block(), Block()]
    one = compiled_and_eager(Blocks(*blocks))
    two = compiled_and_eager(Blocks(*blocks))
    with one.entered(), two.entered(), two.no_compilation():
        for compiled in (one, two, one):
            torch.testing.assert_close(compiled(X), compiled.model(X))
    assert len(graphs) == 2


def test_hooks_and_weights_of_the_model_take_effect(graphs: list[torch.fx.GraphModule]) -> None:
    model = Blocks(Block(), Block())
    model.blocks[1].register_forward_hook(lambda module, args, output: 2 * output)
    compiled = compiled_and_eager(model)
    assert compiled.regions == 2
    model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
    torch.testing.assert_close(compiled(X), model(X))
    assert {name.partition(".")[0] for name in compiled.state_dict()} == {"model"}


class Scaled(Block):
    """Blocks of one structure that differ in a number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(x)


@pytest.mark.parametrize("count", [3, 12])
def test_each_block_keeps_its_own_constants(count: int, graphs: list[torch.fx.GraphModule]) -> None:
    compiled = compiled_and_eager(Blocks(*(Scaled(1 + index / 8) for index in range(count))))
    assert (compiled.regions, compiled.regions_refused) == (count, None)


class Returns(Block):
    """Return the input itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Mutates(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.add_(1))


class Counts(Block):
    """Have a side effect that is visible outside."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.outputs.append(x.sum())
        return super().forward(x)


class Keywords(Blocks):
    """Pass non-tensors to its blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block({"x": x}, scale=2.0, name="a", mask=None)["x"]
        return x


class Keyed(Block):
    def forward(
        self, inputs: dict[str, torch.Tensor], *, scale: float, name: str, mask: None
    ) -> dict[str, torch.Tensor]:
        return {"x": scale * super().forward(inputs["x"])}


@pytest.mark.parametrize(
    "model",
    [Blocks(Mutates(), Mutates()), Blocks(Counts(), Counts()), Keywords(Keyed(), Keyed())],
    ids=["mutation", "side effect", "keywords"],
)
def test_odd_blocks_keep_outputs(model: nn.Module, graphs: list[torch.fx.GraphModule]) -> None:
    compiled = compiled_and_eager(model)
    # Whether they can be regions depends on the version of torch.
    assert (compiled.regions > 0) is (compiled.regions_refused is None)


def test_blocks_returning_inputs_still_compile(graphs: list[torch.fx.GraphModule]) -> None:
    compiled = compiled_and_eager(Blocks(Returns(), Returns(), Block()))
    assert compiled.regions == 0
    assert "alias" in str(compiled.regions_refused)
    assert [calls(graph) for graph in graphs] == [0]


class Breaks(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return super().forward(x)


def test_blocks_with_graph_breaks_compile_as_before(graphs: list[torch.fx.GraphModule]) -> None:
    compiled = compiled_and_eager(Blocks(Breaks(), Breaks()), fullgraph=False)
    assert compiled.regions == 0
    assert compiled.regions_refused == "Call to `torch._dynamo.graph_break()`"
    assert [calls(graph) for graph in graphs] == [0] * len(graphs)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        compile_for_a100(Blocks(Breaks(), Breaks()), mode="default")(X)


def test_inductor_compiles_regions() -> None:
    compiled = compiled_and_eager(Blocks(*(Block() for _ in range(3))))
    assert (compiled.regions, compiled.regions_refused) == (3, None)


def test_uses_no_regions_without_a_compiler() -> None:
    assert compiled_and_eager(Blocks(Block(), Block()), fullgraph=True).mode == "default"
    eager = compile_for_a100(Blocks(Block(), Block()), mode="off")
    eager(X)
    assert (eager.regions, eager.regions_refused) == (0, None)


def test_excludes_linear_subclasses_with_children() -> None:
    class Holding(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = nn.LayerNorm(4)

    assert repeated_blocks(nn.Sequential(Holding(), nn.GELU(), Holding())) == []


class Asking(Block):
    """Query its type in forward, in a method, and in a decorator of each."""

    @staticmethod
    def factor(block: nn.Module) -> int:
        return 2 if type(block) is Asking else 1

    def other(self) -> int:
        return 3 if self.__class__ is Asking else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor(self) * self.other()


def named(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(*args, **kwargs) * len(args[0].__class__.__qualname__)

    return wrapper


class Decorated(Asking):
    forward = named(named(Asking.forward))


class Sealed(type):
    def __new__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
        if any(isinstance(base, Sealed) for base in bases):
            raise TypeError("final")
        return super().__new__(cls, name, bases, names)


class Final(Block, metaclass=Sealed):
    """Forbid subclasses."""


@pytest.mark.parametrize("kind", [Asking, Decorated, Final])
def test_blocks_keep_their_type_inside_regions(
    kind: type[Block], graphs: list[torch.fx.GraphModule]
) -> None:
    compiled = compiled_and_eager(Blocks(*(kind() for _ in range(3))))
    assert (compiled.regions, compiled.regions_refused) == (3, None)
    assert calls(graphs[-1]) == 3


def test_says_why_blocks_are_not_regions(graphs: list[torch.fx.GraphModule]) -> None:
    blocks = [Block(), Block(), Other(), Other()]
    for block in blocks[:2]:
        block.forward = block.mlp.forward  # type: ignore[method-assign]
    compiled = compile_for_a100(Blocks(*blocks).eval(), mode="default")
    compiled(X)
    reason = "a block has a forward set on the instance"
    assert (compiled.regions, compiled.regions_refused) == (2, reason)


# -- inputs -------------------------------------------------------------------------------------


class Strides(nn.Module):
    """A block that records the strides of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor, name: str) -> str:
        self.seen += [x.stride(), mask.stride()]
        return name


def test_copies_transposed_but_not_expanded_inputs() -> None:
    blocks = nn.ModuleList(Strides() for _ in range(2))
    transposed, expanded = torch.zeros(4, 2).t(), torch.zeros(4).expand(2, 4)
    with Regions(list(blocks)):
        for block, x in zip(blocks, (transposed, expanded), strict=True):
            assert block(x, mask=x, name="here") == "here"
    assert blocks[0].seen == [(4, 1), (4, 1)]
    assert blocks[1].seen == [(0, 1), (0, 1)]


class Added(Block):
    """A block that adds its second argument."""

    def forward(self, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + added


class Apart(nn.Module):
    """Blocks that add views of one storage."""

    def __init__(self, *offsets: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Added() for _ in offsets)
        self.offsets = offsets

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        for block, offset in zip(self.blocks, self.offsets, strict=True):
            x = block(x, memory[offset : offset + x.numel()].view(x.shape))
        return x


def compiled_apart(offsets: tuple[int, ...]) -> None:
    model = Apart(*offsets).eval().requires_grad_(False)
    memory = torch.randn(X.numel() + 8)
    compiled = compile_for_a100(model, mode="default")
    for _ in range(2):
        assert torch.allclose(compiled(X, memory), model(X, memory), atol=1e-5)
    told = "blocks are called with inputs of different memory alignment"
    assert (compiled.regions, compiled.regions_refused) in ((len(offsets), None), (0, told))


@pytest.mark.parametrize("offsets", [(0, 8), (1, 0), (0, 1), (0, 8, 2)])
@pytest.mark.slow
def test_keeps_blocks_apart_whose_inputs_differ_in_alignment(offsets: tuple[int, ...]) -> None:
    compiled_apart(offsets)


def test_does_not_run_misaligned_inputs_on_code_for_aligned_ones() -> None:
    compiled_apart((0, 8, 2))


# -- blocks that must stay separate -------------------------------------------------------------


EVERYWHERE = torch.randn(DIM, generator=torch.Generator().manual_seed(1))


class Attributes(Block):
    """A block with a number, a function and a buffer that tests change."""

    def __init__(self) -> None:
        super().__init__()
        self.act: Any = functools.partial(F.leaky_relu, negative_slope=0.5)
        self.scale = 2.0
        self.register_buffer("shift", torch.randn(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.act(self.mlp(self.norm(x)) + self.shift)


def compiled_regions(model: nn.Module, *inputs: torch.Tensor) -> CompiledModel:
    """Compile a model whose blocks are regions, compare its outputs, and return it."""
    model.eval().requires_grad_(False)
    compiled = compile_for_a100(model, mode="default")
    with torch.inference_mode():
        expected = model(*(x.clone() for x in inputs))
    for _ in range(2):
        torch.testing.assert_close(compiled(*(x.clone() for x in inputs)), expected)
    assert (compiled.regions > 0, compiled.regions_refused) == (True, None)
    return compiled


def tie(block: Any) -> None:
    block.mlp[2].bias = block.mlp[0].bias


def transpose(block: Any) -> None:
    block.mlp[0].weight = nn.Parameter(block.mlp[0].weight.t().contiguous().t())


CHANGES: dict[str, Callable[[Any], object]] = {
    "a number": lambda block: setattr(block, "scale", 3.0),
    "the type of a number": lambda block: setattr(block, "scale", 2),
    "a function": lambda block: setattr(block, "act", torch.relu),
    "an argument": lambda block: setattr(
        block, "act", functools.partial(F.leaky_relu, negative_slope=0.25)
    ),
    "a hook": lambda block: block.register_forward_hook(lambda module, args, output: 2 * output),
    "strides": transpose,
    "a method of its own": lambda block: setattr(block, "act", block.mlp[1].forward),
    "tied parameters": tie,
}


@pytest.mark.parametrize("change", CHANGES)
def test_keeps_a_changed_block_apart(change: str, graphs: list[torch.fx.GraphModule]) -> None:
    model = Blocks(*(Attributes() for _ in range(4)))
    CHANGES[change](model.blocks[2])
    compiled_regions(model, X)


@pytest.mark.parametrize("tied", [(0, 1), (2, 3), (0, 1, 2, 3)])
def test_keeps_tied_and_untied_blocks_apart(
    tied: tuple[int, ...], graphs: list[torch.fx.GraphModule]
) -> None:
    model = Blocks(*(Attributes() for _ in range(4)))
    for index in tied:
        tie(model.blocks[index])
    compiled_regions(model, X)


def test_blocks_may_share_weights(graphs: list[torch.fx.GraphModule]) -> None:
    model = Blocks(*(Attributes() for _ in range(4)))
    for block in model.blocks[2:]:
        block.mlp[0].weight = model.blocks[1].mlp[0].weight  # type: ignore[index]
    compiled_regions(model, X)


def test_block_may_run_twice(graphs: list[torch.fx.GraphModule]) -> None:
    block = Block()
    compiled_regions(Blocks(block, Block(), block), X)


def test_model_may_hold_a_sparse_tensor(graphs: list[torch.fx.GraphModule]) -> None:
    model = Blocks(Block(), Block())
    model.register_buffer("sparse", torch.eye(DIM).to_sparse())
    compiled_regions(model, X)


class Last(Block):
    """Check whether it is the last block."""

    def __init__(self, owner: list[nn.Module]) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self is self.owner[-1] else torch.relu(y)


def test_keeps_blocks_apart_that_depend_on_their_position(
    graphs: list[torch.fx.GraphModule],
) -> None:
    owner: list[nn.Module] = []
    owner += [Last(owner) for _ in range(3)]
    compiled_regions(Blocks(*owner), X)


class Collecting(Blocks):
    """Have hooks that append to a list created in forward, as in transformers."""

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


def test_keeps_values_collected_by_hooks(graphs: list[torch.fx.GraphModule]) -> None:
    model = Collecting(*(Block() for _ in range(3))).eval().requires_grad_(False)
    compiled = compile_for_a100(model, mode="default")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(X), model(X))


class Counting(Block):
    """Have a side effect that the block itself reads."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_blocks_may_write_attributes(graphs: list[torch.fx.GraphModule]) -> None:
    model = Blocks(*(Counting() for _ in range(3))).eval()
    with torch.inference_mode():
        first, second = model(X), model(X)
    for block in model.blocks:
        block.calls = 0  # type: ignore[assignment]
    compiled = compile_for_a100(model, mode="default")
    torch.testing.assert_close(compiled(X), first)
    torch.testing.assert_close(compiled(X), second)


class Rescaled(Blocks):
    """Write to attributes that its blocks read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            for other in self.blocks:
                other.scale = 1.5  # type: ignore[assignment]
        return x


def test_model_may_write_attributes_between_blocks(
    graphs: list[torch.fx.GraphModule],
) -> None:
    model = Rescaled(*(Attributes() for _ in range(3))).eval()
    compiled = compile_for_a100(model, mode="default")
    got = compiled(X)
    for block in model.blocks:
        block.scale = 2.0  # type: ignore[assignment]
    with torch.inference_mode():
        torch.testing.assert_close(got, model(X))


# -- settings -----------------------------------------------------------------------------------


class Autocast(Blocks):
    """Enable autocast for some of its blocks."""

    def __init__(self, *blocks: nn.Module, on: tuple[bool, ...]) -> None:
        super().__init__(*blocks)
        self.on = on

    def forward(self, x: torch.Tensor) -> Any:
        for block, on in zip(self.blocks, self.on, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                x = block(x)
        return x.float()


def test_all_blocks_may_run_under_autocast(graphs: list[torch.fx.GraphModule]) -> None:
    compiled_regions(Autocast(*(Block() for _ in range(3)), on=(True, True, True)), X)


@pytest.mark.parametrize("on", [(False, True, False), (True, True, False)])
def test_refuses_blocks_that_run_partly_under_autocast(
    on: tuple[bool, ...], graphs: list[torch.fx.GraphModule]
) -> None:
    model = Autocast(*(Block() for _ in range(3)), on=on)
    model.eval().requires_grad_(False)
    compiled = compile_for_a100(model, mode="default")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(X), model(X))
    assert compiled.regions_refused == "blocks run under different settings, such as autocast"
    assert calls(graphs[-1]) == 0


def test_two_kinds_of_blocks_may_run_under_different_settings(
    graphs: list[torch.fx.GraphModule],
) -> None:
    blocks = (Attributes(), Attributes(), Block(), Block())
    compiled_regions(Autocast(*blocks, on=(True, True, False, False)), X)


class AutocastInside(nn.Module):
    """Run its inner region with or without autocast."""

    def __init__(self, inner: nn.Module, on: bool) -> None:
        super().__init__()
        self.inner, self.on = inner, on

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            return self.inner(x).float()


def test_refuses_inner_regions_that_run_partly_under_autocast(
    graphs: list[torch.fx.GraphModule],
) -> None:
    class Marked(Block):
        forward = torch.compiler.nested_compile_region(Block.forward)

    model = Blocks(*(AutocastInside(Marked(), on) for on in (True, True, False, False)))
    with pytest.raises(Exception, match="blocks run under different settings"):
        compile_for_a100(model.eval().requires_grad_(False), mode="default")(X)
    assert graphs == []


class GradBetween(Blocks):
    """Enable gradients between its blocks, then restore the mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            with torch.enable_grad():
                x = x + 1
        return x


def test_settings_may_change_between_blocks(graphs: list[torch.fx.GraphModule]) -> None:
    compiled_regions(GradBetween(*(Block() for _ in range(3))), X)


class Attention(Blocks):
    """Allow one SDPA backend for some of its blocks."""

    def __init__(self, *blocks: nn.Module, on: tuple[bool, ...]) -> None:
        super().__init__(*blocks)
        self.on = on

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, on in zip(self.blocks, self.on, strict=True):
            if on:
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    x = block(x)
            else:
                x = block(x)
        return x


def test_all_blocks_may_run_on_one_sdpa_backend(graphs: list[torch.fx.GraphModule]) -> None:
    compiled_regions(Attention(*(Block() for _ in range(3)), on=(True, True, True)), X)


def test_refuses_blocks_that_run_partly_on_another_sdpa_backend(
    graphs: list[torch.fx.GraphModule],
) -> None:
    model = Attention(*(Block() for _ in range(3)), on=(True, False, False))
    model.eval().requires_grad_(False)
    compiled = compile_for_a100(model, mode="default")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(X), model(X))
    assert compiled.regions_refused == "blocks run under different settings, such as autocast"
    assert calls(graphs[-1]) == 0


# -- arguments ----------------------------------------------------------------------------------


class Between(nn.Module):
    """Take two tensors and an option, and return two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Attributes()

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


def _own(block: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, block.block.shift)


def _from(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, torch.cat([y.flatten(), y.flatten()])[: y.numel()].view(y.shape))


def _from_further(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, torch.cat([y.flatten(), y.flatten()])[1 : y.numel() + 1].view(y.shape))


def _everywhere(block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return block(x, EVERYWHERE)


@pytest.mark.parametrize(
    "calls",
    [
        [_plain, _plain, _plain],
        [_plain, _swapped, _plain, _swapped],
        [_plain, _twice_the_same, _plain],
        [_plain, _half, _half],
        [_plain, _by_name, _by_name],
        [_own, _own, _plain, _plain],
        [_everywhere, _everywhere, _plain, _plain],
        [_from, _from, _from_further, _from_further],
        [_in_a_tuple, _in_a_tuple, _in_a_list, _in_a_list, _other_in_a_tuple],
    ],
)
def test_keeps_calls_with_other_arguments_apart(
    calls: list[Callable[..., Any]], graphs: list[torch.fx.GraphModule]
) -> None:
    compiled_regions(Pairs(calls), X, X + 1)


def test_compiles_another_batch_size_like_the_first(graphs: list[torch.fx.GraphModule]) -> None:
    model = Pairs([_plain, _by_name, _by_name]).eval().requires_grad_(False)
    compiled = compile_for_a100(model, mode="default")
    for x in (X, torch.cat([X, X])):
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x, x + 1), model(x, x + 1))
