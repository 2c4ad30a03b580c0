"""Test which layers the default filter excludes from real-world models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from pytest_int8bench.quantization.api import apply_int8_quant, coverage
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.quantization.structure import within
from toys.structures import (
    DIM,
    EXPERTS,
    Adapted,
    Attention,
    Block,
    Experts,
    Gated,
    Holder,
    Mlp,
    Stacked,
    linear,
    repeated,
)
from toys.survey import Surveyed, hf_model, numbers_as_n, survey


def left_out(model: nn.Module) -> set[str]:
    """Return the linear layers that the default filter excludes, with numbers as N."""
    found = survey(model)
    return {numbers_as_n(name) for name in found.linears - found.taken}


def taken_by_name(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if is_transformer_linear(part, name)}


def projections(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Block(Holder(**{f"{name}_proj": make() for name in "qkvo"}))


# -- model types of transformers -----------------------------------------------------------------

LEFT_OUT_OF = {
    "bert": {"pooler.dense"},
    "vit": {"pooler.dense"},
    "phi3": set(),
    "deepseek_v3": set(),
    "wav2vec2-conformer": {"feature_projection.projection"},
    "wav2vec2-bert": {"feature_projection.projection"},
    "qwen3_next": {"layers.N.linear_attn.in_proj_ba", "layers.N.mlp.shared_expert_gate"},
    "qwen2_moe": {"layers.N.mlp.shared_expert_gate"},
    "llama4_text": {"layers.N.feed_forward.router"},
    "switch_transformers": {
        "encoder.block.N.layer.N.mlp.router.classifier",
        "decoder.block.N.layer.N.mlp.router.classifier",
    },
    "blip": {"text_model.pooler.dense", "text_projection", "visual_projection"},
    "internvl_vision": set(),
    "gemma4_audio": {
        "output_proj",
        "subsample_conv_projection.input_proj_linear",
    },
    "swin": {"encoder.layers.N.downsample.reduction"},
    "swinv2": {
        "encoder.layers.N.blocks.N.attention.self.continuous_position_bias_mlp.N",
        "encoder.layers.N.downsample.reduction",
    },
    "levit": set(),
    "granitemoehybrid": set(),
}


@pytest.mark.parametrize("kind", LEFT_OUT_OF)
def test_selects_attention_and_mlp_of_each_model_type(kind: str) -> None:
    pytest.importorskip("transformers")
    model = hf_model(kind)
    assert left_out(model) == LEFT_OUT_OF[kind]
    assert survey(model).unexplained == []


def test_selects_blocks_inside_modules_named_embed() -> None:
    pytest.importorskip("transformers")
    left = left_out(hf_model("phi4_multimodal"))
    assert not any("layers.N." in name or "encoders.N." in name for name in left)
    assert any("embed" in name for name in left)


def test_survey_names_unexplained_layers_of_blocks() -> None:
    linears = frozenset(
        {"layers.0.attn.qkv", "layers.1.attn.qkv", "layers.0.mlp.gate", "head", "classifier.0"}
    )
    assert Surveyed(frozenset(), linears, 0.0).unexplained == ["layers.N.attn.qkv"]


# -- structure -------------------------------------------------------------------------------------


def test_selects_layers_of_blocks_under_any_name() -> None:
    def block() -> nn.Module:
        return Block(Attention("alpha", "beta", "gamma", "delta"), Mlp("spread", "squash"))

    assert left_out(repeated(block, embed=linear(), head=linear())) == {"embed", "head"}
    assert left_out(repeated(block, count=1)) == set()
    named = Holder(one=block(), two=block(), out=Holder(norm=nn.LayerNorm(DIM), fit=linear()))
    assert left_out(named) == {"out.fit"}


def test_block_may_be_a_sequence_of_layers() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(DIM), linear(DIM, 256), nn.GELU(), linear(256, DIM))

    model = Holder(blocks=nn.ModuleList([block(), block()]), head=block(), classifiers=block())
    assert left_out(model) == {"head.N", "classifiers.N"}


@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "3-D"])
@pytest.mark.parametrize("router", ["gate", "router", "wg", "switch", "dispatch", "proj", "fc1"])
def test_excludes_routers_under_any_name(router: str, stacked: bool) -> None:
    model = repeated(lambda: Block(mlp=Experts(router, stacked=stacked)))
    assert left_out(model) == {f"layers.N.mlp.{router}"}


@pytest.mark.parametrize("holder", ["router", "selector"])
def test_excludes_router_inside_a_module(holder: str) -> None:
    router = Holder(layer=linear(DIM, EXPERTS))
    model = repeated(lambda: Block(mlp=Holder(**{holder: router}, experts=Stacked())))
    assert left_out(model) == {f"layers.N.mlp.{holder}.layer"}


def test_shared_expert_as_wide_as_the_expert_count_is_not_a_router() -> None:
    model = repeated(
        lambda: Block(
            mlp=Holder(
                experts=Stacked(),
                shared_expert=Gated(EXPERTS),
                shared_mlp=Mlp(inner=EXPERTS),
                shared_expert_gate=linear(DIM, 1),
            )
        )
    )
    assert left_out(model) == {"layers.N.mlp.shared_expert_gate"}


@pytest.mark.parametrize("inner", [4 * DIM, DIM // 2])
def test_selects_gate_of_a_gated_mlp(inner: int) -> None:
    assert left_out(repeated(lambda: Block(mlp=Gated(inner)))) == set()
    wrapped = {name: Holder(linear=part) for name, part in Gated(inner).named_children()}
    assert left_out(repeated(lambda: Block(mlp=Holder(**wrapped)))) == set()


@pytest.mark.parametrize(
    "names",
    [("base_layer", "lora_A", "lora_B"), ("linear", "A", "B"), ("orig", "down", "up")],
)
def test_selects_adapted_layer_without_its_adapters(names: tuple[str, str, str]) -> None:
    base, down, up = names
    left = left_out(repeated(projections(lambda: Adapted(base, down, up))))
    assert left == {
        f"layers.N.attn.{name}_proj.{half}.default" for name in "qkvo" for half in (down, up)
    }


LOW_RANK = {
    "queries whole": {"q": (DIM, DIM), "kv_a": (DIM, 8), "k_b": (8, DIM), "v_b": (8, DIM)},
    "all halved": {"q_a": (DIM, 16), "q_b": (16, DIM), "kv_a": (DIM, 8), "kv_b": (8, DIM)},
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("sizes", LOW_RANK.values(), ids=LOW_RANK)
def test_low_rank_attention_is_not_an_adapter(
    sizes: dict[str, tuple[int, int]], wrapped: bool
) -> None:
    def attention() -> nn.Module:
        layers = {name: linear(*size) for name, size in {**sizes, "o": (DIM, DIM)}.items()}
        return Holder(**{n: Holder(linear=m) if wrapped else m for n, m in layers.items()})

    assert left_out(repeated(lambda: Block(attention()))) == set()


def test_adapters_may_have_the_class_of_their_layer() -> None:
    model = repeated(
        projections(lambda: Holder(frozen=linear(), down=linear(DIM, 4), up=linear(4, DIM)))
    )
    assert {name.rpartition(".")[2] for name in left_out(model)} == {"down", "up"}


@pytest.mark.parametrize("outputs", [EXPERTS, DIM])
def test_projections_as_wide_as_the_expert_count_are_not_routers(outputs: int) -> None:
    experts = nn.ModuleList([Mlp() for _ in range(outputs)])
    model = repeated(
        lambda: Block(
            Holder(q=linear(), k=linear(DIM, outputs), v=linear(DIM, outputs), proj=linear()),
            Holder(experts=experts, choice=linear(DIM, outputs)),
        ),
        count=1,
    )
    assert left_out(model) == {"layers.N.mlp.choice"}


@pytest.mark.parametrize("inner", ["linear", "base_layer", "module", "impl"])
def test_selects_wrapped_layers(inner: str) -> None:
    assert left_out(repeated(projections(lambda: Holder(**{inner: linear()})))) == set()


@pytest.mark.parametrize(
    "above", ["audio_embed", "vision_embedder", "speech_tokenizer", "stem", "normalizer"]
)
def test_ignores_names_above_blocks(above: str) -> None:
    model = Holder(**{above: repeated(Block, proj=linear())}, layers=nn.ModuleList([Block()]))
    assert left_out(model) == {f"{above}.proj"}
    assert left_out(Holder(**{above: nn.ModuleList([Block(), Block()])})) == set()
    assert left_out(Holder(**{above: Block()})) == set()


def test_selects_blocks_inside_an_action_head() -> None:
    model = Holder(action_head=repeated(Block, proj=linear()), lm_head=linear())
    assert left_out(model) == {"action_head.proj", "lm_head"}


def test_excludes_heads_of_one_kind() -> None:
    model = Holder(
        heads=nn.ModuleList([Mlp("a", "b"), Mlp("a", "b")]),
        box_head=Mlp(),
        class_head=Mlp(),
        bbox_embed=nn.ModuleList([Mlp("a", "b"), Mlp("a", "b")]),
        patch_embeds=nn.ModuleList([Mlp(), Mlp()]),
    )
    assert survey(model).taken == set()


def test_excludes_conditioning_and_bias_tables_in_blocks() -> None:
    model = repeated(
        lambda: Holder(
            attn=Attention("qkv", "proj"),
            cpb_mlp=nn.Sequential(linear(2, 512), nn.ReLU(), linear(512, 4)),
            adaLN_modulation=nn.Sequential(nn.SiLU(), linear(DIM, 6 * DIM)),
            norm1=Holder(linear=linear(), norm=nn.LayerNorm(DIM)),
        )
    )
    assert left_out(model) == {
        "layers.N.cpb_mlp.N",
        "layers.N.adaLN_modulation.N",
        "layers.N.norm1.linear",
    }


def test_structure_is_available_only_inside_a_filter() -> None:
    model = repeated(lambda: Block(mlp=Experts("dispatch")))
    name = "layers.0.mlp.dispatch"
    apply_int8_quant(
        model, mode="w8", filter_fn=lambda part, path: is_transformer_linear(part, path)
    )
    assert coverage(model).to_dict()["left_out"] == {
        name: "filtered",
        name.replace("0", "1"): "filtered",
    }
    other = linear(DIM, EXPERTS)
    with within(Holder(dispatch=other, layers=nn.ModuleList([Block()]))):
        assert not is_transformer_linear(other, "dispatch")
    assert is_transformer_linear(other, name)


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        (repeated(Block, head=linear(), patch_embed=linear()), set()),
        (repeated(projections(Adapted)), set()),
        (repeated(projections(lambda: Holder(linear=linear()))), set()),
        (Holder(audio_embed=repeated(Block)), set()),
        (repeated(lambda: Block(mlp=Experts())), set()),
    ],
)
def test_filter_by_name_selects_the_same_layers(model: nn.Module, missing: set[str]) -> None:
    assert survey(model).taken - taken_by_name(model) == missing
    assert taken_by_name(model) <= survey(model).taken
