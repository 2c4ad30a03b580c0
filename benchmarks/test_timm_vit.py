"""Benchmark a vision transformer from timm. Copy this file to benchmark your own."""

import pytest
import torch

from pytest_int8bench.workloads import Workload

# timm needs torchvision, which raises RuntimeError if it was built for another version of torch.
timm = pytest.importorskip("timm", exc_type=Exception)
NAMES = {"cpu": "test_vit", "cuda": "vit_base_patch16_224"}  # a small model without a GPU


@pytest.fixture(scope="module")
def int8_workload():
    return Workload(
        name="vit",
        build=lambda p: timm.create_model(NAMES[p.gpu_type], img_size=224),
        inputs=lambda p, device: (torch.randn(p.batch_size, 3, 224, 224, device=device),),
        units=lambda p: {"samples": p.batch_size, "tokens": 197 * p.batch_size},
    )


# Keep the example quick: max-autotune, the default on a GPU, takes longer to compile.
@pytest.mark.int8(compile_mode="default", benchmark_interval_s=5)
def test_throughput(int8_throughput):
    result = int8_throughput()
    assert result.oom or result.samples_per_s > 0
