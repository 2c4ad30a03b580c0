"""Test apply_int8_quant: which layers it selects, its accuracy, reports and errors."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    MappingType,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.fusion import passes
from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.kernels import dispatch
from pytest_int8bench.kernels.linear import Int8Linear, WeightOnlyLinear
from pytest_int8bench.measure.building import build_eager
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import apply_int8_quant, coverage, weight_storage
from pytest_int8bench.quantization.coverage import Coverage, Layer
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.quantization.lowering import lower
from pytest_int8bench.quantization.modes import MODES
from pytest_int8bench.quantization.weights import DequantizedInt8Weight, Int8Weight
from pytest_int8bench.tensors import call, tensors_of
from pytest_int8bench.workloads.registry import load_workload
from toys.models import Attention, Mlp

DIM = 64


class Transformer(nn.Module):
    """Embedding, one block and head; the default filter selects 6 of 8 linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(8, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.attn = Attention(DIM, heads=4)
        self.mlp = Mlp(DIM, 2 * DIM)
        self.head = nn.Linear(DIM, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        x = x + self.attn(self.norm(x))
        return self.head(x + self.mlp(self.norm(x)))


CONVERTED = ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"]


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer().eval().requires_grad_(False).to(torch.bfloat16)


@pytest.fixture
def batch() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 32, 8, generator=generator).to(torch.bfloat16)


def sqnr_db(reference: torch.Tensor, output: torch.Tensor) -> float:
    reference, output = reference.double(), output.double()
    noise = (reference - output).square().sum()
    return (10 * torch.log10(reference.square().sum() / noise)).item()


# -- the default filter -------------------------------------------------------------------------

OLMOEARTH = [f"encoder.blocks.0.attn.{leaf}" for leaf in ("q", "k", "v", "proj")] + [
    "encoder.blocks.11.mlp.fc1",
    "encoder.blocks.11.mlp.fc2",
]
TIMM = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
BERT = [
    "bert.encoder.layer.0.attention.self.query",
    "bert.encoder.layer.0.attention.self.key",
    "bert.encoder.layer.0.attention.self.value",
    "bert.encoder.layer.0.attention.output.dense",
    "bert.encoder.layer.0.intermediate.dense",
    "bert.encoder.layer.0.output.dense",
]
HF_VIT = [
    "vit.encoder.layer.3.attention.attention.query",
    "vit.encoder.layer.3.attention.output.dense",
]
DISTILBERT = [
    "distilbert.transformer.layer.0.attention.q_lin",
    "distilbert.transformer.layer.0.attention.out_lin",
    "distilbert.transformer.layer.0.ffn.lin1",
    "distilbert.transformer.layer.0.ffn.lin2",
]
LLAMA = [
    *(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo"),
    *(f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
]
T5 = [
    *(f"encoder.block.0.layer.0.SelfAttention.{leaf}" for leaf in "qkvo"),
    "encoder.block.0.layer.1.DenseReluDense.wi",
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
    "encoder.block.0.layer.1.DenseReluDense.wo",
]
FALCON = [
    "transformer.h.0.self_attention.query_key_value",
    "transformer.h.0.self_attention.dense",
    "transformer.h.0.mlp.dense_h_to_4h",
    "transformer.h.0.mlp.dense_4h_to_h",
]
SEGMENT = [
    "image_encoder.blocks.0.attn.qkv",
    "image_encoder.blocks.0.mlp.lin1",
    "image_encoder.blocks.0.mlp.lin2",
    "mask_decoder.transformer.layers.0.self_attn.q_proj",
    "blocks.0.mlp.w_1",
    "blocks.0.mlp.w_2",
    "blocks.0.mlp.w_3",
    "blocks.0.mlp.w12",
    "blocks.0.mlp.w3",
]
OTHERS = [
    "layers.0.linear1",  # nn.TransformerEncoderLayer
    "layers.0.linear2",
    "layers.0.attn.to_q",  # diffusers
    "layers.0.attn.to_out.0",
    "layers.0.ff.net.0.proj",
    "layers.0.mlp.0",  # nn.Sequential
    "layers.0.feed_forward.2",
    "decoder.layers.0.fc1",  # OPT
    "layers.0.block_sparse_moe.experts.3.w1",  # Mixtral
]
KEPT = [
    "patch_embed.proj",
    "encoder.patch_embeddings.sentinel2_l2a.proj",
    "bert.embeddings.word_embeddings",
    "embeddings.patch_embeddings.projection",
    "encoder.composite_encodings.channel_embed",
    "tokenizer.proj",
    "head",
    "head.fc",
    "lm_head",
    "classifier",
    "classifier.out_proj",
    "pre_classifier",
    "bert.pooler.dense",
    "encoder.project_and_aggregate.projection.0",
    "mask_decoder.iou_prediction_head.layers.0",
    "blocks.0.attn.q_norm",
    "blocks.0.attn.k_norm",
    "blocks.0.norm1",
    "fc_norm",
    "ln_f",
    "logits",
    "score",
    "model.layers.0.router",
    "",
]


@pytest.mark.parametrize(
    "name",
    [*OLMOEARTH, *TIMM, *BERT, *HF_VIT, *DISTILBERT, *LLAMA, *T5, *FALCON, *SEGMENT, *OTHERS],
)
def test_default_filter_selects_projections_and_mlp_layers(name: str) -> None:
    assert is_transformer_linear(nn.Linear(8, 8), name) is True


@pytest.mark.parametrize("name", KEPT)
def test_default_filter_excludes_embeddings_norms_and_heads(name: str) -> None:
    assert is_transformer_linear(nn.Linear(8, 8), name) is False


@pytest.mark.parametrize(
    "name", ["layers.0.multihead_attn.q_proj", "layers.0.multi_head_attention.out_proj"]
)
def test_multihead_attention_is_not_a_head(name: str) -> None:
    assert is_transformer_linear(nn.Linear(8, 8), name) is True


@pytest.mark.parametrize("module", [nn.LayerNorm(8), nn.Conv2d(3, 8, 4), nn.Embedding(8, 8)])
def test_default_filter_selects_only_linear_layers(module: nn.Module) -> None:
    assert is_transformer_linear(module, "blocks.0.attn.q") is False


# -- quantizing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "least_db"), [("w8a8", 25), ("w8", 35)])
def test_quantizes_in_place(
    model: Transformer, batch: torch.Tensor, mode: str, least_db: float
) -> None:
    with torch.no_grad():
        before = model(batch)
        returned = apply_int8_quant(model, mode=mode)
        after = model(batch)

    assert returned is model
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after, before)
    assert sqnr_db(before, after) > least_db
    for name in CONVERTED:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Int8Tensor)
        assert weight.qdata.dtype == torch.int8
        assert weight.shape == weight.qdata.shape
        # One scale per output channel.
        assert weight.scale.numel() == weight.shape[0]
    for name in ("patch_embed", "head"):
        assert type(model.get_submodule(name).weight) is nn.Parameter
    assert weight_storage(model) == (6, 6)


def test_only_w8a8_quantizes_activations(model: Transformer) -> None:
    weight_only = apply_int8_quant(copy.deepcopy(model), mode="w8")
    dynamic = apply_int8_quant(model, mode="w8a8")
    assert weight_only.attn.q.weight.act_quant_kwargs is None
    assert dynamic.attn.q.weight.act_quant_kwargs is not None


def test_coverage_counts_layers_and_parameters(model: Transformer) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    covered = coverage(apply_int8_quant(model))

    attention = 4 * (DIM * DIM + DIM)
    mlp = 2 * (2 * DIM * DIM) + 2 * DIM + DIM
    assert [layer.name for layer in covered.converted] == CONVERTED
    assert covered.converted_parameters == attention + mlp
    assert covered.total_parameters == total
    assert covered.left_out == (
        Layer("patch_embed", 9 * DIM, "filtered"),
        Layer("head", (DIM + 1) * 16, "filtered"),
    )
    assert covered.to_dict() == {
        "mode": "w8a8",
        "converted_layers": 6,
        "linear_layers": 8,
        "converted_parameters": attention + mlp,
        "total_parameters": total,
        "left_out": {"patch_embed": "filtered", "head": "filtered"},
        "fused_layers": 0,
        "fallbacks": {},
        "smoothed_folded": {},
        "smoothed_runtime": [],
    }
    share = (attention + mlp) / total
    assert str(covered) == (
        f"6 of 8 linear layers in INT8 (w8a8), {attention + mlp:,} of {total:,} parameters "
        f"({share:.1%}); left out: 2 filtered"
    )


def test_coverage_lists_layers_kept_by_multihead_attention() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "fc1": nn.Linear(16, 16)})
    covered = coverage(apply_int8_quant(model.eval()))
    inside = "type: inside nn.MultiheadAttention"
    assert covered.layers == (
        Layer("attn.in_proj", 3 * 16 * 16 + 3 * 16, inside),
        Layer("attn.out_proj", 16 * 16 + 16, inside),
        Layer("fc1", 16 * 16 + 16),
    )


def test_coverage_of_a_compiled_model_is_that_of_its_model(model: Transformer) -> None:
    apply_int8_quant(model, mode="w8")
    assert coverage(compile_for_a100(model, mode="off")) is coverage(model)


def test_coverage_reads_a_model_that_torchao_quantized(model: Transformer) -> None:
    quantize_(
        model,
        Int8WeightOnlyConfig(set_inductor_config=False),
        filter_fn=lambda module, name: name == "mlp.fc1",
    )
    covered = coverage(model)
    assert covered.mode == "custom"
    assert [layer.name for layer in covered.converted] == ["mlp.fc1"]
    assert {layer.reason for layer in covered.left_out} == {"not quantized"}


def test_coverage_of_a_model_with_an_attribute_named_model(model: Transformer) -> None:
    class CausalLM(nn.Module):
        """Like Hugging Face's: the body is ``model``, next to the head."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.lm_head = nn.Linear(16, 8, dtype=torch.bfloat16)

    whole = CausalLM()
    quantize_(
        whole,
        Int8WeightOnlyConfig(set_inductor_config=False),
        filter_fn=lambda module, name: name == "lm_head",
    )
    covered = coverage(whole)
    assert [layer.name for layer in covered.converted] == ["lm_head"]
    assert covered.layers[0].name == "model.patch_embed"
    assert len(covered.layers) == 9


def test_a_custom_filter_composes_with_the_default_one(model: Transformer) -> None:
    def custom_filter(module: nn.Module, name: str) -> bool:
        if "patch_embed" in name:
            return False
        if "head" in name or "classifier" in name:
            return False
        if name.endswith("fc2"):
            return False
        return is_transformer_linear(module, name)

    apply_int8_quant(model, mode="w8a8", filter_fn=custom_filter, smoothquant=False)
    assert [layer.name for layer in coverage(model).converted] == CONVERTED[:-1]


def test_custom_filter_may_select_layers_the_default_skips(model: Transformer) -> None:
    apply_int8_quant(model, mode="w8", filter_fn=lambda module, name: name == "head")
    assert [layer.name for layer in coverage(model).converted] == ["head"]


@pytest.mark.parametrize("mode", ["w8a8", "w8"])
def test_does_not_change_settings_of_inductor_and_torch(model: Transformer, mode: str) -> None:
    import torch._inductor.config as inductor

    def settings() -> tuple[Any, ...]:
        return (
            inductor.get_config_copy(),
            torch.get_float32_matmul_precision(),
            torch._dynamo.config.get_config_copy(),
            torch.get_rng_state().tolist(),
        )

    before = settings()
    apply_int8_quant(model, mode=mode)
    assert settings() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_excludes_layers_of_shapes_the_cuda_matmul_does_not_support() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(64, 64), "fc2": nn.Linear(64, 20)})
    model.to("cuda", torch.bfloat16)
    covered = coverage(apply_int8_quant(model, backend="torchao"))
    assert covered.layers == (
        Layer("fc1", 65 * 64),
        Layer("fc2", 65 * 20, "shape: 64x20 is not a multiple of 8 (CUDA INT8 matmul)"),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_w8_on_cuda_dequantizes(model: Transformer, batch: torch.Tensor) -> None:
    model, batch = model.cuda(), batch.cuda()
    with torch.no_grad():
        before = model(batch)
        apply_int8_quant(model, mode="w8")
        assert sqnr_db(before, model(batch)) > 35
    assert {type(model.get_submodule(name)) for name in CONVERTED} == {WeightOnlyLinear}
    assert weight_storage(model) == (6, 6)


# -- errors --------------------------------------------------------------------------------------


def test_rejects_filter_that_selects_no_layer(model: Transformer) -> None:
    with pytest.raises(QuantizationError) as caught:
        apply_int8_quant(model, filter_fn=lambda module, name: False)
    assert str(caught.value) == (
        "no layer was converted to INT8: 8 linear layers (patch_embed, attn.q, attn.k …), "
        "left out because: not selected by the filter; select layers with filter_fn or "
        "--int8-filter"
    )
    assert weight_storage(model) == (0, 0)


def test_rejects_model_without_linear_layers() -> None:
    with pytest.raises(
        QuantizationError, match=r"^no layer was converted to INT8: the model has no linear layers$"
    ):
        apply_int8_quant(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "w4"}, "mode must be one of w8a8, w8, fp8, got 'w4'"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"alpha": -0.1}, "alpha must be from 0 to 1, got -0.1"),
        (
            {"smoothquant": True},
            "with smoothquant=True, calibration must be an iterable of inputs, got None",
        ),
        (
            {"quant_config": "int8"},
            "quant_config must be a torchao AOBaseConfig or FqnToConfig, got 'int8'",
        ),
        (
            {
                "quant_config": FqnToConfig(
                    {"mlp.fc1": Int8WeightOnlyConfig(set_inductor_config=False)}
                ),
                "smoothquant": True,
                "calibration": [],
            },
            "smoothquant=True does not support FqnToConfig",
        ),
        (
            {
                "quant_config": Int8StaticActivationInt8WeightConfig(torch.ones(1)),
                "smoothquant": True,
                "calibration": [],
            },
            (
                "smoothquant=True does not support Int8StaticActivationInt8WeightConfig with an "
                "act_quant_scale, which was measured before smoothing"
            ),
        ),
        ({"backend": "cuda"}, "backend must be one of torchao, fused, auto, got 'cuda'"),
        ({"backend": "fused"}, "int8_backend=fused: the fused kernels run on CUDA, not on cpu"),
        (
            {"backend": "fused", "mode": "w8"},
            "int8_backend=fused: the fused kernels support W8A8, not w8",
        ),
    ],
    ids=[
        *("mode", "alpha-high", "alpha-low", "no-calibration", "config"),
        *("fqn-smoothquant", "static-smoothquant", "backend", "fused-cpu", "fused-w8"),
    ],
)
def test_rejects_bad_argument(model: Transformer, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        apply_int8_quant(model, **arguments)
    assert weight_storage(model) == (0, 0)


def test_rejects_quantized_model(model: Transformer) -> None:
    apply_int8_quant(model)
    with pytest.raises(QuantizationError, match=r"^the model is already quantized \(attn\.q is\)$"):
        apply_int8_quant(model, mode="w8")


def test_rejects_calibration_without_batches(model: Transformer) -> None:
    with pytest.raises(QuantizationError) as caught:
        apply_int8_quant(model, smoothquant=True, calibration=[])
    assert str(caught.value) == (
        "calibration did not run 6 of 6 layers (first: attn.q): "
        "it must have at least one batch that runs every layer"
    )


def test_names_layer_missed_by_calibration(batch: torch.Tensor) -> None:
    class Skips(Transformer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(self.patch_embed(x))

    with pytest.raises(QuantizationError) as caught:
        apply_int8_quant(
            Skips().eval().to(torch.bfloat16), smoothquant=True, calibration=[(batch,)]
        )
    assert str(caught.value) == (
        "calibration did not run 2 of 6 layers (first: mlp.fc1): "
        "it must have at least one batch that runs every layer; if the model never calls them, "
        "exclude them with filter_fn or --int8-filter: mlp.fc1, mlp.fc2"
    )


# -- SmoothQuant --------------------------------------------------------------------------------

OUTLIERS = [3, 17, 40]


class Outliers(nn.Module):
    """One layer whose input is far larger in three channels than in the others."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, DIM)
        gain = torch.ones(DIM)
        gain[OUTLIERS] = 50.0
        self.register_buffer("gain", gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc1(x * self.gain)


class Transposed(Outliers):
    """The same, with a non-contiguous layer input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = (x * self.gain).transpose(-1, -2).contiguous().transpose(-1, -2)
        assert not turned.is_contiguous()
        return self.fc1(turned)


class Normed(nn.Module):
    """The same after a norm, into three layers with different weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        with torch.no_grad():
            self.norm.weight[OUTLIERS] = 50.0
            self.k.weight.mul_(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return torch.cat([self.q(h), 10 * self.k(h), self.v(h)], -1)


def made(kind: type[nn.Module], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False).to(dtype)


@pytest.mark.parametrize("kind", [Outliers, Transposed, Normed])
@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_smoothquant_helps(kind: type[nn.Module], wrap: Callable[[torch.Tensor], Any]) -> None:
    model = made(kind)
    x = torch.randn(256, DIM).to(torch.bfloat16)
    seen = torch.randn(256, DIM).to(torch.bfloat16)
    with torch.no_grad():
        reference = model(x)
        plain = apply_int8_quant(copy.deepcopy(model))(x)
        smooth = apply_int8_quant(
            copy.deepcopy(model), smoothquant=True, calibration=iter([wrap(seen)])
        )
        assert sqnr_db(reference, smooth(x)) > sqnr_db(reference, plain) + 4
    assert not any(module._forward_pre_hooks for module in smooth.modules())


def test_outlier_channels_are_scaled_down_before_the_matmul() -> None:
    x = torch.randn(256, DIM).to(torch.bfloat16)
    model = apply_int8_quant(made(Outliers), smoothquant=True, calibration=[x])
    assert type(model.fc1) is nn.Linear
    scale = model.fc1.weight.act_pre_scale
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (DIM,))
    assert set(scale.topk(len(OUTLIERS), largest=False).indices.tolist()) == set(OUTLIERS)

    model = apply_int8_quant(made(Normed), smoothquant=True, calibration=[x])
    scale = model.q.weight.act_pre_scale
    assert set(scale.topk(len(OUTLIERS), largest=False).indices.tolist()) == set(OUTLIERS)
    assert model.k.weight.act_pre_scale is model.v.weight.act_pre_scale is scale


@pytest.mark.parametrize("kind", [Outliers, Normed])
def test_smoothing_does_not_harm_weight_only_quantization(kind: type[nn.Module]) -> None:
    model = made(kind)
    x = torch.randn(256, DIM).to(torch.bfloat16)
    with torch.no_grad():
        reference = model(x)
        smooth = apply_int8_quant(model, mode="w8", smoothquant=True, calibration=[x])
        assert sqnr_db(reference, smooth(x)) > 40


def test_coverage_reports_smoothed_layers(batch: torch.Tensor) -> None:
    model = made(Transformer)
    covered = coverage(apply_int8_quant(model, smoothquant=True, calibration=[batch]))
    assert covered.smoothed_runtime == tuple(CONVERTED)
    assert covered.to_dict()["smoothed_folded"] == {}
    assert covered.to_dict()["smoothed_runtime"] == CONVERTED
    assert str(covered).endswith("left out: 2 filtered; SmoothQuant: 6 layers scaled at run time")


def test_scale_follows_the_weight(batch: torch.Tensor) -> None:
    model = made(Transformer)
    apply_int8_quant(model, smoothquant=True, calibration=[batch])
    with torch.no_grad():
        expected = model(batch)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(batch), expected)
        for moved in (twin.to("cpu"), copy.deepcopy(twin).to("meta")):
            weight = moved.mlp.fc2.weight
            assert weight.act_pre_scale.device == weight.device
            assert "act_pre_scale" in weight.__tensor_flatten__()[0]
        fresh = made(Transformer)
        fresh.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(fresh(batch), expected)


@pytest.mark.parametrize("mode", ["w8a8", "w8"])
def test_a_smoothed_model_compiles_to_one_graph(mode: str) -> None:
    model = made(Outliers)
    x = torch.randn(32, DIM).to(torch.bfloat16)
    apply_int8_quant(model, mode=mode, smoothquant=True, calibration=[x])
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True)(x)
        assert sqnr_db(model(x), compiled) > 40


def test_failed_calibration_leaves_the_model_unchanged(batch: torch.Tensor) -> None:
    model = made(Transformer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        apply_int8_quant(model, smoothquant=True, calibration=[batch, batch[..., 1:]])
    assert weight_storage(model) == (0, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_alpha_controls_how_much_moves_into_the_weights() -> None:
    torch.manual_seed(0)
    model = Outliers().eval().requires_grad_(False).to(torch.bfloat16)
    x = torch.randn(256, DIM).to(torch.bfloat16)
    spans = []
    for alpha in (0.25, 0.5, 0.75):
        smooth = apply_int8_quant(
            copy.deepcopy(model), smoothquant=True, calibration=[x], alpha=alpha
        )
        scale = smooth.fc1.weight.act_pre_scale.float()
        spans.append((scale.max() / scale.min()).item())
    assert spans[0] < spans[1] < spans[2]


# -- configurations of torchao ------------------------------------------------------------------


def test_applies_custom_configuration_to_selected_layers(model: Transformer) -> None:
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    covered = coverage(apply_int8_quant(model, mode="w8", quant_config=config))
    assert covered.mode == "custom"
    assert [layer.name for layer in covered.converted] == CONVERTED
    # The configuration takes precedence over the mode.
    assert model.mlp.fc1.weight.act_quant_kwargs is not None


@dataclass
class Partly(AOBaseConfig):
    """Quantize only square weights, to a tensor that may or may not store the scale."""

    scales: bool = True


class NoScale(TorchAOBaseTensor):
    tensor_data_names = ("qdata",)
    tensor_attribute_names = ()

    def __new__(cls, qdata: torch.Tensor) -> NoScale:
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=qdata.dtype)

    def __init__(self, qdata: torch.Tensor) -> None:
        super().__init__()
        self.qdata = qdata


@register_quantize_module_handler(Partly)
def _quantize_partly(module: nn.Module, config: Partly) -> nn.Module:
    if module.in_features != module.out_features:
        return module
    if config.scales:
        quantize_(module, Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        module.weight = nn.Parameter(NoScale(module.weight.detach()), requires_grad=False)
    return module


def test_smoothquant_supports_custom_configuration(batch: torch.Tensor) -> None:
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    model = made(Transformer)
    with torch.no_grad():
        reference = model(batch)
        apply_int8_quant(model, quant_config=config, smoothquant=True, calibration=[batch])
        assert sqnr_db(reference, model(batch)) > 35
    assert coverage(model).smoothed_runtime == tuple(CONVERTED)


def test_does_not_scale_layers_skipped_by_the_configuration(batch: torch.Tensor) -> None:
    model = made(Transformer)
    with torch.no_grad():
        reference = model(batch)
        weights = [layer.weight.clone() for layer in (model.mlp.fc1, model.mlp.fc2)]
        apply_int8_quant(model, quant_config=Partly(), smoothquant=True, calibration=[batch])
        assert sqnr_db(reference, model(batch)) > 35
    assert torch.equal(model.mlp.fc1.weight, weights[0])
    assert torch.equal(model.mlp.fc2.weight, weights[1])
    assert [layer.name for layer in coverage(model).converted] == CONVERTED[:4]
    assert coverage(model).smoothed_runtime == tuple(CONVERTED[:4])


def test_rejects_configuration_that_cannot_store_the_scale(batch: torch.Tensor) -> None:
    model = made(Transformer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError) as caught:
        apply_int8_quant(
            model, quant_config=Partly(scales=False), smoothquant=True, calibration=[batch]
        )
    assert str(caught.value) == (
        "smoothquant=True does not support Partly: its NoScale cannot scale the input of "
        "attn.q at run time"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fqn_to_config_selects_its_own_layers(model: Transformer) -> None:
    weight_only = Int8WeightOnlyConfig(set_inductor_config=False)
    dynamic = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    config = FqnToConfig({"mlp.fc1": weight_only, "head": dynamic})
    covered = coverage(apply_int8_quant(model, quant_config=config))
    assert [layer.name for layer in covered.converted] == ["mlp.fc1", "head"]
    assert {layer.reason for layer in covered.left_out} == {"not named by FqnToConfig"}
    assert model.mlp.fc1.weight.act_quant_kwargs is None
    assert model.head.weight.act_quant_kwargs is not None


def test_rejects_fqn_to_config_that_names_no_layer(model: Transformer) -> None:
    config = FqnToConfig({"nothing": Int8WeightOnlyConfig(set_inductor_config=False)})
    with pytest.raises(QuantizationError) as caught:
        apply_int8_quant(model, quant_config=config)
    assert str(caught.value).endswith("left out because: not named by FqnToConfig")


# -- weight-only matmuls ------------------------------------------------------------------------


def dequantized(weight: Int8Tensor) -> DequantizedInt8Weight:
    names, context = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    return DequantizedInt8Weight.__tensor_unflatten__(parts, context, weight.shape, weight.stride())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_dequantized_matmul_equals_dequantize_then_linear(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.ModuleDict({"fc1": nn.Linear(DIM, 32, bias=bias, dtype=torch.bfloat16)})
    apply_int8_quant(layer.requires_grad_(False), mode="w8")
    fc1 = layer["fc1"]
    x = torch.randn(8, DIM).to(torch.bfloat16)
    expected = linear(x, fc1.weight.dequantize(torch.bfloat16), fc1.bias)

    weight = dequantized(fc1.weight)
    assert torch.equal(linear(x, weight, fc1.bias), expected)
    assert torch.equal(linear(x, weight, bias=fc1.bias), expected)
    assert linear(x, weight).dtype == torch.bfloat16


def test_dequantized_matmul_after_smoothquant_scales_its_input() -> None:
    torch.manual_seed(0)
    model = Outliers().eval().requires_grad_(False).to(torch.bfloat16)
    x = torch.randn(64, DIM).to(torch.bfloat16)
    apply_int8_quant(model, mode="w8", smoothquant=True, calibration=[x])
    weight, bias = model.fc1.weight, model.fc1.bias
    assert weight.act_pre_scale is not None
    expected = linear(x * weight.act_pre_scale, weight.scaled(torch.bfloat16), bias)
    assert torch.equal(linear(x, dequantized(weight), bias), expected)


def test_dequantized_matmul_compiles_to_a_library_matmul() -> None:
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    layer = nn.ModuleDict({"fc1": nn.Linear(DIM, 32, dtype=torch.bfloat16)}).requires_grad_(False)
    apply_int8_quant(layer, mode="w8")
    fc1 = layer["fc1"]
    fc1.weight = nn.Parameter(dequantized(fc1.weight), requires_grad=False)
    x = torch.randn(32, DIM).to(torch.bfloat16)
    with torch.inference_mode():
        expected = fc1(x)
        output, [code] = run_and_get_code(torch.compile(fc1, fullgraph=True), x)
    assert "_weight_int8pack_mm" not in code
    assert sqnr_db(expected, output) > 35


# -- the fused backend --------------------------------------------------------------------------


def lowered(model: nn.Module, layers: tuple[Layer, ...] | None = None) -> list[Layer]:
    """Lower a quantized model, which does not happen automatically on the CPU."""
    return lower(model, coverage(model).layers if layers is None else layers)


def test_lowers_with_torchao_values(model: Transformer, batch: torch.Tensor) -> None:
    apply_int8_quant(model)
    weights = {name: model.get_submodule(name).weight for name in CONVERTED}
    biases = {name: model.get_submodule(name).bias for name in CONVERTED}
    with torch.no_grad():
        expected = model(batch)
        told = lowered(model)
        assert [layer.name for layer in told if layer.fused] == CONVERTED
        # Values halfway between two levels may round to the other one.
        assert sqnr_db(expected, model(batch)) > 40
    for name in CONVERTED:
        layer = model.get_submodule(name)
        assert isinstance(layer, Int8Linear)
        assert torch.equal(layer.int8_weight, weights[name].qdata)
        assert torch.equal(layer.weight_scale, weights[name].scale.flatten().float())
        assert layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer.bias, biases[name])
        assert layer.factor is None
    assert weight_storage(model) == (6, 6)
    attention = model.attn
    assert attention.q.block is attention.k.block is attention.v.block


def test_a_lowered_model_is_quantized_and_covered(model: Transformer) -> None:
    apply_int8_quant(model)
    lowered(model)
    with pytest.raises(QuantizationError, match=r"^the model is already quantized \(attn\.q is\)$"):
        apply_int8_quant(model)
    found = coverage(copy.deepcopy(model))  # as in a model quantized elsewhere
    assert [layer.name for layer in found.fused] == CONVERTED
    assert found.backend == "fused"


def test_a_lowered_model_compiles_to_one_graph(model: Transformer, batch: torch.Tensor) -> None:
    apply_int8_quant(model)
    lowered(model)
    with torch.no_grad():
        compiled = compile_for_a100(model, mode="default", attention="math")
        assert sqnr_db(model(batch), compiled(batch)) > 35
    assert compiled.first_call_s is not None


def test_lowers_smoothquant_factors(batch: torch.Tensor) -> None:
    model = made(Transformer)
    apply_int8_quant(model, smoothquant=True, calibration=[batch])
    factors = {name: model.get_submodule(name).weight.act_pre_scale for name in CONVERTED}
    with torch.no_grad():
        expected = model(batch)
        lowered(model)
        assert sqnr_db(expected, model(batch)) > 40
    for name, factor in factors.items():
        assert torch.equal(model.get_submodule(name).factor, factor)
    attention = model.attn
    assert attention.q.block is attention.k.block is attention.v.block
    assert attention.proj.block is not attention.q.block


def test_smoothed_layers_of_one_input_become_one_matmul(batch: torch.Tensor) -> None:
    widths: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        linear = torch.ops.int8bench.linear.default
        for node in passes.fuse(module).graph.find_nodes(op="call_function", target=linear):
            widths.append(node.args[2].meta["example_value"].shape[0])
        return module.forward

    model = made(Transformer)
    apply_int8_quant(model, smoothquant=True, calibration=[batch])
    lowered(model)
    torch._dynamo.reset()
    with torch.inference_mode():
        output = torch.compile(model, fullgraph=True, backend=backend)(batch)
        assert sqnr_db(model(batch), output) > 40
    assert widths == [3 * DIM, DIM, 2 * DIM, DIM]


def _weight_only(model: Any) -> None:
    quantize_(model["fc1"], Int8WeightOnlyConfig(set_inductor_config=False))


def _dynamic(model: Any, **changes: Any) -> None:
    quantize_(
        model["fc1"], Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, **changes)
    )


def _static(model: Any) -> None:
    config = Int8StaticActivationInt8WeightConfig(
        torch.ones(1, 1), granularity=PerTensor(), set_inductor_config=False
    )
    quantize_(model["fc1"], config)


def _tensor_weight(model: Any) -> None:
    _dynamic(model, granularity=[PerRow(), PerTensor()])


def _tensor_activation(model: Any) -> None:
    _dynamic(model, granularity=[PerTensor(), PerRow()])


def _asymmetric(model: Any) -> None:
    _dynamic(model, act_mapping_type=MappingType.ASYMMETRIC)


def _zero_point(model: Any) -> None:
    _dynamic(model)
    model["fc1"].weight.zero_point = torch.ones(DIM, 1)


def _pre_hook(model: Any) -> None:
    _dynamic(model)
    model["fc1"].register_forward_pre_hook(lambda module, inputs: None)


def _hook(model: Any) -> None:
    _dynamic(model)
    model["fc1"].register_forward_hook(lambda module, inputs, output: None)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _own_forward(model: Any) -> None:
    model["fc1"] = Doubled(DIM, DIM)
    _dynamic(model)


def _dequantized(model: Any) -> None:
    _weight_only(model)
    model["fc1"].weight = nn.Parameter(dequantized(model["fc1"].weight), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_weight_only, "activations: not quantized"),
        (_static, "activations: scale not per row"),
        (_tensor_activation, "activations: scale not per row"),
        (_asymmetric, "activations: not symmetric per row"),
        (_tensor_weight, "weight: scale not per output channel"),
        (_zero_point, "weight: not symmetric"),
        (_hook, "type: has forward hooks"),
        (_pre_hook, "type: has forward hooks"),
        (_own_forward, "type: Doubled has its own forward"),
        (_dequantized, "weight: DequantizedInt8Weight"),
    ],
)
def test_unsupported_layer_says_why(change: Callable[[Any], None], reason: str) -> None:
    layers: Any = nn.ModuleDict({"fc1": nn.Linear(DIM, DIM), "fc2": nn.Linear(DIM, DIM)})
    layers.eval().requires_grad_(False)
    change(layers)
    quantize_(layers["fc2"], Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    first = layers["fc1"]
    told = lowered(layers)
    assert [(layer.fused, layer.fallback) for layer in told] == [(False, reason), (True, None)]
    assert layers["fc1"] is first
    found = Coverage("w8a8", tuple(told), 2 * (DIM * DIM + DIM))
    assert found.backend == "fused"
    assert found.to_dict()["fused_layers"] == 1
    assert found.to_dict()["fallbacks"] == {"fc1": reason}
    assert str(found).endswith(f"; 1 on fused kernels; on torchao kernels: 1 {reason}")


def test_does_not_lower_layers_of_torchs_encoder_layer() -> None:
    # The encoder layer reads their weights itself.
    model: Any = nn.TransformerEncoderLayer(DIM, 4, batch_first=True).eval().requires_grad_(False)
    apply_int8_quant(model)
    told = {layer.name: layer for layer in lowered(model)}
    reason = "type: inside nn.TransformerEncoderLayer"
    assert told["linear1"].fallback == told["linear2"].fallback == reason
    assert type(model.linear1) is nn.Linear
    model(torch.randn(2, 3, DIM))


def test_does_not_lower_model_that_is_a_single_layer() -> None:
    model = nn.Linear(DIM, DIM).requires_grad_(False)
    apply_int8_quant(model, filter_fn=lambda module, name: True)
    (layer,) = lowered(model)
    assert layer.fallback == "type: the model itself, which cannot be replaced in place"
    assert type(model.weight) is Int8Weight


def test_lowers_layer_with_two_names_under_both() -> None:
    shared = nn.Linear(DIM, DIM)
    model: Any = nn.ModuleDict({"fc1": shared, "fc2": shared}).requires_grad_(False)
    apply_int8_quant(model)
    lowered(model)
    assert isinstance(model["fc1"], Int8Linear)
    assert model["fc2"] is model["fc1"]


def test_does_not_lower_unquantized_layers(model: Transformer) -> None:
    apply_int8_quant(model)
    told = {layer.name: layer for layer in lowered(model)}
    assert (told["head"].fused, told["head"].fallback) == (False, None)
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize(
    ("mode", "device", "capability", "triton", "problem"),
    [
        ("w8", "cuda", (9, 0), True, "the fused kernels support W8A8, not w8"),
        ("w8a8", "cpu", (9, 0), True, "the fused kernels run on CUDA, not on cpu"),
        ("w8a8", "cuda", (7, 5), True, "the fused kernels need sm80 or later, this is sm75"),
        ("w8a8", "cuda", (8, 0), False, "the fused kernels need Triton, which is not installed"),
        ("w8a8", "cuda", (8, 0), True, None),
        ("w8a8", "cuda", (10, 0), True, None),
    ],
)
def test_reports_why_fused_kernels_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    device: str,
    capability: tuple[int, int],
    triton: bool,
    problem: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    assert MODES[mode].fused_problem(torch.device(device)) == problem


@pytest.mark.parametrize(
    ("backend", "used"), [("auto", "fused"), ("fused", "fused"), ("torchao", "torchao")]
)
def test_uses_the_requested_backend(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, backend: str, used: str
) -> None:
    monkeypatch.setattr(dispatch, "fused_problem", lambda device: None)
    covered = coverage(apply_int8_quant(model, backend=backend))
    assert covered.backend == used
    assert len(covered.fused) == (6 if used == "fused" else 0)
    assert ("6 on fused kernels" in str(covered)) == (used == "fused")


def test_auto_uses_torchao_if_the_kernels_cannot_run(model: Transformer) -> None:
    covered = coverage(apply_int8_quant(model, backend="auto"))
    assert (covered.backend, covered.fused) == ("torchao", ())
    assert not any(layer.fallback for layer in covered.layers)


def test_fused_backend_needs_a_supported_layer(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "fused_problem", lambda device: None)
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    with pytest.raises(QuantizationError) as caught:
        apply_int8_quant(model, backend="fused", quant_config=config)
    assert str(caught.value) == "int8_backend=fused supports no layer: activations: not quantized"


def joined_products(model: nn.Module, inputs: Any) -> list[int]:
    """Return the number of layers in each matmul of the compiled model, and check its outputs."""
    found: list[int] = []

    def backend(module: Any, example: Any) -> Any:
        for node in passes.fuse(module).graph.nodes:
            if node.target is torch.ops.int8bench.linear.default:
                parts = next(iter(node.users))
                found.append(len(parts.args[1]) if parts.target is torch.split else 1)
        return module.forward

    ignored = {logging.Logger.debug, logging.Logger.info, logging.Logger.warning}
    with torch.inference_mode(), torch._dynamo.config.patch(ignore_logging_functions=ignored):
        expected = call(model, inputs)
        output = call(torch.compile(model, fullgraph=True, backend=backend), inputs)
    for one, other in zip(tensors_of(expected), tensors_of(output), strict=True):
        assert sqnr_db(one, other) > 35
    return found


@pytest.mark.parametrize(
    ("name", "extra", "layers", "products"),
    [
        ("olmoearth", {}, 24, [3, 1, 1, 1] * 4),
        (
            "hf:bert",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "vocab_size": 100,
                "max_position_embeddings": 64,
                "sequence_length": 16,
            },
            12,
            [3, 1, 1, 1] * 2,
        ),
    ],
)
def test_lowers_encoders(
    name: str, extra: dict[str, Any], layers: int, products: list[int]
) -> None:
    pytest.importorskip("transformers" if name.startswith("hf:") else "olmoearth_pretrain_minimal")
    workload = load_workload(name, Path())
    device = torch.device("cpu")
    params = RunParams(
        model_size="nano",
        gpu_type="cpu",
        bf16=False,
        compile_mode="off",
        image_size=8,
        num_timesteps=2,
        batch_size=2,
        extra=extra,
    )
    params = workload.with_axes(params)
    model = build_eager(workload, params, device).requires_grad_(False)
    inputs = workload.inputs(params, device)
    apply_int8_quant(model, filter_fn=workload.filter_fn)
    chosen = coverage(model).converted
    assert len(chosen) == layers
    with torch.no_grad():
        before = tensors_of(call(model, inputs))
        told = lowered(model)
        after = tensors_of(call(model, inputs))
    assert [layer.name for layer in told if layer.fused] == [layer.name for layer in chosen]
    for one, other in zip(before, after, strict=True):
        if one.is_floating_point() and one.numel() > 1:
            assert sqnr_db(one, other) > 35
    assert joined_products(model, inputs) == products


# -- calling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [((1, 2), (1, 2)), ([1, 2], (1, 2)), ({"b": 1, "a": 2}, (2, 1)), (1, (1, 0))],
)
def test_passes_inputs_by_position_or_name(inputs: Any, expected: tuple[int, int]) -> None:
    assert call(lambda a, b=0: (a, b), inputs) == expected
