"""Test quantization modes: built-in ones, FP8, and one registered by a project."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pytest_int8bench
from pytest_int8bench import choices
from pytest_int8bench.accuracy.guardrail import next_step
from pytest_int8bench.choices import INT8_MODES, ModeChoice, mode_choices, register_mode
from pytest_int8bench.cli.main import main
from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.measure.building import mode_problem
from pytest_int8bench.measure.ceiling import CeilingError, bound_of
from pytest_int8bench.measure.evidence import Evidence, EvidenceError, Kernel, check_labels
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import apply_int8_quant, coverage, weight_storage
from pytest_int8bench.quantization.modes import MODES, Mode, fp8, w8
from pytest_int8bench.report.tables import MISSING
from pytest_int8bench.report.terminal import accuracy_table, results_table
from pytest_int8bench.report.verdict_text import message
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result
from pytest_int8bench.results.verdicts import Accuracy
from pytest_int8bench.sweep import SWEEPS, expand_modes
from pytest_int8bench.workloads import Workload

PACKAGE = Path(pytest_int8bench.__file__).parent
FP8 = RunParams(int8_enabled=True, int8_mode="fp8")


# -- the registry -------------------------------------------------------------------------------


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_modes", mode_choices())


@pytest.mark.parametrize("name", INT8_MODES)
def test_every_name_has_a_mode(name: str) -> None:
    mode = MODES[name]
    assert (mode.name, mode.label) == (name, name.upper())
    assert mode.choice is mode_choices()[name]
    assert mode.next_mode in (None, *INT8_MODES)


def test_unknown_mode_raises_key_error() -> None:
    with pytest.raises(KeyError):
        MODES["w4"]
    assert "w4" not in MODES
    assert list(MODES) == list(INT8_MODES)


def test_names_are_known_without_torch() -> None:
    code = (
        "import sys; from pytest_int8bench.params import RunParams; "
        "from pytest_int8bench.choices import ModeChoice, register_mode; "
        "register_mode('toy', ModeChoice(summary='a toy', target='nowhere:MODE')); "
        "name = RunParams(int8_enabled=True, int8_mode='toy').run_name; "
        "assert RunParams.from_run_name(name).int8_mode == 'toy'; "
        "RunParams.from_run_name(name).impossible_reason(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("own_registry")
def test_registering_twice_must_agree() -> None:
    toy = ModeChoice(summary="a toy", target="toy:MODE")
    register_mode("toy", toy)
    register_mode("toy", toy)
    with pytest.raises(ValueError, match=r"^quantization mode 'toy' is registered already: Mode"):
        register_mode("toy", ModeChoice(summary="another toy", target="toy:MODE"))


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("name", ["off", "", "W4", "4w", "w4_g128", "w4-g128", "w4.1"])
def test_rejects_names_that_cannot_be_in_a_run_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^name must be lower-case .* got {name!r}$"):
        register_mode(name, ModeChoice(summary="a toy", target="toy:MODE"))


@pytest.mark.usefixtures("own_registry")
def test_target_must_be_the_mode_of_that_name() -> None:
    register_mode("toy", ModeChoice(summary="a toy", target=f"{w8.__name__}:MODE"))
    with pytest.raises(TypeError, match=r"w8:MODE must be a Mode named 'toy', got Mode\(name='w8'"):
        MODES["toy"]


def _constants(path: Path) -> Iterator[str]:
    """Yield the strings of a file that name a mode, except docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            text = node.value
            if isinstance(text, str) and re.search(rf"\b({'|'.join(INT8_MODES)})\b", text):
                yield text


def test_no_other_file_names_a_mode() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): list(_constants(path))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "modes" and path.name != "choices.py"
    }
    assert {name: texts for name, texts in found.items() if texts} == {
        # Defaults.
        "params.py": ["w8a8"],
        "plugin/options.py": [" or off (BF16 only). Default: w8a8"],
        "plugin/settings.py": ["w8a8"],
        "quantization/api.py": ["w8a8"],
    }


# -- FP8 ----------------------------------------------------------------------------------------

NVJET = "nvjet_qqtst_128x256_128x6_2x1_v_bz_coopA_scaleAB_TNT"
NVJET_BF16 = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"
CUTLASS = (
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel"
    "::GemmUniversal<cute::tuple<int, int, int>, cutlass::gemm::collective::CollectiveMma<cutlass"
    "::gemm::MainloopSm90TmaGmmaWarpSpecializedFP8<5>, cutlass::float_e4m3_t> > >"
)
GEMM_INT8 = "cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16"


def ran(*names: str) -> Evidence:
    return Evidence(tuple(Kernel(name, 1e-3, 1) for name in names))


@pytest.mark.parametrize(
    "kernel",
    [
        NVJET,
        CUTLASS,
        "nvjet_sm100_qqtst_128x256_128x6_2x1_v_bz_TNT",
        "sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x64_stage3_warpsize4x1x1",
        "triton_tem_fused__scaled_mm__to_copy_3",
    ],
)
def test_fp8_matmuls_prove_fp8(kernel: str) -> None:
    check_labels(ran(kernel, NVJET_BF16), FP8, (24, 24))
    with pytest.raises(EvidenceError, match=f"is a baseline, but {re.escape(kernel)} ran$"):
        check_labels(ran(kernel), FP8.baseline(), (0, 0))


@pytest.mark.usefixtures("own_registry")
def test_broken_registered_mode_does_not_stop_baselines() -> None:
    register_mode("broken", ModeChoice(summary="a toy", target="nowhere:MODE"))
    message = "int8_mode=broken: cannot load nowhere:MODE: ModuleNotFoundError: No module named"
    with pytest.raises(QuantizationError, match=f"^{message} 'nowhere'$"):
        MODES["broken"]
    check_labels(ran("nvjet_sm90_tst"), FP8.baseline(), (0, 0))


@pytest.mark.parametrize(
    "kernel",
    [
        NVJET_BF16,
        "triton_poi_fused__scaled_mm__to_copy_3",  # fused around a matmul
        "void at::native::vectorized_elementwise_kernel<4, float8_e4m3fn_copy>",
        "void at::native::float_e4m3_amax_kernel",
    ],
)
def test_other_kernels_do_not_prove_fp8(kernel: str) -> None:
    message = f"{FP8.run_name} is labelled FP8, but no FP8 matmul ran; kernels: {kernel} 1000 us"
    with pytest.raises(EvidenceError, match=f"^{re.escape(message)}$"):
        check_labels(ran(kernel), FP8, (24, 24))


def test_fp8_must_store_fp8_and_run_no_int8() -> None:
    with pytest.raises(EvidenceError, match=r": 3 of 24 quantized layers store FP8 weights$"):
        check_labels(ran(NVJET), FP8, (3, 24))
    with pytest.raises(EvidenceError, match=f" is labelled FP8, but {GEMM_INT8} ran$"):
        check_labels(ran(NVJET, GEMM_INT8), FP8, (24, 24))


def test_fp8_has_no_upper_bound() -> None:
    with pytest.raises(CeilingError, match=r"^no upper bound is known for int8_mode=fp8$"):
        bound_of("fp8")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu_type": "cpu"}, "int8_mode=fp8 runs on CUDA only, gpu_type=cpu"),
        (
            {"bf16": False, "attention": "efficient"},
            "int8_mode=fp8 takes BF16 weights only, bf16=False",
        ),
        ({"int8_smoothquant": True}, "int8_smoothquant must be False with int8_mode=fp8, got True"),
        ({"int8_backend": "fused"}, "int8_backend=fused runs w8a8, int8_mode=fp8"),
        ({}, None),
        ({"int8_enabled": False, "gpu_type": "cpu", "attention": "math"}, None),
    ],
)
def test_fp8_impossible_reasons(changes: dict[str, object], reason: str | None) -> None:
    assert FP8.replace(**changes).impossible_reason() == reason


@pytest.mark.parametrize(
    ("available", "capability", "problem"),
    [
        (False, (0, 0), "FP8 requires CUDA, but torch sees no CUDA device"),
        (True, (8, 0), "FP8 requires sm89 (Ada) or later, got sm80"),
        (True, (8, 9), None),
        (True, (9, 0), None),
    ],
)
def test_which_gpus_run_fp8(
    monkeypatch: pytest.MonkeyPatch,
    available: bool,
    capability: tuple[int, int],
    problem: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert mode_problem(FP8) == problem
    assert mode_problem(FP8.baseline()) is None
    assert mode_problem(FP8.replace(int8_mode="w8a8")) is None


def layers() -> nn.ModuleDict:
    model = nn.ModuleDict(
        {
            "fc1": nn.Linear(64, 128),
            "fc2": nn.Linear(128, 64),
            "fc3": nn.Linear(64, 24),
            "fc4": nn.Linear(64, 64),
        }
    )
    model = model.eval().requires_grad_(False).to(torch.bfloat16)
    model["fc4"].float()
    return model


def test_rejects_fp8_on_unsupported_devices() -> None:
    model = layers()
    with pytest.raises(QuantizationError, match=r"^int8_mode=fp8: FP8 requires CUDA, got c"):
        apply_int8_quant(model, mode="fp8")
    with pytest.raises(ValueError, match=r"^smoothquant=True does not support mode=fp8$"):
        apply_int8_quant(model, mode="fp8", smoothquant=True, calibration=[])
    assert weight_storage(model, None) == (0, 0)


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow FP8 on the CPU, which can store and multiply it slowly."""
    monkeypatch.setattr(
        "torchao.quantization.quant_api._check_hardware_support", lambda granularity: None
    )
    anywhere = dataclasses.replace(fp8.MODE, device_problem=lambda device: None)
    monkeypatch.setattr(fp8, "MODE", anywhere)


@pytest.mark.usefixtures("on_any_device")
def test_fp8_stores_fp8_weights() -> None:
    model, x = layers(), torch.randn(8, 64).to(torch.bfloat16)
    expected = model["fc1"](x)
    apply_int8_quant(model, mode="fp8")
    noise = (model["fc1"](x) - expected).float().square().sum() / expected.float().square().sum()
    assert 0 < noise < 0.01
    assert weight_storage(model, torch.float8_e4m3fn) == (2, 2)
    assert weight_storage(model) == (0, 2)
    covered = coverage(model)
    assert (covered.mode, covered.backend) == ("fp8", "torchao")
    assert str(covered).startswith("2 of 4 linear layers in FP8 (fp8), ")
    assert {layer.name: layer.reason for layer in covered.left_out} == {
        "fc3": "shape: 64x24 is not a multiple of 16 (FP8 matmul)",
        "fc4": "dtype: float32 (row-wise FP8 requires BF16 weights)",
    }


@pytest.mark.usefixtures("on_any_device")
def test_reports_that_nothing_was_converted_to_fp8() -> None:
    with pytest.raises(QuantizationError, match=r"^no layer was converted to FP8: 4 linear"):
        apply_int8_quant(layers(), mode="fp8", filter_fn=lambda module, name: False)


def test_suggests_what_to_try_after_fp8() -> None:
    workload = Workload(name="toy", build=nn.Identity, inputs=lambda p, device: ())
    assert next_step(workload, FP8) == "next step: weights only (--int8-mode=w8, int8_mode='w8')"
    assert not MODES["fp8"].smoothquant_helps


def test_tables_and_messages_do_not_call_fp8_int8() -> None:
    point = {"nodeid": "a", "workload": "olmoearth", "run_name": FP8.run_name}
    params = FP8.to_dict()
    results = results_table(
        [Result(**point, params=params, samples_per_s=1.0, int8_time_share=0.0)]
    )
    [row] = results.rows
    assert row[results.columns.index("INT8 time")] == MISSING
    verdict = Accuracy(
        **point,
        params=params,
        metric="top1",
        outcome="FAIL",
        samples=100,
        baseline=0.9,
        candidate=0.8,
        limit="1%",
        drop=0.1,
        drop_low=0.05,
        drop_high=0.15,
        lost=10,
        gained=0,
    )
    assert "FP8" in accuracy_table([verdict]).columns
    int8 = dataclasses.replace(verdict, params={**params, "int8_mode": "w8a8"})
    assert "INT8" in accuracy_table([int8]).columns
    assert "candidate" in accuracy_table([verdict, int8]).columns
    text = message([verdict], remedied=False)
    assert "  BF16 0.9000, FP8 0.8000, 100 samples: 10 got worse" in text
    assert text.endswith("--int8-remedy tries BF16 for the worst layers, and W8")
    assert "tries SmoothQuant, BF16 for" in message([int8], remedied=False)


def test_sweeps_include_fp8_only_on_request() -> None:
    assert SWEEPS["int8_mode"] == {"int8_mode": ["w8a8", "w8"]}
    points = expand_modes(RunParams(), ["w8a8", "fp8"], {})
    assert [point.int8_mode for point in points] == ["w8a8", "fp8"]


# -- a mode of a project ------------------------------------------------------------------------

REGISTER = """
from pytest_int8bench.choices import ModeChoice, register_mode

register_mode("toy", ModeChoice(summary="weights, dequantized", target="toy_mode:MODE"))
"""
TOY_MODE = """
from torchao.quantization import Int8WeightOnlyConfig

from pytest_int8bench.quantization.lowering import dequantize
from pytest_int8bench.quantization.modes import Bound, Mode

MODE = Mode(
    name="toy",
    configure=lambda model: Int8WeightOnlyConfig(set_inductor_config=False),
    lower=dequantize,
    bound=Bound(int8_matmuls=False),
    next_mode="w8",
)
"""
WORKLOAD = """
import numpy as np
import pytest
import torch
from torch import nn

from pytest_int8bench import Evaluation, Workload


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(32, 64)
        self.fc2 = nn.Linear(64, 32)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


def scores(forward):
    forward(torch.randn(8, 32))
    return np.arange(1000) % 10 != 0


@pytest.fixture(scope="session")
def int8_workload():
    return Workload(
        name="net",
        build=lambda p: Net(),
        inputs=lambda p, device: (torch.randn(p.batch_size, 32, device=device),),
        evaluation=Evaluation(metric="top1", scores=scores),
    )
"""
TESTS = """
def test_throughput(int8_throughput):
    int8_throughput()


def test_accuracy(int8_guardrail):
    int8_guardrail()
"""
SMOKE = (
    "--int8-preset=smoke",
    "--int8-set=compile_mode=off",
    "--int8-set=benchmark_interval_s=0.05",
)
TOY = "cpu_bf16_int8_toy_off_bs4"


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Return a project that registers a mode in its conftest."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    without = " ".join(f"-p no:{name}" for name in ("randomly", "codspeed", "hypothesispytest"))
    pytester.makeini(f"[pytest]\npythonpath = .\naddopts = --strict-markers {without}\n")
    pytester.makepyfile(toy_mode=TOY_MODE, register_toy=REGISTER, test_net=TESTS)
    pytester.makeconftest(REGISTER + WORKLOAD)
    return pytester


@pytest.mark.usefixtures("forked")
def test_registered_mode_is_measured_and_judged(
    project: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (*SMOKE, "--int8-mode=toy", "--benchmark-json=out.json")
    result = project.runpytest_subprocess(*args)
    result.assert_outcomes(passed=3)
    text = result.stdout.str()
    assert re.search(rf"^net +{TOY} .* 0% .*\dx \[", text, re.MULTILINE)
    assert re.search(rf"^net +{TOY} +top1 +1,000 .* PASS$", text, re.MULTILINE)

    path = project.path / "out.json"
    saved = read(path)
    [measured] = [r for r in saved.results if r.params["int8_enabled"]]
    assert (measured.run_name, measured.params["int8_mode"]) == (TOY, "toy")
    assert measured.coverage is not None
    assert (measured.coverage["mode"], measured.coverage["converted_layers"]) == ("toy", 2)
    assert measured.int8_backend == "torchao"
    assert [(v.run_name, v.outcome) for v in saved.accuracy] == [(TOY, "PASS")]
    assert TOY in json.dumps(json.loads(path.read_text())["benchmarks"])

    # The mode is not registered here, because reading does not need it.
    again = path.with_name("again.json")
    again.write_text(path.read_text())
    assert main(["compare", str(path), str(again)]) == 0
    assert "nothing regressed" in capsys.readouterr().out
    assert main(["show", str(path)]) == 0
    assert TOY in capsys.readouterr().out


@pytest.mark.usefixtures("forked")
def test_modes_multiply_points_and_unsupported_modes_are_skipped(project: pytest.Pytester) -> None:
    args = (*SMOKE, "--int8-mode=w8a8,toy,fp8", "--int8-no-baseline", "-rs", "-k", "throughput")
    result = project.runpytest_subprocess(*args)
    result.assert_outcomes(passed=2, skipped=1, deselected=3)
    result.stdout.fnmatch_lines(["SKIPPED * int8_mode=fp8 runs on CUDA only, gpu_type=cpu"])


@pytest.mark.slow
def test_fp8_without_a_gpu_is_skipped(project: pytest.Pytester) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    args = ("--int8-preset=seed", "--int8-mode=fp8", "--int8-no-baseline", "-rs")
    result = project.runpytest_subprocess(*args)
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED * FP8 requires CUDA, but torch sees no CUDA device"])


def test_registered_modes_are_in_help_and_messages(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(project.path), prepend=":")
    shown = project.runpytest_subprocess("-p", "register_toy", "--help").stdout.str()
    text = re.sub(r"\s+", " ", shown)
    assert "w8 (weights only), fp8 (" in text
    assert "toy (weights, dequantized) or off (BF16 only)" in text
    result = project.runpytest_subprocess("--int8-mode=w4")
    message = "must be a comma-separated list of w8a8, w8, fp8, toy, off, got 'w4'"
    result.stderr.fnmatch_lines([f"ERROR: --int8-mode: {message}"])


@pytest.mark.usefixtures("own_registry")
def test_registered_modes_are_in_run_names() -> None:
    with pytest.raises(ValueError, match=r"^not a run name: "):
        RunParams.from_run_name(TOY)
    register_mode("toy", ModeChoice(summary="a toy", target="toy_mode:MODE"))
    params = RunParams.from_run_name(TOY)
    assert (params.int8_mode, params.run_name) == ("toy", TOY)
    assert RunParams.from_env_vars(params.to_env_vars()) == params
    with pytest.raises(ValueError, match=r"must be one of w8a8, w8, fp8, toy, got 'w4'$"):
        params.replace(int8_mode="w4")
    assert [p.int8_mode for p in expand_modes(params, ["toy", "off"], {})] == ["toy", "w8a8"]


def test_mode_needs_only_name_and_configuration() -> None:
    mode = Mode(name="w8", configure=lambda model: None)
    assert (mode.bound, mode.next_mode, mode.proof.storage) == (None, None, torch.int8)
    assert mode.layer_problem(nn.Linear(1, 1)) is mode.device_problem(torch.device("cpu")) is None
    assert mode.explain("anything") is None
