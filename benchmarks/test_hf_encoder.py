"""An encoder of Hugging Face transformers under the plugin: copy this file for your own."""

import pytest
import torch
from transformers import BertConfig, BertModel

from pytest_int8bench.workloads import Workload

SIZES = {"cpu": (2, 2), "cuda": (12, 12)}  # layers and heads, few of them without a GPU


def build(p):
    layers, heads = SIZES[p.gpu_type]
    widths = {"hidden_size": 64 * heads, "intermediate_size": 256 * heads}
    return BertModel(BertConfig(num_hidden_layers=layers, num_attention_heads=heads, **widths))


@pytest.fixture(scope="module")
def int8_workload():
    def inputs(p, device):
        return (torch.randint(1, 30_000, (p.batch_size, 128), device=device),)

    return Workload(name="bert", build=build, inputs=inputs)


# Compiled, older transformers makes a mask for this model, which flash attention does not take.
# An example is to be quick: max-autotune, the default on a GPU, compiles for longer.
@pytest.mark.int8(attention="auto", compile_mode="default", benchmark_interval_s=5)
def test_throughput(int8_throughput):
    assert int8_throughput().status in ("ok", "oom")
