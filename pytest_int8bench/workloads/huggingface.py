"""Build Hugging Face encoders by name, with inputs and units derived from the configuration."""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModel,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pytest_int8bench.errors import first_line
from pytest_int8bench.param_values import EXTRA_NAME, Scalar
from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads.weights import (
    HUB,
    WeightsError,
    check_not_pointer,
    load_state_dict,
    read_state_dict,
)
from pytest_int8bench.workloads.workload import Workload

INPUT_SEED = 0
# Decoders whose mask is purely causal.
_CAUSAL = ("llama", "olmo2", "qwen2", "qwen3")
# Model types of the RoBERTa family.
_OFFSET_POSITIONS = (
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer"),
    *("luke", "markuplm", "mluke", "mpnet", "roberta", "xlm-roberta"),
)
# transformers builds no mask for an attention without a registered mask function.
_UNMASKED = "int8bench_unmasked"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
#: Default sequence length of text models that have at least as many positions.
SEQUENCE_LENGTH = 512
#: Entry of ``auto_map`` that names the class in the model's own code, and the argument that
#: transformers mentions in its error if that code is not trusted.
_CLASS_REFERENCE, _TRUST = "AutoModel", "trust_remote_code"
_UNTRUSTED = (
    "the model needs Python code that comes with it (auto_map in its config.json), which is not "
    "run: give --int8-trust-remote-code if you trust it"
)


def huggingface(name: str, root: Path, trust_remote_code: bool = False) -> Workload:
    """Return the workload of a transformers encoder with random weights and random inputs.

    Text models get ``sequence_length`` tokens per sample (512, or fewer if they have fewer
    positions), all valid and without an attention mask. With ``extra.attention_mask=true``, samples
    differ in length and come with a mask; token counts then include padding. Image models get
    Gaussian noise of their ``image_size``. Every plain field of the configuration is an axis, such
    as ``extra.num_hidden_layers=2``.

    Args:
        name: a folder with a ``config.json``, a model type of transformers (``bert`` for BERT's
            default configuration), or a repository on the Hub.
        root: folder that relative paths start from.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ValueError: one line, if there is no such configuration, the model takes inputs other than
            token ids or images, or it needs its own code and that is not trusted.
    """
    config, pretrained = _find_config(name, root, trust_remote_code)
    model = _NamedModel(f"hf:{name}", config, pretrained, trust_remote_code)
    is_text = _main_input(config, model) == "input_ids"
    return Workload(
        name=model.label,
        build=model.build,
        load=model.load,
        inputs=_text if is_text else _images,
        units=_text_units if is_text else _image_units,
        tokens=None if is_text else _count_tokens,
        axes=_axes(config, is_text),
        impossible_reason=model.impossible_reason,
    )


@dataclass(frozen=True)
class _NamedModel:
    """A model that the user named, with its configuration."""

    label: str
    """The workload's name."""
    config: Any
    pretrained: str | None
    """Folder or repository that holds its weights; None if there is none."""
    trusted: bool
    """Whether code that comes with the model may be run."""

    def impossible_reason(self, params: RunParams) -> str | None:
        length, positions = params.extra.get("sequence_length"), _positions(self.config)
        if positions and length and int(length) > positions:
            return (
                f"sequence_length={length} is more than the {positions} positions of {self.label}"
            )
        return _mask_reason(params)

    def build(self, params: RunParams) -> torch.nn.Module:
        attention = _attention(self.config, params)
        return _encoder(
            AutoModel.from_config(
                _configured(self.config, params), trust_remote_code=self.trusted, **attention
            )
        )

    def load(self, params: RunParams, weights: str) -> torch.nn.Module:
        if weights != HUB and not Path(weights).is_dir():
            model = self.build(params)
            load_state_dict(model, read_state_dict(Path(weights)), source=weights)
            return model
        source = weights if weights != HUB else self.pretrained
        if source is None:
            raise WeightsError(
                f"--int8-weights=hub: {self.label} is a model type without weights of its own; "
                "name a repository"
            )
        return self._from_pretrained(params, source)

    def _from_pretrained(self, params: RunParams, source: str) -> torch.nn.Module:
        check_not_pointer(Path(source))
        try:
            model, loaded = AutoModel.from_pretrained(
                source,
                config=_configured(self.config, params),
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=self.trusted,
                **_attention(self.config, params),
            )
        except Exception as error:  # from the Hub's client or safetensors
            raise WeightsError(
                f"weights of {source} cannot be loaded: {first_line(error)}"
            ) from None
        # Many checkpoints lack the pooler, which only classifiers use.
        lacking = [str(k) for k in loaded["missing_keys"] if "pooler" not in str(k)]
        lacking += [str(key) for key in loaded["mismatched_keys"]]
        if lacking:
            raise WeightsError(
                f"weights of {source} do not fit the model: {len(lacking)} keys are missing or of "
                f"another shape ({', '.join(sorted(lacking)[:3])} …)"
            )
        return _encoder(model)


def _axes(config: Any, is_text: bool) -> dict[str, Scalar]:
    """Return the configuration's plain fields and, for a text model, the axes of its inputs."""
    axes: dict[str, Scalar] = {
        key: value
        for key, value in config.to_dict().items()
        if isinstance(value, str | int | float) and EXTRA_NAME.fullmatch(key) and _finite(value)
    }
    if is_text:
        axes |= {"sequence_length": _sequence_length(config), "attention_mask": False}
    return axes


def _find_config(name: str, root: Path, trusted: bool) -> tuple[Any, str | None]:
    """Return the configuration, and the source of its weights or None if there are none."""
    folder = root / name
    if (folder / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        except Exception as error:  # from JSON, the configuration, or the model's own code
            problem = _UNTRUSTED if _TRUST in str(error) else first_line(error)
            raise ValueError(f"hf:{name}: {problem}") from None
        return _checked(config, name, trusted), str(folder)
    if name in CONFIG_MAPPING:
        return AutoConfig.for_model(name), None
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    except Exception as error:
        if _TRUST in str(error):
            raise ValueError(f"hf:{name}: {_UNTRUSTED}") from None
        raise ValueError(
            f"hf:{name} is no folder with a config.json, no model type of transformers such as "
            f"bert, and the hub did not answer with one: {first_line(error)}"
        ) from None
    return _checked(config, name, trusted), name


def _checked(config: Any, name: str, trusted: bool) -> Any:
    """Return ``config``, or raise ``ValueError`` if it needs code that is not trusted."""
    if (
        _model_class(config) is None
        and _CLASS_REFERENCE in (getattr(config, "auto_map", None) or {})
        and not trusted
    ):
        raise ValueError(f"hf:{name}: {_UNTRUSTED}")
    return config


def _finite(value: Scalar) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _model_class(config: Any) -> Any:
    found = MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple | list) else found


def _main_input(config: Any, model: _NamedModel) -> str:
    label, found = model.label, _model_class(config)
    reference = (getattr(config, "auto_map", None) or {}).get(_CLASS_REFERENCE)
    if found is None and reference and model.trusted and model.pretrained:
        try:
            found = get_class_from_dynamic_module(reference, model.pretrained)
        except Exception as error:  # from the model's own code
            raise ValueError(
                f"{label}: its code cannot be loaded: {type(error).__name__}: {first_line(error)}"
            ) from None
    kind = getattr(found, "main_input_name", None)
    needs = {"input_ids": ("vocab_size",), "pixel_values": ("image_size", "num_channels")}
    if kind not in needs:
        raise ValueError(
            f"{label} takes {kind or 'nothing that is known'}; by name only models that take "
            "input_ids or pixel_values can be had: write a Workload"
        )
    absent = [field for field in needs[kind] if not isinstance(getattr(config, field, None), int)]
    if absent:
        raise ValueError(
            f"{label} takes {kind}, but its configuration has no whole number {absent[0]}: "
            "name one of its encoders, or write a Workload"
        )
    return str(kind)


def _sequence_length(config: Any) -> int:
    return min(SEQUENCE_LENGTH, _positions(config) or SEQUENCE_LENGTH)


def _positions(config: Any) -> int | None:
    """Return the number of tokens for which a model has positions, or None if unlimited."""
    positions = getattr(config, "max_position_embeddings", None)
    return None if not positions else int(positions) - _first_position(config)


def _first_position(config: Any) -> int:
    """Return the first position used; the RoBERTa family starts after the padding token's id."""
    if not str(config.model_type).startswith(_OFFSET_POSITIONS):
        return 0
    return int(config.pad_token_id or 0) + 1


def _configured(config: Any, params: RunParams) -> Any:
    """Return the configuration with the axes of ``params`` and without a decoding cache.

    Raises:
        ValueError: one line, if transformers rejects the combination.
    """
    values = config.to_dict()
    own = {k: v for k, v in params.extra.items() if k in values and v != values[k]}
    if "num_hidden_layers" in own:
        values.pop("layer_types", None)  # one item per layer; transformers rebuilds it
    try:
        changed = type(config).from_dict({**values, **own})
    except Exception as error:  # from the libraries' validators
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        named = ", ".join(f"extra.{k}={v}" for k, v in own.items())
        raise ValueError(f"{config.model_type} cannot take {named}: {lines[-1]}") from None
    if hasattr(changed, "use_cache"):
        changed.use_cache = False
    return changed


def _attention(config: Any, params: RunParams) -> dict[str, str]:
    """Return the arguments that select torch's SDPA, without a mask if every token is valid:
    flash attention on CUDA takes no mask at all."""
    model = _model_class(config)
    if not getattr(model, "_supports_sdpa", False):
        return {}
    # Drop the mask only if it merely marks valid tokens. A sliding window, or anything else that a
    # model adds to its mask, is part of the model.
    plain = hasattr(sys.modules[model.__module__], "create_bidirectional_mask")
    plain = plain or config.model_type in _CAUSAL
    local = any("full" not in kind for kind in getattr(config, "layer_types", None) or ())
    windowed = local or getattr(config, "sliding_window", None) is not None
    masked = not plain or windowed or bool(params.extra.get("attention_mask"))
    if masked or not getattr(model, "_supports_attention_backend", False):
        return {"attn_implementation": "sdpa"}
    return {"attn_implementation": _UNMASKED}


def _encoder(model: Any) -> torch.nn.Module:
    encoder: torch.nn.Module = model.get_encoder() if model.config.is_encoder_decoder else model
    return encoder


def kept_in_fp32(model: torch.nn.Module) -> frozenset[str]:
    """Return the names of parameters and buffers that transformers keeps in FP32 when it loads a
    model in BF16 (``from_pretrained(dtype=torch.bfloat16)``), such as rotary frequencies.

    Args:
        model: any model; only the transformers models in it are inspected.
    """
    kept: set[str] = set()
    seen: set[torch.nn.Module] = set()
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or module in seen:
            continue
        shell = _empty_bf16(module)
        if shell is None:  # models nested in this one may still work
            continue
        seen.update(part for part in module.modules() if isinstance(part, PreTrainedModel))
        prefix = f"{path}." if path else ""
        plan = module._get_dtype_plan(torch.bfloat16)
        stored = shell.state_dict().keys()
        for name, tensor in itertools.chain(shell.named_parameters(), shell.named_buffers()):
            planned = name in stored and any(_matches(pattern, name) for pattern in plan)
            if planned or (tensor.is_floating_point() and tensor.dtype != torch.bfloat16):
                kept.add(prefix + name)
    return frozenset(kept)


def _matches(pattern: str, name: str) -> bool:
    # Like build_glob_alternation in transformers 5.17 to 5.23 (core_model_loading.py).
    return re.search(pattern.replace("*", ".*"), name) is not None


def _empty_bf16(model: Any) -> torch.nn.Module | None:
    """Return a BF16 copy of ``model`` without weights, built by transformers from the
    configuration, or None if that takes more than the configuration."""
    for device in ("meta", "cpu"):  # some models read tensor values while they are built
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device), no_init_weights():
                shell: torch.nn.Module = type(model)._from_config(
                    copy.deepcopy(model.config), dtype=torch.bfloat16
                )
                return shell
        except Exception:
            continue
    return None


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(INPUT_SEED)


def _text(params: RunParams, device: torch.device) -> Mapping[str, torch.Tensor]:
    vocabulary, length = int(params.extra["vocab_size"]), int(params.extra["sequence_length"])
    generator = _generator(device)
    shape = (params.batch_size, length)
    ids = torch.randint(0, vocabulary, shape, generator=generator, device=device)
    padding = params.extra.get("pad_token_id")
    if padding is not None:  # some models derive positions from it
        ids[ids == padding] = (int(padding) + 1) % vocabulary
    if not params.extra["attention_mask"]:
        return {"input_ids": ids}
    lengths = torch.randint(
        length // 2, length + 1, (params.batch_size, 1), generator=generator, device=device
    )
    valid = torch.arange(length, device=device) < lengths
    return {"input_ids": ids, "attention_mask": valid.long()}


def _text_units(params: RunParams) -> dict[str, float]:
    tokens = params.batch_size * int(params.extra["sequence_length"])
    return {"samples": params.batch_size, "tokens": tokens}


def _images(params: RunParams, device: torch.device) -> Mapping[str, torch.Tensor]:
    size, channels = int(params.extra["image_size"]), int(params.extra["num_channels"])
    shape = (params.batch_size, channels, size, size)
    return {"pixel_values": torch.randn(shape, generator=_generator(device), device=device)}


def _image_units(params: RunParams) -> dict[str, float]:
    pixels = params.batch_size * int(params.extra["image_size"]) ** 2
    return {"samples": params.batch_size, "pixels": pixels}


def _count_tokens(output: Any) -> int:
    """Count the tokens of (batch, tokens, channels) or (batch, channels, rows, columns)."""
    shape = output.last_hidden_state.shape
    return math.prod(shape[:2]) if len(shape) == 3 else shape[0] * math.prod(shape[2:])


def _mask_reason(params: RunParams) -> str | None:
    masked = bool(params.extra.get("attention_mask"))
    if masked and params.gpu_type == "cuda" and params.attention == "flash":
        return "flash attention takes no attention mask on CUDA; use attention=efficient or auto"
    return None
