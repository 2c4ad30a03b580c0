"""Test sensitivity scans of models that a copy does not reproduce."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from pytest_int8bench.accuracy.attention_rows import SelectiveInt8Attention
from pytest_int8bench.accuracy.guardrail import Guardrail
from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.outputs import OutputsError
from pytest_int8bench.accuracy.sensitivity import ScanError, SensitivityScan
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads import Workload
from toys import rebound, stateful
from toys.attending import Outlier, masked
from toys.models import make_workload, normal
from toys.rebound import Blocks

W8A8 = RunParams(gpu_type="cpu", compile_mode="off", batch_size=4, int8_enabled=True)


def blocks(change: Any) -> Workload:
    def build() -> nn.Module:
        net = Blocks()
        change(net)
        return net

    return make_workload(
        build, inputs=normal(16), filter_fn=lambda module, name: isinstance(module, nn.Linear)
    )


def scan(of: Workload, by: str = "block", params: RunParams = W8A8) -> list[dict[str, Any]]:
    guardrail = Guardrail(ModelPool(), Limit(0.01, relative=True))
    table = SensitivityScan(guardrail, of, params, by=by).run(nodeid="")
    return sorted(table.layers, key=lambda row: str(row["name"]))


@pytest.mark.parametrize(
    "change",
    [rebound.closure, rebound.hook, rebound.lock, rebound.compiled_in_place],
    ids=lambda change: change.__name__,
)
def test_scan_quantizes_every_block(change: Any) -> None:
    rows = scan(blocks(change))
    assert rows == scan(blocks(lambda net: None))
    assert [row["name"] for row in rows] == ["blocks.0", "blocks.1"]
    assert all(row["sqnr_db"] is not None for row in rows)


def test_rejects_model_that_cannot_be_made_twice() -> None:
    net: Any = Blocks()
    rebound.closure(net)
    of = make_workload(lambda: net, inputs=normal(16), filter_fn=lambda module, name: True)
    with pytest.raises(WorkloadError, match=r"^workload 'toy': build must return a new model each"):
        scan(of)


def test_rejects_sparse_outputs_in_one_line() -> None:
    def sparse(net: Any) -> None:
        net.register_forward_hook(lambda module, args, out: out.to_sparse())

    with pytest.raises(WorkloadError) as caught:
        scan(blocks(sparse))
    assert str(caught.value) == (
        "workload 'toy': outputs must be dense tensors, got a sparse_coo one; convert it inside "
        "the model"
    )
    assert torch.is_inference_mode_enabled() is False


@pytest.mark.parametrize(
    "kind", [*stateful.IN_BUFFERS, stateful.Draws], ids=lambda kind: kind.__name__
)
def test_buffers_and_random_draws_do_not_count_as_loss(kind: Any) -> None:
    of = make_workload(kind, inputs=normal(16), filter_fn=lambda module, name: "fc" in name)
    rows = scan(of, "layer")
    assert [row["name"] for row in rows] == ["fc1", "fc2"]
    assert all(row["sqnr_db"] > 35 for row in rows)


def test_rejects_python_state_in_one_line() -> None:
    of = make_workload(
        stateful.InPython, inputs=normal(16), filter_fn=lambda module, name: "fc" in name
    )
    with pytest.raises(OutputsError) as caught:
        scan(of)
    assert str(caught.value) == (
        "two calls with the same inputs gave different outputs: layers cannot be ranked"
    )


def masked_logits(fill: float) -> Workload:
    class Masked(stateful.Layers):
        def forward(self, x: torch.Tensor) -> Any:
            return self.fc2(self.fc1(x)).masked_fill(torch.arange(16) > 10, fill)

    return make_workload(
        Masked, inputs=normal(16), filter_fn=lambda module, name: name.startswith("fc")
    )


def test_ignores_masked_logits() -> None:
    assert scan(masked_logits(-torch.inf), "layer") == scan(masked_logits(0.0), "layer")


def test_rejects_nan_outputs_in_one_line() -> None:
    with pytest.raises(OutputsError, match=r"^the outputs hold NaN or infinity: layers cannot be"):
        scan(masked_logits(torch.nan))


# -- attention ----------------------------------------------------------------------------------


class Attends(nn.Module):
    """Blocks whose attention INT8 ruins, preserves, and cannot compute."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), part) for part in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(-1, (1, 4, 4)).repeat(1, 1, 1, 4)
        for block in self.blocks:
            x = x + block(x)
        return x


class Masking(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return masked(x)


def attending(*parts: nn.Module) -> Workload:
    return make_workload(
        lambda: Attends([copy.deepcopy(part) for part in parts]),
        inputs=normal(16),
        filter_fn=lambda module, name: isinstance(module, nn.Linear),
    )


@pytest.mark.parametrize("by", ["layer", "block"])
def test_attention_has_its_own_rows(by: str) -> None:
    of = attending(Outlier(0.0), Masking(), Outlier(1e4))
    [*plain] = scan(of, by)
    rows = scan(of, by, W8A8.replace(int8_attention=True))
    names = ["blocks.0.1", "blocks.2.1"] if by == "layer" else ["blocks.0", "blocks.2"]
    found = {row["name"]: row for row in rows if not row["layers"]}
    assert list(found) == [f"{name} (attention)" for name in names]
    kept_db, lost_db = (row["sqnr_db"] for row in found.values())
    assert lost_db < 20 < kept_db
    # Layers are quantized alone, not together with all attention.
    assert [row for row in rows if row["layers"]] == plain


def test_module_called_twice_has_one_row() -> None:
    shared = Outlier(0.0)
    of = make_workload(lambda: Attends([shared, shared]), inputs=normal(16))
    of = dataclasses.replace(of, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    names = [row["name"] for row in scan(of, "layer", W8A8.replace(int8_attention=True))]
    assert names == ["blocks.0.0", "blocks.0.1 (attention)", "blocks.1.0"]


def test_reports_attention_unsupported_in_int8_in_one_line() -> None:
    message = "^int8_attention=True: 0 of 1 attention calls on .*; left out: 1 with a mask$"
    with pytest.raises(ScanError, match=message):
        scan(attending(Masking()), "block", W8A8.replace(int8_attention=True))


def test_removes_hooks_after_a_failed_forward() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("mine")

    model = nn.Sequential(Fails())
    mode = SelectiveInt8Attention(model)
    with pytest.raises(ValueError, match=r"^mine$"), mode.entered():
        model(torch.ones(1))
    x = torch.ones(1, 1, 4, 8)
    assert mode.callers == {}
    with mode.entered():
        nn.functional.scaled_dot_product_attention(x, x, x)
    assert mode.callers == {"": None}
