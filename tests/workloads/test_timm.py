"""Test timm models by name. Skipped if timm or its torchvision cannot be imported."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import coverage
from pytest_int8bench.workloads import Workload
from pytest_int8bench.workloads.registry import load_workload


@pytest.fixture(scope="module", autouse=True)
def _timm() -> None:
    """Skip without timm, which takes five seconds to import, so collecting does not import it."""
    try:
        importlib.import_module("timm")
    except (
        ImportError,
        RuntimeError,
    ) as error:  # torchvision built for another torch raises RuntimeError
        pytest.skip(f"timm cannot be imported: {error}")


POINT = RunParams(gpu_type="cpu", batch_size=2, compile_mode="off")
VIT = "vit_tiny_patch16_224"


def workload(name: str) -> Workload:
    return load_workload(f"timm:{name}", Path())


@pytest.mark.parametrize(("size", "tokens"), [(None, 197), (96, 37)])
def test_vit_gets_images_of_its_size(size: int | None, tokens: int) -> None:
    loaded = workload(VIT)
    params = POINT.replace(extra={} if size is None else {"image_size": size})
    seen, side = loaded.with_axes(params), size or 224
    assert dict(loaded.units(seen)) == {"samples": 2, "pixels": 2 * side**2, "tokens": 2 * tokens}
    model: Any = ModelPool().get(loaded, params)
    assert model.inputs[0].shape == (2, 3, side, side)
    assert model.eager.forward_features(*model.inputs).shape == (2, tokens, 192)


def test_does_not_quantize_the_classifier() -> None:
    covered = coverage(ModelPool().get(workload(VIT), POINT.replace(int8_enabled=True)).eager)
    assert len(covered.converted) == 48
    assert [layer.name for layer in covered.left_out] == ["head"]


def test_a_convolutional_network_runs_in_channels_last() -> None:
    loaded = workload("resnet18")
    assert (loaded.channels_last, workload(VIT).channels_last) == (True, False)
    model: Any = ModelPool().get(loaded, POINT)
    layout = torch.channels_last
    assert model.inputs[0].is_contiguous(memory_format=layout)
    assert model.eager.layer1[0].conv1.weight.is_contiguous(memory_format=layout)
    with pytest.raises(QuantizationError, match="1 linear layers"):
        ModelPool().get(loaded, POINT.replace(int8_enabled=True))


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    loaded = workload(VIT)
    model = loaded.build(loaded.with_axes(POINT))
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    read: Any = ModelPool(weights=str(tmp_path / "vit.pth")).get(loaded, POINT).eager
    assert torch.equal(read.head.weight, model.head.weight.bfloat16())


def test_an_unknown_name_suggests_others() -> None:
    with pytest.raises(ValueError, match="timm has no model 'vit_tiny_patch16_225'; there is vit_"):
        workload("vit_tiny_patch16_225")
