"""A compiled model keeps torch's settings as the user set them, by any of torch's APIs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.torch_workarounds.eager import float32_matmul_precision
from toys.process_state import changes, process_state

X = torch.ones(2, 4)
MATMUL, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn


class Raising(nn.Module):
    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.error = error
        self.precision = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.precision = MATMUL.fp32_precision
        if self.error is not None:
            raise self.error
        return self.linear(x)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    yield
    for backend in ("generic", "cuda", "mkldnn"):
        put(backend, "all", "none")
    torch.set_float32_matmul_precision("highest")
    for backend in ("cuda", "mkldnn"):
        put(backend, "matmul", "none")
        assert get(backend, "matmul") == "none"
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)


def by_newer_api(value: str) -> Callable[[], None]:
    return lambda: setattr(MATMUL, "fp32_precision", value)


def by_both_apis() -> None:
    MATMUL.allow_tf32 = True
    MATMUL.fp32_precision = "ieee"


def for_all_backends() -> None:
    torch.backends.fp32_precision = "tf32"


def for_mkldnn() -> None:
    MKLDNN.matmul.fp32_precision = "bf16"


def without_flash() -> None:
    torch.backends.cuda.enable_flash_sdp(False)


def without_math() -> None:
    torch.backends.cuda.enable_math_sdp(False)


def deterministic() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)


def without_gradients() -> None:
    torch.set_grad_enabled(False)


SET: dict[str, Callable[[], object]] = {
    "untouched": lambda: None,
    "new tf32": by_newer_api("tf32"),
    "new ieee": by_newer_api("ieee"),
    "both": by_both_apis,
    "all backends": for_all_backends,
    "mkldnn": for_mkldnn,
    "old high": lambda: torch.set_float32_matmul_precision("high"),
    "old medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no flash": without_flash,
    "no math": without_math,
    "deterministic": deterministic,
    "no gradients": without_gradients,
}


@pytest.mark.parametrize("error", [None, KeyError("bug"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("name", SET)
def test_keeps_settings_of_the_user(name: str, error: BaseException | None) -> None:
    model = Raising(error)
    SET[name]()
    before = process_state()
    compiled = compile_for_a100(model, mode="off", attention="math")
    if error is None:
        compiled(X)
    else:
        with pytest.raises(type(error)):
            compiled(X)
    assert model.precision == "tf32"
    assert process_state() == before


def test_compiles_with_precision_set_by_the_newer_api() -> None:
    model = nn.Linear(4, 4).eval()
    MATMUL.fp32_precision = "tf32"
    before = process_state()
    compile_for_a100(model, mode="default")(X)
    changed = changes(before, process_state())
    assert set(changed) <= {"environment", "recursion limit"}  # Inductor's own


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_matmuls_still_follow_the_precision_of_all_backends(precision: str) -> None:
    for_all_backends()
    for _ in range(2):
        with float32_matmul_precision(precision), float32_matmul_precision("highest"):
            assert torch.get_float32_matmul_precision() == "highest"
            assert (MATMUL.fp32_precision, MKLDNN.matmul.fp32_precision) == ("ieee", "ieee")
        assert (MATMUL.fp32_precision, MKLDNN.matmul.fp32_precision) == ("tf32", "tf32")
    torch.backends.fp32_precision = "none"
    assert (MATMUL.fp32_precision, MKLDNN.matmul.fp32_precision) == ("none", "none")
