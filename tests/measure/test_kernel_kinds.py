"""Test classifying kernels by their names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.measure.evidence import Evidence, Kernel
from pytest_int8bench.measure.kernel_kinds import Breakdown, break_down, kind_of, shortest_s

INT8 = [
    "void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_128x64_128x3_tn_align16>",
    "sm90_xmma_gemm_i8i8_i8i32_i32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
    "triton_tem_fused__int_mm_3",
    "triton_tem_fused__int_mm__to_copy_add_mul_12",
    "int8_product_specialized",
    "int8_product_tma",
    "int8_product_pointers",
    "_int8_product_kernel",
]
PRODUCTS = [
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN",
    "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
    "nvjet_tst_64x8_64x16_1x1_v_bz_splitK_TNN",
    "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
    "ampere_sgemm_128x64_tn",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
    "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x32_stage4_warpsize2x2x1_tensor16x8x16",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128_32x5_tn_align8>",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16>",
    "void gemmSN_TN_kernel<float, 128, 16, 2, 4, 6, 10, false>",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, true, false>",
    "triton_tem_fused_addmm_gelu_2",
    "triton_mm_plus_mm_1",
]
ATTENTION = [
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::bf16>",
    "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 64, 256, 4>>",
    "void pytorch_flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<64, 64, 256, 4>>",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>::Params)",
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<cutlass::gemm::X>>>",
    "triton_tem_fused_flex_attention_0",
]
REST = [
    "triton_poi_fused_gelu_view_9",
    "triton_per_fused__to_copy_add_native_layer_norm_3",
    "triton_red_fused__int_mm__to_copy_amax_clamp_div_round_4",
    "triton_poi_fused__int_mm_mul_add_7",
    "triton_poi_fused_addmm_gelu_1",
    "triton_poi_fused__scaled_dot_product_flash_attention_clone_2",
    "quantize_rows",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>",
    "void at::native::(anonymous namespace)::softmax_warp_forward<float, float, float, 10, false>",
    "Memcpy HtoD (Pinned -> Device)",
    "Memset (Device)",
    "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x128_32x5>",
    "void implicit_convolve_sgemm<float, float, 128, 6, 7, 3, 3, 5, 0, false, true, true>",
    "triton_tem_fused_convolution_4",
]
KINDS = {"int8_products": INT8, "other_products": PRODUCTS, "attention": ATTENTION, "rest": REST}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for kind, names in KINDS.items() for name in names]
)
def test_classifies_kernels(name: str, kind: str) -> None:
    split = break_down(Evidence((Kernel(name, 0.25, 1),)))
    assert split.to_dict() == {
        "int8_products": 0.0,
        "other_products": 0.0,
        "attention": 0.0,
        "rest": 0.0,
        kind: 0.25,
    }
    assert kind == "int8_products" or kind_of(name) == kind


@given(
    st.lists(
        st.tuples(st.sampled_from(INT8 + PRODUCTS + ATTENTION + REST), st.floats(1e-7, 1.0)),
        min_size=1,
        unique_by=lambda row: row[0],
    )
)
def test_parts_add_up_to_total_time(rows: list[tuple[str, float]]) -> None:
    evidence = Evidence(tuple(Kernel(name, seconds, 2) for name, seconds in rows))
    split = break_down(evidence)
    assert split.total_s == pytest.approx(evidence.total_s)
    assert split.int8_products == pytest.approx(evidence.int8_time_share * evidence.total_s)
    assert shortest_s(evidence) == min(seconds for _, seconds in rows) / 2


def test_matmul_time_includes_int8_and_other_matmuls() -> None:
    assert Breakdown(1.0, 2.0, 4.0, 8.0).products_s == 3.0
