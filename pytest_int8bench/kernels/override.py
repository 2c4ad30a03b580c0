"""Which product kernels there are, and the one that the environment forces. Loads no torch, so that
a wrong name is refused at the start of a session."""

from __future__ import annotations

import os

from pytest_int8bench.errors import ClearError

#: Environment variable that forces a product kernel, one of :data:`PRODUCTS`.
KERNEL_VARIABLE = "INT8BENCH_PRODUCT"
#: Product kernels: for large matrices on sm90 (what it does not take goes to the next one), for
#: sm90 and later, and for any GPU.
PRODUCTS = ("specialized", "tma", "pointers")


class KernelError(ClearError, ValueError):
    """The environment asks for a kernel that there is not."""


def forced_product() -> str | None:
    """Return the kernel that ``INT8BENCH_PRODUCT`` names, None if it is empty or not set.

    Raises:
        KernelError: if it names none.
    """
    forced = os.environ.get(KERNEL_VARIABLE)
    if forced and forced not in PRODUCTS:
        raise KernelError(f"{KERNEL_VARIABLE} must be one of {', '.join(PRODUCTS)}, got {forced!r}")
    return forced or None
