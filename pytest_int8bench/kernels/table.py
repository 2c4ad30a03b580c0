"""Table of the Triton kernels: the calls each accepts, where it runs, its tiles and its launch.

To add a kernel, write it in a new file in :mod:`.triton`, with a function that returns its launch,
and add a row here. Selection for a device, ``INT8BENCH_PRODUCT``, tuning, the self-test, launches
in compiled graphs and the evidence in results all follow from the row.

Importing this module loads neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_int8bench.kernels import device as devices
from pytest_int8bench.kernels import tiles
from pytest_int8bench.kernels.selftest import SelfTest
from pytest_int8bench.kernels.tile_types import ALIGNMENT, Problem

if TYPE_CHECKING:
    import torch

    from pytest_int8bench.kernels.launch import Launch

#: Compute capability from which Triton's INT8 matmul runs on tensor cores.
FUSED_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Kernel:
    """A row of the table: everything that the rest of the package knows about a kernel.

    ``accepts``, ``tiles`` and ``launch`` take the parameters of one call of the operator; the
    functions in :mod:`.dispatch` that call them document these.
    """

    operator: str
    """The operator in ``torch.ops.int8bench`` that it implements."""
    name: str
    """Its name in ``INT8BENCH_PRODUCT`` and in the file of tuned tiles."""
    function: str
    """The name of its Triton function, by which evidence recognizes it in a profile."""
    launch: Callable[..., Launch]
    """Returns the launch for a call and its tiles. Triton is imported here, not earlier."""
    tiles: Callable[..., Any]
    """Returns the tiles for a call, or None to pass the call on to the next row."""
    accepts: Callable[..., bool] = lambda *call: True
    """Returns whether the kernel supports a call."""
    capability: tuple[int, int] | None = None
    """The compute capability that it needs, or None for :data:`FUSED_CAPABILITY`."""
    is_for_later: bool = True
    """Whether it also runs on devices of later compute capabilities."""
    selftest: SelfTest | None = None
    """The self-test that it must pass with untested versions of Triton."""

    def runs_on(self, device: torch.device) -> bool:
        """Return whether the device has the compute capability that the kernel needs."""
        if self.capability is None:
            return True
        found = devices.capability(device)
        return found >= self.capability if self.is_for_later else found == self.capability

    def unmet(self, device: torch.device) -> str:
        """Return which compute capability the kernel needs and which one the device has."""
        needed = self.capability or FUSED_CAPABILITY
        later = " or later" if self.is_for_later else ""
        found = devices.capability(device)
        return f"needs sm{needed[0]}{needed[1]}{later}, this is sm{found[0]}{found[1]}"


def _accepts_tma(
    problem: Problem,
    stride: int,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    is_aligned: bool,
) -> bool:
    # TMA needs strides that are positive multiples of ALIGNMENT bytes.
    return (
        is_aligned
        and problem.k % ALIGNMENT == 0
        and problem.n * problem.out_bytes % ALIGNMENT == 0
        and (residual is None or (stride > 0 and stride * residual.element_size() % ALIGNMENT == 0))
    )


def _accepts_specialized(
    problem: Problem,
    stride: int,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    is_aligned: bool,
) -> bool:
    # The kernel loads the residual into the same shared memory that it stores the output from.
    same_dtype = residual is None or residual.dtype == dtype
    return same_dtype and _accepts_tma(problem, stride, residual, dtype, is_aligned)


def _launch_specialized(*call: Any) -> Launch:
    from pytest_int8bench.kernels.triton import int8_matmul_sm90

    return int8_matmul_sm90.launch(*call)


def _launch_tma(*call: Any) -> Launch:
    from pytest_int8bench.kernels.triton import int8_matmul

    return int8_matmul.launch_tma(*call)


def _launch_pointers(*call: Any) -> Launch:
    from pytest_int8bench.kernels.triton import int8_matmul

    return int8_matmul.launch_pointers(*call)


def _launch_quantize_rows(*call: Any) -> Launch:
    from pytest_int8bench.kernels.triton import quantize_rows

    return quantize_rows.launch(*call)


def _launch_dequantize(*call: Any) -> Launch:
    from pytest_int8bench.kernels.triton import dequantize

    return dequantize.launch(*call)


def _launch_quantize_heads(*call: Any) -> Launch:
    from pytest_int8bench.kernels.triton import int8_attention

    return int8_attention.launch_quantize(*call)


def _launch_rotate_heads(*call: Any) -> Launch:
    from pytest_int8bench.kernels.triton import rotation

    return rotation.launch(*call)


def _launch_attention(*call: Any) -> Launch:
    from pytest_int8bench.kernels.triton import int8_attention

    return int8_attention.launch(*call)


def _launch_short(*call: Any) -> Launch:
    from pytest_int8bench.kernels.triton import short_attention

    return short_attention.launch(*call)


#: The kernels of each operator, in order of preference. A call runs on the first kernel that runs
#: on the device, accepts the call, has passed its self-test and has tiles for the call.
KERNELS = (
    Kernel(
        operator="linear",
        name="specialized",
        function="int8_product_specialized",
        launch=_launch_specialized,
        tiles=tiles.specialized_tiles,
        accepts=_accepts_specialized,
        capability=(9, 0),
        is_for_later=False,
        selftest=SelfTest(
            kernel="the warp-specialized INT8 matmul kernel",
            # Gluon, in which it is written, is experimental.
            passed_with=("3.6.",),
            problems=tiles.specialized_forms,
        ),
    ),
    Kernel(
        operator="linear",
        name="tma",
        function="int8_product_tma",
        launch=_launch_tma,
        tiles=tiles.tma_tiles,
        accepts=_accepts_tma,
        capability=(9, 0),
    ),
    Kernel(
        operator="linear",
        name="pointers",
        function="int8_product_pointers",
        launch=_launch_pointers,
        tiles=tiles.pointer_tiles,
    ),
    Kernel(
        operator="quantize_rows",
        name="quantize_rows",
        function="quantize_rows",
        launch=_launch_quantize_rows,
        tiles=tiles.rows,
        accepts=tiles.fits_registers,
    ),
    Kernel(
        operator="dequantize",
        name="dequantize",
        function="dequantize",
        launch=_launch_dequantize,
        tiles=tiles.weights,
    ),
    Kernel(
        operator="quantize_heads",
        name="quantize_heads",
        function="quantize_heads",
        launch=_launch_quantize_heads,
        tiles=lambda *call: None,
    ),
    Kernel(
        operator="rotate_heads",
        name="rotate_heads",
        function="rotate_heads",
        launch=_launch_rotate_heads,
        tiles=lambda *call: None,
    ),
    Kernel(
        operator="int8_attention",
        name="int8_attention",
        function="int8_attention",
        launch=_launch_attention,
        tiles=tiles.attention,
    ),
    Kernel(
        operator="short_attention",
        name="short_attention",
        function="short_attention",
        launch=_launch_short,
        tiles=tiles.short,
    ),
)


def kernels_of(operator: str) -> list[Kernel]:
    """Return the rows of an operator, in order of preference."""
    return [kernel for kernel in KERNELS if kernel.operator == operator]
