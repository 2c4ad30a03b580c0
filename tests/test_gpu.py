"""Tests that need a CUDA device. Marked ``gpu``; skipped with a reason without one."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytest_int8bench.accuracy.guardrail import Guardrail
from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.sensitivity import SensitivityScan
from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.measure.evidence import EvidenceError, profile_forward
from pytest_int8bench.measure.host_feed import HostFeed
from pytest_int8bench.measure.layer_checks import check_kernel_count
from pytest_int8bench.measure.memory import allocated_bytes
from pytest_int8bench.measure.point import Throughput
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.measure.rounding import RoundingNoise
from pytest_int8bench.params import RunParams
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result
from pytest_int8bench.workloads import Workload
from pytest_int8bench.workloads.registry import load_workload
from toys import layers
from toys.models import normal, time_rounds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DIM = 256
POINT = RunParams(
    model_size="nano",
    image_size=16,
    num_timesteps=3,
    batch_size=16,
    compile_mode="default",
    model_version="v1.2",
    benchmark_interval_s=0.2,
)


class Block(nn.Module):
    """One transformer block with heads of 64 channels."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, dim // 64, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.mlp(x)


def toy(tokens: int = 128) -> Workload:
    return Workload(name="toy", build=lambda p: Block(), inputs=normal(tokens, DIM))


def measure(workload: Workload, *points: RunParams) -> list[Result]:
    throughput = Throughput(ModelPool())
    return [throughput.measure(workload, p, time_rounds, nodeid=p.run_name) for p in points]


@pytest.mark.parametrize("mode", ["w8a8", "w8"])
def test_encoder_measures_with_evidence(mode: str) -> None:
    candidate = POINT.replace(int8_enabled=True, int8_mode=mode)
    workload = load_workload("olmoearth", Path())
    baseline, result = measure(workload, candidate.baseline(), candidate)
    assert baseline.int8_time_share == 0
    assert (result.int8_time_share or 0) > 0 if mode == "w8a8" else result.int8_time_share == 0
    assert baseline.attention_kernel == result.attention_kernel == "flash"
    assert result.speedup_method == "interleaved"
    names = [kernel["name"] for kernel in result.kernels]
    assert not [name for name in names if "int8pack" in name]


LAYERS = POINT.replace(batch_size=64, int8_enabled=True)


def with_layers(model: type[nn.Module]) -> Workload:
    """Return a workload of a toy of ``toys.layers``, all of whose layers are quantized."""
    return Workload(
        name="toy", build=lambda p: model(), inputs=normal(32), filter_fn=layers.is_linear
    )


@pytest.mark.parametrize("backend", ["fused", "torchao"])
@pytest.mark.parametrize("compile_mode", ["off", "default", "max-autotune"])
@pytest.mark.parametrize("model", [layers.FourLayers, layers.CallsTwice, layers.Discarded])
def test_every_quantized_layer_runs_in_int8(
    model: type[nn.Module], compile_mode: str, backend: str
) -> None:
    params = LAYERS.replace(int8_backend=backend, compile_mode=compile_mode)
    [result] = measure(with_layers(model), params)
    assert result.status == "ok"
    assert "not proven" not in (result.reason or "")
    dropped = model is layers.Discarded and compile_mode != "off"
    assert result.coverage.get("unused", []) == (["c", "d"] if dropped else [])
    assert result.ceiling is not None
    assert "problem" not in result.ceiling, result.ceiling


@pytest.mark.parametrize("mode", ["w8", "fp8"])
def test_modes_without_layer_checks_have_no_remark(mode: str) -> None:
    if mode == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs FP8")
    [result] = measure(with_layers(layers.FourLayers), LAYERS.replace(int8_mode=mode))
    assert (result.status, result.coverage.get("unused", [])) == ("ok", [])
    assert "quantized layers" not in (result.reason or "")


@pytest.mark.parametrize("backend", ["fused", "torchao"])
def test_layer_that_runs_another_matmul_contradicts_the_label(backend: str) -> None:
    params = LAYERS.replace(int8_backend=backend, compile_mode="off")
    problem = "1 of 4 quantized layers ran matmuls that are not INT8"
    with pytest.raises(EvidenceError, match=problem) as caught:
        measure(with_layers(layers.Multiplies), params)
    assert ": c " in str(caught.value)


def test_layer_with_few_rows_contradicts_the_label_on_torchao_kernels() -> None:
    class Pools(layers.FourLayers):
        def second(self, x: torch.Tensor) -> torch.Tensor:
            return super().second(x[:8])

    params = LAYERS.replace(compile_mode="off")
    problem = r"matmuls of 16 rows or fewer run in floating point\): c, d "
    with pytest.raises(EvidenceError, match=problem):
        measure(with_layers(Pools), params.replace(int8_backend="torchao"))
    [result] = measure(with_layers(Pools), params.replace(int8_backend="fused"))
    assert result.status == "ok"


@pytest.mark.parametrize("backend", ["fused", "torchao"])
def test_counts_kernels_that_ran(backend: str) -> None:
    params = LAYERS.replace(int8_backend=backend)
    model = ModelPool().get(with_layers(layers.FourLayers), params)
    model.ready()
    evidence, runs = model.evidence(), dict(model.layers.runs)
    check_kernel_count(evidence, runs, params, ())
    for number in range(16):  # autotuning may have run additional kernels
        runs[f"more.{number}"] = dataclasses.replace(runs["a"], storage=-1 - number)
    with pytest.raises(EvidenceError, match="INT8 matmuls are needed for one forward, but "):
        check_kernel_count(evidence, runs, params, ())


def test_dynamo_may_be_reset_between_tests() -> None:
    throughput, workload = Throughput(ModelPool()), with_layers(layers.FourLayers)
    candidate = LAYERS.replace(compile_mode="max-autotune")
    for params in (candidate.baseline(), candidate, candidate):
        torch._dynamo.reset()
        result = throughput.measure(workload, params, time_rounds, nodeid="a")
        assert result.status == "ok"


def test_requested_attention_backend_runs_with_warm_caches() -> None:
    model = Block().to("cuda", torch.bfloat16).eval()
    x = torch.randn(8, 128, DIM, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):  # the second time, every compiler cache on disk is warm
        for attention in ("flash", "cudnn", "efficient"):
            torch._dynamo.reset()
            compiled = compile_for_a100(model, mode="default", attention=attention)
            compiled(x)
            evidence = profile_forward(lambda run=compiled: run(x), torch.device("cuda"))
            assert evidence.attention_kernel == attention, evidence.top()


@pytest.mark.parametrize("mode", ["w8a8", "w8"])
def test_point_has_breakdown_and_ceiling(mode: str) -> None:
    candidate = POINT.replace(int8_enabled=True, int8_mode=mode)
    baseline, result = measure(toy(), candidate.baseline(), candidate)
    for measured in (baseline, result):
        split = measured.device_breakdown
        assert split is not None
        assert sum(split.values()) == pytest.approx(measured.device_time_s)
        assert split["attention"] > 0
        assert split["rest"] > 0
    assert (
        baseline.device_breakdown["int8_products"]
        == 0
        < baseline.device_breakdown["other_products"]
    )
    assert (result.device_breakdown["int8_products"] > 0) is (mode == "w8a8")
    assert (baseline.ceiling, baseline.ceiling_speedup) == (None, None)

    basis = result.ceiling
    assert basis is not None
    assert "problem" not in basis, basis
    assert basis["quantized_share"] == 1.0  # the toy has no other linear layer
    # An INT8 matmul slower than BF16 gives a ceiling below 1, which is correct.
    assert 0.5 < basis["products_speedup"] <= result.ceiling_speedup < 4
    assert 0.25 < basis["product_ratio"] < 4
    if mode == "w8":
        assert 1 <= result.ceiling_speedup < 2
    assert (result.ceiling_reached is None) is (result.ceiling_speedup <= 1)
    # No GPU is below 1 TFLOP/s or 50 GB/s, or above 10,000 TFLOP/s or 50,000 GB/s.
    assert 1e12 < basis["float_ops_per_s"] < 1e16
    assert 5e10 < basis["bytes_per_s"] < 5e13
    print(result.ceiling_speedup, result.ceiling_reached, basis)


def test_int8_attention_does_not_exceed_its_ceiling() -> None:
    candidate = POINT.replace(int8_enabled=True, int8_attention=True)
    _, result = measure(toy(), candidate.baseline(), candidate)
    assert "problem" not in result.ceiling, result.ceiling
    part = result.ceiling["attention"]
    assert part["share"] == 1.0  # the toy has one call
    assert 1e12 < part["ops_per_s"] < 1e16
    assert result.speedup <= result.ceiling_speedup


def test_auto_attention_is_the_same_for_baseline_and_candidate() -> None:
    candidate = POINT.replace(int8_enabled=True, attention="auto")
    baseline, result = measure(toy(), candidate.baseline(), candidate)
    chosen = baseline.attention_backend
    assert chosen in ("flash", "cudnn", "efficient", "math")
    assert result.attention_backend == chosen
    for measured in (baseline, result):
        # On CUDA, math attention uses the same kernels as other layers.
        assert measured.attention_kernel == (None if chosen == "math" else chosen)


def test_compile_cache_is_separate_for_each_backend(tmp_path: Path) -> None:
    model = nn.Sequential(Block(), Block()).to("cuda", torch.bfloat16).eval()
    x = torch.randn(8, 128, DIM, device="cuda", dtype=torch.bfloat16)
    found = []
    for attention in ("flash", "cudnn", "efficient") * 2:
        torch._dynamo.reset()
        compiled = compile_for_a100(model, mode="default", attention=attention, cache_dir=tmp_path)
        compiled(x)
        evidence = profile_forward(lambda run=compiled: run(x), torch.device("cuda"))
        assert evidence.attention_kernel == attention, evidence.top()
        found.append(compiled.compile_cache)
        assert (compiled.regions, compiled.regions_refused) == (2, None)
    assert found == ["cold"] * 3 + ["warm"] * 3
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_repeated_blocks_compile_as_one_on_the_device(mode: str) -> None:
    model = nn.Sequential(*(Block() for _ in range(4))).to("cuda", torch.bfloat16).eval()
    x = torch.randn(8, 128, DIM, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(x)
    compiled = compile_for_a100(model, mode=mode)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected, rtol=0.05, atol=0.05)
    assert (compiled.regions, compiled.regions_refused) == (4, None)


def test_cuda_graphs_and_host_feed_measure() -> None:
    graphs = POINT.replace(int8_enabled=True, compile_mode="reduce-overhead")
    host = POINT.replace(int8_enabled=True, feed="host")
    for result in measure(toy(), graphs, host):
        assert result.status == "ok"
        assert (result.speedup_low or 0) <= (result.speedup or 0) <= (result.speedup_high or 0)


def test_host_batches_arrive_intact_during_computation() -> None:
    samples = 64
    inputs = (torch.randint(0, 1000, (samples, 1 << 16)), torch.arange(samples))
    feed = HostFeed(inputs, torch.device("cuda"), samples=samples)
    expected = [[t.roll(k, 0).cuda() for t in inputs] for k in range(feed.variants)]
    whole = torch.ones((), dtype=torch.bool, device="cuda")
    for index in range(200):
        batch = next(feed)
        for _ in range(2):  # read twice, leaving time for a copy that arrives too early
            torch.cuda._sleep(1_000_000)
            for got, wanted in zip(batch, expected[index % feed.variants], strict=True):
                whole &= (got == wanted).all()
    assert bool(whole)
    assert feed.nbytes == 2 * sum(t.nbytes for t in inputs)
    children = len(multiprocessing.active_children())
    feed.close()
    assert len(multiprocessing.active_children()) == children - (feed.workers or 0)


@pytest.mark.parametrize("compile_mode", ["off", "default", "reduce-overhead"])
def test_host_batches_give_the_outputs_of_resident_batches(compile_mode: str) -> None:
    pool = ModelPool()
    point = POINT.replace(int8_enabled=True, feed="host", compile_mode=compile_mode)
    model = pool.get(toy(), point)
    model.ready()
    feed = model.feed
    assert feed is not None
    resident = [[t.roll(k, 0).cuda() for t in model.inputs] for k in range(feed.variants)]
    with model.compiled.entered(), model.compiled.no_compilation():
        equal = torch.ones((), dtype=torch.bool, device="cuda")
        for _ in range(100):
            index = feed.batches - 1  # one batch is always ahead
            fed, again = model.run().clone(), model.run_again().clone()
            expected = model.compiled(*resident[index % feed.variants])
            equal &= (fed == expected).all() & (again == expected).all()
        assert bool(equal)
    pool.clear()
    assert feed.nbytes == 0


def test_feeding_from_the_host_is_measured() -> None:
    host = POINT.replace(feed="host")
    graphs = host.replace(compile_mode="reduce-overhead", int8_enabled=True)
    device = POINT.replace(compile_mode="reduce-overhead", int8_enabled=True)
    for result in measure(toy(), host, graphs):
        assert result.feed_workers is not None
        assert (result.feed_copy_s or 0) > 0
        assert (result.feed_wait_s or 0) > 0
        assert (result.feed_exposed_s or 0) < (result.batch_time_s or 0)
        assert result.attention_kernel == "flash"
        names = [kernel["name"] for kernel in result.kernels]
        assert not [name for name in names if name.startswith("Memcpy HtoD")]
        print(result.run_name, result.feed_workers, result.batch_time_s)
        print(result.feed_copy_s, result.feed_exposed_s, result.feed_wait_s)
    [resident] = measure(toy(), device)
    assert resident.feed_copy_s is resident.feed_exposed_s is resident.feed_wait_s is None


def test_out_of_memory_does_not_stop_later_points() -> None:
    small = POINT.replace(int8_enabled=True, batch_size=16)
    huge = small.replace(batch_size=1 << 23)
    before, oom, after = measure(toy(), small, huge, small)
    assert [r.status for r in (before, oom, after)] == ["ok", "oom", "ok"]
    assert (oom.requested_bytes or 0) > 2**30
    assert after.peak_memory_bytes == pytest.approx(before.peak_memory_bytes, rel=0.05)
    assert after.speedup is not None


class Greedy(nn.Module):
    """At large batches, hold 4 GiB and then request more than any device has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1000:
            held = torch.zeros(4 << 30, dtype=torch.uint8, device=x.device)
            x = x + torch.zeros(1 << 44, dtype=torch.uint8, device=x.device)[:1] + held[:1]
        return self.fc1(x)


def test_out_of_memory_in_a_forward_frees_memory() -> None:
    workload = Workload(name="greedy", build=lambda p: Greedy(), inputs=normal(64))
    before = allocated_bytes(torch.device("cuda"))
    small = POINT.replace(compile_mode="off", batch_size=32)
    oom, after = measure(workload, small.replace(batch_size=2000), small)
    assert oom.oom
    assert oom.requested_bytes == 1 << 44
    assert 0 < (after.peak_memory_bytes or 0) < 1 << 20
    assert allocated_bytes(torch.device("cuda")) - before < 1 << 20


@pytest.mark.parametrize("backend", ["torchao", "fused"])
def test_recognizes_int8_kernels_of_max_autotune(backend: str) -> None:
    candidate = POINT.replace(
        int8_enabled=True, int8_backend=backend, compile_mode="max-autotune-no-cudagraphs"
    )
    throughput = Throughput(ModelPool(), with_baseline=False)
    result = throughput.measure(toy(), candidate, time_rounds, nodeid="autotuned")
    assert result.status == "ok"
    assert (result.int8_time_share or 0) > 0
    print(*(k["name"] for k in result.kernels), sep="\n")


def test_peak_memory_excludes_other_models() -> None:
    ballast = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    workload = Workload(
        name="linear",
        build=lambda p: nn.Sequential(nn.Linear(4096, 4096, bias=False)),
        inputs=normal(4096),
        filter_fn=lambda module, name: True,
    )
    (result,) = measure(workload, POINT.replace(batch_size=4096, compile_mode="off"))
    least = 3 * 4096 * 4096 * 2  # weights, inputs and outputs in BF16
    assert least <= (result.peak_memory_bytes or 0) <= 1.5 * least
    assert allocated_bytes(torch.device("cuda")) >= ballast.nbytes


@pytest.mark.parametrize("compile_mode", ["off", "default"])
def test_reports_too_few_rows_for_the_int8_matmul(compile_mode: str) -> None:
    few = POINT.replace(
        int8_enabled=True, int8_backend="torchao", batch_size=1, compile_mode=compile_mode
    )
    with pytest.raises((QuantizationError, EvidenceError), match="16 rows"):
        measure(toy(tokens=8), few)


def test_restores_tf32_and_other_settings() -> None:
    before = torch.get_float32_matmul_precision()
    model: Any = compile_for_a100(nn.Linear(64, 64).cuda().eval(), mode="off", attention="auto")
    model(torch.randn(32, 64, device="cuda"))
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_inference_mode_enabled()


def test_smoothquant_measures() -> None:
    (result,) = measure(toy(), POINT.replace(int8_enabled=True, int8_smoothquant=True))
    assert result.status == "ok"
    assert dataclasses.asdict(result)["coverage"]["converted_layers"] == 4


@pytest.mark.parametrize("compile_mode", ["default", "reduce-overhead"])
def test_compiled_digits_pass_accuracy(compile_mode: str) -> None:
    point = RunParams(
        model_size="nano", batch_size=128, compile_mode=compile_mode, int8_enabled=True
    )
    guardrail = Guardrail(ModelPool(), Limit.parse("1%"))
    workload = load_workload("digits", Path())
    for params in (point, point.replace(int8_smoothquant=True), point.replace(int8_mode="w8")):
        [verdict] = guardrail.check(workload, params, nodeid=params.run_name)
        # 797 samples in batches of 128: the last one is partial.
        assert (verdict.outcome, verdict.samples) == ("PASS", 797)
        assert verdict.baseline > 0.97


def test_rounding_noise_is_reproducible_on_device_and_host() -> None:
    """Models on a GPU also compute tables and scalars on the host."""
    outputs = []
    for _ in range(2):
        with RoundingNoise(0):
            table = torch.linspace(0, 1, 7).cos()
            outputs.append([table, torch.ones(3, 7, device="cuda") / 3 * table.cuda()])
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(outputs[0][0], torch.linspace(0, 1, 7).cos())


def test_olmoearth_scenes_are_judged_as_a_pipeline_check() -> None:
    params = POINT.replace(model_version="v1.2", num_timesteps=3, int8_enabled=True)
    guardrail = Guardrail(ModelPool(), Limit.parse("1%"))
    verdicts = guardrail.check(load_workload("olmoearth", Path()), params, nodeid="a")
    assert [v.metric for v in verdicts] == ["knn20 top1", "linear probe top1", "outputs"]
    assert [v.is_pipeline_check for v in verdicts] == [True, True, False]
    assert verdicts[2].outcome == "proxy-ok"
    for verdict in verdicts[:2]:
        assert verdict.samples == 500
        assert 0.8 <= verdict.baseline <= 0.98


def test_ranks_layers_on_the_device() -> None:
    workload = load_workload("digits", Path())
    point = RunParams(model_size="nano", batch_size=128, compile_mode="off", int8_enabled=True)
    scan = SensitivityScan(Guardrail(ModelPool(), Limit.parse("1%")), workload, point)
    table = scan.run(nodeid="a", metric=True)
    assert len(table.layers) == 16
    assert all(20 < row["sqnr_db"] < 80 for row in table.layers)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("visible", [None, "1,0"])
def test_each_xdist_worker_has_its_own_gpu(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    pytest.importorskip("xdist")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pytester.makepyfile(
        test_one="""
        import os

        import pytest
        import torch
        from torch import nn

        from pytest_int8bench import Workload

        torch.cuda.is_available()  # as modules of tests do, which starts CUDA


        @pytest.fixture
        def int8_workload():
            return Workload(
                name="toy",
                build=lambda p: nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)),
                inputs=normal(256),
                filter_fn=lambda module, name: isinstance(module, nn.Linear),
            )


        def test_throughput(int8_throughput):
            int8_throughput()
            uuid = torch.cuda.get_device_properties(0).uuid
            seen = torch._C._cuda_getDeviceCount()
            with open(os.environ["PYTEST_XDIST_WORKER"], "a") as file:
                print(uuid, seen, os.environ["CUDA_VISIBLE_DEVICES"], file=file)
        """
    )
    options = ["-pxdist", "-pbenchmark", "-pint8bench", "-n2", "--benchmark-json=out.json"]
    sets = ("batch_size=32,64", "compile_mode=off", "benchmark_interval_s=0.2")
    options += ["--int8-preset=seed", *(f"--int8-set={value}" for value in sets)]
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.runpytest_subprocess(*options).assert_outcomes(passed=4)
    saved = read(pytester.path / "out.json")
    assert [result.status for result in saved.results] == ["ok"] * 4
    assert saved.environment["gpu_count"] == torch.cuda.device_count()
    uuids = set()
    for worker in ("gw0", "gw1"):
        [line] = set((pytester.path / worker).read_text().splitlines())
        uuid, seen, name = line.split()
        uuids.add(uuid)
        assert seen == "1"
        assert name == (f"GPU-{uuid}" if visible is None else visible.split(",")[int(worker[-1])])
        assert {r.worker["gpu"] for r in saved.results if r.worker["id"] == worker} == {name}
    assert len(uuids) == 2
