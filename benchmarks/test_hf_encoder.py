"""An encoder of Hugging Face transformers under the plugin: copy this file for your own."""

import pytest
import torch

from pytest_int8bench import Workload

transformers = pytest.importorskip("transformers")
CONFIGS = {
    "nano": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "base": {},
}
# Compiled, older transformers makes a mask for this model, which flash attention does not take.
pytestmark = pytest.mark.int8(attention="auto")


@pytest.fixture(scope="module")
def int8_workload():
    return Workload(
        name="bert",
        build=lambda p: transformers.BertModel(transformers.BertConfig(**CONFIGS[p.model_size])),
        inputs=lambda p, device: (torch.randint(1, 30_000, (p.batch_size, 128), device=device),),
        units=lambda p: {"samples": p.batch_size, "tokens": 128 * p.batch_size},
    )


def test_throughput(int8_throughput):
    result = int8_throughput()
    assert result.oom or result.samples_per_s > 0
