"""The Triton kernels under Triton's interpreter, and the operators around them."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pytest_int8bench.kernels import device as kernels_device
from pytest_int8bench.kernels import dispatch, ops, reference, schema, table, tile_types, tuning
from pytest_int8bench.kernels.tile_types import Product

triton = pytest.importorskip("triton")
launch = pytest.importorskip("pytest_int8bench.kernels.cuda")
operands_like = pytest.importorskip("pytest_int8bench.kernels.launch").operands_like
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1, set where no GPU is"
)

# Values beyond FP32 on the way are meant, and end as they must.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

linear = ops.linear
#: Product kernels that Triton's interpreter runs.
INTERPRETED = ("tma", "pointers")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rounding of FP32 is off by this part at most.
FP32 = 2.0**-24
TINY = 1e-36  # rows whose largest value is smaller count as zero
ACTIVATED = schema.ACTIVATIONS[1:]
COLUMNS = (1, 2, 3, 7, 8, 16, 17, 35, 64, 96, 100, 257, 1600, 2560)


# -- inputs -------------------------------------------------------------------------------------


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Three dimensions, the first two swapped in memory."""
    halves = x.reshape(2 if x.shape[0] % 2 == 0 else 1, -1, x.shape[1])
    return halves.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_full((x.shape[0], x.shape[1] + 5), torch.nan)
    wide[:, 3:-2] = x
    return wide[:, 3:-2]


def part_of_a_row(x: torch.Tensor) -> torch.Tensor:
    """At addresses as a row of its own has them."""
    return torch.cat([x, x], -1)[:, x.shape[1] :]


def every_second(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1)[:, ::2]


def expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.shape[0], -1)


LAYOUTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    contiguous,
    transposed,
    sliced,
    every_second,
    expanded,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of ``quantize_rows`` to be made from."""

    m: int
    k: int
    dtype: torch.dtype = torch.float32
    norm: str = "none"
    activation: str = "none"
    gated: bool = False
    gate_contiguous: bool = False
    offset: float = 0.0
    weight: bool = False
    bias: bool = False
    factor: bool = False
    keep: bool = False
    layout: Callable[[torch.Tensor], torch.Tensor] = contiguous
    seed: int = 0

    def make(self) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        x = normal(self.m, self.k) + self.offset
        largest = 5e3 if self.dtype == torch.float16 else 1e30 if self.norm == "none" else 1e15
        # Rows that are out of the ordinary, between those that are not.
        for row, values in enumerate((0.0, largest, 1e-30, 1e-42)):
            if 2 * row + 1 < self.m:
                x[2 * row + 1] *= values
        if self.m > 10:
            x[10, self.k // 2] = 50.0  # an outlier
        column = [normal(self.k).to(self.dtype) for _ in range(2)]
        factor = torch.exp2(torch.randint(-4, 5, (self.k,), generator=generator).float())
        gate = self.layout(normal(self.m, self.k).to(self.dtype))
        return (
            self.layout(x.to(self.dtype)),
            self.norm,
            self.activation,
            (gate.contiguous() if self.gate_contiguous else gate) if self.gated else None,
            column[0] if self.weight else None,
            column[1] if self.bias else None,
            1e-5,
            factor.to(self.dtype) if self.factor else None,
            self.keep,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    norm = draw(st.sampled_from(schema.NORMS))
    plain = norm == "none"
    return Case(
        m=draw(st.sampled_from((0, 1, 2, 12, 19))),
        k=draw(st.sampled_from(COLUMNS)),
        dtype=draw(st.sampled_from(DTYPES)),
        norm=norm,
        activation=draw(st.sampled_from(schema.ACTIVATIONS)) if plain else "none",
        gated=plain and draw(st.booleans()),
        gate_contiguous=draw(st.booleans()),
        offset=draw(st.sampled_from((0.0, 5.0))),
        weight=not plain and draw(st.booleans()),
        bias=norm == "layer" and draw(st.booleans()),
        factor=draw(st.booleans()),
        keep=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 99)),
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new tensors with what no kernel writes: NaN, and -128, for values go to -127."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = real(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else -128)

    with mock.patch.object(torch, "empty", empty):
        yield


# -- quantizing rows ----------------------------------------------------------------------------


def exact_rows(arguments: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows before and after ``factor`` in FP64, and by how much FP32 may be off.

    The normal distribution of the kernel is off by 1.5e-7 at most, which the input multiplies. A
    LayerNorm takes the difference of values that were rounded: what that is off by is divided by
    the standard deviation as the row is. Anything else is off in proportion to the row.
    """
    x, norm, activation, gate, weight, bias, eps, factor, _ = arguments
    rows = x.double()
    error = torch.zeros_like(rows)
    if activation == "gelu":
        error = 1.5e-7 * rows.abs()
        rows = rows * 0.5 * torch.special.erfc(-rows / 2**0.5)
    elif activation == "gelu_tanh":
        rows = rows * torch.sigmoid(1.5957691216057308 * (rows + 0.044715 * rows**3))
        rows = rows.nan_to_num(0)  # -1e30 * 0
    elif activation == "silu":
        rows = rows * torch.sigmoid(rows)
    elif activation == "relu":
        rows = rows.relu()
    if gate is not None:
        rows, error = rows * gate.double(), error * gate.double().abs()
    if norm != "none":
        mean = rows.mean(-1, keepdim=True) if norm == "layer" else 0.0
        centred = rows - mean
        inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        if norm == "layer":
            error = (8 * FP32 * rows.abs().amax(-1, keepdim=True) * inverse).expand(rows.shape)
        rows = centred * inverse
        if weight is not None:
            rows, error = rows * weight.double(), error * weight.double().abs()
        if bias is not None:
            rows = rows + bias.double()
    after = rows if factor is None else rows * factor.double()
    return rows, after, error.amax(-1, keepdim=True)


def check_rows(arguments: tuple[Any, ...], outputs: schema.Three) -> None:
    """Check shapes, that values x scale are the row to half a step, and the row that is kept."""
    x, keep = arguments[0], arguments[8]
    q, scale, kept = outputs
    assert (q.shape, q.dtype, q.is_contiguous()) == (x.shape, torch.int8, True)
    assert (scale.shape, scale.dtype) == (x.shape[:-1], torch.float32)
    assert (kept.shape, kept.dtype) == (x.shape if keep else (0,), x.dtype)
    before, after, error = exact_rows(arguments)
    peak = after.abs().amax(-1, keepdim=True)
    steps = scale.double().unsqueeze(-1)
    assert not steps.isnan().any()
    slack = room(arguments)
    assert ((steps * 127.5 - peak).abs() <= slack).all()
    assert ((q * steps - after).abs() <= 0.5 * steps + slack).all()
    nothing = (peak < 0.99 * TINY).squeeze(-1)
    assert (scale[nothing] == 0).all()
    assert (q[nothing] == 0).all()
    if keep:
        # The interpreter truncates to BF16: off by one step, where rounding is off by half of one.
        step = torch.finfo(x.dtype).eps * before.abs() + torch.finfo(x.dtype).tiny
        largest = before.abs().amax(-1, keepdim=True)
        assert ((kept.double() - before).abs() <= step + 1e-5 * largest + error).all()


def room(arguments: tuple[Any, ...]) -> torch.Tensor:
    """Return by how much each quantized row may be off, besides rounding to INT8: a thousandth of
    a step for some roundings to FP32, and what :func:`exact_rows` says."""
    _, after, error = exact_rows(arguments)
    factor = arguments[7]
    if factor is not None:
        error = error * factor.double().max()
    return 1e-3 / 127.5 * after.abs().amax(-1, keepdim=True) + 2 * error + TINY


@interpreted
@settings(max_examples=100)
@given(cases())
@example(Case(3, 16, norm="layer", weight=True, bias=True, keep=True, factor=True))
@example(Case(19, 2560, torch.bfloat16, activation="gelu", gated=True))
@example(Case(12, 35, norm="layer", offset=5.0))
@example(Case(12, 17, activation="relu", gated=True, gate_contiguous=True, layout=sliced))
@example(Case(12, 96, torch.bfloat16, layout=expanded, keep=True))
def test_rows_are_quantized_as_the_reference_says(case: Case) -> None:
    arguments = case.make()
    with poisoned():
        q, scale, kept = launch.quantize_rows(*arguments)
    assert not (q == -128).any()
    check_rows(arguments, (q, scale, kept))

    expected_q, expected_scale, _ = reference.quantize_rows(*arguments[:-1])
    # One level apart, and only where the value is half way between two.
    apart = (q.int() - expected_q.int()).abs()
    assert (apart <= 1).all()
    _, after, _ = exact_rows(arguments)
    level = 127.5 / after.abs().amax(-1, keepdim=True).clamp_min(TINY)
    from_half = ((after * level).abs() % 1 - 0.5).abs()
    assert (from_half <= room(arguments) * level)[apart > 0].all()
    assert ((scale - expected_scale).abs() * 127.5 <= 2 * room(arguments).squeeze(-1)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", ["kernel", "reference"])
@pytest.mark.parametrize(
    ("norm", "activation"),
    [("none", "none"), ("layer", "none"), ("rms", "none"), *(("none", a) for a in ACTIVATED)],
)
def test_nan_or_infinity_spoils_one_row(value: float, how: str, norm: str, activation: str) -> None:
    if how == "kernel" and not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1, set where no GPU is")
    arguments = list(Case(6, 35, norm=norm, activation=activation, keep=norm != "none").make())
    clean = arguments[0].clone()
    arguments[0][2, 7] = value
    run = launch.quantize_rows if how == "kernel" else ops.quantize_rows
    q, scale, _ = run(*arguments)
    undefined = not (activation == "relu" and value == -torch.inf)
    assert scale[2].isnan() == undefined
    weight = torch.ones(3, 35, dtype=torch.int8)
    product = (q, scale, weight, torch.ones(3), torch.ones(3), None, None, torch.float32)
    on_kernel = how == "kernel"
    out = (
        launch.linear(*product, kernel="pointers", tile=TILES[0]) if on_kernel else linear(*product)
    )
    assert out[2].isnan().all() == undefined
    assert out[2].isnan().any() == undefined
    others = [0, 1, 3, 4, 5]
    assert out[others].isfinite().all()
    arguments[0] = clean
    assert torch.equal(q[others], run(*arguments)[0][others])


@interpreted
def test_an_empty_row_and_an_empty_batch() -> None:
    with poisoned():
        for shape in ((0, 8), (3, 0), (2, 0, 8), (0, 0)):
            arguments = list(Case(1, shape[-1] or 1).make())
            arguments[0] = torch.zeros(shape)
            q, scale, _ = launch.quantize_rows(*arguments)
            assert (q.shape, scale.shape) == (shape, shape[:-1])
            assert (scale == 0).all()


@interpreted
def test_the_largest_value_of_either_sign_is_127() -> None:
    arguments = list(Case(1, 4).make())
    arguments[0] = torch.tensor([[-3.0, 3.0, 1.5, 0.0]])
    q, scale, _ = launch.quantize_rows(*arguments)
    assert q.tolist() == [[-127, 127, 64, 0]]
    assert scale.item() == pytest.approx(3 / 127.5, rel=1e-6)


# -- products -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Multiplied:
    """Arguments of ``linear`` to be made from."""

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.float32
    bias: bool = True
    gamma: bool = False
    residual: bool = False
    layout: Callable[[torch.Tensor], torch.Tensor] = contiguous
    seed: int = 0

    def make(self) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def bytes_(*shape: int) -> torch.Tensor:
            return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)

        n = self.n
        # Scales as those of values around 1; one row is large, and one is all zero.
        scale = torch.rand(self.m, generator=generator) / 127.5
        q = bytes_(self.m, self.k)
        if self.m > 3:
            scale[1], scale[2] = scale[1] * 100, 0
            q[2] = 0
        weight, column = bytes_(n, self.k), torch.rand(n, generator=generator) / 127.5
        bias = normal(n).to(self.dtype) if self.bias else None
        residual = self.layout(normal(self.m, n).to(self.dtype)) if self.residual else None
        if residual is not None and residual.ndim == 3:  # as q and its scales are then
            q, scale = q.reshape(*residual.shape[:2], self.k), scale.reshape(residual.shape[:2])
        gamma = normal(n).to(self.dtype) if self.gamma else None
        return q, scale, weight, column, bias, gamma, residual, self.dtype


def check_product(arguments: tuple[Any, ...], out: torch.Tensor) -> None:
    """Compare with FP64. FP32 rounds the product and each of up to six results after it, so that
    each term is off by eight roundings at most; the result is rounded to its dtype, by the
    interpreter towards zero: off by up to one step of it."""
    q, scale, weight, column, bias, gamma, residual, dtype = arguments
    whole = (q.double() @ weight.double().T) * scale.double().unsqueeze(-1) * column.double()
    size = whole.abs()
    if bias is not None:
        whole, size = whole + bias.double(), size + bias.double().abs()
    if gamma is not None:
        whole, size = whole * gamma.double(), size * gamma.double().abs()
    if residual is not None:
        whole, size = whole + residual.double(), size + residual.double().abs()
    assert (out.shape, out.dtype, out.is_contiguous()) == (whole.shape, dtype, True)
    info = torch.finfo(dtype)
    room = 8 * FP32 * size + info.eps * whole.abs() + info.tiny
    assert ((out.double() - whole).abs() <= room).all()


TILES = (
    Product(16, 16, 16, 4, 2, group=2),
    Product(16, 32, 64, 4, 2, programs_per_sm=3, parts=2, flatten=False, group=8),
    Product(32, 64, 32, 4, 2, programs_per_sm=2, parts=4, early=True, group=1),
    Product(32, 32, 32, 4, 2, parts=2, early=True, flatten=False),
    Product(16, 64, 16, 4, 2, programs_per_sm=5, parts=1, early=True),
)


@st.composite
def products(draw: st.DrawFn) -> Multiplied:
    """Half of them of sizes that TMA can address."""
    even = draw(st.booleans())
    sizes = (8, 16, 72, 136) if even else (1, 3, 8, 33, 130)
    return Multiplied(
        m=draw(st.sampled_from((0, 1, 2, 17, 40))),
        n=draw(st.sampled_from(sizes)),
        k=draw(st.sampled_from((16, 48, 64, 144) if even else (0, 1, 3, 8, 17, 35, 130))),
        dtype=draw(st.sampled_from(DTYPES)),
        bias=draw(st.booleans()),
        gamma=draw(st.booleans()),
        residual=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 99)),
    )


@interpreted
@settings(max_examples=100)
@given(products(), st.sampled_from(INTERPRETED), st.sampled_from(TILES))
@example(Multiplied(1, 8, 16, torch.bfloat16, residual=True), "tma", TILES[2])
@example(Multiplied(40, 96, 144, torch.float16, gamma=True), "tma", TILES[1])
def test_products_are_those_of_float64(case: Multiplied, kernel: str, tile: Product) -> None:
    arguments = case.make()
    with poisoned():
        out = launch.linear(*arguments, kernel=kernel, tile=tile)
    check_product(arguments, out)
    check_product(arguments, ops.linear(*arguments))


@interpreted
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("kernel", INTERPRETED)
@pytest.mark.parametrize("residual", [False, True])
def test_every_way_to_cut_a_product(kernel: str, tile: Product, residual: bool) -> None:
    case = Multiplied(40, 136, 144, torch.bfloat16, gamma=residual, residual=residual)
    arguments = case.make()
    with poisoned(), launches() as ran:
        out = launch.linear(*arguments, kernel=kernel, tile=tile)
    assert ran == [kernel]
    check_product(arguments, out)


@contextmanager
def launches() -> Iterator[list[str]]:
    """Note the kernel of each matmul."""
    ran: list[str] = []

    def noting(kernel: table.Kernel) -> table.Kernel:
        def launched(*call: Any) -> launch.Launch:
            made = kernel.launch(*call)
            ran.append(made.kernel.fn.__name__.removeprefix("int8_product_"))
            return made

        return dataclasses.replace(kernel, launch=launched)

    rows = [noting(row) if row.operator == "linear" else row for row in table.KERNELS]
    with mock.patch.object(table, "KERNELS", rows):
        yield ran


def take_first_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every matmul run with the same tiles."""
    monkeypatch.setattr(dispatch, "kernel_and_tile", lambda kernels, *_: (kernels[0], TILES[0]))


@interpreted
@pytest.mark.parametrize(
    ("case", "ran"),
    [
        (Multiplied(2, 48, 16), "tma"),
        (Multiplied(2, 48, 16, bias=False), "tma"),
        # TMA takes addresses and strides of 16 bytes.
        (Multiplied(2, 16, 24), "pointers"),
        (Multiplied(2, 12, 16, torch.bfloat16), "pointers"),
        (Multiplied(2, 12, 16), "tma"),
        (Multiplied(2, 16, 16, residual=True), "tma"),
        (Multiplied(2, 16, 16, residual=True, layout=transposed), "tma"),
        (Multiplied(2, 16, 16, residual=True, layout=sliced), "pointers"),
        (Multiplied(2, 16, 16, residual=True, layout=expanded), "pointers"),
    ],
    ids=range(9),
)
def test_which_product_runs(case: Multiplied, ran: str) -> None:
    arguments = case.make()
    with poisoned(), launches() as seen:
        check_product(arguments, launch.linear(*arguments, kernel="tma", tile=TILES[0]))
    assert seen == [ran]


@pytest.mark.parametrize(
    ("kernel", "residual", "takes"),
    [
        ("specialized", torch.bfloat16, "specialized"),
        ("specialized", torch.float16, "tma"),
        ("specialized", torch.float32, "tma"),
        ("tma", torch.float32, "tma"),
        ("specialized", None, "specialized"),
    ],
)
def test_roles_need_residual_dtype(
    kernel: str, residual: torch.dtype | None, takes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_device, "capability", lambda device: (9, 0))
    problem = tile_types.Problem(64, 128, 128, 2, residual is not None)
    tensor = None if residual is None else torch.zeros(64, 128, dtype=residual)
    given = (problem, 0 if residual is None else 128, tensor, torch.bfloat16)
    gpu = torch.device("cuda", 0)
    assert dispatch.accepting(kernel, gpu, *given, True)[0].name == takes
    assert dispatch.accepting(kernel, gpu, *given, False)[0].name == "pointers"


@interpreted
def test_an_address_between_those_that_tma_takes() -> None:
    q, scale, weight, *rest = Multiplied(2, 16, 16).make()
    shifted = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].reshape(16, 16)
    with poisoned(), launches() as seen:
        out = launch.linear(q, scale, shifted, *rest, kernel="tma", tile=TILES[0])
    check_product((q, scale, weight, *rest), out)
    assert seen == ["pointers"]


@pytest.fixture
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_kept", {})


@interpreted
@pytest.mark.usefixtures("_nothing_kept")
def test_calls_of_one_kind_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    take_first_tile(monkeypatch)
    case = Multiplied(5, 16, 32, torch.bfloat16, residual=True)
    with poisoned(), launches() as seen:
        for seed in range(3):
            arguments = dataclasses.replace(case, seed=seed).make()
            check_product(arguments, launch.linear(*arguments, kernel="tma"))
        assert len(seen) == 1
        # Each of these compiles or computes something else.
        others: tuple[dict[str, Any], ...] = (
            *({"m": 6}, {"n": 32}, {"k": 16}, {"dtype": torch.float16}, {"bias": False}),
            *({"gamma": True}, {"residual": False}, {"layout": sliced}),
        )
        for changed in others:
            arguments = dataclasses.replace(case, **changed).make()
            check_product(arguments, launch.linear(*arguments, kernel="tma"))
        check_product(arguments, launch.linear(*arguments, kernel="pointers"))
    assert len(seen) == 2 + len(others)


@interpreted
@pytest.mark.usefixtures("_nothing_kept")
def test_rows_of_one_kind_are_prepared_once() -> None:
    case = Case(5, 16, torch.bfloat16)
    with poisoned():
        for seed in range(3):
            arguments = dataclasses.replace(case, seed=seed).make()
            check_rows(arguments, launch.quantize_rows(*arguments))
        assert len(launch._kept) == 1
        others: tuple[dict[str, Any], ...] = (
            *({"m": 6}, {"k": 8}, {"dtype": torch.float16}, {"norm": "layer"}, {"keep": True}),
            *({"norm": "rms", "weight": True}, {"norm": "layer", "bias": True}, {"factor": True}),
            *({"activation": "gelu"}, {"gated": True}, {"layout": part_of_a_row}),
            {"gated": True, "layout": part_of_a_row, "gate_contiguous": True},
        )
        for changed in others:
            arguments = dataclasses.replace(case, **changed).make()
            check_rows(arguments, launch.quantize_rows(*arguments))
    assert len(launch._kept) == 1 + len(others)


@interpreted
@pytest.mark.usefixtures("_nothing_kept")
@pytest.mark.parametrize("position", [1, 3, 4])
@pytest.mark.parametrize("change", ["dtype", "address"])
def test_vector_kinds_differ(position: int, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_first_tile(monkeypatch)
    arguments = list(Multiplied(16, 16, 16).make())
    with poisoned():
        launch.linear(*arguments, kernel="tma")
        vector = arguments[position]
        if change == "dtype":
            arguments[position] = vector.to(torch.bfloat16)
        else:
            arguments[position] = torch.cat([vector.new_zeros(1), vector])[1:]
        out = launch.linear(*arguments, kernel="tma")
        again = launch.linear(*arguments, kernel="tma")
    check_product(tuple(arguments), out)
    assert torch.equal(out, again)
    assert len(launch._kept) == 2
    assert [one.kernel.fn.__name__ for one in launch._kept.values()] == ["int8_product_tma"] * 2


@interpreted
@pytest.mark.usefixtures("_nothing_kept")
def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_KEPT", 4)
    for m in range(1, 12):
        launch.quantize_rows(*Case(m, 4).make())
        assert 0 < len(launch._kept) <= 4


@interpreted
def test_default_tiles_come_from_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pointer_tiles(
        kernel: str, problem: tile_types.Problem, device: torch.device, time: Any
    ) -> Product:
        asked.append((problem, kernel, device, time is not None))
        return TILES[0]

    rows = [dataclasses.replace(row, tiles=pointer_tiles) for row in table.kernels_of("linear")]
    monkeypatch.setattr(table, "KERNELS", rows)
    monkeypatch.setattr(launch, "_kept", {})
    arguments = Multiplied(5, 32, 16, torch.bfloat16, residual=True).make()
    check_product(arguments, launch.linear(*arguments, kernel="pointers"))
    problem = tile_types.Problem(5, 32, 16, 2, residual=True)
    assert asked == [(problem, "pointers", torch.device("cpu"), True)]


def test_products_are_timed_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        done.append(tensor)
        yield
        done.append("left")

    def do_bench(call: Callable[[], None], **options: Any) -> float:
        call()
        return 2.0

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    operands = operands_like(
        tile_types.Problem(2, 3, 4, 4, False), False, False, torch.float32, torch.device("cpu")
    )
    took = tuning.seconds(operands, lambda *given: done.append("ran"))
    assert took == 2e-3
    assert done[0] is operands[0]
    assert done[1:] == ["ran", "left"]


# -- operators ----------------------------------------------------------------------------------

ALL = [
    Case(4, 6),
    Case(4, 6, torch.bfloat16, layout=transposed, keep=True),
    Case(4, 6, layout=every_second, keep=True),
    Case(4, 6, norm="layer", weight=True, bias=True, factor=True, keep=True),
    Case(0, 6, torch.float16, norm="rms", weight=True),
    Case(1, 6, activation="silu", gated=True, layout=transposed),
]


@pytest.mark.parametrize("case", ALL, ids=range(len(ALL)))
def test_the_operator_that_quantizes_rows_keeps_the_rules(case: Case) -> None:
    arguments = case.make()
    torch.library.opcheck(torch.ops.int8bench.quantize_rows.default, arguments)
    check_rows(arguments, ops.quantize_rows(*arguments))


@pytest.mark.parametrize(
    "case",
    [
        Multiplied(3, 4, 6, bias=False),
        Multiplied(4, 6, 6, torch.bfloat16, gamma=True, residual=True, layout=transposed),
        Multiplied(0, 4, 6),
    ],
    ids=["nothing", "everything", "empty"],
)
def test_the_operator_that_multiplies_keeps_the_rules(case: Multiplied) -> None:
    torch.library.opcheck(torch.ops.int8bench.linear.default, case.make())


def test_the_operators_may_be_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    name = ops.__name__
    monkeypatch.setattr(sys.modules[name.rpartition(".")[0]], "ops", ops)
    monkeypatch.delitem(sys.modules, name)  # as pytester does after a session in its process
    again = importlib.import_module(name)
    assert again is not ops
    q, scale, _ = again.quantize_rows(torch.ones(2, 4))
    assert (q.shape, scale.shape) == ((2, 4), (2,))


@pytest.mark.parametrize("keep", [False, True])
def test_fake_outputs_have_the_shapes_of_the_real_ones_in_any_batch(keep: bool) -> None:
    case = Case(6, 10, torch.bfloat16, layout=transposed, keep=keep)
    arguments = case.make()
    multiplied = Multiplied(6, 7, 10).make()
    q, scale, kept = ops.quantize_rows(*arguments)
    rest = (*multiplied[2:6], None, torch.bfloat16)
    real = (q, scale, kept, linear(q, scale, *rest))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake_x = mode.from_tensor(arguments[0], static_shapes=False)
        fake = ops.quantize_rows(fake_x, *arguments[1:])
        weights = [mode.from_tensor(part) for part in rest[:3]]
        out = linear(*fake[:2], *weights, *rest[3:])
        symbol = fake_x.shape[1]
        assert isinstance(symbol, torch.SymInt)
        assert out.shape[1] is symbol or out.shape[1] == symbol
        for one, other in zip((*fake, out), real, strict=True):
            assert (tuple(one.shape), one.dtype) == (tuple(other.shape), other.dtype)
            assert tuple(one.stride()) == other.stride()
