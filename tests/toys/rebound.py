"""A small model of blocks, and ways in which a build changes its functions or attributes."""

from __future__ import annotations

import functools
import math
import threading
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu


class Block(nn.Module):
    """A residual MLP of 16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 64)
        self.fc2 = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(gelu(self.fc1(x)))


class Blocks(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def run(block: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = x + block.fc2(gelu(block.fc1(x)))
    return out


# -- the same values by another path ------------------------------------------------------------


def closure(net: Any) -> None:
    b = net.blocks[1]
    b.forward = lambda x: x + b.fc2(gelu(b.fc1(x)))


def closure_over_layers(net: Any) -> None:
    fc1, fc2 = net.blocks[1].fc1, net.blocks[1].fc2
    net.blocks[1].forward = lambda x: x + fc2(gelu(fc1(x)))


def partial(net: Any) -> None:
    net.blocks[1].forward = functools.partial(run, net.blocks[1])


def functions_in_a_list(net: Any) -> None:
    steps = [lambda x, b=b: run(b, x) for b in net.blocks]
    net.steps = steps
    net.forward = lambda x: functools.reduce(lambda y, step: step(y), net.steps, x)


def hook(net: Any) -> None:
    b = net.blocks[1]
    b.register_forward_hook(lambda module, args, out: run(b, args[0]))


def registered_object(net: Any) -> None:
    class Runner:
        """Hold a module where nn.Module does not find it."""

        def __init__(self, block: nn.Module) -> None:
            self.block = block

        def __deepcopy__(self, memo: Any) -> Runner:
            return self

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return run(self.block, x)

    net.blocks[1].runner = Runner(net.blocks[1])
    net.blocks[1].forward = lambda x: net.blocks[1].runner(x)


# -- what cannot be copied ----------------------------------------------------------------------


def lock(net: Any) -> None:
    net.lock = threading.Lock()


def python_module(net: Any) -> None:
    net.math = math


def csr_buffer(net: Any) -> None:
    net.register_buffer("adjacency", torch.eye(3).to_sparse_csr())


def quantized_buffer(net: Any) -> None:
    net.register_buffer("codes", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))


def old_weight_norm(net: Any) -> None:
    """Add a weight that a hook computes and that is not a leaf."""
    net.norm = nn.utils.spectral_norm(nn.Linear(4, 4))


def python_generator(net: Any) -> None:
    net.ids = (number for number in range(10))


def random_generator(net: Any) -> None:
    net.generator = torch.Generator().manual_seed(3)


def thread_local(net: Any) -> None:
    net.state = threading.local()


# -- compiled -----------------------------------------------------------------------------------


def compiled_method(net: Any) -> None:
    net.blocks[1].forward = torch.compile(net.blocks[1].forward, backend="eager")


def compiled_in_place(net: Any) -> None:
    net.compile(backend="eager")
    net.blocks[0].compile(backend="eager")


def compiled_block(net: Any) -> None:
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
    net.last = net.blocks[1]


SAME_NUMBERS = (
    closure,
    closure_over_layers,
    partial,
    functions_in_a_list,
    hook,
    registered_object,
    lock,
    python_module,
    csr_buffer,
    quantized_buffer,
    python_generator,
    random_generator,
    thread_local,
    compiled_method,
    compiled_in_place,
    compiled_block,
)
