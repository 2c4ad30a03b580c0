"""Test the table of attention backends: allow one at a time, and recognize the one that ran."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pytest_int8bench import attention
from pytest_int8bench.attention import (
    BACKENDS,
    Backend,
    FlashSDPA,
    attention_kernel,
    backends_of,
    general_backends,
    impossible_reason,
    is_attention_kernel,
    sdpa_backends,
)
from pytest_int8bench.choices import ATTENTION_BACKENDS, DEVICES
from pytest_int8bench.measure.attention_auto import fastest_backend, recorded_calls
from pytest_int8bench.measure.kernel_kinds import kind_of

ALL = {"flash", "efficient", "math", "cudnn"}


def enabled() -> set[str]:
    backends = torch.backends.cuda
    flags = {
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(),
    }
    return {name for name, on in flags.items() if on}


@pytest.mark.parametrize(
    ("attention", "allowed"),
    [
        ("flash", {"flash"}),
        ("cudnn", {"cudnn"}),
        ("efficient", {"efficient"}),
        ("math", {"math"}),
        ("short", ALL),  # calls that our kernel does not support
        ("auto", ALL),
    ],
)
def test_allows_one_backend_and_restores_others(attention: str, allowed: set[str]) -> None:
    before = enabled()
    with FlashSDPA(attention):
        assert enabled() == allowed
    assert enabled() == before


def test_flash_is_the_default() -> None:
    with FlashSDPA() as context:
        assert enabled() == {"flash"}
    assert context.attention == "flash"


def test_restores_outer_settings() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlashSDPA("flash"):
            assert enabled() == {"flash"}
        assert enabled() == {"math"}


def test_restores_state_after_an_exception() -> None:
    before = enabled()
    with pytest.raises(KeyError), FlashSDPA("math"):
        raise KeyError
    assert enabled() == before


def test_contexts_nest() -> None:
    with FlashSDPA("flash"):
        with FlashSDPA("math"):
            assert enabled() == {"math"}
        assert enabled() == {"flash"}


def test_context_is_reusable_and_reentrant() -> None:
    before = enabled()
    flash, math = FlashSDPA("flash"), FlashSDPA("math")
    for _ in range(2):
        with flash:
            with math, flash:
                assert enabled() == {"flash"}
            assert enabled() == {"flash"}
        assert enabled() == before


def test_raises_if_the_backend_does_not_support_the_inputs() -> None:
    query = torch.randn(1, 2, 8, 16)
    # On the CPU, flash attention does not support masks that require gradients.
    mask = torch.zeros(8, 8, requires_grad=True)
    assert scaled_dot_product_attention(query, query, query, mask).shape == query.shape
    with (
        FlashSDPA("flash"),
        pytest.warns(UserWarning, match="Flash attention kernel not used"),
        pytest.raises(RuntimeError, match="No available kernel"),
    ):
        scaled_dot_product_attention(query, query, query, mask)


def test_every_attention_name_has_backends() -> None:
    assert all(sdpa_backends(name) for name in ATTENTION_BACKENDS)


@pytest.mark.parametrize("make", [FlashSDPA, sdpa_backends])
def test_rejects_unknown_backend(make: type[FlashSDPA]) -> None:
    message = "attention must be one of flash, cudnn, efficient, math, short, auto, got 'xformers'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make("xformers")


@pytest.mark.parametrize(
    ("backend", "kernel"),
    [
        (
            "flash",
            (
                "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, "
                "false, false, cutlass::bfloat16_t>, false, false>(pytorch_flash::Flash_fwd_params)"
            ),
        ),
        ("flash", "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64>>"),
        ("flash", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("flash", "aten::_scaled_dot_product_flash_attention"),
        (
            "cudnn",
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1",
        ),
        (
            "cudnn",
            "cudnn_generated_fort_native_sdpa_sm80_flash_fprop_f16_knob_3_64x64x64_4x1x1_kernel0_0",
        ),
        ("cudnn", "aten::_scaled_dot_product_cudnn_attention"),
        ("efficient", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::Params)"),
        ("efficient", "aten::_scaled_dot_product_efficient_attention"),
        ("math", "aten::_scaled_dot_product_attention_math"),
        ("short", "short_attention"),
        ("short", "int8bench::short_attention"),
    ],
)
def test_kernel_names_identify_backends(backend: str, kernel: str) -> None:
    others = ["nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "aten::addmm", "triton_poi_fused_gelu_0"]
    assert attention_kernel([*others, kernel]) == backend


@pytest.mark.parametrize(
    "kernel",
    [
        "aten::scaled_dot_product_attention",  # the entry point of every backend
        "aten::mm",
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN",
        "triton_red_fused_native_layer_norm_2",
        # Heads and routers also use softmax.
        "void (anonymous namespace)::softmax_warp_forward<c10::BFloat16, c10::BFloat16, float, 6>",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, c10::BFloat16, float>",
        # Fused kernels are named after the surrounding operators.
        "triton_poi_fused__scaled_dot_product_flash_attention__to_copy_add_clone",
        "triton_poi_fused__scaled_dot_product_cudnn_attention_transpose_1",
        "triton_poi_fused__scaled_dot_product_efficient_attention_view_3",
        "triton_poi_fused_short_attention_view_3",
    ],
)
def test_other_kernels_identify_no_backend(kernel: str) -> None:
    assert attention_kernel([kernel]) is None


def test_our_kernels_take_precedence_over_other_attention_kernels() -> None:
    flash = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>"
    assert attention_kernel([flash, "short_attention"]) == "short"
    assert attention_kernel([flash, "short_attention", "int8_attention"]) == "int8"


def test_no_kernels_identify_no_backend() -> None:
    assert attention_kernel([]) is None


# -- the table ----------------------------------------------------------------------------------


def test_table_matches_the_names_in_choices() -> None:
    assert (*BACKENDS, "auto") == ATTENTION_BACKENDS
    assert {device for backend in BACKENDS.values() for device in backend.dtypes} == set(DEVICES)


@pytest.mark.parametrize(
    ("name", "device", "bf16", "reason"),
    [
        ("flash", "cuda", True, None),
        ("flash", "cuda", False, "flash attention takes 16-bit inputs only, bf16=False"),
        ("flash", "cpu", False, None),
        ("cudnn", "cuda", False, "cudnn attention takes 16-bit inputs only, bf16=False"),
        ("cudnn", "cpu", True, "attention=cudnn exists on CUDA only, gpu_type=cpu"),
        ("efficient", "cpu", False, "attention=efficient exists on CUDA only, gpu_type=cpu"),
        ("efficient", "cuda", False, None),
        ("math", "cpu", False, None),
        ("short", "cuda", True, None),
        ("short", "cuda", False, "short attention takes 16-bit inputs only, bf16=False"),
        ("short", "cpu", True, "attention=short exists on CUDA only, gpu_type=cpu"),
        ("auto", "cpu", False, None),
    ],
)
def test_says_why_a_backend_cannot_run(
    name: str, device: str, bf16: bool, reason: str | None
) -> None:
    assert impossible_reason(name, device, bf16=bf16) == reason


def test_new_row_is_allowed_timed_and_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Backend(
        sdpa=("MATH",),
        dtypes={"cpu": ("bfloat16",)},
        kernels=re.compile("toy_attention"),
        is_general=True,
    )
    monkeypatch.setattr(attention, "BACKENDS", {"toy": toy, **BACKENDS})
    with FlashSDPA("toy"):
        assert enabled() == {"math"}
    assert backends_of("cpu") == ["toy", "flash", "math"]
    assert general_backends() == ["toy", "efficient", "math"]
    assert attention_kernel(["aten::mm", "toy_attention_fwd"]) == "toy"
    assert is_attention_kernel("toy_attention_fwd")
    assert kind_of("toy_attention_fwd") == "attention"
    reason = "toy attention takes 16-bit inputs only, bf16=False"
    assert impossible_reason("toy", "cpu", bf16=False) == reason
    message = "attention=toy exists on CPU only, gpu_type=cuda"
    assert impossible_reason("toy", "cuda", bf16=True) == message
    with pytest.raises(
        ValueError, match="must be one of toy, flash, cudnn, efficient, math, short, auto"
    ):
        FlashSDPA("xformers")
    # With a timer that does not advance, the first row is chosen.
    query = torch.randn(1, 2, 8, 16)
    calls = recorded_calls(lambda: scaled_dot_product_attention(query, query, query))
    assert fastest_backend(calls, lambda: 0.0) == "toy"


def test_table_does_not_load_torch() -> None:
    code = "import sys, pytest_int8bench.attention; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
