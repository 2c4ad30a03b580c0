"""Test reports of unquantized layers in repeated blocks, and of weights outside nn.Linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.quantization.api import apply_int8_quant, coverage
from toys.structures import DIM, EXPERTS, Attention, Block, Experts, Holder, linear, repeated


def test_missed_layers_are_block_layers_the_filter_excluded() -> None:
    model = repeated(lambda: Block(mlp=Experts()), head=linear(), count=2)
    apply_int8_quant(model, mode="w8", filter_fn=lambda part, name: "mlp" in name)
    covered = coverage(model)
    attention = [f"layers.{n}.attn.{leaf}" for n in (0, 1) for leaf in ("q", "k", "v", "proj")]
    assert covered.missed == {"layers": attention, "of": 8 + 2 * 2 * EXPERTS}
    assert covered.to_dict()["missed"] == covered.missed


def test_layers_of_unknown_roles_in_blocks_are_missed() -> None:
    model = repeated(lambda: Block(Attention("qkv", "proj", "tiny")))
    for n in (0, 1):
        model.get_submodule(f"layers.{n}.attn").add_module("tiny", linear(DIM, 4))
    apply_int8_quant(model, mode="w8")
    assert coverage(model).missed["layers"] == ["layers.0.attn.tiny", "layers.1.attn.tiny"]


def test_projections_inside_multihead_attention_are_missed() -> None:
    model = Holder(
        layers=nn.ModuleList(
            [nn.TransformerEncoderLayer(DIM, 4, dropout=0, batch_first=True) for _ in range(2)]
        )
    )
    apply_int8_quant(model, mode="w8")
    covered = coverage(model)
    left = [layer.name for layer in covered.left_out]
    assert covered.missed.get("layers", []) == left
    assert all(name.split(".")[2] == "self_attn" for name in left)


def test_nothing_is_missed_if_the_filter_selects_all() -> None:
    model = repeated(Block, head=linear(), embed=linear())
    apply_int8_quant(model, mode="w8")
    covered = coverage(model)
    assert (covered.missed, covered.elsewhere) == ({}, {})
    assert not {"missed", "elsewhere"} & set(covered.to_dict())


def test_names_experts_in_3d_parameters() -> None:
    model = repeated(lambda: Block(mlp=Experts(stacked=True)), embed=nn.Embedding(9999, DIM))
    apply_int8_quant(model, mode="w8")
    attention, router = 4 * DIM * DIM, DIM * EXPERTS
    experts = 2 * EXPERTS * DIM * 4 * DIM
    assert coverage(model).elsewhere == {
        "share": experts / (experts + attention + router),
        "weights": {
            "3-D parameters of Stacked": {
                "parameters": 2 * experts,
                "layers": ["layers.0.mlp.experts", "layers.1.mlp.experts"],
            }
        },
    }


def test_names_pointwise_convolutions() -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(256, 256, 1))
    model = repeated(Block, count=1, convolutions=convolutions)
    apply_int8_quant(model, mode="w8")
    assert coverage(model).elsewhere["weights"] == {
        "1x1 Conv2d": {"parameters": 256 * 256, "layers": ["convolutions.1"]},
        "Conv2d": {"parameters": 8 * 3 * 9, "layers": ["convolutions.0"]},
    }


def test_error_names_conv1d_weights() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = repeated(
        lambda: Block(Holder(c_attn=conv1d(3 * DIM, DIM)), Holder(c_fc=conv1d(DIM, DIM)))
    )
    where = "; it has weights outside nn.Linear, in Conv1D (4 modules: layers.0.attn.c_attn …)"
    with pytest.raises(QuantizationError) as caught:
        apply_int8_quant(model, mode="w8")
    assert str(caught.value) == (
        f"no layer was converted to INT8: the model has no linear layers{where}"
    )
    model.add_module("lm_head", linear())
    with pytest.raises(
        QuantizationError, match=r"not selected by the filter; select .*--int8-filter; it has"
    ):
        apply_int8_quant(model, mode="w8")


def test_ignores_embedding_tables_and_norms() -> None:
    model = repeated(Block)
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 9999, DIM)))
    model.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, DIM)))
    apply_int8_quant(model, mode="w8")
    assert coverage(model).elsewhere == {}
