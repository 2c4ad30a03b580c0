"""Measure the documentation's figures: BF16, torchao's INT8 written by hand, and ours.

    python benchmarks/quote.py [--points NAMES] [--variants NAMES] [--json FILE] [--markdown]

The points are blocks and whole encoders of OlmoEarth with random weights, compiled, on one CUDA
device. Each variant runs in its own process with an empty compile cache, because torchao's defaults
change Inductor for the whole process. The time of a batch is the median over rounds. Speedups are
against the faster of ``bf16-flash`` and ``bf16-cudnn``, and against ``bf16-best``. dB is the SQNR
of the first batch's output against the eager BF16 model.

- ``bf16-best`` is BF16 with everything that is not due to INT8: our passes that rotate queries and
  keys (RoPE) and resize images, and the fastest attention backend. ``fused-best`` is ``fused`` with
  the fastest backend.
- ``fused-warm`` compiles from the cache that ``fused`` left.
- ``fused-int8attn`` is ``fused`` with INT8 attention.
- ``fused-sm80`` runs the kernels for GPUs without TMA and wgmma on any GPU.
- ``sm80-proxy-bf16`` and ``sm80-proxy-int8`` run only such kernels: a Triton matmul in BF16,
  because cuBLAS uses wgmma where it can, and ours in INT8, both with FlashAttention-2. Their ratio
  is an estimate of the speedup on an A100.
- ``torchao-*`` is the code that torchao's documentation recommends, for the same layers.

``--markdown`` prints rows for the table in docs/fused.md instead.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytest_int8bench.attention import FlashSDPA
from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.backend import load_inductor
from pytest_int8bench.environment import describe, fingerprint
from pytest_int8bench.measure.attention_auto import fastest_backend
from pytest_int8bench.measure.building import build_eager
from pytest_int8bench.measure.evidence import Evidence, profile_forward
from pytest_int8bench.measure.timing import Plan, pilot, summarize, time_block
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import apply_int8_quant
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.tensors import tensors_of
from pytest_int8bench.workloads.olmoearth import olmoearth
from quote_tables import BEST, PROXY, ROW, markdown, table
from sm80_linear import use_sm80_linears

SECONDS = 2.0
ENCODER = RunParams(model_version="v1.2")


@dataclass(frozen=True)
class Point:
    """What is measured: a block, or an encoder."""

    name: str
    params: RunParams
    tokens: int | None = None
    """Tokens of a sample, for a block; None for an encoder."""

    @property
    def mode(self) -> str:
        """CUDA graphs where the host would decide, on all sides."""
        return "reduce-overhead" if self.params.image_size == 16 else "default"


BASE, LARGE = RunParams(model_size="base"), RunParams(model_size="large")
POINTS = (
    Point("encoder-v1-128", RunParams(batch_size=128)),
    Point("encoder-128", ENCODER.replace(batch_size=128)),
    Point("base-64x3072", BASE.replace(batch_size=64), 3072),
    Point("base-4096x48", BASE.replace(batch_size=4096), 48),
    Point("large-32x3072", LARGE.replace(batch_size=32), 3072),
    Point("large-4096x48", LARGE.replace(batch_size=4096), 48),
    *(
        Point(f"encoder16-{batch}", ENCODER.replace(image_size=16, batch_size=batch))
        for batch in (1, 8, 32)
    ),
)


@dataclass(frozen=True)
class Variant:
    """How a model is made fast."""

    name: str
    attention: str
    quantize: Callable[[nn.Module], object] | None = None
    by_hand: bool = False
    int8_attention: bool = False
    always_fuse: bool = False
    """Run the passes that do not need INT8 layers, which those with INT8 layers always do."""
    environment: tuple[tuple[str, str], ...] = ()
    warm: str | None = None
    """The variant whose compile cache this one finds."""
    only: str | tuple[str, ...] = ""
    """Points that it is measured at: those whose names begin so."""


def _torchao(config: str) -> Callable[[nn.Module], object]:
    def quantize(model: nn.Module) -> None:
        import torchao.quantization as ao

        # Of all linear layers, the ones that are quantized everywhere: some of an encoder's others
        # have inputs that torchao cannot take.
        ao.quantize_(model, getattr(ao, config)(), filter_fn=is_transformer_linear)

    return quantize


def _ours(mode: str, backend: str) -> Callable[[nn.Module], object]:
    return lambda model: apply_int8_quant(model, mode=mode, backend=backend)


SM80 = (("INT8BENCH_PRODUCT", "pointers"), ("DISABLE_MMA_V3", "1"))
PROXY_POINTS = ("encoder-", "base-", "large-")  # elsewhere the host decides
# Names of cuBLAS's, cuDNN's and CUTLASS's kernels for sm90 and later.
NEWER = re.compile(r"nvjet|sm(9\d|1\d\d)")

VARIANTS = (
    Variant("bf16-flash", "flash"),
    Variant("bf16-cudnn", "cudnn"),
    Variant(BEST, "auto", always_fuse=True),
    Variant("fused", "cudnn", _ours("w8a8", "fused")),
    Variant("fused-best", "auto", _ours("w8a8", "fused")),
    Variant("fused-warm", "cudnn", _ours("w8a8", "fused"), warm="fused", only="encoder-"),
    Variant("fused-int8attn", "cudnn", _ours("w8a8", "fused"), int8_attention=True),
    Variant("fused-flash", "flash", _ours("w8a8", "fused")),
    Variant(
        "fused-sm80",
        "cudnn",
        _ours("w8a8", "fused"),
        environment=SM80,
    ),
    Variant(f"{PROXY}bf16", "flash", always_fuse=True, environment=SM80, only=PROXY_POINTS),
    Variant(
        f"{PROXY}int8",
        "flash",
        _ours("w8a8", "fused"),
        environment=SM80,
        only=PROXY_POINTS,
    ),
    Variant("w8", "cudnn", _ours("w8", "auto")),
    Variant(
        "torchao-w8a8", "flash", _torchao("Int8DynamicActivationInt8WeightConfig"), by_hand=True
    ),
    # Three seconds a block.
    Variant("torchao-w8", "flash", _torchao("Int8WeightOnlyConfig"), by_hand=True, only="base-"),
)

ROW_POINTS = ("base-64x3072", "base-4096x48", "large-32x3072", "large-4096x48", "encoder-128")


def model_and_inputs(point: Point) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the eager BF16 model of a point, and one batch."""
    device = torch.device("cuda")
    params = point.params
    if point.tokens is None:
        workload = olmoearth()
        eager = build_eager(workload, params, device)
        return eager, tuple(workload.inputs(params, device))
    from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn.attention import Block

    width, heads = {"base": (768, 12), "large": (1024, 16)}[params.model_size]
    torch.manual_seed(0)
    block = Block(width, heads, qkv_bias=True).to(device, torch.bfloat16).eval()
    shape = (params.batch_size, point.tokens, width)
    batch = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return block.requires_grad_(False), (batch,)


def measure(point: Point, variant: Variant, cache: Path) -> dict[str, Any]:
    """Build, compile and time one variant of a point."""
    eager, inputs = model_and_inputs(point)
    with torch.inference_mode(), FlashSDPA("flash"):
        wanted = _output(eager(*inputs))
    if variant.quantize is not None:
        variant.quantize(eager)
    if variant.name.startswith(PROXY):
        use_sm80_linears(eager)
    weight_bytes = _weight_bytes(eager)
    if variant.by_hand:
        load_inductor("cuda")  # as the other variants do, outside the clock
        compiled = torch.compile(eager, mode=None if point.mode == "default" else point.mode)
        settings: Any = FlashSDPA(variant.attention)
    else:
        compiled = compile_for_a100(
            eager,
            mode=point.mode,
            attention=variant.attention,
            cache_dir=cache,
            int8_attention=variant.int8_attention,
        )
        compiled.always_fuse = variant.always_fuse
        if variant.attention == "auto":
            compiled.choose_attention = lambda calls: fastest_backend(calls) or "auto"
        settings = compiled.entered()

    def run() -> Any:
        return compiled(*inputs)

    timer = synchronized_perf_counter
    with torch.inference_mode(), settings:
        start = timer()
        output = _output(run())
        # Without timing the attention backends, where one is chosen.
        compile_s = getattr(compiled, "first_call_s", timer() - start)
        noise = float((output - wanted).double().norm() / wanted.double().norm())
        del output, wanted
        first = time_block(run, timer, 1)
        if first > SECONDS:  # seconds a batch: torchao's W8
            plan, times = Plan(1, 1), [first]
        else:
            plan = pilot(run, timer, interval_s=SECONDS, min_batches=3)
            times = [time_block(run, timer, plan.iterations) for _ in range(plan.rounds)]
        evidence = profile_forward(run, torch.device("cuda"))
    if variant.name.startswith(PROXY):
        check_proxy(evidence)
    return {
        "point": point.name,
        "variant": variant.name,
        "batch_time_s": summarize(times).median_s,
        "rounds": len(times),
        "iterations": plan.iterations,
        "compile_s": compile_s,
        "compile_cache": getattr(compiled, "compile_cache", None),
        "regions": getattr(compiled, "regions", 0),
        "sqnr_db": -20 * math.log10(noise),
        "weight_bytes": weight_bytes,
        "int8_time_share": evidence.int8_time_share,
        "attention_kernel": evidence.attention_kernel,
        "kernels": [(k.name[:100], k.seconds, k.calls) for k in evidence.kernels[:12]],
    }


def check_proxy(evidence: Evidence) -> None:
    """Raise if kernels for newer GPUs ran for more than 2 % of the time; those of small matmuls,
    such as the ones that resize images, may."""
    newer = [kernel for kernel in evidence.kernels if NEWER.search(kernel.name)]
    share = sum(kernel.seconds for kernel in newer) / evidence.total_s
    if share > 0.02:
        raise RuntimeError(f"{newer[0].name[:80]} is not for sm80; such kernels took {share:.0%}")
    if evidence.attention_kernel != "flash":
        raise RuntimeError(f"attention must be flash, got {evidence.attention_kernel}")


def _output(output: Any) -> torch.Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors_of(output)])


def _weight_bytes(model: nn.Module) -> int:
    total = 0
    held: Any
    for held in (*model.parameters(), *model.buffers()):
        names = held.__tensor_flatten__()[0] if hasattr(held, "__tensor_flatten__") else None
        parts = [held] if names is None else [getattr(held, name) for name in names]
        total += sum(part.nbytes for part in parts)
    return total


def _child(variant: Variant, points: list[Point], out: Path) -> None:
    cache = out.parent / f"cache-{variant.warm or variant.name}"
    for point in points:
        if not point.name.startswith(variant.only):
            continue
        try:
            record = measure(point, variant, cache)
        except Exception as error:
            record = {"point": point.name, "variant": variant.name, "error": repr(error)[:300]}
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """Run the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", help="comma-separated; all by default")
    parser.add_argument("--variants", help="comma-separated; all by default")
    parser.add_argument("--markdown", action="store_true", help="print rows for docs/fused.md")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    known, shown = {p.name: p for p in POINTS}, {v.name: v for v in VARIANTS}
    if args.markdown:
        known, shown = {n: known[n] for n in ROW_POINTS}, {n: shown[n] for n in ROW}
    points = _chosen(parser, "--points", args.points, known)
    variants = _chosen(parser, "--variants", args.variants, shown)
    forced = [name for name, _ in SM80 if os.environ.get(name)]
    if args.markdown and forced:
        parser.error(f"--markdown must run the GPU's own kernels: unset {forced[0]}")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json must name a file in a folder that exists, got {args.json}")
    if args.child:
        _child(variants[0], points, Path(args.child))
        return 0
    names = [variant.name for variant in variants]
    for variant in variants:
        if variant.warm and variant.warm not in names[: names.index(variant.name)]:
            parser.error(f"--variants: {variant.name} needs {variant.warm} before it")
    machine = fingerprint(Path.cwd())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.jsonl"
        try:
            for variant in variants:
                environment = os.environ | dict(variant.environment)
                environment["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{variant.name}"
                command = [sys.executable, __file__, "--child", str(out)]
                command += ["--variants", variant.name]
                command += ["--points", ",".join(point.name for point in points)]
                ended = subprocess.run(command, env=environment, check=False).returncode
                if ended:
                    print(f"{variant.name} ended with {ended}, what it had not measured is missing")
                _save(args.json, machine, _measured(out))
        finally:  # also what was measured before Ctrl-C
            records = _measured(out)
            if args.markdown:
                print(markdown(machine, records))
            else:
                print(describe(machine))
                print(table(records, [variant.name for variant in VARIANTS]))
            _save(args.json, machine, records)
    return 0


def _measured(out: Path) -> list[dict[str, Any]]:
    """Return the records of a file but for a last one that was not written to its end."""
    lines = out.read_text().splitlines(keepends=True) if out.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _save(path: Path | None, machine: dict[str, Any], records: list[dict[str, Any]]) -> None:
    if path is not None and records:
        path.write_text(json.dumps({"environment": machine, "records": records}))


def _chosen(
    parser: argparse.ArgumentParser, option: str, given: str | None, known: dict[str, Any]
) -> list[Any]:
    if given is None:
        return list(known.values())
    unknown = [name for name in given.split(",") if name not in known]
    if unknown:
        parser.error(f"{option} must be of {', '.join(known)}, got {unknown[0]!r}")
    return [known[name] for name in given.split(",")]


if __name__ == "__main__":
    sys.exit(main())
