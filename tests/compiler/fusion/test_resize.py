"""Compare antialiased resizing as two matmuls with torch's own in FP64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn.flexi_patch_embed import FlexiPatchEmbed
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.constants import Modality
from torch import nn
from torch.nn.functional import interpolate

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.fusion import passes, resize
from pytest_int8bench.kernels import dispatch

SIZES = [((64, 64), (128, 128)), ((9, 7), (24, 24)), ((32, 48), (12, 48)), ((1, 5), (3, 2))]


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that kernels exist and that small images are worth resizing."""
    monkeypatch.setattr(dispatch, "fused_problem", lambda device: None)
    monkeypatch.setattr(resize, "_FEWEST_ELEMENTS", 1)
    torch.manual_seed(0)
    torch._dynamo.reset()


class Resize(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"mode": "bicubic", "antialias": True} | options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return interpolate(x, **self.options)


def resized(model: nn.Module, x: torch.Tensor) -> tuple[Any, list[Any]]:
    """Return the output of the changed graph (None if it is unchanged) and its nodes."""
    nodes: list[Any] = []

    def backend(module: Any, _: Any) -> Callable[..., Any]:
        resize.resize_by_matmuls(module)
        module.graph.lint()
        nodes.extend(module.graph.nodes)
        if not any(node.target is torch.matmul for node in nodes):
            return lambda *_: (None,)  # on a CPU, torch cannot resize 16-bit images
        assert not any(node.target is interpolate for node in nodes)
        return module.forward  # type: ignore[no-any-return]

    with torch.inference_mode():
        return torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x), nodes


def error_of(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("size", "new"), SIZES)
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_matches_torch(size: tuple[int, int], new: tuple[int, int], mode: str) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float16)
    out, _ = resized(Resize(size=new, mode=mode), x)
    wanted = interpolate(x.double(), new, mode=mode, antialias=True)
    assert (out.dtype, out.shape, out.stride()) == (x.dtype, wanted.shape, wanted.stride())
    assert error_of(out, wanted) < 1e-3  # FP16 rounds to 5e-4


def test_rounds_like_torchs_kernel() -> None:
    """Round the weights, the image between the two axes, and the output."""
    x = torch.randn(2, 3, 16, 16).bfloat16()
    out, _ = resized(Resize(size=(32, 32)), x)
    across = interpolate(torch.eye(16)[None, None], (32, 16), mode="bicubic", antialias=True)
    weights = across[0, 0].bfloat16().double()
    between = (x.double() @ weights.T).bfloat16().double()
    assert error_of(out, weights @ between) < 2**-8


@pytest.mark.parametrize(
    "options",
    [
        {"antialias": False},
        {"scale_factor": 2.0},
        {"size": (300, 16), "width": 300},
        {"dtype": torch.float32},
        {"mode": "bilinear", "memory_format": torch.channels_last},
    ],
    ids=str,
)
def test_leaves_unsupported_calls_to_torch(options: dict[str, Any]) -> None:
    dtype, width = options.pop("dtype", torch.float16), options.pop("width", 8)
    memory_format = options.pop("memory_format", torch.contiguous_format)
    x = torch.randn(2, 3, 8, width, dtype=dtype).to(memory_format=memory_format)
    if "scale_factor" not in options:
        options = {"size": (16, 16)} | options
    assert resized(Resize(**options), x)[0] is None


def test_leaves_small_outputs_and_other_devices_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = torch.randn(2, 3, 8, 8).half(), Resize(size=(16, 16))
    monkeypatch.setattr(resize, "_FEWEST_ELEMENTS", 2 * 3 * 16 * 16 + 1)
    assert resized(model, x)[0] is None
    monkeypatch.setattr(resize, "_FEWEST_ELEMENTS", 2 * 3 * 16 * 16)
    torch._dynamo.reset()
    assert resized(model, x)[0] is not None
    monkeypatch.setattr(dispatch, "fused_problem", lambda device: "no kernels")
    torch._dynamo.reset()
    assert resized(model, x)[0] is None


@pytest.mark.parametrize("inside", [False, True])
def test_supports_autocast(inside: bool) -> None:
    """Without care, matmuls would run in another dtype."""

    class Inside(Resize):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    x = torch.randn(2, 3, 8, 8).half()
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        assert resized((Inside if inside else Resize)(size=(16, 16)), x)[0] is None


def test_resizes_patch_embedding_of_olmoearth() -> None:
    embed = FlexiPatchEmbed(Modality.get("sentinel2_l2a"), 8, in_chans=4, embedding_size=16)
    embed.eval().requires_grad_(False)
    x = torch.randn(2, 16, 16, 3, 4)
    wanted = embed.double()(x.double(), 4)

    class Embed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return embed(x, 4)  # type: ignore[no-any-return]

    embed.bfloat16()
    out, _ = resized(Embed(), x.bfloat16())
    assert error_of(out, wanted) < 0.02


@pytest.mark.parametrize("always", [False, True])
def test_graphs_without_int8_layers_resize_as_before(always: bool) -> None:
    nodes: list[Any] = []

    def backend(module: Any, _: Any) -> Callable[..., Any]:
        nodes.extend(passes.fuse(module, always=always).graph.nodes)
        return lambda *_: (None,)

    x = torch.randn(2, 3, 8, 8).bfloat16()
    torch.compile(Resize(size=(16, 16)), backend=backend, fullgraph=True, dynamic=False)(x)
    assert any(node.target is torch.matmul for node in nodes) == always


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "new"), SIZES)
def test_matches_torchs_kernel_on_the_gpu(
    size: tuple[int, int], new: tuple[int, int], dtype: torch.dtype
) -> None:
    """Both round at the same places: errors against FP64 differ by no more than rounding weights
    twice explains."""
    x = torch.randn(2, 3, *size, dtype=dtype, device="cuda")
    model = Resize(size=new)
    out, _ = resized(model, x)
    theirs, wanted = model(x), model(x.double())
    assert out.stride() == theirs.stride()
    assert error_of(out, wanted) < 1.5 * error_of(theirs, wanted) + torch.finfo(dtype).eps / 8
    assert error_of(out, theirs.double()) < 2 * torch.finfo(dtype).eps


@pytest.mark.slow
def test_inductor_compiles_the_resize() -> None:
    """The compile cache distinguishes constants of equal shape."""
    x = torch.randn(2, 3, 16, 16).bfloat16()
    for mode in ("bicubic", "bilinear"):
        compiled = compile_for_a100(Resize(size=(32, 32), mode=mode), mode="default")
        compiled.always_fuse = True
        wanted = interpolate(x.double(), (32, 32), mode=mode, antialias=True)
        assert error_of(compiled(x), wanted) < 0.005
