"""Test what kernel names prove about a label."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pytest_int8bench.kernels import table
from pytest_int8bench.measure.evidence import (
    Evidence,
    EvidenceError,
    Kernel,
    check_labels,
    profile_forward,
)
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import apply_int8_quant

GEMM_INT8 = "void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_128x64_128x3_tn_align16>"
GEMM_BF16 = "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN"
FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>"

W8A8 = RunParams(int8_enabled=True)
W8 = RunParams(int8_enabled=True, int8_mode="w8")
# The hint that errors add on CUDA.
ROWS = " (on CUDA, matmuls of 16 rows or fewer run in floating point)"
BF16 = RunParams()
SHORT, SHORT_INT8 = (
    BF16.replace(attention="short"),
    W8A8.replace(attention="short", int8_attention=True),
)


def ran(*names: str) -> Evidence:
    return Evidence(tuple(Kernel(name, 1e-3, 1) for name in names))


# -- INT8 matmuls -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        GEMM_INT8,
        "cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16",
        "aten::_int_mm",
        "sm90_xmma_gemm_i8i8_i8i32_i32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
        "sm80_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize128x128x64_stage3_igemm",
        "ampere_int8_i16832gemm_int8_128x128_ldg16_stages_64x3_tn",
        "triton_tem_fused__int_mm_3",
        "triton_mm_int_mm_0",
        "onednn::qlinear_pointwise",
    ],
)
def test_recognizes_int8_matmuls(name: str) -> None:
    evidence = ran(GEMM_BF16, name)
    assert [kernel.name for kernel in evidence.int8_products] == [name]
    assert evidence.int8_time_share == 0.5


@pytest.mark.parametrize(
    "name",
    [
        GEMM_BF16,
        "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x32_stage4_warpsize2x2x1",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128_32x5_tn>",
        "triton_tem_fused_addmm_gelu_2",
        "aten::addmm",
        "aten::minimum",
        FLASH,
        "triton_poi_fused_gelu_view_9",
        # Fused around a matmul: quantizing before it, scaling after it.
        "triton_red_fused__int_mm__to_copy_amax_clamp_div_round_4",
        "triton_per_fused__int_mm__to_copy_abs_amax_1",
        "triton_poi_fused__int_mm_mul_add_7",
        "triton_for_fused__int_mm_mul_2",
    ],
)
def test_other_kernels_are_not_int8_matmuls(name: str) -> None:
    evidence = ran(name)
    assert evidence.int8_products == ()
    assert evidence.int8_time_share == 0


@given(st.lists(st.tuples(st.booleans(), st.floats(1e-9, 1.0)), min_size=1, max_size=20))
def test_int8_share_is_relative_to_total_time(rows: list[tuple[bool, float]]) -> None:
    kernels = tuple(
        Kernel("aten::_int_mm" if int8 else "aten::mm", seconds, 1) for int8, seconds in rows
    )
    evidence = Evidence(kernels)
    inside = sum(seconds for int8, seconds in rows if int8)
    outside = sum(seconds for int8, seconds in rows if not int8)
    assert evidence.total_s == pytest.approx(inside + outside)
    assert evidence.int8_time_share == pytest.approx(inside / (inside + outside))
    assert 0 <= evidence.int8_time_share <= 1


def test_longest_kernels_are_summarized_in_one_line() -> None:
    evidence = Evidence((Kernel("a" * 100, 2e-3, 1), Kernel("b", 1e-6, 1), Kernel("c", 1e-7, 1)))
    assert evidence.top(2) == "a" * 80 + " 2000 us, b 1 us"


def test_fused_kernels_do_not_identify_attention_backend() -> None:
    around = "triton_poi_fused__scaled_dot_product_flash_attention__to_copy_add_clone"
    assert ran(around).attention_kernel is None
    assert ran(around, "aten::_scaled_dot_product_attention_math").attention_kernel == "math"
    assert ran(around, FLASH).attention_kernel == "flash"


# -- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "evidence", "stored"),
    [
        (W8A8, ran(GEMM_INT8, FLASH), (24, 24)),
        (W8A8, ran(GEMM_INT8), (24, 24)),  # a model without attention
        (W8, ran(GEMM_BF16, FLASH), (24, 24)),  # dequantized: INT8 storage is the proof
        (W8, ran("aten::_weight_int8pack_mm"), (1, 1)),
        (BF16, ran(GEMM_BF16, FLASH), (0, 0)),
        (BF16.replace(attention="auto"), ran("fmha_cutlassF_bf16_aligned_64x64_rf_sm80"), (0, 0)),
        (
            W8A8.replace(int8_attention=True),
            ran(GEMM_INT8, "int8bench::int8_attention", "int8bench::quantize_heads", FLASH),
            (24, 24),
        ),
        (
            BF16.replace(attention="cudnn"),
            ran("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"),
            (0, 0),
        ),
        (SHORT, ran(FLASH, "short_attention"), (0, 0)),  # another call was too long
        (SHORT_INT8, ran(GEMM_INT8, "int8_attention", "int8bench::short_attention"), (24, 24)),
    ],
    ids=[
        *("w8a8", "w8a8-no-attention", "w8", "w8-packed", "bf16", "auto", "int8-attention"),
        *("cudnn", "short", "int8-and-short"),
    ],
)
def test_accepts_matching_labels(
    params: RunParams, evidence: Evidence, stored: tuple[int, int]
) -> None:
    check_labels(evidence, params, stored)


FUSED = "int8_product_tma"


@pytest.mark.parametrize("kernel", [row.function for row in table.kernels_of("linear")])
def test_recognizes_int8_matmuls_of_the_fused_backend(kernel: str) -> None:
    evidence = ran(GEMM_BF16, kernel, "quantize_rows", FLASH)
    assert [found.name for found in evidence.int8_products] == [kernel]
    check_labels(evidence, W8A8, (24, 24), fused=True)
    # Unsupported layers ran torchao's kernels.
    check_labels(ran(kernel, GEMM_INT8), W8A8, (24, 24), fused=True)


@pytest.mark.parametrize(
    ("names", "fused", "message"),
    [
        (
            (GEMM_INT8,),
            True,
            (
                f"{W8A8.run_name} is labelled int8_backend=fused, but none of its kernels ran; "
                f"kernels: {GEMM_INT8[:80]} 1000 us"
            ),
        ),
        (
            (FUSED, GEMM_INT8),
            False,
            (
                f"{W8A8.run_name} is labelled int8_backend=torchao, but {FUSED} ran; "
                f"kernels: {FUSED} 1000 us, {GEMM_INT8[:80]} 1000 us"
            ),
        ),
        (
            ("quantize_rows",),
            True,
            (
                f"{W8A8.run_name} is labelled W8A8, but no INT8 matmul ran{ROWS}; "
                "kernels: quantize_rows 1000 us"
            ),
        ),
    ],
)
def test_rejects_wrong_backend(names: tuple[str, ...], fused: bool, message: str) -> None:
    with pytest.raises(EvidenceError) as caught:
        check_labels(ran(*names), W8A8, (24, 24), fused=fused)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("params", "evidence", "stored", "message"),
    [
        (
            W8A8,
            ran(GEMM_BF16, FLASH),
            (24, 24),
            (
                f"{W8A8.run_name} is labelled W8A8, but no INT8 matmul ran{ROWS}; "
                f"kernels: {GEMM_BF16} 1000 us, {FLASH[:80]} 1000 us"
            ),
        ),
        (
            W8A8,
            ran("triton_poi_fused__int_mm_mul_add_7"),
            (24, 24),
            (
                f"{W8A8.run_name} is labelled W8A8, but no INT8 matmul ran{ROWS}; "
                "kernels: triton_poi_fused__int_mm_mul_add_7 1000 us"
            ),
        ),
        (
            W8,
            ran(GEMM_BF16),
            (3, 24),
            f"{W8.run_name}: 3 of 24 quantized layers store INT8 weights",
        ),
        (
            W8A8,
            ran(GEMM_INT8),
            (0, 0),
            f"{W8A8.run_name}: 0 of 0 quantized layers store INT8 weights",
        ),
        (
            BF16,
            ran(GEMM_BF16, GEMM_INT8),
            (0, 0),
            f"{BF16.run_name} is a baseline, but {GEMM_INT8} ran",
        ),
        (
            BF16,
            ran(GEMM_BF16),
            (1, 1),
            f"{BF16.run_name} is a baseline, but 1 layers are quantized",
        ),
        (W8, ran(GEMM_INT8), (24, 24), f"{W8.run_name} is labelled W8, but {GEMM_INT8} ran"),
        (
            W8A8,
            ran("aten::_weight_int8pack_mm"),  # INT8 weights, 16-bit activations
            (24, 24),
            (
                f"{W8A8.run_name} is labelled W8A8, but no INT8 matmul ran{ROWS}; "
                "kernels: aten::_weight_int8pack_mm 1000 us"
            ),
        ),
        (
            BF16.replace(attention="cudnn"),
            ran(FLASH),
            (0, 0),
            (
                f"{BF16.replace(attention='cudnn').run_name} asked for cudnn attention, "
                f"but flash ran; kernels: {FLASH[:80]} 1000 us"
            ),
        ),
        (
            W8A8.replace(int8_attention=True),
            ran(GEMM_INT8, FLASH),
            (24, 24),
            (
                f"{W8A8.replace(int8_attention=True).run_name} is labelled int8_attention=True, "
                f"but none of its kernels ran; kernels: {GEMM_INT8[:80]} 1000 us, "
                f"{FLASH[:80]} 1000 us"
            ),
        ),
        (
            W8A8,
            ran(GEMM_INT8, "int8_attention"),
            (24, 24),
            (
                f"{W8A8.run_name} is labelled int8_attention=False, but int8_attention ran; "
                f"kernels: {GEMM_INT8[:80]} 1000 us, int8_attention 1000 us"
            ),
        ),
        (
            W8A8,
            ran(GEMM_INT8, "aten::_scaled_dot_product_attention_math"),
            (24, 24),
            (
                f"{W8A8.run_name} asked for flash attention, but math ran; kernels: "
                f"{GEMM_INT8[:80]} 1000 us, aten::_scaled_dot_product_attention_math 1000 us"
            ),
        ),
        (
            SHORT,
            ran("triton_poi_fused_short_attention_0"),  # named after the fused operators
            (0, 0),
            (
                f"{SHORT.run_name} asked for short attention, but no known backend ran; "
                "kernels: triton_poi_fused_short_attention_0 1000 us"
            ),
        ),
        (
            BF16,
            ran("short_attention"),
            (0, 0),
            (
                f"{BF16.run_name} asked for flash attention, but short ran; "
                "kernels: short_attention 1000 us"
            ),
        ),
        (
            SHORT_INT8,
            ran(GEMM_INT8, "short_attention"),
            (24, 24),
            (
                f"{SHORT_INT8.run_name} is labelled int8_attention=True, but none of its kernels "
                "ran (attention=short computes sequences of up to 128 tokens instead); "
                f"kernels: {GEMM_INT8[:80]} 1000 us, short_attention 1000 us"
            ),
        ),
    ],
    ids=[
        "no-product",
        "only-fused",
        "storage",
        "no-layer",
        "baseline",
        "baseline-quantized",
        "w8-product",
        "w8a8-packed",
        "no-int8-attention",
        "int8-attention",
        "attention",
        "math",
        "not-short",
        "short",
        "int8-left-to-short",
    ],
)
def test_rejects_labels_that_contradict_the_kernels(
    params: RunParams, evidence: Evidence, stored: tuple[int, int], message: str
) -> None:
    with pytest.raises(EvidenceError, match=f"^{re.escape(message)}$"):
        check_labels(evidence, params, stored)


# -- profiling ----------------------------------------------------------------------------------


def test_profile_of_int8_layer_shows_int8_matmul() -> None:
    layer = nn.ModuleDict({"fc1": nn.Linear(64, 64, dtype=torch.bfloat16)})
    apply_int8_quant(layer.requires_grad_(False), mode="w8a8")
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    evidence = profile_forward(lambda: layer["fc1"](x), torch.device("cpu"))

    [product] = evidence.int8_products
    assert product.name == "aten::_int_mm"
    assert product.calls == 1
    assert 0 < evidence.int8_time_share < 1
    assert evidence.attention_kernel is None
    seconds = [kernel.seconds for kernel in evidence.kernels]
    assert seconds == sorted(seconds, reverse=True)
    assert min(seconds) > 0
    assert evidence.total_s == pytest.approx(sum(seconds))
    check_labels(evidence, W8A8, (1, 1))


def test_checks_the_backend_chosen_by_auto() -> None:
    evidence = ran(FLASH)
    auto = BF16.replace(attention="auto")
    for attention in (None, "auto", "flash"):
        check_labels(evidence, auto, (0, 0), attention)
    with pytest.raises(EvidenceError, match=r" asked for cudnn attention, but flash ran; "):
        check_labels(evidence, auto, (0, 0), "cudnn")


def test_profile_of_bf16_layer_shows_no_int8_matmul() -> None:
    layer = nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    evidence = profile_forward(lambda: layer(x), torch.device("cpu"))
    assert "aten::addmm" in [kernel.name for kernel in evidence.kernels]
    assert evidence.int8_products == ()
    check_labels(evidence, BF16, (0, 0))


def test_copies_between_host_and_device_are_not_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a simulated device profile."""
    names = {
        "Memcpy HtoD (Pinned -> Device)": 500.0,
        "Memcpy DtoH (Device -> Pageable)": 50.0,
        "Memcpy DtoD (Device -> Device)": 10.0,
        GEMM_INT8: 30.0,
    }
    rows = [
        SimpleNamespace(
            key=name,
            device_type=SimpleNamespace(name="CUDA"),
            is_user_annotation=False,
            self_device_time_total=micros,
            count=1,
        )
        for name, micros in names.items()
    ]
    profiler = SimpleNamespace(key_averages=lambda: rows)
    monkeypatch.setattr(
        "pytest_int8bench.measure.evidence.profile", lambda **_: contextlib.nullcontext(profiler)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    evidence = profile_forward(lambda: None, torch.device("cuda"))
    # Copies within the device belong to the model.
    assert [kernel.name for kernel in evidence.kernels] == [
        GEMM_INT8,
        "Memcpy DtoD (Device -> Device)",
    ]
    assert evidence.total_s == pytest.approx(40e-6)
    assert evidence.int8_time_share == pytest.approx(0.75)


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_a_profile_shows_the_attention_backend(backend: str) -> None:
    from pytest_int8bench.attention import FlashSDPA

    query = torch.randn(1, 2, 16, 16)

    def run() -> torch.Tensor:
        with FlashSDPA(backend):
            return nn.functional.scaled_dot_product_attention(query, query, query)

    assert profile_forward(run, torch.device("cpu")).attention_kernel == backend


def test_rejects_profile_without_kernels() -> None:
    with pytest.raises(
        EvidenceError, match=r"^the profiler saw no kernel on cpu, so the label is unproven$"
    ):
        profile_forward(lambda: None, torch.device("cpu"))
