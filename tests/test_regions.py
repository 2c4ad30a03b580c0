"""Repeated blocks compile once, and whatever cannot be a region compiles as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pytest_int8bench import inductor
from pytest_int8bench.compilation import CompiledModel, compile_for_a100
from pytest_int8bench.quantize import apply_int8_quant
from pytest_int8bench.regions import Regions, repeated_blocks

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


def test_children_of_one_class_and_structure_are_blocks() -> None:
    a, b, c, alone, wide = Block(), Block(), Block(), Other(), Block(2 * DIM)
    model = Blocks(a, alone, b, wide)
    model.head = nn.Sequential(nn.Linear(4, 4), c)
    assert repeated_blocks(model) == [a, b]  # the same class elsewhere is another list's


def test_a_sequential_holds_blocks_too_and_the_outer_ones_count() -> None:
    def stage() -> nn.Module:
        return nn.Sequential(Block(), Block())

    stages = [stage(), stage()]
    assert repeated_blocks(nn.Sequential(*stages)) == stages
    assert repeated_blocks(nn.Sequential(stages[0], nn.Linear(4, 4))) == list(stages[0])


def test_parts_that_fuse_with_what_is_around_them_are_no_blocks() -> None:
    assert repeated_blocks(Block()) == []
    assert repeated_blocks(Blocks(nn.Linear(4, 4), nn.Linear(4, 4))) == []


def test_blocks_that_differ_in_dtype_are_not_the_same() -> None:
    assert repeated_blocks(Blocks(Block(), Block().bfloat16())) == []


def test_a_block_that_is_used_twice_is_one_block() -> None:
    block = Block()
    assert repeated_blocks(Blocks(block, block)) == []


def test_blocks_with_tensor_subclasses_are_left_out() -> None:
    model = Blocks(Block(), Block(), Block(), Block()).eval()
    first, second, *others = model.blocks
    apply_int8_quant(model, filter_fn=lambda m, name: name.startswith(("blocks.2", "blocks.3")))
    assert repeated_blocks(model) == [first, second]
    assert not set(others) & set(repeated_blocks(model))


def test_blocks_with_a_forward_of_their_own_are_left_out() -> None:
    blocks = [Block(), Block()]
    for block in blocks:
        block.forward = block.mlp.forward  # type: ignore[method-assign]
    assert repeated_blocks(Blocks(*blocks)) == []

    class Marked(Block):
        forward = torch.compiler.nested_compile_region(Block.forward)

    assert repeated_blocks(Blocks(Marked(), Marked())) == []


# -- the context --------------------------------------------------------------------------------


def test_blocks_are_regions_inside_and_their_own_outside() -> None:
    model = Blocks(Block(), Block(), Other(), Other())
    state = {id(block): dict(vars(block)) for block in model.blocks}
    regions = Regions(repeated_blocks(model))
    assert len(regions) == 4
    for _ in range(2):
        with regions:
            classes = [type(block) for block in model.blocks]
            assert classes[0] is classes[1] is not Block
            assert classes[2] is classes[3] is not Other
            assert [c.__name__ for c in classes] == ["Block", "Block", "Other", "Other"]
            assert {id(block): dict(vars(block)) for block in model.blocks} == state
            assert torch.equal(model(X), copy.deepcopy(model)(X))
        assert [type(block) for block in model.blocks] == [Block, Block, Other, Other]


def test_classes_come_back_after_an_exception() -> None:
    model = Blocks(Block(), Block())
    with pytest.raises(KeyError), Regions(list(model.blocks)):
        raise KeyError
    assert [type(block) for block in model.blocks] == [Block, Block]


def test_a_class_that_allows_no_subclass_is_left_as_it_is() -> None:
    class Sealing(type):
        def __new__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
            if any(isinstance(base, Sealing) for base in bases):
                raise TypeError("final")
            return super().__new__(cls, name, bases, names)

    class Final(Block, metaclass=Sealing):
        pass

    model = Blocks(Final(), Final())
    regions = Regions(repeated_blocks(model))
    assert len(regions) == 0
    with regions:
        assert type(model.blocks[0]) is Final


# -- compiled -----------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that Dynamo hands on, to a backend that is quicker than Inductor."""
    found: list[torch.fx.GraphModule] = []

    def quick(self: Any, model_: torch.fx.GraphModule, inputs_: Any, **kwargs: Any) -> Any:
        found.append(model_)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(model_, inputs_)

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", quick)
    return found


def calls(graph: torch.fx.GraphModule) -> int:
    """Return how many regions a graph calls."""
    return sum("invoke_subgraph" in str(node.target) for node in graph.graph.nodes)


class Shortened(nn.Module):
    """Returns a view from the middle of a tensor: without the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(X.shape[-1], X.shape[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)[:, 1:]


def test_blocks_that_return_a_view_from_the_middle_are_no_regions(
    graphs: list[torch.fx.GraphModule],
) -> None:
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


def test_two_models_that_share_their_blocks(graphs: list[torch.fx.GraphModule]) -> None:
    blocks = [Block(), Block()]
    one = compiled_and_eager(Blocks(*blocks))
    two = compiled_and_eager(Blocks(*blocks))
    with one.entered(), two.entered(), two.no_compilation():
        for compiled in (one, two, one):
            torch.testing.assert_close(compiled(X), compiled.model(X))
    assert len(graphs) == 2


def test_hooks_and_weights_of_the_model_count(graphs: list[torch.fx.GraphModule]) -> None:
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
def test_blocks_that_differ_in_a_number_keep_it(
    count: int, graphs: list[torch.fx.GraphModule]
) -> None:
    compiled = compiled_and_eager(Blocks(*(Scaled(1 + index / 8) for index in range(count))))
    assert (compiled.regions, compiled.regions_refused) == (count, None)


class Returns(Block):
    """Returns what it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Mutates(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.add_(1))


class Counts(Block):
    """Has a side effect that is seen outside."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.outputs.append(x.sum())
        return super().forward(x)


class Keywords(Blocks):
    """Hands its blocks what is no tensor."""

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
    [
        Blocks(Mutates(), Mutates()),
        Blocks(Counts(), Counts()),
        Keywords(Keyed(), Keyed()),
    ],
    ids=["mutation", "side effect", "keywords"],
)
def test_odd_blocks_give_what_they_give_without_regions(
    model: nn.Module, graphs: list[torch.fx.GraphModule]
) -> None:
    compiled = compiled_and_eager(model)
    # Which of them can be regions differs by version of torch.
    assert (compiled.regions > 0) is (compiled.regions_refused is None)


def test_blocks_that_return_what_they_are_given_compile_as_before(
    graphs: list[torch.fx.GraphModule],
) -> None:
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


@pytest.mark.parametrize("as_before", [False, True], ids=["this torch", "torch that keeps nothing"])
def test_what_a_region_writes_to_is_found_out_once(
    as_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if as_before:
        monkeypatch.setattr(inductor, "_torch_keeps_schemas", lambda: False)
        name = "get_functionalize_schema_entry"
        cache = torch._guards.InvokeSubgraphCache
        monkeypatch.setattr(cache, name, lambda self, key: None, raising=False)
    region = torch.ops.higher_order.invoke_subgraph
    traced: list[str] = []
    make = type(region).gen_schema

    def gen_schema(self: Any, subgraph: Any, identifier: str, *operands: Any) -> Any:
        traced.append(identifier)
        return make(self, subgraph, identifier, *operands)

    monkeypatch.setattr(type(region), "gen_schema", gen_schema)
    assert compiled_and_eager(Blocks(*(Block() for _ in range(4)))).regions == 4
    assert len(traced) == 1
    assert "gen_schema" not in vars(region)


def test_regions_of_two_graphs_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_torch_keeps_schemas", lambda: False)
    region = torch.ops.higher_order.invoke_subgraph

    def kept(*operands: torch.Tensor) -> str:
        return str(region.gen_schema(graph, "same", *operands))

    graph = torch.fx.symbolic_trace(lambda x: (x + 1,))
    with inductor._schemas_kept():
        one = kept(X)
        graph = torch.fx.symbolic_trace(lambda x: (x.add_(1),))
        assert kept(X) != one
        with pytest.raises(KeyError), inductor._schemas_kept():
            raise KeyError
        assert kept(X) != one
    assert "gen_schema" not in vars(region)


def test_no_region_without_a_compiler() -> None:
    assert compiled_and_eager(Blocks(Block(), Block()), fullgraph=True).mode == "default"
    eager = compile_for_a100(Blocks(Block(), Block()), mode="off")
    eager(X)
    assert (eager.regions, eager.regions_refused) == (0, None)


def test_classes_made_for_blocks_are_not_announced() -> None:
    registry: list[type] = []

    class Registered(nn.Module):
        def __init_subclass__(cls) -> None:
            registry.append(cls)

    class Block(Registered):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

    with Regions([Block(), Block()]) as regions:
        assert len(regions) == 2
    assert registry == [Block]


def test_linear_layers_are_no_blocks_whatever_they_hold() -> None:
    class Holding(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = nn.LayerNorm(4)

    assert repeated_blocks(nn.Sequential(Holding(), nn.GELU(), Holding())) == []


def test_blocks_that_ask_for_their_type_are_no_regions() -> None:
    class Asking(Block):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * (2 if type(self) is Asking else 1)

    assert repeated_blocks(Blocks(Asking(), Asking())) == []


# -- what enters --------------------------------------------------------------------------------


class Strides(nn.Module):
    """A block that notes how what it is given lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor, name: str) -> str:
        self.seen += [x.stride(), mask.stride()]
        return name


def test_what_is_transposed_enters_a_region_in_order_and_what_is_expanded_as_it_is() -> None:
    blocks = nn.ModuleList(Strides() for _ in range(2))
    transposed, expanded = torch.zeros(4, 2).t(), torch.zeros(4).expand(2, 4)
    with Regions(list(blocks)):
        for block, x in zip(blocks, (transposed, expanded), strict=True):
            assert block(x, mask=x, name="here") == "here"
    assert blocks[0].seen == [(4, 1), (4, 1)]
    assert blocks[1].seen == [(0, 1), (0, 1)]


class Added(Block):
    """A block that is given what it adds."""

    def forward(self, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + added


class Apart(nn.Module):
    """Blocks that add parts of one memory."""

    def __init__(self, *offsets: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Added() for _ in offsets)
        self.offsets = offsets

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        for block, offset in zip(self.blocks, self.offsets, strict=True):
            x = block(x, memory[offset : offset + x.numel()].view(x.shape))
        return x


@pytest.mark.parametrize("offsets", [(0, 8), (1, 0), (0, 1), (0, 8, 2)])
def test_blocks_that_get_memory_at_other_alignments_are_not_one(offsets: tuple[int, ...]) -> None:
    model = Apart(*offsets).eval().requires_grad_(False)
    memory = torch.randn(X.numel() + 8)
    compiled = compile_for_a100(model, mode="default")
    for _ in range(2):
        assert torch.allclose(compiled(X, memory), model(X, memory), atol=1e-5)
    told = "blocks are given memory at addresses of different alignment"
    assert (compiled.regions, compiled.regions_refused) in ((len(offsets), None), (0, told))
