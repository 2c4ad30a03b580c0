"""The fused backend on a CUDA device. Marked ``gpu``; skipped with a reason without one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.attention_calls import Layout
from pytest_int8bench.kernels import dispatch, ops, reference, table
from pytest_int8bench.measure.attention_auto import Call, Timings, fastest_backend
from pytest_int8bench.measure.evidence import Evidence, profile_forward
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import apply_int8_quant, coverage
from pytest_int8bench.tensors import tensors_of
from pytest_int8bench.workloads.olmoearth import olmoearth
from pytest_int8bench.workloads.registry import load_workload

launch = pytest.importorskip("pytest_int8bench.kernels.cuda")  # needs Triton
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
KERNELS = ("tma", "pointers")
# Rows, inputs, outputs: large, odd, tiny, and deeper than a tile.
SHAPES = [
    (4096, 768, 2304),
    (1000, 3072, 768),
    (300, 192, 576),
    (17, 100, 33),
    (1, 1024, 1024),
    (130, 7, 5),
    (2048, 4096, 1000),
    (65, 64, 8),
]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch.cuda.empty_cache()


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force a product kernel: ``pointers`` is what runs on sm80."""
    monkeypatch.setenv("INT8BENCH_PRODUCT", request.param)
    return str(request.param)


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


def decibels(out: torch.Tensor, want: torch.Tensor) -> float:
    return float(-20 * torch.log10((out.double() - want.double()).norm() / want.double().norm()))


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=CUDA)


# Each epilogue and dtype is a kernel that Triton compiles for seconds.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.bfloat16) for shape in SHAPES),
        *((SHAPES[2], dtype) for dtype in (torch.float16, torch.float32)),
    ],
    ids=str,
)
def test_products_match(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    q, weight = int8(m, k), int8(n, k)
    scale, weight_scale = (torch.rand(size, device=CUDA) / 1e3 for size in (m, n))
    bias, gamma = (torch.randn(n, device=CUDA, dtype=dtype) for _ in range(2))
    residual = torch.randn(m, n, device=CUDA, dtype=dtype)
    exact = (q.double() @ weight.double().T) * scale.double()[:, None] * weight_scale.double()
    # A rounding to the output's dtype is at most eps / 2 for each element.
    allowed = torch.finfo(dtype).eps
    for b, g, r in ((bias, None, None), (bias, gamma, residual)):
        want = exact
        want = want if b is None else want + b.double()
        want = want if g is None else want * g.double()
        want = want if r is None else want + r.double()
        out = ops.linear(q, scale, weight, weight_scale, b, g, r, dtype)
        assert out.isfinite().all()
        assert error(out, want) < allowed, (b is None, g is None, r is None)


@pytest.mark.parametrize(
    ("columns", "norm", "activation", "dtype"),
    [
        *((columns, "none", "none", torch.bfloat16) for columns in (8, 100, 4096, 32768, 40000)),
        *((columns, "layer", "none", torch.bfloat16) for columns in (192, 768, 1000)),
        *((columns, "none", "gelu", torch.bfloat16) for columns in (3072, 11008)),
        (768, "rms", "none", torch.bfloat16),
        (3072, "none", "silu", torch.bfloat16),
        (768, "layer", "none", torch.float32),
        (768, "none", "gelu", torch.float16),
    ],
)
def test_quantizes_rows(columns: int, norm: str, activation: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, columns, 37, device=CUDA, dtype=dtype).transpose(1, 2)
    x[0, 0] = 0
    # The square of a larger one has no FP32, and itself no FP16.
    x[0, 1] *= 1e30 if norm == "none" and dtype == torch.bfloat16 else 1e3
    x[0, 2] *= 1e-30
    x[0, 3, columns // 2] = 1e4
    weight, bias = (torch.randn(columns, device=CUDA, dtype=dtype) for _ in range(2))
    given = (weight, bias if norm == "layer" else None) if norm != "none" else (None, None)
    args = (x, norm, activation, None, *given, 1e-5, None)
    q, scale, kept = ops.quantize_rows(*args, True)
    want_q, want_scale, rows = reference.quantize_rows(*args)
    assert torch.allclose(scale, want_scale, rtol=1e-5, atol=0, equal_nan=True)
    off = (q.int() - want_q.int()).abs()
    assert off.max() <= 1
    # Only what lies half-way, as in a row of BF16 values whose largest is 255 times a power of two.
    exact = rows.double() * reference.HALF_RANGE / rows.double().abs().amax(-1, keepdim=True)
    half_way = (exact - exact.floor() - 0.5).abs() < 2e-3
    assert half_way[off > 0].all()
    assert error(kept[0, 4:], rows[0, 4:]) < torch.finfo(dtype).eps


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(kernel: str, value: float) -> None:
    x = torch.randn(256, 768, device=CUDA, dtype=torch.bfloat16)
    x[7, 3] = value
    q, scale, _ = ops.quantize_rows(x)
    out = ops.linear(
        q, scale, int8(768, 768), torch.ones(768, device=CUDA), None, None, None, x.dtype
    )
    assert out[7].isnan().all()
    assert out[torch.arange(256, device=CUDA) != 7].isfinite().all()


def test_both_kernels_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, weight = int8(1536, 768), int8(3072, 768)
    scales = torch.rand(1536, device=CUDA), torch.rand(3072, device=CUDA)
    outs = []
    for kernel in KERNELS:
        monkeypatch.setenv("INT8BENCH_PRODUCT", kernel)
        args = (weight, scales[1], None, None, None, torch.bfloat16)
        outs.append(ops.linear(q, scales[0], *args))
    assert torch.equal(*outs)


# Rows, inputs, outputs, residual: tiles that are cut off, a depth that is no multiple of a tile's,
# fewer steps than are loaded ahead, passes of one and several columns, and the weight of a column
# in shared memory or not.
LARGE = [
    (70_001, 768, 2304, False),
    (50_000, 784, 3072, False),
    (33_333, 1024, 4096, False),
    (60_000, 1024, 3072, False),
    (100_000, 192, 768, False),
    (90_000, 384, 1152, False),
    (130_000, 768, 768, True),
    (120_000, 384, 384, True),
    (70_001, 3072, 768, True),
    (50_000, 4096, 1024, True),
    (60_000, 3072, 768, False),
]


@pytest.fixture
def _roles(monkeypatch: pytest.MonkeyPatch) -> None:
    if dispatch.matmul_kernel(CUDA) != "specialized":
        pytest.skip("needs sm90")
    monkeypatch.setattr(launch, "_kept", {})


def ran() -> list[str]:
    """Return the kernels of the kinds of products that ran."""
    return [one.kernel.fn.__name__.removeprefix("int8_product_") for one in launch._kept.values()]


@pytest.mark.usefixtures("_roles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_large_products_have_the_bits_of_the_other_kernel(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int, bool], dtype: torch.dtype
) -> None:
    m, k, n, has_residual = size
    q, weight = int8(m, k), int8(n, k)
    q[5] = 0
    scale, weight_scale = (torch.rand(rows, device=CUDA) / 1e3 for rows in (m, n))
    scale[7] = torch.nan
    # Each is there in half of the cases, with a residual and without one.
    bias = torch.randn(n, device=CUDA, dtype=dtype) if m % 2 or dtype == torch.float16 else None
    gamma = torch.randn(n, device=CUDA, dtype=dtype) if k % 512 else None
    # Rows of a wider tensor, as a slice has them.
    residual = torch.randn(m, 2 * n, device=CUDA, dtype=dtype)[:, :n] if has_residual else None
    outs = []
    for kernel in ("tma", "specialized", "specialized"):
        monkeypatch.setenv("INT8BENCH_PRODUCT", kernel)
        args = (weight, weight_scale, bias, gamma, residual, dtype)
        outs.append(ops.linear(q, scale, *args))
    assert ran() == ["tma", "specialized"]
    assert outs[0][7].isnan().all()
    one, other, again = (out.view(torch.int16) for out in outs)
    assert torch.equal(one, other)
    assert torch.equal(other, again)


@pytest.mark.usefixtures("_roles")
def test_a_large_product_with_a_residual_of_another_dtype() -> None:
    q, weight = int8(130_000, 768), int8(768, 768)
    scales = torch.rand(130_000, device=CUDA), torch.rand(768, device=CUDA)
    residual = torch.randn(130_000, 768, device=CUDA, dtype=torch.float32)
    args = (weight, scales[1], None, None, residual, torch.bfloat16)
    out = ops.linear(q, scales[0], *args)
    assert ran() == ["tma"]
    assert error(out, reference.linear(q, scales[0], *args)) < torch.finfo(out.dtype).eps


@pytest.mark.usefixtures("_roles")
def test_warps_with_roles_prove_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INT8BENCH_PRODUCT", raising=False)
    first, *others = table.kernels_of("linear")
    assert first.name == "specialized"
    assert first.selftest is not None
    unknown = dataclasses.replace(
        first, selftest=dataclasses.replace(first.selftest, passed_with=())
    )
    monkeypatch.setattr(table, "KERNELS", [unknown, *others])
    state = torch.cuda.get_rng_state()
    assert dispatch.has_passed(unknown, torch.device("cuda", 0), may_try=True)
    assert torch.equal(state, torch.cuda.get_rng_state())


@pytest.mark.usefixtures("_roles")
def test_a_large_block_runs_warps_with_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, changed = torch.randn(2, 512, 100, 768, device=CUDA, dtype=torch.bfloat16)
    block = Block(768).to(CUDA, torch.bfloat16).eval().requires_grad_(False)
    eager = nn.Sequential(apply_int8_quant(block, backend="fused"))
    eager.append(copy.deepcopy(eager[0]))
    outs = []
    for kernel, mode in (("tma", "default"), ("", "default"), ("", "reduce-overhead")):
        monkeypatch.setenv("INT8BENCH_PRODUCT", kernel)
        torch._dynamo.reset()
        compiled = compile_for_a100(eager, mode=mode)
        for _ in range(3):  # a CUDA graph is replayed from the third one on
            compiled(x)
        outs.append((compiled(x), compiled(changed)))
        evidence = profile_forward(functools.partial(compiled, x), CUDA)
        assert set(ours(evidence)) == {f"int8_product_{kernel or 'specialized'}"}
        assert sum(k.calls for k in evidence.int8_products) == 8
    for other in outs[1:]:
        assert torch.equal(outs[0][0], other[0])
        assert torch.equal(outs[0][1], other[1])


@pytest.mark.parametrize("name", ["quantize_rows", "linear"])
def test_the_operators_keep_the_rules_of_custom_operators(name: str) -> None:
    x = torch.randn(32, 64, device=CUDA, dtype=torch.bfloat16)
    q, scale, _ = ops.quantize_rows(x)
    if name == "quantize_rows":
        args: tuple[Any, ...] = (x, "layer", "none", None, None, None, 1e-5, None, False)
    else:
        weight_scale = torch.rand(48, device=CUDA)
        args = (q, scale, int8(48, 64), weight_scale, None, None, None, torch.bfloat16)
    torch.library.opcheck(getattr(torch.ops.int8bench, name).default, args)


class Block(nn.Module):
    """A transformer block with separate projections."""

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        y = self.norm1(x)
        heads = (f(y).reshape(batch, tokens, -1, 64).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(y).reshape(batch, tokens, -1, 64).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(*heads, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def fused_block() -> nn.Module:
    block = Block().to(CUDA, torch.bfloat16).eval().requires_grad_(False)
    return apply_int8_quant(block, backend="fused")


def ours(evidence: Evidence) -> list[str]:
    return [kernel.name for kernel in evidence.kernels if "int8_product" in kernel.name]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_block_compiles_to_its_kernels(kernel: str, mode: str) -> None:
    eager = fused_block()
    compiled = compile_for_a100(eager, mode=mode)
    x = torch.randn(4, 96, 256, device=CUDA, dtype=torch.bfloat16)
    for _ in range(3):
        out = compiled(x)
    with torch.inference_mode():
        want = eager(x)
    assert error(out, want) < 0.01
    evidence = profile_forward(lambda: compiled(x), CUDA)
    calls = {k.name: k.calls for k in evidence.kernels}
    # q, k and v are one product; each norm, the GELU and the attention's output one pass.
    assert sum(calls[name] for name in ours(evidence)) == 4
    assert calls["quantize_rows"] == 4
    assert not [name for name in calls if "layer_norm" in name or "gelu" in name]
    changed = torch.randn_like(x)
    again = compiled(changed)
    with torch.inference_mode():
        assert error(again, eager(changed)) < 0.01


def test_repeated_blocks(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = nn.Sequential(fused_block(), fused_block())
    x = torch.randn(4, 96, 256, device=CUDA, dtype=torch.bfloat16)
    with torch.inference_mode():
        want = eager(x)

    def launched_by_an_operator(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an operator ran")

    for function in ("linear", "quantize_rows"):
        monkeypatch.setattr(launch, function, launched_by_an_operator)
    for state in ("cold", "warm"):
        torch._dynamo.reset()
        compiled = compile_for_a100(eager, mode="default", cache_dir=tmp_path)
        assert error(compiled(x), want) < 0.01
        assert (compiled.regions, compiled.regions_refused) == (2, None)
        assert compiled.compile_cache == state
        evidence = profile_forward(functools.partial(compiled, x), CUDA)
        calls = {k.name: k.calls for k in evidence.kernels}
        assert sum(calls[name] for name in ours(evidence)) == 8
        assert calls["quantize_rows"] == 8


def test_batch_sizes_of_one_graph_and_an_empty_batch() -> None:
    eager = fused_block()
    compiled = compile_for_a100(eager, mode="default", dynamic=True, attention="auto")
    for batch in (3, 5, 16):
        x = torch.randn(batch, 40, 256, device=CUDA, dtype=torch.bfloat16)
        with torch.inference_mode():
            assert error(compiled(x), eager(x)) < 0.01
    with torch.inference_mode():
        linear = eager.get_submodule("fc1")
        assert linear(x[:0]).shape == (0, 40, 1024)
        assert error(linear(x[0, 0]), linear(x)[0, 0]) == 0


NAMES = ["olmoearth", "timm:vit_tiny_patch16_224", "hf:bert"]


@pytest.mark.parametrize("name", NAMES)
def test_encoders_run_on_it_as_accurately_as_on_torchao(name: str) -> None:
    if name.startswith("timm") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    workload = load_workload(name, Path())
    point = RunParams(
        **({} if ":" in name else {"model_size": "tiny", "model_version": "v1.2"}),
        image_size=32,
        batch_size=8,
        compile_mode="default",
        attention="auto",
        benchmark_interval_s=0.2,
    )
    outputs: dict[str, torch.Tensor] = {}
    for backend in (None, "torchao", "fused"):
        pool = ModelPool()
        params = point
        if backend is not None:
            params = point.replace(int8_enabled=True, int8_backend=backend)
        model = pool.get(workload, params)
        model.ready()
        outputs[backend or "bf16"] = next(tensors_of(model.run())).float()
        if backend == "fused":
            covered = coverage(model.eager)
            assert covered.fused == covered.converted
            kernels = model.evidence()
            assert ours(kernels)
            names: Any = [k.name for k in kernels.kernels]
            assert not [n for n in names if "s8_s8" in n or "i16832gemm_s8" in n]
    fused, torchao = (decibels(outputs[n], outputs["bf16"]) for n in ("fused", "torchao"))
    print(f"{name}: SQNR against BF16 {fused:.1f} dB fused, {torchao:.1f} dB torchao")
    assert fused > torchao - 0.5


def test_auto_is_fused_and_says_so() -> None:
    model = Block().to(CUDA, torch.bfloat16).eval()
    apply_int8_quant(model)
    assert coverage(model).backend == "fused"
    assert "; 6 on fused kernels" in str(coverage(model))


# -- INT8 attention -----------------------------------------------------------------------------

# Batch, heads, heads of keys, queries, keys, columns: odd, grouped, padded, cross, tiny.
ATTENTION = [
    (2, 3, 3, 130, 130, 64),
    (1, 12, 12, 1000, 1000, 64),
    (2, 4, 2, 77, 200, 32),
    (1, 4, 2, 65, 1281, 96),
    (2, 4, 4, 333, 70, 128),
    (1, 2, 2, 256, 256, 80),
    (2, 2, 1, 1, 3, 64),
]


def heads_of(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> list[torch.Tensor]:
    """Return q, k and v as views of joined projections; keys have something in common."""
    batch, heads, kv_heads, rows, keys, width = shape
    q = torch.randn(batch, rows, 3, heads, width, dtype=dtype, device=CUDA)[:, :, 0] * size
    kv = torch.randn(batch, keys, 2, kv_heads, width, dtype=dtype, device=CUDA)
    return [q.transpose(1, 2), kv[:, :, 0].transpose(1, 2) + 1, kv[:, :, 1].transpose(1, 2)]


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [
        *((shape, torch.bfloat16, 1.0) for shape in ATTENTION),
        (ATTENTION[0], torch.bfloat16, 40.0),  # scores beyond what a sum of exponentials holds
        (ATTENTION[0], torch.float16, 1.0),
        (ATTENTION[0], torch.float16, 6.0),
    ],
)
def test_int8_attention(kernel: str, shape: Any, dtype: torch.dtype, size: float) -> None:
    q, k, v = heads_of(shape, dtype, size)
    parts = ops.quantize_heads(q, k)
    wanted = reference.quantize_heads(q, k, "none", [], [])
    for part, want in zip(parts, wanted, strict=True):
        assert (part.double() - want.double()).abs().max() <= (part.dtype == torch.int8) + 1e-4
    scale = shape[-1] ** -0.5
    out = ops.int8_attention(*parts, v, scale)
    assert out.transpose(1, 2).is_contiguous()
    assert error(out, reference.int8_attention(*parts, v.float(), scale)) < 4e-3
    exact = nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=True
    )
    assert error(out, exact) < (0.012 if size == 1 else 0.08)


def test_int8_attention_keeps_what_is_not_finite_where_it_is(kernel: str) -> None:
    q, k, v = heads_of((1, 3, 3, 200, 200, 64), torch.bfloat16, 1.0)
    q[0, 0, 5, 3] = torch.nan
    k[0, 1, 199, 0] = torch.inf
    v[0, 2, 190, 7] = torch.nan
    bad = ops.int8_attention(*ops.quantize_heads(q, k), v, 0.125).isnan()
    assert bad[0, 0].any(-1).nonzero().flatten().tolist() == [5]
    assert bad[0, 1].all()
    assert bad[0, 2, :, 7].all()
    assert bad[0, 2].sum() == 200


def turns(kind: str, batch: int, heads: int, rows: int, width: int) -> list[torch.Tensor]:
    """Return what queries or keys are rotated by; "large" are angles."""
    if kind == "halves":
        shape = (1, 1, rows, width)
        return [torch.randn(shape, device=CUDA, dtype=torch.bfloat16) for _ in range(2)]
    if kind != "positions":
        size = 1e6 if kind == "large" else 30.0
        return [torch.randn(batch, 1, rows, width // 2, device=CUDA) * size]
    # As in a model in BF16: products are exact, so that their sum has the same bits in any order.
    frequencies = torch.randn(1, heads, 3, width // 2, device=CUDA).bfloat16().float()
    return [torch.randint(0, 9000, (batch, 1, rows, 3), device=CUDA).float(), frequencies]


@pytest.mark.parametrize("kind", ["angles", "positions", "halves"])
def test_quantizes_what_it_rotates(kind: str) -> None:
    q, k, _ = heads_of(ATTENTION[3], torch.bfloat16, 1.0)
    q_turn, k_turn = turns(kind, 1, 4, 65, 96), turns(kind, 1, 2, 1281, 96)
    parts = ops.quantize_heads(q, k, kind, q_turn, k_turn)
    wanted = reference.quantize_heads(q, k, kind, q_turn, k_turn)
    for part, want in zip(parts, wanted, strict=True):
        assert (part.double() - want.double()).abs().max() <= (part.dtype == torch.int8) + 1e-3


def rotated(x: torch.Tensor, *turn: torch.Tensor) -> torch.Tensor:
    """Rotate as OlmoEarth does."""
    [angles] = turn if len(turn) == 1 else [None]
    if angles is None:
        positions, frequencies = turn
        t, row, column = (positions[..., i, None] for i in range(3))
        f = [frequencies[:, :, i, None] for i in range(3)]
        angles = t * f[0] + row * f[1] + column * f[2]
    cosine, sine = (torch.repeat_interleave(f(angles), 2, -1) for f in (torch.cos, torch.sin))
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cosine.to(x.dtype) + swapped * sine.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["angles", "large", "positions"])
@pytest.mark.parametrize("shape", [(2, 3, 3, 130, 130, 64), (1, 2, 2, 1001, 1001, 96)], ids=str)
def test_rotates_with_the_bits_of_inductor(shape: Any, kind: str, dtype: torch.dtype) -> None:
    batch, count, _, rows, _, width = shape
    q, k, _ = heads_of(shape, dtype, 1.0)
    q[0, 0, 5, 3] = torch.nan
    turn = turns(kind, batch, count, rows, width)
    rotation = "positions" if kind == "positions" else "angles"
    for rows_first in (True, False):
        outs = ops.rotate_heads([q, k], rotation, turn, rows_first)
        for x, out in zip((q, k), outs, strict=True):
            want = torch.compile(rotated, dynamic=False)(x, *turn)
            assert out.transpose(1, 2).is_contiguous() == rows_first
            assert torch.equal(out.nan_to_num(77.0), want.nan_to_num(77.0))
            exact = reference.rotate_heads([x.double()], rotation, turn, True)[0]
            # Angles of thousands are rounded to a thousandth, here and there in another order.
            limit = torch.finfo(dtype).eps + 2e-3 * (kind == "positions")
            assert error(out.nan_to_num(), exact.nan_to_num()) < limit


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_point_rotates_in_one_pass(mode: str) -> None:
    params = RunParams(
        model_size="nano",
        model_version="v1.2",
        image_size=16,
        batch_size=8,
        int8_enabled=True,
        compile_mode=mode,
        benchmark_interval_s=0.5,
    )
    model = ModelPool().get(olmoearth(), params)
    model.ready()
    kernels = model.evidence().kernels
    assert [kernel.calls for kernel in kernels if kernel.name == "rotate_heads"] == [4]
    assert not any("cos" in kernel.name for kernel in kernels)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_point_with_int8_attention(mode: str) -> None:
    """Joined projections are read through their strides: nothing is copied in between."""
    params = RunParams(
        model_size="nano",
        model_version="v1.2",
        image_size=16,
        batch_size=8,
        int8_enabled=True,
        int8_attention=True,
        compile_mode=mode,
        benchmark_interval_s=0.5,
    )
    workload = olmoearth()
    pool = ModelPool()
    baseline = pool.get(workload, params.baseline())
    model = pool.get(workload, params)
    outputs = []
    for one in (baseline, model):
        one.ready()
        outputs.append(torch.cat([t.flatten() for t in tensors_of(one.run())]).clone())
        found = one.evidence()
    assert found.attention_kernel == "int8"
    assert model.compiled.int8_attention is not None
    assert model.compiled.int8_attention.to_dict() == {"int8": 4, "left_out": {}}
    names = [kernel.name for kernel in found.kernels]
    assert not any("clone" in name and "int8_attention" in name for name in names)
    assert not any("cos" in name and "quantize_heads" in name for name in names)
    assert 20 < decibels(outputs[1], outputs[0]) < 60


# -- short attention ----------------------------------------------------------------------------

# Batch, heads, heads of keys, queries, keys, columns: odd, tiny, grouped, cross, padded, whole.
SHORT = [
    (7, 12, 12, 48, 48, 64),
    (5, 3, 3, 16, 16, 64),
    (3, 5, 5, 17, 31, 32),
    (2, 8, 2, 33, 49, 64),
    (2, 4, 1, 128, 77, 80),
    (3, 2, 2, 128, 128, 128),
    (3, 2, 2, 1, 5, 16),
]


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHORT)
def test_short_attention(shape: Any, dtype: torch.dtype, causal: bool) -> None:
    q, k, v = heads_of(shape, dtype, 3.0)
    out = ops.short_attention(q, k, v, 0.2, causal)
    assert out.transpose(1, 2).is_contiguous()
    exact = nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=causal, scale=0.2, enable_gqa=True
    )
    assert error(out, exact) < 4e-3


@pytest.mark.parametrize("rows", [17, 49, 128])
def test_short_attention_keeps_what_is_not_finite_where_it_is(rows: int) -> None:
    q, k, v = heads_of((1, 3, 3, rows, rows, 64), torch.bfloat16, 1.0)
    q[0, 0, 5, 3] = torch.nan
    k[0, 1, rows - 1, 0] = torch.inf
    v[0, 2, rows - 1, 7] = torch.nan
    bad = ops.short_attention(q, k, v, 0.125).isnan()
    assert bad[0, 0].any(-1).nonzero().flatten().tolist() == [5]
    assert torch.equal(bad, reference.short_attention(q, k, v, 0.125, False).isnan())
    assert bad[0, 2].sum() == rows


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_block_attends_to_short_sequences(mode: str, tmp_path: Path) -> None:
    """Baseline and candidate; joined projections are read through their strides."""
    x = torch.randn(64, 48, 256, device=CUDA, dtype=torch.bfloat16)
    plain = Block().to(CUDA, torch.bfloat16).eval().requires_grad_(False)
    for eager in (plain, apply_int8_quant(copy.deepcopy(plain), backend="fused")):
        for state in ("cold", "warm"):
            torch._dynamo.reset()
            compiled = compile_for_a100(eager, mode=mode, attention="short", cache_dir=tmp_path)
            for _ in range(3):
                out = compiled(x)
            with torch.inference_mode():
                assert error(out, eager(x)) < 0.02  # flash on one side
            assert compiled.compile_cache == state
            evidence = profile_forward(functools.partial(compiled, x), CUDA)
            assert evidence.attention_kernel == "short"
            assert {k.name: k.calls for k in evidence.kernels}["short_attention"] == 1


def test_auto_takes_the_kernel_for_short_sequences_where_it_is_faster() -> None:
    layout = Layout((2048, 12, 48, 64), (110592, 64, 2304, 1), torch.bfloat16, CUDA)
    timings: Timings = {}
    calls = {Call(layout, layout, layout, None, ()): 12}
    chosen = fastest_backend(calls, timings=timings)
    times = {name: seconds for (name, _), seconds in timings.items()}
    assert chosen == min(times, key=times.__getitem__)
    assert set(times) == {"flash", "cudnn", "efficient", "math", "short"}
