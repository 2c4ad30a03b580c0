"""Replace image resizing in Dynamo's graph by two matmuls with constant weights.

Resizing is linear in the image: first along its rows, then along its columns. Torch's kernel for
antialiased resizing computes each output element separately, and recomputes the weights in every
block.
"""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.nn import functional as F

from pytest_int8bench.compiler.fusion.nodes import Node, given_arguments, value_of, with_value
from pytest_int8bench.compiler.torch_workarounds.names import SETTING_CALLS
from pytest_int8bench.kernels import dispatch

_MODES = ("bilinear", "bicubic")
_CONSTANT = torch.ops.aten.lift_fresh_copy.default
_DTYPES = (torch.bfloat16, torch.float16)
# Each output element costs two multiplications per row and column of the image, however few pixels
# the filter reads. Up to this side, the matmuls compute about as fast as they store.
_LARGEST_SIDE = 256
# For outputs with fewer elements, torch's single launch is no slower than our two.
_FEWEST_ELEMENTS = 1 << 20


def resize_by_matmuls(module: fx.GraphModule) -> None:
    """Replace antialiased bilinear and bicubic resizing of 16-bit images by two matmuls on devices
    that our kernels support.

    Weights and the intermediate image are rounded to the dtype of the image, and sums are FP32, as
    in torch's CUDA kernel (``upsample_gen2d_aa_out_frame``). Torch still resizes FP32 images,
    because matmuls may use TF32, and images under autocast, which applies to matmuls but not to
    resizing.
    """
    found = [node for node in module.graph.nodes if _fits(node)]
    if not found or any(node.target in SETTING_CALLS for node in module.graph.nodes):
        return
    for node in found:
        _replace(module, node)
    module.recompile()


def _fits(node: Node) -> bool:
    if node.target is not F.interpolate:
        return False
    given = given_arguments(node)
    image, out = value_of(given["input"]), value_of(node)
    if not isinstance(image, torch.Tensor) or not isinstance(out, torch.Tensor):
        return False
    sizes = (*image.shape, *out.shape)
    return (
        given.get("mode") in _MODES
        and given.get("antialias") is True
        and given.get("scale_factor") is None  # else the sizes do not determine the scale
        and image.dtype in _DTYPES
        and image.dim() == 4
        and all(isinstance(size, int) for size in sizes)
        and max(sizes[2:4]) <= _LARGEST_SIDE
        and math.prod(out.shape) >= _FEWEST_ELEMENTS
        and out.is_contiguous()
        and not torch.is_autocast_enabled(image.device.type)
        and dispatch.fused_problem(image.device) is None
    )


def _replace(module: fx.GraphModule, node: Node) -> None:
    given = given_arguments(node)
    source, graph = given["input"], module.graph
    image, out = value_of(source), value_of(node)
    options = {"mode": given["mode"], "align_corners": given.get("align_corners")}
    (height, width), (rows, columns) = image.shape[2:], out.shape[2:]
    with graph.inserting_before(node):
        across = _constant(module, node, "columns", _weights(width, columns, options).T, image)
        down = _constant(module, node, "rows", _weights(height, rows, options), image)
        wide = graph.call_function(torch.matmul, (source, across))
        with_value(wide, image.new_empty((*image.shape[:3], columns)))
        resized = graph.call_function(torch.matmul, (down, wide))
    resized.meta = dict(node.meta)
    node.replace_all_uses_with(resized)
    graph.erase_node(node)


def _weights(size: int, resized: int, options: dict[str, object]) -> torch.Tensor:
    """Return the matrix (resized, size) that resizes one axis."""
    one_axis = torch.eye(size, dtype=torch.float64)[None, None]
    return F.interpolate(one_axis, (resized, size), antialias=True, **options)[0, 0]  # type: ignore[arg-type]


def _constant(
    module: fx.GraphModule, node: Node, axis: str, weights: torch.Tensor, like: torch.Tensor
) -> Node:
    """Store weights in the module and return a node for them. They are a constant of the graph, not
    a buffer, because AOTAutograd rejects buffers that Dynamo did not see."""
    name = f"_resize_{node.name}_{axis}"
    setattr(module, name, weights.to(like.device, like.dtype).contiguous())
    kept = module.graph.create_node("get_attr", name)
    constant = module.graph.call_function(_CONSTANT, (kept,))
    return with_value(constant, like.new_empty(weights.shape))
