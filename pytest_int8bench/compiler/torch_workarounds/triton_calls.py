"""Insert launches of Triton kernels into graphs, in the form that ``torch.compile`` uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

#: Index of an empty entry in torch's table of constant kernel arguments.
_NO_CONSTANTS = 1 << 60


def register_triton_kernel(index: int, kernel: Any) -> None:
    """Register a kernel with torch under an index that we choose.

    The key of AOTAutograd's cache contains this index but not the kernel's source, and torch
    numbers kernels in the order in which it sees them. Another process would not find what this
    one cached, or would load it for a kernel whose source has changed.

    Affects torch 2.11 to 2.13 (``KernelSideTable`` in
    torch/_higher_order_ops/triton_kernel_wrap.py). We know of no upstream issue.
    """
    # Imported late here and below, because few sessions need these modules of torch.
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
    """Insert the node that ``torch.compile`` creates for a launch of a user's Triton kernel.

    The node represents a kernel that first copies the tensors to which it writes. Inductor drops
    the copies, because nothing else reads the originals. The mutating kind of node does not name
    its outputs, so that AOTAutograd would parse the kernel each time it traces the launch.

    The public API for these nodes, ``wrap_triton``, drops launches with TMA descriptors in torch
    2.11 to 2.13 (see :mod:`..fusion.inline_triton`). We know of no upstream issue.

    Args:
        graph: where to insert the node.
        index: the index of the kernel (:func:`register_triton_kernel`).
        programs: the number of programs to launch.
        arguments: all arguments of the kernel, by name.
        blocks: for each tensor that the kernel addresses by TMA, the shape of its blocks.
        written: names of the arguments to which the kernel writes.
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
