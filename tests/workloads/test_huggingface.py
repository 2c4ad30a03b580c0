"""Test encoders of transformers by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import coverage
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.workloads import Workload
from pytest_int8bench.workloads.registry import load_workload
from pytest_int8bench.workloads.weights import WeightsError

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
POINT = RunParams(gpu_type="cpu", batch_size=3, compile_mode="off", bf16=False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def workload(name: str, root: Path = Path()) -> Workload:
    return load_workload(f"hf:{name}", root)


def point(**extra: Any) -> RunParams:
    return POINT.replace(extra={**SMALL, "max_position_embeddings": 64, **extra})


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    config = transformers.BertConfig(**SMALL, max_position_embeddings=48)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize(
    ("name", "converted", "left_out"),
    [
        ("bert", 72, {"pooler.dense"}),
        ("roberta", 72, {"pooler.dense"}),
        ("distilbert", 36, set()),
        ("modernbert", 88, set()),
        ("deberta-v2", 144, set()),
        ("vit", 72, {"pooler.dense"}),
        ("dinov2", 72, set()),
        ("convnext", 36, set()),
        ("siglip_vision_model", 72, {"head.attention.out_proj", "head.mlp.fc1", "head.mlp.fc2"}),
        ("t5", 36, set()),
    ],
)
def test_default_filter_selects_the_layers(name: str, converted: int, left_out: set[str]) -> None:
    loaded = workload(name)
    with torch.device("meta"):
        model = loaded.build(loaded.with_axes(POINT))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = {n for n, m in linears.items() if is_transformer_linear(m, n)}
    assert len(chosen) == converted
    assert set(linears) - chosen == left_out


@pytest.mark.parametrize(
    ("name", "length"),
    [("bert", 512), ("roberta", 510), ("ibert", 510), ("luke", 510), ("t5", 512)],
)
def test_sequence_length_is_the_number_of_positions(name: str, length: int) -> None:
    assert workload(name).axes["sequence_length"] == length


def test_text_inputs_follow_the_configuration() -> None:
    loaded = workload("bert")
    seen = loaded.with_axes(point(sequence_length=16))
    inputs = loaded.inputs(seen, CPU)
    assert isinstance(inputs, dict)
    assert set(inputs) == {"input_ids"}
    ids = inputs["input_ids"]
    assert ids.shape == (3, 16)
    assert 0 < int(ids.min()) <= int(ids.max()) < 100  # 0 is the padding token
    assert dict(loaded.units(seen)) == {"samples": 3, "tokens": 48}
    output = loaded.build(seen).eval()(**inputs)
    assert output.last_hidden_state.shape == (3, 16, 32)


TINY = {"num_hidden_layers": 2, "sequence_length": 8, "vocab_size": 100, "hidden_size": 32}
HEADS = {"num_attention_heads": 2, "intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": TINY | HEADS,
    "roberta": TINY | HEADS,
    "llama": TINY | HEADS | {"num_key_value_heads": 1},
    "qwen3": TINY | HEADS | {"num_key_value_heads": 1, "head_dim": 16},
    "t5": {"num_layers": 3, "sequence_length": 8, "d_model": 32, "d_kv": 16, "d_ff": 32},
    "vit": {"num_hidden_layers": 2, "hidden_size": 32, "image_size": 32} | HEADS,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_one_region(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the layers of the installed transformers as traced by Dynamo, without compiling."""
    graphs: list[torch.fx.GraphModule] = []

    def trace(self: Any, graph: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", trace)
    loaded = workload(name)
    seen = loaded.with_axes(POINT.replace(extra=FAMILIES[name]))
    compiled = compile_for_a100(loaded.build(seen).eval(), mode="default", attention="math")
    compiled(**loaded.inputs(seen, CPU))
    regions = [child for child, _ in graphs[-1].named_children() if "subgraph" in child]
    if name == "t5":  # a layer returns the bias that it received
        assert (compiled.regions, len(regions)) == (0, 0)
        assert "alias" in str(compiled.regions_refused)
    else:
        assert (compiled.regions, len(regions)) == (2, 1)
        assert compiled.regions_refused is None


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.slow
def test_layers_compile_once(mask: bool) -> None:
    loaded = workload("bert")
    seen = loaded.with_axes(point(num_hidden_layers=3, sequence_length=16, attention_mask=mask))
    model, inputs = loaded.build(seen).eval(), loaded.inputs(seen, CPU)
    compiled = compile_for_a100(model, mode="default", attention="math")
    output = compiled(**inputs).last_hidden_state
    assert (compiled.regions, compiled.regions_refused) == (3, None)
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
    assert torch.allclose(output, expected, atol=1e-4)


def test_mask_has_samples_of_different_lengths() -> None:
    loaded = workload("bert")
    asked = point(sequence_length=16, attention_mask=True)
    inputs: Any = loaded.inputs(loaded.with_axes(asked), CPU)
    lengths = inputs["attention_mask"].sum(-1)
    assert inputs["attention_mask"].shape == (3, 16)
    assert 8 <= int(lengths.min()) < int(lengths.max()) <= 16
    assert loaded.impossible_reason is not None
    reason = "flash attention takes no attention mask on CUDA; use attention=efficient or auto"
    assert loaded.impossible_reason(asked.replace(gpu_type="cuda")) == reason
    assert loaded.impossible_reason(asked.replace(gpu_type="cuda", attention="auto")) is None
    assert loaded.impossible_reason(asked) is None


def test_image_inputs_follow_the_configuration() -> None:
    loaded = workload("vit")
    seen = loaded.with_axes(
        POINT.replace(
            extra={**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "image_size": 32}
        )
    )
    inputs: Any = loaded.inputs(seen, CPU)
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)
    assert dict(loaded.units(seen)) == {"samples": 3, "pixels": 3 * 32 * 32}
    assert loaded.tokens is not None
    assert loaded.tokens(loaded.build(seen).eval()(**inputs)) == 3 * (2 * 2 + 1)


def test_decoder_uses_no_cache() -> None:
    loaded = workload("qwen2")
    seen = loaded.with_axes(point(sequence_length=8, num_key_value_heads=2))
    output = loaded.build(seen).eval()(**loaded.inputs(seen, CPU))
    assert output.last_hidden_state.shape == (3, 8, 32)
    assert output.past_key_values is None


def test_rejects_incompatible_fields_in_one_line() -> None:
    loaded = workload("bert")
    seen = loaded.with_axes(point(hidden_size="big"))
    with pytest.raises(
        ValueError, match=r"bert cannot take .*extra\.hidden_size=big.*: "
    ) as caught:
        loaded.build(seen)
    assert "\n" not in str(caught.value)


def test_random_weights_repeat_and_int8_covers_them() -> None:
    loaded = workload("bert")
    params = point(sequence_length=16).replace(int8_enabled=True)
    first, second = (ModelPool().get(loaded, params.baseline()).eager for _ in range(2))
    assert torch.equal(
        first.embeddings.word_embeddings.weight, second.embeddings.word_embeddings.weight
    )
    covered = coverage(ModelPool().get(loaded, params).eager)
    assert len(covered.converted) == 6
    assert [layer.name for layer in covered.left_out] == ["pooler.dense"]


@pytest.mark.parametrize("weights", ["hub", "folder", "file"])
def test_weights_come_from_a_folder_or_a_file(bert_folder: Path, weights: str) -> None:
    # A local folder replaces a hub repository, because transformers reads both the same way.
    loaded = workload("bert", bert_folder.parent)
    assert loaded.axes["max_position_embeddings"] == loaded.axes["sequence_length"] == 48
    source = {"hub": "hub", "folder": bert_folder, "file": bert_folder / "model.safetensors"}
    model = ModelPool(weights=str(source[weights])).get(loaded, POINT).eager
    saved = transformers.BertModel.from_pretrained(bert_folder).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_rejects_mismatched_weights_in_one_line(bert_folder: Path) -> None:
    other = POINT.replace(extra={"num_hidden_layers": 2})
    loaded = workload("bert", bert_folder.parent)
    with pytest.raises(WeightsError, match="16 missing") as caught:
        ModelPool(weights=str(bert_folder / "model.safetensors")).get(loaded, other)
    assert "\n" not in str(caught.value)


def test_checkpoint_must_have_every_layer(bert_folder: Path) -> None:
    loaded, deeper = workload("bert", bert_folder.parent), {"num_hidden_layers": 2}
    with pytest.raises(WeightsError, match=r"do not fit the model: 16 keys are missing") as caught:
        ModelPool(weights="hub").get(loaded, POINT.replace(extra=deeper))
    assert "\n" not in str(caught.value)


def test_reports_damaged_checkpoint_in_one_line(bert_folder: Path) -> None:
    (bert_folder / "model.safetensors").write_text("damaged")
    with pytest.raises(WeightsError, match="cannot be loaded: ") as caught:
        ModelPool(weights="hub").get(workload("bert", bert_folder.parent), POINT)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_positions_are_impossible() -> None:
    loaded = workload("roberta")
    assert loaded.impossible_reason is not None
    reason = "sequence_length=511 is more than the 510 positions of hf:roberta"
    assert loaded.impossible_reason(POINT.replace(extra={"sequence_length": 511})) == reason
    assert loaded.impossible_reason(POINT.replace(extra={"sequence_length": 510})) is None


def test_model_type_has_no_weights_on_the_hub() -> None:
    with pytest.raises(WeightsError, match="hf:bert is a model type without weights of its own"):
        ModelPool(weights="hub").get(workload("bert"), point())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such", "hf:no/such is no folder with a config.json, no model type of transformers"),
        ("wav2vec2", "hf:wav2vec2 takes input_values; by name only models that take input_ids or"),
        ("clip", "hf:clip takes input_ids, but its configuration has no whole number vocab_size"),
    ],
)
def test_reports_unavailable_names_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        workload(name)
    assert "\n" not in str(caught.value)


def test_reports_damaged_folder_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "none-such"}))
    with pytest.raises(ValueError, match="hf:model: ") as caught:
        workload("model", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "extra", "masked"),
    [
        ("bert", {}, False),
        ("bert", {"attention_mask": True}, True),
        ("roberta", {}, False),
        ("qwen2", {"num_key_value_heads": 2}, False),  # causal, without a mask
        ("modernbert", {"sequence_length": 40, "local_attention": 8}, True),  # a window
    ],
)
def test_compiled_attention_drops_full_mask(name: str, extra: dict[str, Any], masked: bool) -> None:
    """Flash attention on CUDA does not support masks."""
    loaded = workload(name)
    fields = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    seen = loaded.with_axes(
        POINT.replace(extra={**fields, "num_hidden_layers": 2, "sequence_length": 16, **extra})
    )
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        attention = nn.functional.scaled_dot_product_attention
        calls.extend(node for node in graph.graph.nodes if node.target is attention)
        return graph.forward

    model = loaded.build(seen).eval()
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        compiled(**loaded.inputs(seen, CPU))
    masks = [node.kwargs.get("attn_mask") for node in calls]
    assert len(masks) == 2
    assert any(mask is not None for mask in masks) is masked
    assert {bool(node.kwargs["is_causal"]) for node in calls} == {name == "qwen2"}


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "electra", "llama", "olmo2", "qwen2", "qwen3", "doge"]
)
def test_omitting_the_mask_does_not_change_the_output(name: str) -> None:
    loaded = workload(name)
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "sequence_length": 16}
    small |= {"n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 64}  # DistilBERT's names
    own = {key: value for key, value in small.items() if key in loaded.axes}
    seen = loaded.with_axes(POINT.replace(extra=own))
    model: Any = loaded.build(seen).eval()
    assert ("unmasked" in model.config._attn_implementation) == (name != "doge")
    with torch.inference_mode():
        ours = model(**loaded.inputs(seen, CPU)).last_hidden_state
        model.set_attn_implementation("sdpa")
        theirs = model(**loaded.inputs(seen, CPU)).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-5)


# -- BF16 ----------------------------------------------------------------------------------------

TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    "deepseek_v3": {
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "bert": {},
}


def tiny(name: str) -> Any:
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **TINY[name]})
    return transformers.AutoModel.from_config(config)


def tensors_in(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", TINY)
def test_bf16_matches_transformers(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / name)
    expected = tensors_in(
        transformers.AutoModel.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
    )
    eager = (
        ModelPool(weights="hub")
        .get(workload(name, tmp_path), POINT.replace(bf16=True, extra={"sequence_length": 16}))
        .eager
    )
    found = tensors_in(eager)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, torch.equal(found[key], value)) == (value.dtype, True), key
    if name == "llama":
        assert found["rotary_emb.inv_freq"].dtype == torch.float32
    if name == "deepseek_v3":
        assert found["layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


class Wrapped(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.register_buffer("own", torch.ones(2))

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.inner(**inputs).last_hidden_state + self.own.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_supports_transformers_models_in_user_workloads(dtype: torch.dtype) -> None:
    def build(p: RunParams) -> torch.nn.Module:
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, use_cache=False)
        return Wrapped(transformers.AutoModel.from_config(config, dtype=dtype))

    def inputs(p: RunParams, device: torch.device) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(6).reshape(2, 3)}

    own = Workload(name="own", build=build, inputs=inputs)
    model = ModelPool().get(own, POINT.replace(bf16=True, batch_size=2))
    kept = {name for name, t in tensors_in(model.eager).items() if t.dtype == torch.float32}
    assert kept == {"inner.rotary_emb.inv_freq", "inner.rotary_emb.original_inv_freq"}
    whole = ModelPool().get(own, POINT.replace(bf16=False, batch_size=2))
    assert {t.dtype for t in tensors_in(whole.eager).values()} == {torch.float32}


# -- models with custom code -------------------------------------------------------------------

OWN_CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import BertConfig, BertModel

class OwnConfig(BertConfig):
    model_type = "own"

class OwnModel(BertModel):
    config_class = OwnConfig
"""


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Return a model folder with a Python file that leaves a mark when it runs."""
    folder = tmp_path / "own"
    folder.mkdir()
    classes = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    config = {"model_type": "own", "auto_map": classes, **SMALL, "max_position_embeddings": 48}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(tmp_path / "ran")))
    return folder


def no_questions(prompt: str = "") -> str:
    raise AssertionError(f"asked on standard input: {prompt}")


@pytest.mark.parametrize("known", [False, True], ids=["config-too", "model-only"])
def test_does_not_run_code_of_a_model(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    monkeypatch.setattr("builtins.input", no_questions)
    if known:  # transformers has the configuration but no model for it
        path = own_folder / "config.json"
        values = json.loads(path.read_text())
        del values["auto_map"]["AutoConfig"]
        path.write_text(json.dumps(values | {"model_type": "pix2struct_text_model"}))
    with pytest.raises(ValueError, match="--int8-trust-remote-code") as caught:
        workload(own_folder.name, tmp_path)
    assert str(caught.value) == (
        "hf:own: the model needs Python code that comes with it (auto_map in its config.json), "
        "which is not run: give --int8-trust-remote-code if you trust it"
    )
    assert not (tmp_path / "ran").exists()


def test_runs_trusted_code_of_a_model(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", no_questions)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    found = load_workload("hf:own", tmp_path, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    model = ModelPool().get(found, POINT.replace(extra={"sequence_length": 8})).eager
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 7


def test_known_model_does_not_need_its_code(bert_folder: Path, tmp_path: Path) -> None:
    path = bert_folder / "config.json"
    values = json.loads(path.read_text()) | {"auto_map": {"AutoModel": "missing.Model"}}
    path.write_text(json.dumps(values))
    assert workload("bert", tmp_path).name == "hf:bert"
