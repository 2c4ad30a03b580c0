"""Ways in which models read a linear layer's weight without calling the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Reader = Callable[[Any, torch.Tensor], torch.Tensor]

#: Each computes the layer's matmul for inputs (M, K).
MATMULS: dict[str, Reader] = {
    "layer": lambda layer, x: layer(x),
    "dtype": lambda layer, x: layer(x.to(layer.weight.dtype)),
    "linear": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "bias=": lambda layer, x: F.linear(x, layer.weight, bias=layer.bias),
    "weight=": lambda layer, x: F.linear(x, weight=layer.weight, bias=layer.bias),
    "input=": lambda layer, x: F.linear(bias=layer.bias, weight=layer.weight, input=x),
    "t": lambda layer, x: x @ layer.weight.t() + layer.bias,
    "T": lambda layer, x: x @ layer.weight.T + layer.bias,
    "mT": lambda layer, x: x.matmul(layer.weight.mT) + layer.bias,
    "transpose": lambda layer, x: torch.mm(x, layer.weight.transpose(-2, -1)) + layer.bias,
    "t of t": lambda layer, x: F.linear(x, layer.weight.t().t(), layer.bias),
    "addmm": lambda layer, x: torch.addmm(layer.bias, x, layer.weight.t()),
    "3-D": lambda layer, x: (x[None] @ layer.weight.T)[0] + layer.bias,
    "1-D": lambda layer, x: torch.stack([F.linear(row, layer.weight, layer.bias) for row in x]),
    "cast": lambda layer, x: F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype)),
    "data": lambda layer, x: F.linear(x, layer.weight.data, layer.bias),
    "clone": lambda layer, x: F.linear(x, layer.weight.detach().clone(), layer.bias),
    "chunk": lambda layer, x: (
        torch.cat([F.linear(x, w) for w in layer.weight.chunk(3)], -1) + layer.bias
    ),
    "split": lambda layer, x: (
        torch.cat([F.linear(x, w) for w in layer.weight.split([1, 63])], -1) + layer.bias
    ),
    "rows": lambda layer, x: torch.cat(
        [F.linear(x, layer.weight[rows], layer.bias[rows]) for rows in (slice(9), slice(9, None))],
        -1,
    ),
}

#: Each needs the values.
READS: dict[str, Reader] = {
    "einsum": lambda layer, x: torch.einsum("mk,nk->mn", x, layer.weight) + layer.bias,
    "tensordot": lambda layer, x: torch.tensordot(x, layer.weight, dims=([1], [1])),
    "left": lambda layer, x: (layer.weight @ x.t()).t() + layer.bias,
    "scaled addmm": lambda layer, x: torch.addmm(layer.bias, x, layer.weight.t(), beta=2),
    "FP64": lambda layer, x: F.linear(x.double(), layer.weight.double(), layer.bias.double()),
    "columns": lambda layer, x: F.linear(x[:, :7], layer.weight[:, :7], layer.bias),
    "normalized": lambda layer, x: F.linear(F.normalize(x), F.normalize(layer.weight)),
    "standardized": lambda layer, x: F.linear(x, layer.weight - layer.weight.mean(1, True)),
    "norm": lambda layer, x: layer.weight.norm(dim=1),
    "embedding": lambda layer, x: F.embedding(torch.tensor([[1, 5]]), layer.weight),
    "row": lambda layer, x: layer.weight[3],
    "column": lambda layer, x: layer.weight[:, 3],
    "every other": lambda layer, x: layer.weight[::2],
    "index": lambda layer, x: layer.weight[torch.tensor([0, 3, 2])],
    "view": lambda layer, x: F.linear(x, layer.weight.view(-1, x.shape[1]), layer.bias),
    "concatenated": lambda layer, x: F.linear(x, torch.cat([layer.weight, layer.weight])),
    "convolution": lambda layer, x: F.conv1d(x[..., None], layer.weight[..., None], layer.bias),
    "copied": lambda layer, x: torch.empty(layer.weight.shape, dtype=x.dtype).copy_(layer.weight),
    "list": lambda layer, x: torch.stack(list(layer.weight)),
    "expanded": lambda layer, x: x[None] @ layer.weight.t().expand(2, -1, -1),
    "dequantize": lambda layer, x: (
        getattr(layer.weight, "dequantize", None)()
        if not type(layer.weight).__module__.startswith("torch.")
        else layer.weight + 0
    ),
}

#: Reads outside of torch, which compilers cannot trace.
PYTHON_READS: dict[str, Reader] = {
    "numpy": lambda layer, x: torch.from_numpy(layer.weight.numpy()),
    "tolist": lambda layer, x: torch.tensor(layer.weight.tolist()),
}
