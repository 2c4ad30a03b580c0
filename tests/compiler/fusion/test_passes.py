"""Test joining operators in Dynamo's graphs: what is joined, what is not, and the values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from pytest_int8bench.compiler.backend import FusingInductor
from pytest_int8bench.compiler.fusion import nodes, passes
from pytest_int8bench.kernels import ops
from pytest_int8bench.kernels.linear import Int8Linear
from toys.models import lowered

DIM = 16
X = torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # Fixed values, because one halfway between two levels could round to either.
    torch.manual_seed(0)


@dataclass(frozen=True)
class Part:
    """The contents of one graph after joining."""

    quantize: tuple[str, ...]
    """For each quantization pass: norm or activation, ``+gate``, ``+kept``."""
    linear: tuple[str, ...]
    """For each matmul: number of layers, ``+gamma``, ``+residual``."""
    others: Counter[str]
    """The other calls by name."""


def described(part: fx.GraphModule) -> Part:
    quantize, linear, others = [], [], Counter[str]()
    for node in part.graph.nodes:
        if node.target is torch.ops.int8bench.quantize_rows.default:
            _, norm, activation, gate, _, _, _, _, keep = node.args
            kind = norm if norm != "none" else activation
            quantize.append(kind + "+gate" * (gate is not None) + "+kept" * keep)
        elif node.target is torch.ops.int8bench.linear.default:
            _, _, _, _, _, gamma, residual, _ = node.args
            extras = "+gamma" * (gamma is not None) + "+residual" * (residual is not None)
            parts = next(iter(node.users))
            layers = len(parts.args[1]) if parts.target is torch.split else 1
            linear.append(f"{layers}{extras}")
        elif node.op in ("call_function", "call_method"):
            name = getattr(node.target, "__name__", str(node.target))
            if name not in ("getitem", "_log_api_usage_once"):
                others[name] += 1
    return Part(tuple(quantize), tuple(linear), others)


class Compiled:
    """A model compiled like ``compile_for_a100`` does, but its graphs run without Inductor, so that
    only the joining is tested."""

    def __init__(
        self,
        model: nn.Module,
        monkeypatch: pytest.MonkeyPatch,
        *,
        inductor: bool = False,
        dynamic: bool | None = False,
    ) -> None:
        self.parts: list[Part] = []
        self.graphs = 0
        fuse = passes.fuse

        def noting(module: fx.GraphModule, **options: bool) -> fx.GraphModule:
            joined = fuse(module, **options)
            self.graphs += 1
            self.parts += [
                described(part) for part in module.modules() if isinstance(part, fx.GraphModule)
            ]
            return joined

        monkeypatch.setattr(passes, "fuse", noting)
        real = FusingInductor("default", dynamic)

        def plain(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            return noting(module).forward

        torch._dynamo.reset()
        self.run = torch.compile(
            model, fullgraph=True, backend=real if inductor else plain, dynamic=dynamic
        )

    @property
    def part(self) -> Part:
        """The only graph. Inductor may request it again with numbers in place of symbols."""
        assert len({(part.quantize, part.linear) for part in self.parts}) == 1
        return self.parts[-1]


def close(one: Any, other: Any) -> None:
    ones, others = (t if isinstance(t, tuple) else (t,) for t in (one, other))
    for a, b in zip(ones, others, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-30


Joined = Callable[..., Part]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Joined:
    """Compile a model, compare with running it eagerly, and describe its graph after joining."""

    def joined(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Part:
        inputs = inputs or (X,)
        compiled = Compiled(model, monkeypatch, **options)
        with torch.inference_mode():
            expected = model(*(x.clone() for x in inputs))
            close(compiled.run(*(x.clone() for x in inputs)), expected)
        return compiled.part

    return joined


class Written(nn.Module):
    """A norm and a few layers with the given forward."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(DIM)
        for name in ("norm",):
            nn.init.normal_(getattr(self, name).weight)
            nn.init.normal_(getattr(self, name).bias)
        self.a, self.b, self.c = (nn.Linear(DIM, DIM) for _ in range(3))
        self.gamma = nn.Parameter(torch.randn(DIM))
        for name, part in parts.items():
            setattr(self, name, part)
        self.written = forward

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.written(self, *inputs)


def written(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    return lowered(Written(forward, **parts))


# -- transformers -------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer block with layer scale."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(DIM), norm(DIM)
        self.q, self.k, self.v, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.gamma = nn.Parameter(torch.randn(DIM))
        self.drop = nn.Dropout(0.1)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.drop(self.proj(mixed.transpose(1, 2).flatten(2)))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x)) * self.gamma
        return x + self.mlp(self.norm2(x))


class PostNorm(Block):
    """A post-norm block as in BERT: the norms' outputs are also the residuals."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.attention(x) + x)
        return self.norm2(self.mlp(x) + x)


PRE = (("layer", "none", "layer", "gelu"), ("3", "1+gamma+residual", "1", "1+residual"))


def test_fuses_pre_norm_block(joined: Joined) -> None:
    torch.manual_seed(0)
    part = joined(lowered(Block()))
    assert (part.quantize, part.linear) == PRE
    # Only attention and views are left.
    assert not {"layer_norm", "gelu", "dropout", "add", "mul"} & set(part.others)
    assert part.others["scaled_dot_product_attention"] == 1


def test_fuses_post_norm_blocks_and_keeps_norm_outputs(joined: Joined) -> None:
    torch.manual_seed(0)
    part = joined(lowered(nn.Sequential(PostNorm(), PostNorm())))
    assert part.quantize == (
        *("none", "none", "layer+kept", "gelu"),
        *("layer+kept", "none", "layer+kept", "gelu"),
    )
    assert part.linear == ("3", "1+residual", "1", "1+residual") * 2
    assert part.others["layer_norm"] == 1  # the last one, which no layer reads


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_compiles_a_fused_block(joined: Joined, dynamic: bool) -> None:
    torch.manual_seed(0)
    part = joined(lowered(Block()), inductor=True, dynamic=dynamic)
    assert (part.quantize, part.linear) == PRE


def test_one_graph_serves_several_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = lowered(nn.Sequential(Block(), PostNorm()))
    compiled = Compiled(model, monkeypatch, dynamic=True)
    with torch.inference_mode():
        for batch, tokens in ((2, 5), (3, 5), (7, 4)):
            x = torch.randn(batch, tokens, DIM)
            close(compiled.run(x), model(x))
    assert compiled.graphs == 1
    assert compiled.part.linear[:4] == PRE[1]


@pytest.mark.parametrize("inductor", [False, True])
def test_joins_layers_in_reused_regions(monkeypatch: pytest.MonkeyPatch, inductor: bool) -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = region(block, x)
            return x

    @torch.compiler.nested_compile_region
    def region(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block(x)

    torch.manual_seed(0)
    model = lowered(Regions())
    compiled = Compiled(model, monkeypatch, inductor=inductor)
    with torch.inference_mode():
        close(compiled.run(X), model(X))
    inside = [part for part in compiled.parts if part.linear]
    assert [(part.quantize, part.linear) for part in inside] == [PRE]


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_region_outputs_are_dense(monkeypatch: pytest.MonkeyPatch, inductor: bool) -> None:
    @torch.compiler.nested_compile_region
    def region(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return m.a(x), m.b(x).unflatten(-1, (4, 4)).transpose(-1, -2)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        (q, k), (v, w) = region(m, x), region(m, x + 1)
        return q - k.flatten(2) + v * w.flatten(2)

    model = written(forward)
    compiled = Compiled(model, monkeypatch, inductor=inductor)
    with torch.inference_mode():
        close(compiled.run(X), model(X))
    assert [part.linear for part in compiled.parts if part.linear] == [("2",)]


def _as_strided(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k = m.a(x), m.b(x)
    return torch.as_strided(q, (8, DIM), (DIM, 1)) + k.reshape(-1, DIM)[:8]


def _mutated_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k = m.a(x), m.b(x)
    q.view(-1, 4).mul_(2)
    return q - k


def _sliced_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k = m.a(x), m.b(x)
    return q[:, :].view(-1, 4) - k.reshape(-1, 4)


def _overloaded_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k = m.a(x), m.b(x)
    return torch.ops.aten.view(q, [-1, 4]) - k.view_as(x).reshape(-1, 4)


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "forward",
    [_as_strided, _mutated_view, _sliced_view, _overloaded_view, lambda m, x: (m.a(x), m.b(x))],
)
def test_joined_layers_return_the_same_values_and_strides(
    forward: Any, inductor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = written(forward)
    compiled = Compiled(model, monkeypatch, inductor=inductor)
    with torch.inference_mode():
        found, expected = compiled.run(X), model(X)
    assert compiled.part.linear == ("2",)
    if isinstance(expected, torch.Tensor):
        found, expected = (found,), (expected,)
    for one, other in zip(found, expected, strict=True):
        close(one, other)
        assert one.stride() == other.stride()


def test_scale_written_before_residual_is_kept(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        gamma = x[0, 0] * 1
        scaled = m.a(x) * gamma
        changed = gamma.mul_(3)
        return (scaled + x) + changed

    joined(written(forward))


def test_square_of_an_output_is_not_a_layer_scale(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return y * y

    joined(written(forward), X[0, 0])


def test_joins_layers_called_in_another_order_than_registered(joined: Joined) -> None:
    model = written(lambda m, x: torch.cat([m.c(x), 2 * m.a(x), m.b(x)], -1))
    assert joined(model).linear == ("3",)


def test_only_layers_of_adjacent_rows_are_joined(joined: Joined) -> None:
    # The rows of m.b are in between.
    apart = written(lambda m, x: torch.cat([m.c(x), m.b(2 * x), m.a(x)], -1))
    assert joined(apart).linear == ("1", "1", "1")
    some = written(lambda m, x: torch.cat([m.c(x), m.a(2 * x), m.b(x)], -1))
    assert joined(some).linear == ("2", "1")


def test_layer_called_twice_is_not_joined(joined: Joined) -> None:
    model = written(lambda m, x: torch.cat([m.a(x), m.b(x), m.a(x)], -1))
    assert sorted(joined(model).linear) == ["1", "2"]


def test_reads_rearranged_columns_by_strides() -> None:
    passes = fx.Graph()
    column = passes.placeholder("column")
    heads = passes.call_function(einops.rearrange, (column, "b n (h d) -> b h n d"), {"h": 2})
    passes.call_function(F.scaled_dot_product_attention, (heads, heads, heads))
    assert nodes.views_read_by_strides(column) == [heads]
    passes.call_function(einops.repeat, (column, "b n d -> b n d k"), {"k": 2})
    assert nodes.views_read_by_strides(column) is None


# -- norms --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(DIM, eps=0.1),
        nn.LayerNorm(DIM, bias=False),
        nn.LayerNorm(DIM, elementwise_affine=False),
        nn.RMSNorm(DIM),
        nn.RMSNorm(DIM, eps=0.1),
        nn.RMSNorm(DIM, elementwise_affine=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_fuses_norms(joined: Joined, norm: nn.Module, scale: float) -> None:
    part = joined(written(lambda m, x: m.a(m.other(x * scale)), other=norm))
    assert part.quantize == ("rms" if isinstance(norm, nn.RMSNorm) else "layer",)
    assert part.others == {"mul": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_eps_in_16_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = written(lambda m, x: m.a(m.other(x)), other=nn.RMSNorm(DIM)).to(dtype)
    compiled = Compiled(model, monkeypatch)
    with torch.inference_mode():
        x = (X * 1e-3).to(dtype)
        out, expected = compiled.run(x).float(), model(x).float()
    assert compiled.part.quantize == ("rms",)
    # The result of torch's norm is rounded to 16 bits before it is rounded to INT8.
    assert (out - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: F.layer_norm(x, (DIM,)),
        lambda m, x: F.layer_norm(x, normalized_shape=(DIM,), weight=m.gamma),
        lambda m, x: F.layer_norm(input=x, normalized_shape=[DIM], bias=m.gamma, eps=0.5),
        lambda m, x: F.layer_norm(x, (DIM,), m.gamma, m.gamma, 0.5),
        lambda m, x: F.rms_norm(input=x, normalized_shape=(DIM,), eps=0.5),
        lambda m, x: F.rms_norm(x, (DIM,), m.gamma),
        lambda m, x: torch.rms_norm(x, (DIM,), m.gamma),
        lambda m, x: torch.layer_norm(x, (DIM,)),
    ],
)
def test_fuses_norms_called_with_keywords(joined: Joined, call: Any) -> None:
    joined(written(lambda m, x: m.a(call(m, x))))


def test_keeps_norm_over_two_dimensions(joined: Joined) -> None:
    part = joined(written(lambda m, x: m.a(F.layer_norm(x, (5, DIM)))))
    assert (part.quantize, part.others) == (("none",), {"layer_norm": 1})


def test_keeps_norm_output_that_a_floating_point_layer_reads(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        return m.a(y) + m.b(y)

    part = joined(lowered(Written(forward), keep=("b",)))
    assert (part.quantize, part.linear) == (("layer+kept",), ("1+residual",))
    assert part.others == {"linear": 1}


def test_keeps_norm_that_is_read_before_the_layer(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        z = y.exp()
        return m.a(y) + z

    part = joined(written(forward))
    assert (part.quantize, part.linear) == (("none",), ("1+residual",))
    assert part.others == {"layer_norm": 1, "exp": 1}


def test_layers_of_one_norm_with_different_factors(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        return torch.cat([m.a(y), m.b(y), m.c(y)], -1)

    factors = {"a": torch.rand(DIM) + 0.5, "b": torch.rand(DIM) + 0.5}
    part = joined(lowered(Written(forward), factors=factors))
    assert (part.quantize, part.linear) == (("layer+kept", "none", "none"), ("1", "1", "1"))


def test_layers_of_one_norm_with_one_factor(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        return torch.cat([m.a(y), m.b(y), m.c(y)], -1)

    factors = dict.fromkeys("abc", torch.rand(DIM) + 0.5)
    part = joined(lowered(Written(forward), factors=factors))
    assert (part.quantize, part.linear) == (("layer",), ("3",))


# -- activations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (F.gelu, "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (lambda x: F.gelu(input=x, approximate="none"), "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (nn.SiLU(), "silu"),
        (lambda x: F.silu(input=x), "silu"),
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (lambda x: torch.relu(input=x), "relu"),
        (nn.ReLU(), "relu"),
        (lambda x: F.silu(x) * (2 * x), "silu+gate"),
        (lambda x: torch.mul(2 * x, F.gelu(x)), "gelu+gate"),
        (lambda x: F.relu(x) * F.relu(-x + 1), "relu+gate"),
    ],
)
def test_fuses_activations(joined: Joined, call: Any, name: str) -> None:
    part = joined(written(lambda m, x: m.b(call(m.a(x)))))
    assert part.quantize == ("none", name)
    assert not {"gelu", "silu"} & set(part.others)


def test_fuses_gated_mlp(joined: Joined) -> None:
    part = joined(written(lambda m, x: m.c(F.silu(m.a(m.norm(x))) * m.b(m.norm(x)))))
    assert "silu+gate" in part.quantize
    model = written(lambda m, x: (lambda y: m.c(F.silu(m.a(y)) * m.b(y)))(m.norm(x)))
    part = joined(model)
    assert (part.quantize, part.linear) == (("layer", "silu+gate"), ("2", "1"))
    assert part.others == {"split": 1}


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.silu(x) * x[..., :1],  # broadcast
        lambda x: F.silu(x) * 2.0,
        lambda x: torch.mul(F.silu(x), other=x),
        lambda x: (lambda y: y * y)(F.silu(x)),
        lambda x: (lambda y: y * x + y)(F.silu(x)),
        F.elu,
        torch.sigmoid,
    ],
)
def test_keeps_other_activations(joined: Joined, call: Any) -> None:
    part = joined(written(lambda m, x: m.b(call(m.a(x)))))
    assert part.quantize == ("none", "none")


def test_keeps_activation_that_is_read_twice(joined: Joined) -> None:
    part = joined(written(lambda m, x: (lambda y: m.b(y) + y)(F.gelu(m.a(x)))))
    assert (part.quantize, part.linear) == (("none", "none"), ("1", "1+residual"))
    assert part.others == {"gelu": 1}


def test_joins_layers_that_share_an_activation(joined: Joined) -> None:
    model = written(lambda m, x: (lambda y: m.b(y) - m.c(y))(F.gelu(m.a(x))))
    part = joined(model)
    assert (part.quantize, part.linear) == (("none", "gelu"), ("1", "2"))


# -- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "left"),
    [
        (lambda m, x: F.dropout(x, 0.5, False), {}),
        (lambda m, x: F.dropout(input=x, p=0.0), {}),
        (lambda m, x: F.dropout(x, training=False, inplace=True), {}),
        (lambda m, x: nn.Dropout(0.3).eval()(x), {}),
        (lambda m, x: F.dropout(x, 1.0), {"dropout": 1, "layer_norm": 1}),
    ],
)
def test_removes_dropout_without_effect(joined: Joined, call: Any, left: dict[str, int]) -> None:
    part = joined(written(lambda m, x: m.a(call(m, m.norm(x)))))
    assert part.others == left


# -- writes to tensors --------------------------------------------------------------------------


def _between(write: Callable[[torch.Tensor], Any]) -> Callable[..., torch.Tensor]:
    """Compute a norm of x, then write to x, then call the layer."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        y = m.norm(x)
        write(x)
        return m.a(y) + x.sum()

    return forward


def _add(x: torch.Tensor) -> None:
    x += 1


def _set(x: torch.Tensor) -> None:
    x[0] = 0


def _power(x: torch.Tensor) -> None:
    x **= 2


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x.view(-1).mul_(2),
        lambda x: nn.ReLU(inplace=True)(x),
        lambda x: F.elu(x, 1.0, True),
        lambda x: nn.LeakyReLU(0.3, inplace=True)(x),
        lambda x: F.relu_(x),
        lambda x: torch.relu_(x),
        lambda x: torch.exp(x, out=x),
        lambda x: torch.ops.aten.add_.Tensor(x, x),
        _add,
        _set,
        _power,
    ],
)
def test_write_after_norm_blocks_fusion(joined: Joined, write: Any) -> None:
    part = joined(written(_between(write)))
    assert part.quantize == ("none",)
    assert part.others["layer_norm"] == 1


@pytest.mark.parametrize("write", [lambda x: x.add_(1), nn.ReLU(inplace=True), _add, _set])
def test_keeps_unread_writes(joined: Joined, write: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        write(x)
        return m.a(m.norm(x)) + x

    part = joined(written(forward))
    assert (part.quantize, part.linear) == (("layer",), ("1+residual",))


def test_write_before_gate_blocks_fusion(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y, gate = m.a(x), m.b(x) * 1
        z = F.silu(y)
        y.add_(1)
        return m.c(z * gate) + y

    part = joined(written(forward))
    assert part.quantize == ("none", "none")
    assert part.others["silu"] == 1


def test_write_between_layers_of_one_input_blocks_join(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        one = m.a(x)
        x.add_(1)
        return one - m.b(x)

    part = joined(written(forward))
    assert (part.quantize, part.linear) == (("none", "none"), ("1", "1"))


def test_keeps_in_place_activation(joined: Joined) -> None:
    model = written(lambda m, x: (lambda y: m.b(nn.ReLU(inplace=True)(y)) + y)(m.a(x)))
    part = joined(model)
    assert part.quantize == ("none", "none")
    assert part.others == {"relu": 1}


def test_parts_of_a_joined_matmul_may_be_written_to(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.a(x), m.b(x), m.c(x)
        q *= 2
        k.add_(q)
        return q * 3 + k - v

    for inductor in (False, True):
        assert joined(written(forward), inductor=inductor).linear == ("3",)


def test_parts_of_a_joined_matmul_may_be_viewed(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k = m.a(x), m.b(x)
        return q.view(-1) + k.view(x.shape[0] * 5, DIM).reshape(-1) + m.c(x).view(3, -1).flatten()

    for inductor in (False, True):
        assert joined(written(forward), inductor=inductor).linear == ("3",)


# -- layer scale and residual -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "linear"),
    [
        (lambda m, x: x + m.a(x), "1+residual"),
        (lambda m, x: torch.add(m.a(x), x), "1+residual"),
        (lambda m, x: m.gamma * m.a(x), "1+gamma"),
        (lambda m, x: torch.mul(m.a(x), m.gamma) + x, "1+gamma+residual"),
        (lambda m, x: m.a(x) + m.gamma, "1"),  # broadcast
        (lambda m, x: m.a(x) + x[:1], "1"),
        (lambda m, x: m.a(x[:1]) + x, "1"),
        (lambda m, x: m.a(x) + 1, "1"),
        (lambda m, x: m.a(x) * x, "1"),
        (lambda m, x: m.a(x) * 2, "1"),
        (lambda m, x: m.a(x) * m.gamma[:1], "1"),
        (lambda m, x: torch.add(m.a(x), x, alpha=2), "1"),
        (lambda m, x: torch.add(m.a(x), other=x), "1"),
        (lambda m, x: x - m.a(x), "1"),
        (lambda m, x: (lambda y: y + y)(m.a(x)), "1"),
        (lambda m, x: (lambda y: y * y)(m.a(x)), "1"),
        (lambda m, x: (lambda y: (y + x) * y)(m.a(x)), "1"),
        (lambda m, x: m.a(x) + x.double(), "1"),
        (lambda m, x: m.a(x) * m.gamma.double(), "1"),
        (lambda m, x: m.a(x) + x.half(), "1"),
    ],
)
def test_fuses_layer_scale_and_residual(joined: Joined, call: Any, linear: str) -> None:
    part = joined(written(call))
    assert part.linear == (linear,)
    assert (sum(part.others.values()) == 0) == (linear != "1")


def test_fuses_output_of_one_layer_as_residual_of_another(joined: Joined) -> None:
    part = joined(written(lambda m, x: m.a(x) + m.b(x.exp())))
    assert sorted(part.linear) == ["1", "1+residual"]
    assert part.others == {"exp": 1}


def test_residual_written_later_blocks_fusion(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        y = m.a(x)
        x.add_(1)
        return y + x

    assert joined(written(forward)).linear == ("1",)


@pytest.mark.parametrize("name", ["bias", "scale"])
@pytest.mark.parametrize(
    "use", [lambda m, x, y: y * m.gamma, lambda m, x, y: y + x], ids=["scale", "residual"]
)
def test_later_write_to_parameters_does_not_change_the_output(
    name: str, use: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        getattr(m.a.block, name).mul_(1.5)
        return use(m, x, y)

    model = written(forward)
    held = getattr(model.get_submodule("a").block, name)
    before = held.clone()
    compiled = Compiled(model, monkeypatch)
    with torch.inference_mode():
        out = compiled.run(X)
        held.copy_(before)
        close(out, model(X))


def test_scale_written_between_layers_blocks_join(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, scale, _ = ops.quantize_rows(x)

        def product(layer: Any) -> torch.Tensor:
            rest = (layer.weight_scale, layer.bias, None, None, x.dtype)
            return ops.linear(q, scale, layer.int8_weight, *rest)

        one = product(m.a)
        scale.mul_(2)
        return one - product(m.b)

    assert joined(written(forward)).linear == ("1", "1")


def test_does_not_join_layers_of_different_rows(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, scale, _ = ops.quantize_rows(x)

        def product(weight: Any, scales: Any, bias: Any) -> torch.Tensor:
            tensors = weight.int8_weight, scales.weight_scale, bias.bias
            return ops.linear(q, scale, *tensors, None, None, x.dtype)

        return product(m.a, m.b, m.c) - product(m.b, m.a, m.a)

    assert joined(written(forward)).linear == ("1", "1")


@pytest.mark.parametrize(
    "cast",
    [
        lambda y: y.float(),
        lambda y: y.to(torch.float32),
        lambda y: y.to(y.dtype),
        lambda y: y.type_as(y),
    ],
)
def test_ignores_casts_to_the_same_dtype(
    cast: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cast(m.a(x)).view(-1), cast(m.b(x))

    model = written(forward)
    compiled = Compiled(model, monkeypatch)
    with torch.inference_mode():
        outs, wanted = compiled.run(X), model(X)
    close(outs, wanted)
    assert [out.stride() for out in outs] == [out.stride() for out in wanted]
    assert compiled.part.linear == ("2",)


# -- inputs -------------------------------------------------------------------------------------


def test_does_not_join_layers_of_different_inputs(joined: Joined) -> None:
    part = joined(written(lambda m, x, y: m.a(x) - m.b(y)), X, X + 1)
    assert (part.quantize, part.linear) == (("none", "none"), ("1", "1"))


def test_does_not_join_layers_of_different_dtypes(joined: Joined) -> None:
    part = joined(written(lambda m, x: m.a(x) - m.b(x.double())))
    assert part.linear == ("1", "1")


def test_layer_called_twice_on_one_input(joined: Joined) -> None:
    part = joined(written(lambda m, x: m.a(x).exp() - m.a(x)))
    assert part.quantize == ("none",)


def test_weight_made_between_layers_blocks_join(joined: Joined) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, scale, _ = ops.quantize_rows(x)

        def product(weight: torch.Tensor, layer: Any) -> torch.Tensor:
            rest = (layer.weight_scale, layer.bias, None, None, x.dtype)
            return ops.linear(q, scale, weight, *rest)

        one = product(m.a.int8_weight, m.a)
        return one - product(m.b.int8_weight.flip(0), m.b)

    part = joined(written(forward))
    assert (part.linear, part.others) == (("1", "1"), {"flip": 1, "sub": 1})


def test_region_after_norm_blocks_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.compiler.nested_compile_region
    def region(x: torch.Tensor) -> torch.Tensor:
        return x.exp()

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        return region(region(x)) + m.a(y)  # a region called only once does not count

    compiled = Compiled(written(forward), monkeypatch)
    with torch.inference_mode():
        compiled.run(X)
    assert ("none",) in [part.quantize for part in compiled.parts]


def test_fuses_one_dimensional_input(joined: Joined) -> None:
    part = joined(written(lambda m, x: x + m.a(m.norm(x)) * m.gamma), X[0, 0])
    assert (part.quantize, part.linear) == (("layer",), ("1+gamma+residual",))


def test_leaves_graph_without_int8_layers_alone() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)).eval())
    code = module.code
    assert passes.fuse(module) is module
    assert module.code == code


def test_lowered_layer_is_correct_without_compiling() -> None:
    model = written(lambda m, x: m.a(x))
    assert isinstance(model.a, Int8Linear)
    q, scale, _ = ops.quantize_rows(X)
    weight = model.a.int8_weight.double() * model.a.weight_scale.double()[:, None]
    expected = (q.double() * scale.double()[..., None]) @ weight.T + model.a.bias
    close(model(X).double(), expected)
