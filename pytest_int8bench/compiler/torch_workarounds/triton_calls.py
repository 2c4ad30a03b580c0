"""Triton kernels in graphs, as torch.compile holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

#: Torch keeps constants that a graph cannot hold in a table; this entry of it is empty.
_NO_CONSTANTS = 1 << 60


def register_triton_kernel(index: int, kernel: Any) -> None:
    """Make a kernel known to torch under a number that we choose.

    The key of AOTAutograd's cache contains this number but not the kernel's source, and torch
    numbers kernels in the order in which it meets them. Another process would miss what this one
    cached, or load it for a kernel whose source has changed.

    Affects torch 2.11 to 2.13 (``KernelSideTable`` in
    torch/_higher_order_ops/triton_kernel_wrap.py). We know of no upstream issue.
    """
    # Imported late, also below: this loads modules of torch that few sessions need.
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel_side_table.id_to_kernel[index] = kernel
    kernel_side_table.constant_args.setdefault(_NO_CONSTANTS, {})


def insert_triton_call(
    graph: fx.Graph,
    index: int,
    programs: int,
    arguments: Mapping[str, Any],
    blocks: Mapping[str, Sequence[int]],
    written: Sequence[str],
) -> fx.Node:
    """Insert the node that ``torch.compile`` makes of a launch of a user's Triton kernel.

    The node stands for a kernel that first copies the tensors it writes; Inductor drops the copies,
    as nothing else reads the originals. The other kind of node does not name outputs: AOTAutograd
    parses the kernel to find them, each time it traces the launch.

    The public way to these nodes, ``wrap_triton``, drops launches with TMA descriptors in torch
    2.11 to 2.13 (see :mod:`..fusion.inline_triton`). We know of no upstream issue.

    Args:
        graph: where to insert the node.
        index: the number of the kernel (:func:`register_triton_kernel`).
        programs: how many programs to launch.
        arguments: all arguments of the kernel by name.
        blocks: shapes of the blocks of those tensors that the kernel addresses by TMA.
        written: names of the arguments that the kernel writes to.
    """
    from torch._higher_order_ops.triton_kernel_wrap import (
        create_tma_stable_metadata,
        triton_kernel_wrapper_functional,
    )

    return graph.call_function(
        triton_kernel_wrapper_functional,
        kwargs={
            "kernel_idx": index,
            "constant_args_idx": _NO_CONSTANTS,
            "grid": [(programs, 1, 1)],
            "tma_descriptor_metadata": {
                name: create_tma_stable_metadata(list[int | torch.SymInt](block))
                for name, block in blocks.items()
            },
            "kwargs": dict(arguments),
            "tensors_to_clone": list(written),
        },
    )
