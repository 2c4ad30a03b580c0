"""Remarks on layers and weights that quantization left out."""

from __future__ import annotations

from pytest_int8bench.report.remarks import remarks
from toys.results import result_of

NAMES = [f"layers.{n}.attn.qkv" for n in range(5)]


def said(**coverage: object) -> list[str]:
    label = result_of().label
    lines = [line for line in remarks(result_of(coverage=coverage)) if line.startswith("left in")]
    return [line.replace(f" {label}: ", " RUN: ") for line in lines]


def test_missed_layers_are_named_with_reasons() -> None:
    reasons = {
        **dict.fromkeys(NAMES[:4], "filtered"),
        NAMES[4]: "shape: K is 7",
        "head": "filtered",
    }
    (line,) = said(missed={"layers": NAMES, "of": 20}, left_out=reasons)
    assert line == (
        "left in BF16: RUN: 5 of 20 attention and MLP layers of repeated blocks "
        "(layers.0.attn.qkv, layers.1.attn.qkv, layers.2.attn.qkv and 2 more): "
        "4 filtered, 1 shape: K is 7"
    )


def test_weights_outside_of_linear_layers_are_named() -> None:
    weights = {
        "Conv1D": {"parameters": 7_000_000, "layers": ["h.0.attn.c_attn", "h.0.mlp.c_fc"]},
        "3-D parameters of Mixer": {"parameters": 1_000, "layers": [""]},
    }
    (line,) = said(elsewhere={"share": 0.876, "weights": weights})
    assert line == (
        "left in BF16: RUN: 88% of the weights are not in nn.Linear: Conv1D (7,000,000 in "
        "h.0.attn.c_attn, h.0.mlp.c_fc), 3-D parameters of Mixer (1,000 in the model itself)"
    )


def test_older_files_get_no_remarks() -> None:
    assert said(left_out={"head": "filtered"}) == []
    assert [line for line in remarks(result_of(coverage=None)) if "left in" in line] == []
