"""Benchmark an encoder from Hugging Face transformers. Copy this file to benchmark your own."""

import pytest
import torch
from transformers import BertConfig, BertModel

from pytest_int8bench.workloads import Workload

SIZES = {"cpu": (2, 2), "cuda": (12, 12)}  # layers and heads; fewer without a GPU


def build(p):
    layers, heads = SIZES[p.gpu_type]
    widths = {"hidden_size": 64 * heads, "intermediate_size": 256 * heads}
    return BertModel(BertConfig(num_hidden_layers=layers, num_attention_heads=heads, **widths))


@pytest.fixture(scope="module")
def int8_workload():
    def inputs(p, device):
        return (torch.randint(1, 30_000, (p.batch_size, 128), device=device),)

    return Workload(name="bert", build=build, inputs=inputs)


# attention="auto": under torch.compile, older transformers versions pass this model a mask, which
# flash attention does not support. compile_mode="default" keeps the example quick: max-autotune,
# the default on a GPU, takes longer to compile.
@pytest.mark.int8(attention="auto", compile_mode="default", benchmark_interval_s=5)
def test_throughput(int8_throughput):
    assert int8_throughput().status in ("ok", "oom")
