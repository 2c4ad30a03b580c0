"""Test remedies on models that were built to break."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pytest_int8bench.accuracy.forward import Forward
from pytest_int8bench.accuracy.guardrail import Guardrail
from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.remedies import ALPHAS, Remedies, _half
from pytest_int8bench.accuracy.sensitivity import ScanError, SensitivityScan, grouped
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import coverage
from pytest_int8bench.report.verdict_text import describe
from pytest_int8bench.results.verdicts import Accuracy, Sensitivity
from pytest_int8bench.workloads import Evaluation, Workload
from toys.attending import Outlier

WIDTH, CLASSES, SAMPLES = 32, 4, 3000
W8A8 = RunParams(
    gpu_type="cpu",
    compile_mode="off",
    batch_size=500,
    model_size="nano",
    int8_enabled=True,
    benchmark_interval_s=0.05,
)
LIMIT = Limit.parse("1%")
OUTLIERS = {1: 100.0, 2: 100.0}
SPIKES = {1: 60.0, 3: 60.0}


class Block(nn.Module):
    """A residual MLP whose second layer may get outliers that do not show in its output."""

    def __init__(self, channel: float, spike: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)
        self.spike = spike
        with torch.no_grad():
            self.fc1.weight *= 2
            if channel:  # always the same channel
                self.fc1.bias[5] = channel
                self.fc2.weight[:, 5] = 0
        self.register_buffer("columns", self.fc2.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.fc1(self.norm(x)))
        if not self.spike:
            return x + self.fc2(hidden)
        # A different channel for each sample.
        spikes = self.spike * nn.functional.one_hot(hidden.argmax(-1), 2 * WIDTH).to(x.dtype)
        return x + self.fc2(hidden + spikes) - nn.functional.linear(spikes, self.columns)


class Net(nn.Module):
    def __init__(self, channel: dict[int, float], spike: dict[int, float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(channel.get(index, 0), spike.get(index, 0)) for index in range(4)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Attending(Net):
    """A model whose attention INT8 may ruin."""

    def __init__(self, channel: dict[int, float], outlier: float) -> None:
        super().__init__(channel, {})
        self.attend = Outlier(outlier)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.attend(x.unflatten(-1, (1, 4, -1))).flatten(1))


def data(seed: int, samples: int) -> torch.Tensor:
    return torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(seed))


def make_workload(
    channel: dict[int, float] | None = None,
    spike: dict[int, float] | None = None,
    *,
    selection: bool = True,
    **changes: Any,
) -> Workload:
    def build(p: Any = None) -> nn.Module:
        torch.manual_seed(0)
        return Net(channel or {}, spike or {})

    exact = build().eval()

    def scores_on(seed: int, samples: int) -> Callable[[Forward], Any]:
        images = data(seed, samples)
        with torch.no_grad():
            labels = exact(images).argmax(1)

        def scores(forward: Forward) -> Any:
            return forward(images).argmax(1) == labels

        return scores

    return Workload(
        **{
            "name": "net",
            "build": build,
            "inputs": lambda p, device: (data(1, p.batch_size).to(device),),
            "evaluation": Evaluation(
                metric="top1",
                scores=scores_on(2, SAMPLES),
                selection=scores_on(3, SAMPLES // 4) if selection else None,
            ),
            **changes,
        }
    )


def walk(workload: Workload, params: RunParams = W8A8) -> Accuracy:
    guardrail = Guardrail(ModelPool(), LIMIT)
    [verdict] = guardrail.check(workload, params, nodeid="a")
    assert verdict.outcome == "FAIL"
    assert verdict.drop > 0.01
    return Remedies(guardrail, LIMIT).walk(workload, params, 0, verdict)


def test_a_model_without_outliers_needs_no_remedy() -> None:
    [verdict] = Guardrail(ModelPool(), LIMIT).check(make_workload(), W8A8, nodeid="a")
    assert verdict.outcome != "FAIL"


@pytest.mark.parametrize(
    ("channel", "outlier", "helps"),
    [(OUTLIERS, 0.0, False), ({}, 1e4, True)],
    ids=["layers", "attention"],
)
def test_tries_attention_in_bf16_first(
    channel: dict[int, float], outlier: float, helps: bool
) -> None:
    def build(p: RunParams) -> nn.Module:
        torch.manual_seed(0)
        return Attending(channel, outlier)

    workload = make_workload(channel=channel, build=build)
    verdict = walk(workload, W8A8.replace(int8_attention=True))
    [first, *rest] = verdict.remedies
    assert (first["rung"], first["setting"]) == ("attention in BF16", "int8_attention=False")
    assert first["configuration"] == "--int8-set int8_attention=false"
    assert (first["outcome"] == "PASS") is helps
    assert {row["rung"] for row in rest} == (set() if helps else {"SmoothQuant"})


def test_smoothquant_remedies_an_outlier_channel() -> None:
    verdict = walk(make_workload(channel=OUTLIERS))
    assert verdict.outcome == "FAIL"  # of the requested configuration
    rows = verdict.remedies
    assert [(row["rung"], row["setting"]) for row in rows] == [
        ("SmoothQuant", f"alpha={alpha:g}") for alpha in ALPHAS
    ]
    [passed] = [row for row in rows if row["outcome"]]
    assert passed["outcome"] == "PASS"
    assert passed["drop_high"] < 0.01
    assert (passed["selection_samples"], passed["samples"]) == (SAMPLES // 4, SAMPLES)
    assert passed["selection_drop"] == min(row["selection_drop"] for row in rows)
    assert passed["speedup_low"] <= passed["speedup"] <= passed["speedup_high"]
    text = describe(verdict)
    alpha = passed["setting"].partition("=")[2]
    assert text[-2:] == [
        "  remedy:",
        f"    Workload(..., smoothquant_alpha={alpha})  # and --int8-smoothquant",
    ]
    # What is pasted does what was measured.
    pasted = make_workload(channel=OUTLIERS, smoothquant_alpha=float(alpha))
    [again] = Guardrail(ModelPool(), LIMIT).check(
        pasted, W8A8.replace(int8_smoothquant=True), nodeid="a"
    )
    assert (again.outcome, again.drop) == ("PASS", passed["drop"])


@pytest.mark.parametrize("selection", [True, False], ids=["split", "halves"])
def test_layers_with_outliers_are_found_and_left_in_bf16(selection: bool) -> None:
    verdict = walk(make_workload(spike=SPIKES, selection=selection))
    rungs = {row["rung"] for row in verdict.remedies}
    assert rungs == {"SmoothQuant", "BF16 for the worst layers"}
    worst = [row["setting"].split(", ") for row in verdict.remedies][len(ALPHAS) :]
    assert worst[1] == ["blocks.1.fc2", "blocks.3.fc2"]
    last = verdict.remedies[-1]
    assert last["outcome"] == "PASS"
    parts = (SAMPLES // 4, SAMPLES) if selection else (SAMPLES // 2, SAMPLES // 2)
    assert (last["selection_samples"], last["samples"]) == parts
    # What is pasted does what was measured.
    pasted: dict[str, Any] = {}
    exec(last["configuration"], pasted)
    workload = make_workload(spike=SPIKES, filter_fn=pasted["filter_fn"])
    covered = coverage(ModelPool().get(workload, W8A8).eager)
    assert {layer.name for layer in covered.left_out} == {*worst[-1], "head"}
    [again] = Guardrail(ModelPool(), LIMIT).check(workload, W8A8, nodeid="a")
    assert again.outcome == "PASS"


def test_remedies_keep_the_users_filter() -> None:
    workload = make_workload(spike=SPIKES, filter_fn=lambda module, name: name.startswith("blocks"))
    last = walk(workload).remedies[-1]
    assert "and your_filter(module, name)" in last["configuration"]


def test_tries_weights_only_last() -> None:
    def both(module: nn.Module, name: str) -> bool:
        return name in ("blocks.1.fc2", "blocks.3.fc2")

    rows = walk(make_workload(spike={1: 40.0, 3: 40.0}, filter_fn=both)).remedies
    assert [(rung, len(list(of))) for rung, of in itertools.groupby(r["rung"] for r in rows)] == [
        ("SmoothQuant", len(ALPHAS)),
        ("BF16 for the worst layers", 1),  # at most half of them
        ("weights only", 1),
    ]
    assert (rows[-1]["outcome"], rows[-1]["configuration"]) == ("PASS", "--int8-mode=w8")


def test_reports_remedy_that_cannot_be_tried() -> None:
    def fails(p: RunParams, device: torch.device) -> Any:
        raise WorkloadError("no calibration today")

    verdict = walk(make_workload(channel={1: 100.0}, calibration=fails))
    assert {row["problem"] for row in verdict.remedies if row["rung"] == "SmoothQuant"} == {
        "no calibration today"
    }
    assert any("no calibration today" in line for line in describe(verdict))


# -- sensitivity --------------------------------------------------------------------------------


def test_layers_are_ranked_by_loss() -> None:
    guardrail = Guardrail(ModelPool(), LIMIT)
    told: list[str] = []
    scan = SensitivityScan(guardrail, make_workload(spike={1: 40.0}), W8A8)
    kept: list[Sensitivity] = []
    table = scan.run(nodeid="a", tell=told.append, record=kept.append)
    assert re.fullmatch(r"8 layers: about \d+ s \(\d+\.\d s for the first\)", *told)
    assert [len(part.layers) for part in kept] == [*range(1, 9)]
    assert kept[-1] == table
    assert table.layers[0]["name"] == "blocks.1.fc2"
    assert len(table.layers) == 8
    sqnr = [row["sqnr_db"] for row in table.layers]
    assert sqnr == sorted(sqnr)
    assert sqnr[0] < sqnr[1] - 10
    assert (table.metric, table.samples) == (None, 500)


def test_blocks_are_ranked_by_their_metric() -> None:
    guardrail = Guardrail(ModelPool(), LIMIT)
    scan = SensitivityScan(guardrail, make_workload(spike={2: 60.0}), W8A8, by="block")
    table = scan.run(nodeid="a", metric=True)
    first, *others = table.layers
    assert (first["name"], first["layers"]) == ("blocks.2", ["blocks.2.fc1", "blocks.2.fc2"])
    assert first["drop"] > 0.01
    assert first["lost"] - first["gained"] == pytest.approx(first["drop"] * SAMPLES / 4)
    assert all(row["drop"] < first["drop"] for row in others)
    assert (table.metric, table.samples) == ("top1", SAMPLES // 4)


def test_blocks_are_named_up_to_their_first_number() -> None:
    names = [
        "encoder.blocks.0.attn.q",
        "encoder.blocks.0.fc1",
        "encoder.blocks.10.fc1",
        "fc",
        "a.b",
    ]
    assert grouped(names, "block") == {
        "encoder.blocks.0": ("encoder.blocks.0.attn.q", "encoder.blocks.0.fc1"),
        "encoder.blocks.10": ("encoder.blocks.10.fc1",),
        "fc": ("fc",),
        "a": ("a.b",),
    }
    assert list(grouped(names, "layer")) == names


def test_rejects_scans_that_cannot_run() -> None:
    guardrail = Guardrail(ModelPool(), LIMIT)
    with pytest.raises(ScanError, match=r"^by must be one of layer, block, got 'model'$"):
        SensitivityScan(guardrail, make_workload(), W8A8, by="model")
    with pytest.raises(WorkloadError, match=r"^workload 'net' brings its own quantization, so"):
        SensitivityScan(guardrail, make_workload(prequantized=True), W8A8)
    scan = SensitivityScan(guardrail, make_workload(evaluation=None), W8A8)
    with pytest.raises(
        WorkloadError, match=r"^workload 'net' has no evaluation at .*ranked by SQNR$"
    ):
        scan.run(nodeid="a", metric=True)


def test_halves_do_not_split_groups() -> None:
    """Otherwise the samples that certify a remedy would also have helped to choose it."""
    groups = np.arange(300) % 30
    evaluation = Evaluation(metric="top1", scores=lambda forward: [], groups=groups)
    first, second = (_half(evaluation, 300, half) for half in (0, 1))
    assert first is not None
    assert second is not None
    assert sorted([*first, *second]) == list(range(300))
    assert len(set(groups[first])) == len(set(groups[second])) == 15
    assert not set(groups[first]) & set(groups[second])
    chosen = dataclasses.replace(evaluation, selection=lambda forward: [])
    assert _half(chosen, 300, 0) is None
