"""Test the output of benchmarks/quote.py and the reference for its sm80 estimate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quote
from quote_tables import PROXY_NOTE, ROW, markdown, table

MACHINE: dict[str, Any] = {
    "gpu": {"name": "Toy GPU", "driver": "1.2", "power_limit_w": 400.0, "mig": "off"},
    "cuda": "13.0",
    "packages": {"torch": "2.11.0", "triton": "3.6.0", "torchao": "0.18.0"},
    "commit": "0123456789abcdef",
    "dirty": False,
}
VERSIONS = "driver 1.2, cuda 13.0, torch 2.11.0, triton 3.6.0, torchao 0.18.0, commit 012345678"


def record(variant: str, seconds: float, point: str = "base-64x3072") -> dict[str, Any]:
    made = {"point": point, "variant": variant, "batch_time_s": seconds}
    return made | {"sqnr_db": 40.0, "compile_s": 2.0}


def failed(variant: str, point: str = "base-64x3072") -> dict[str, Any]:
    return {"point": point, "variant": variant, "error": "OutOfMemoryError()"}


def test_a_row_has_gpu_speedups_and_versions() -> None:
    times = {"bf16-flash": 12e-3, "bf16-cudnn": 10e-3, "bf16-best": 9e-3}
    times |= {"fused": 7.5e-3, "fused-best": 6e-3, "w8": 11e-3}
    header, rule, row = markdown(MACHINE, [record(*item) for item in times.items()]).splitlines()
    assert header == "| GPU | point | " + " | ".join(ROW.values()) + " | versions |"
    assert rule == "|---" * 9 + "|"
    assert row == (
        "| Toy GPU, 400 W | base-64x3072 | 12 ms (0.833×, 0.75× of bf16-best) "
        "| 10 ms (1×, 0.9× of bf16-best) | 9 ms (1.11×, 1× of bf16-best) "
        "| 7.5 ms (1.33×, 1.2× of bf16-best) | 6 ms (1.67×, 1.5× of bf16-best) "
        f"| 11 ms (0.909×, 0.818× of bf16-best) | {VERSIONS} |"
    )


def test_a_row_shows_only_what_was_measured() -> None:
    records = [record("fused", 5e-3), failed("bf16-cudnn"), failed("w8", "large-32x3072")]
    lines = markdown(MACHINE | {"dirty": True}, records).splitlines()
    assert lines[2:] == [
        f"| Toy GPU, 400 W | base-64x3072 | – | failed | – | 5 ms | – | – | {VERSIONS}, changed |",
        "",
        "base-64x3072, bf16-cudnn: OutOfMemoryError()",
        "large-32x3072, w8: OutOfMemoryError()",
    ]


@pytest.mark.parametrize("records", [[], [failed("fused")], [record("fused-sm80", 1e-3)]])
def test_writes_no_row_if_nothing_was_measured(records: list[dict[str, Any]]) -> None:
    assert (
        markdown(MACHINE, records).splitlines()[0]
        == "no rows: none of the variants in this table was measured"
    )


def test_row_names_the_mig_instance() -> None:
    machine = MACHINE | {"gpu": {"name": "Toy GPU", "mig": "1g.10gb"}}
    row = markdown(machine, [record("fused", 5e-3)]).splitlines()[2]
    assert row.startswith("| Toy GPU, MIG 1g.10gb | ")


def test_estimate_compares_with_bf16_on_the_same_instructions() -> None:
    records = [record("bf16-flash", 10e-3), record("bf16-best", 8e-3)]
    records += [record("sm80-proxy-bf16", 24e-3), record("sm80-proxy-int8", 16e-3)]
    lines = table(records, [variant.name for variant in quote.VARIANTS]).splitlines()
    assert "| 16 ms (1.5× of sm80-proxy-bf16), 40 dB, compile 2.0 s |" in lines[2]
    assert lines[3:] == ["", PROXY_NOTE]
    assert PROXY_NOTE not in table(records[:2], ["bf16-flash", "bf16-best"])
    alone = table(records[:1] + records[3:], ["bf16-flash", "sm80-proxy-int8"])
    assert alone.splitlines()[2].endswith("| 16 ms, 40 dB, compile 2.0 s |")


@pytest.mark.parametrize("name", ["INT8BENCH_PRODUCT", "DISABLE_MMA_V3"])
def test_refuses_rows_with_forced_kernels(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit):
        quote.main(["--markdown"])
    assert f"--markdown must run the GPU's own kernels: unset {name}" in capsys.readouterr().err


def test_rows_use_known_variants_and_points(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(ROW) <= {v.name for v in quote.VARIANTS if not v.environment}
    assert set(quote.ROW_POINTS) <= {point.name for point in quote.POINTS}
    with pytest.raises(SystemExit):
        quote.main(["--markdown", "--variants", "fused-sm80"])
    assert "--variants must be of bf16-flash, " in capsys.readouterr().err


def test_one_command_prints_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(command: list[str], **_: Any) -> Any:
        given = dict(zip(command[2::2], command[3::2], strict=True))
        ran.append(given["--variants"])
        assert given["--points"] == "base-4096x48"
        with Path(given["--child"]).open("a") as file:
            file.write(json.dumps(record(given["--variants"], 1e-3, given["--points"])) + "\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(quote.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quote, "fingerprint", lambda root: MACHINE)
    assert quote.main(["--markdown", "--points", "base-4096x48"]) == 0
    assert set(ran) == set(ROW)
    _, _, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| Toy GPU, 400 W | base-4096x48 | 1 ms (1×, 1× of bf16-best) | ")


FLASH = "void pytorch_flash::flash_fwd_kernel"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({FLASH: 1.0, "matmul": 1.0, "nvjet_tst_128x256": 0.01}, None),
        ({FLASH: 1.0, "nvjet_tst_128x256": 0.1}, "nvjet_tst_128x256 is not for sm80"),
        ({FLASH: 1.0, "cudnn_sm90_fprop": 0.1}, "cudnn_sm90_fprop is not for sm80"),
        ({FLASH: 1.0, "cutlass3x_sm100_gemm": 0.1}, "cutlass3x_sm100_gemm is not for sm80"),
        ({FLASH: 1.0, "cutlass_80_tensorop_sm80": 1.0}, None),
        ({"matmul": 1.0}, "attention must be flash, got None"),
    ],
)
def test_estimate_rejects_newer_kernels(names: dict[str, float], message: str | None) -> None:
    kernels = [SimpleNamespace(name=name, seconds=seconds) for name, seconds in names.items()]
    attention = "flash" if FLASH in names else None
    evidence: Any = SimpleNamespace(
        kernels=kernels, total_s=sum(names.values()), attention_kernel=attention
    )
    if message is None:
        quote.check_proxy(evidence)
    else:
        with pytest.raises(RuntimeError, match=message):
            quote.check_proxy(evidence)


@pytest.fixture
def sm80() -> Any:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1, set where no GPU is")
    return pytest.importorskip("sm80_linear")


@pytest.mark.parametrize(("rows", "n", "k"), [(70, 96, 128), (33, 40, 72), (1, 1, 1)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_sm80_matmul_equals_linear(sm80: Any, rows: int, n: int, k: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, k), torch.randn(n, k)  # the interpreter cannot multiply BF16
    bias = torch.randn(n) if has_bias else None
    for tile in sm80.CANDIDATES[-2:]:
        out = torch.full((rows, n), 77.0)
        sm80.launch(rows, n, k, has_bias, tile)(x, weight, bias, out)
        assert torch.allclose(out, F.linear(x, weight, bias), atol=1e-4)


def test_tiles_hold_as_many_bytes_as_int8_tiles(sm80: Any) -> None:
    assert [(t.bm, t.bn, 2 * t.bk) for t in sm80.CANDIDATES] == [
        (t.bm, t.bn, t.bk) for t in sm80.POINTER_CANDIDATES if t.bm * t.bn >= 128 * 64
    ]


def test_replaces_unquantized_linear_layers(sm80: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Quantized(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 4), Quantized(4, 4))
    x = torch.randn(2, 3, 8)
    wanted = model(x)
    called = []

    def fastest(m: int, n: int, k: int, has_bias: bool, device: torch.device) -> Any:
        called.append((m, n, k, has_bias))
        return lambda x, weight, bias, out: out.copy_(F.linear(x, weight, bias))

    monkeypatch.setattr(sm80, "fastest", fastest)
    sm80.use_sm80_linears(model)
    assert [type(layer).__name__ for layer in model] == ["Sm80Linear", "Quantized"]
    assert torch.equal(model(x), wanted)  # in FP32, by torch
    assert called == []
    with torch.inference_mode():
        out = torch.compile(model.bfloat16(), backend="aot_eager", fullgraph=True)(x.bfloat16())
    assert (out - wanted).norm() < 0.02 * wanted.norm()
    assert called == [(6, 4, 8, True)]
