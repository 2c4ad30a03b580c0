"""Test the workload of OlmoEarth encoders."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

package = pytest.importorskip(
    "olmoearth_pretrain_minimal.olmoearth_pretrain_v1.olmoearth_pretrain_v1"
)

from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.data import normalize  # noqa: E402
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn.latent_mim import (  # noqa: E402
    LatentMIMConfig,
)
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.constants import (  # noqa: E402
    Modality,
)

from pytest_int8bench.compiler.api import compile_for_a100  # noqa: E402
from pytest_int8bench.errors import WorkloadError  # noqa: E402
from pytest_int8bench.measure.building import build_eager  # noqa: E402
from pytest_int8bench.measure.pool import ModelPool, part_key  # noqa: E402
from pytest_int8bench.params import RunParams  # noqa: E402
from pytest_int8bench.quantization.api import coverage  # noqa: E402
from pytest_int8bench.workloads import Workload, geotiff, scenes  # noqa: E402
from pytest_int8bench.workloads import olmoearth as module  # noqa: E402
from pytest_int8bench.workloads.olmoearth import VERSION_SIZES, olmoearth  # noqa: E402
from pytest_int8bench.workloads.registry import load_workload  # noqa: E402
from pytest_int8bench.workloads.weights import WeightsError  # noqa: E402

CPU = torch.device("cpu")
SMALL = RunParams(
    model_size="nano",
    gpu_type="cpu",
    compile_mode="off",
    image_size=8,
    num_timesteps=2,
    batch_size=2,
    benchmark_interval_s=0.01,
)
# Tokens of a Sentinel-2 image of v1: 2 x 2 patches, 2 timesteps, 3 band groups, 2 samples.
V1_S2_TOKENS = 2 * 2 * 2 * 3 * 2
GROUPS = {
    "v1": {"s2": 3, "s1": 1, "landsat": 2},
    "v1.1": {"s2": 1, "s1": 1, "landsat": 1},
    "v1.2": {"s2": 1, "s1": 1, "landsat": 1},
}
MIXES = [mix for mix in itertools.product([True, False], repeat=3) if any(mix)]


@pytest.fixture
def workload() -> Workload:
    return load_workload("olmoearth", Path())


def test_versions_and_sizes_match_the_package() -> None:
    supported = {
        "v1": package.V1_SUPPORTED_SIZES,
        "v1.1": package.V1_1_SUPPORTED_SIZES,
        "v1.2": package.V1_2_SUPPORTED_SIZES,
        "v1.3": package.V1_3_SUPPORTED_SIZES,
    }
    assert {version: set(sizes) for version, sizes in VERSION_SIZES.items()} == {
        version: set(sizes) for version, sizes in supported.items()
    }


@pytest.mark.parametrize(
    ("version", "size"),
    [
        (version, size)
        for version, sizes in VERSION_SIZES.items()
        for size in sizes
        if size in ("nano", "tiny")
    ],
)
def test_every_version_runs(workload: Workload, version: str, size: str) -> None:
    params = SMALL.replace(model_version=version, model_size=size)
    assert workload.impossible_reason(params) is None
    ready = ModelPool().get(workload, params).ready()
    channels = {"nano": 128, "tiny": 192}[size]
    groups = GROUPS[version]["s2"]
    assert ready.outputs == (((2, 2, 2, 2, groups, channels), torch.bfloat16),)
    assert ready.finite is True


@pytest.mark.parametrize("version", list(GROUPS))
@pytest.mark.parametrize(("s2", "s1", "landsat"), MIXES)
def test_supports_modality_mixes(
    workload: Workload, version: str, s2: bool, s1: bool, landsat: bool
) -> None:
    params = SMALL.replace(model_version=version, use_s2=s2, use_s1=s1, use_landsat=landsat)
    model = ModelPool().get(workload, params)
    used = {
        name: GROUPS[version][name]
        for name, on in (("s2", s2), ("s1", s1), ("landsat", landsat))
        if on
    }
    names = {"s2": "sentinel2_l2a", "s1": "sentinel1", "landsat": "landsat"}
    assert list(model.run()) == [names[name] for name in used]
    ready = model.ready()
    assert ready.finite is True
    assert {dtype for _, dtype in ready.outputs} == {torch.bfloat16}
    assert ready.tokens == 2 * 2 * 2 * 2 * sum(used.values())


def test_v1_has_three_tokens_for_each_later_one(workload: Workload) -> None:
    tokens = {
        version: ModelPool().get(workload, SMALL.replace(model_version=version)).ready().tokens
        for version in ("v1", "v1.1", "v1.2")
    }
    assert tokens == {"v1": V1_S2_TOKENS, "v1.1": V1_S2_TOKENS // 3, "v1.2": V1_S2_TOKENS // 3}


def test_bf16_is_close_to_fp32(workload: Workload) -> None:
    half = ModelPool().get(workload, SMALL)
    full = ModelPool().get(workload, SMALL.replace(bf16=False))
    assert half.eager.encoder.blocks[0].attn.q.weight.dtype == torch.bfloat16
    # The inputs depend on the dtype that they are drawn in (torch 2.11).
    inputs = (x.float() if x.is_floating_point() else x for x in half.fresh_inputs())
    reference = full.compiled(*inputs)["sentinel2_l2a"]
    assert reference.dtype == torch.float32
    error = (half.run()["sentinel2_l2a"].float() - reference).norm() / reference.norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize("version", list(GROUPS))
def test_quantizes_attention_and_mlp_only(workload: Workload, version: str) -> None:
    params = SMALL.replace(model_version=version, int8_enabled=True)
    model = ModelPool().get(workload, params)
    leaves = ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert [layer.name for layer in coverage(model.eager).converted] == [
        f"encoder.blocks.{block}.{leaf}" for block in range(4) for leaf in leaves
    ]
    assert model.ready().finite is True


def test_units_count_a_location_once(workload: Workload) -> None:
    params = RunParams(batch_size=128, image_size=64, num_timesteps=12)
    assert workload.units(params) == pytest.approx(
        {"samples": 128, "pixels": 128 * 64 * 64, "square_km": 128 * 0.64 * 0.64}
    )


def test_inputs_are_reproducible(workload: Workload) -> None:
    first, second = (workload.inputs(SMALL, CPU) for _ in range(2))
    assert len(first) == len(second) == 3
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_inputs_have_consecutive_months_and_no_masked_token(workload: Workload) -> None:
    params = SMALL.replace(num_timesteps=13, use_s1=True)
    timestamps, s2, s2_mask, s1, s1_mask = workload.inputs(params, CPU)
    assert timestamps.shape == (2, 13, 3)
    assert timestamps[0, :, 1].tolist() == [*range(12), 0]
    assert timestamps[1, :, 2].tolist() == [2020] * 12 + [2021]
    assert (s2.shape, s2.dtype) == ((2, 8, 8, 13, 12), torch.bfloat16)
    assert (s1.shape, s1.dtype) == ((2, 8, 8, 13, 2), torch.bfloat16)
    assert s2_mask.shape == (2, 8, 8, 13, 3)
    assert s1_mask.shape == (2, 8, 8, 13, 1)
    assert not s2_mask.any()
    assert not s1_mask.any()


def test_more_than_a_year_of_images_runs(workload: Workload) -> None:
    ready = ModelPool().get(workload, SMALL.replace(num_timesteps=13)).ready()
    assert ready.tokens == V1_S2_TOKENS // 2 * 13
    assert ready.finite is True


@pytest.mark.parametrize("patch_size", [1, 2, 8])
def test_every_patch_size_runs(workload: Workload, patch_size: int) -> None:
    params = SMALL.replace(patch_size=patch_size, model_version="v1.2", batch_size=1)
    ready = ModelPool().get(workload, params).ready()
    assert ready.tokens == (8 // patch_size) ** 2 * 2
    assert ready.finite is True


def test_weights_repeat_between_builds(workload: Workload) -> None:
    first, second = (build_eager(workload, SMALL, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_version": "v1", "model_size": "small"}, "OlmoEarth v1 has no size small"),
        ({"model_version": "v1.1", "model_size": "large"}, "OlmoEarth v1.1 has no size large"),
        ({"model_version": "v1.3", "model_size": "nano"}, "OlmoEarth v1.3 has no size nano"),
        ({"model_version": "v9"}, "OlmoEarth has no version v9; it has v1, v1.1, v1.2, v1.3"),
    ],
)
def test_missing_models_have_an_impossible_reason(
    workload: Workload, changes: dict[str, str], reason: str
) -> None:
    assert workload.impossible_reason(SMALL.replace(**changes)) == reason


@pytest.mark.slow
def test_encoder_compiles_to_one_graph(workload: Workload) -> None:
    model = ModelPool().get(workload, SMALL)
    compiled = compile_for_a100(model.eager, mode="default", fullgraph=True)
    reference = model.run()["sentinel2_l2a"].float()
    output = compiled(*model.inputs)["sentinel2_l2a"].float()
    assert (output - reference).norm() / reference.norm() < 0.02
    with compiled.no_compilation():
        compiled(*model.inputs)


# -- weights ----------------------------------------------------------------------------------

V12 = SMALL.replace(model_version="v1.2")


@pytest.fixture
def pretrained(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return a model as the package builds it, with weights unlike the seeded ones, and its
    configuration."""
    configs = []
    original = LatentMIMConfig.build

    def build(self: LatentMIMConfig) -> Any:
        configs.append(self)
        return original(self)

    with monkeypatch.context() as context:
        context.setattr(LatentMIMConfig, "build", build)
        model = package.OlmoEarthPretrain_v1(model_size="nano", model_version="v1.2").model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.125)
    return model, configs[0]


def save_as_on_the_hub(folder: Path, model: Any, config: Any) -> Path:
    masking = {"strategy_config": {"only_decode_modalities": []}}
    values = {"model": config.as_config_dict(), "train_module": {"masking_config": masking}}
    (folder / "config.json").write_text(json.dumps(values))
    torch.save(model.state_dict(), folder / "weights.pth")
    return folder


def assert_loaded(workload: Workload, weights: str) -> None:
    for params in (V12, V12.replace(int8_enabled=True)):
        eager = ModelPool(weights=weights).get(workload, params).eager
        assert bool((eager.encoder.blocks[0].attn.proj.bias == 0.125).all())
    random = ModelPool().get(workload, V12).eager
    assert bool((random.encoder.blocks[0].attn.proj.bias == 0).all())


@pytest.mark.parametrize("part", ["whole model", "encoder", "hub's folder"])
def test_weights_come_from_a_path(
    workload: Workload, tmp_path: Path, pretrained: tuple[Any, Any], part: str
) -> None:
    model, config = pretrained
    path = tmp_path / "w.pth"
    if part == "hub's folder":
        path = save_as_on_the_hub(tmp_path, model, config)
    else:
        torch.save((model if part == "whole model" else model.encoder).state_dict(), path)
    assert_loaded(workload, str(path))


def test_weights_come_from_the_hub(
    workload: Workload, tmp_path: Path, pretrained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_as_on_the_hub(tmp_path, *pretrained)
    asked = set()

    def download(repo_id: str, filename: str) -> str:
        asked.add((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr("olmoearth_pretrain_minimal.model_loader.hf_hub_download", download)
    assert_loaded(workload, "hub")
    repository = "allenai/OlmoEarth-v1_2-Nano"
    assert asked == {(repository, "config.json"), (repository, "weights.pth")}


@pytest.mark.parametrize(
    "name", ["evil.Config", "olmoearth_pretrain_evil.Config", "os.path.X", ".evil.X", 3, ["evil.X"]]
)
@pytest.mark.parametrize("place", ["model", "encoder_config", "list"])
def test_config_imports_no_other_package(
    tmp_path: Path,
    pretrained: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    name: Any,
    place: str,
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the config ran')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = save_as_on_the_hub(tmp_path, *pretrained)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    part = {"_CLASS_": name}
    if place == "list":
        values["model"]["extra"] = [[part]]
    elif place == "model":
        values["model"] |= part
    else:
        values["model"][place] |= part
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError) as caught:
        module.load(V12, str(folder))
    assert str(caught.value) == (
        f"config.json of {folder} must name classes of olmoearth_pretrain only, which are "
        f"imported and so run as code, got {name!r}"
    )


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": ' + "[" * 100_000])
def test_reports_damaged_config_in_one_line(
    tmp_path: Path, pretrained: tuple[Any, Any], text: str
) -> None:
    folder = save_as_on_the_hub(tmp_path, *pretrained)
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError) as caught:
        module.load(V12, str(folder))
    assert str(caught.value).startswith(f"weights {folder} of OlmoEarth v1.2 nano cannot be loaded")
    assert "\n" not in str(caught.value)


def test_rejects_weights_of_another_size(
    workload: Workload, tmp_path: Path, pretrained: tuple[Any, Any]
) -> None:
    folder = save_as_on_the_hub(tmp_path, *pretrained)
    tiny = V12.replace(model_size="tiny")
    for weights, message in {
        str(folder / "weights.pth"): "do not fit the model: keys ",
        str(folder): r"do not fit the model: [\d,]+ parameters for [\d,]+ of OlmoEarth v1.2 tiny",
    }.items():
        with pytest.raises(WeightsError, match=message) as caught:
            ModelPool(weights=weights).get(workload, tiny)
        assert "\n" not in str(caught.value)


def test_reports_unreachable_hub_in_one_line(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo_id: str, filename: str) -> str:
        raise OSError("no route to host\nand much advice")

    monkeypatch.setattr("olmoearth_pretrain_minimal.model_loader.hf_hub_download", download)
    with pytest.raises(WeightsError) as caught:
        ModelPool(weights="hub").get(workload, V12)
    assert str(caught.value) == (
        "weights hub of OlmoEarth v1.2 nano cannot be loaded: no route to host"
    )


# -- labelled accuracy ------------------------------------------------------------------------

METRICS = ["knn20 top1", "linear probe top1"]


@pytest.mark.parametrize("version", list(VERSION_SIZES))
def test_normalization_matches_the_package(version: str) -> None:
    name = {"v1": "NormalizerV1"}.get(version, f"NormalizerV1_{version[-1]}")
    pixels = np.random.default_rng(0).uniform(0, 10_000, (2, 3, 3, 2, 12)).astype(np.float32)
    expected = getattr(normalize, name)().normalize(Modality.SENTINEL2_L2A, pixels)
    ours = module.normalize(torch.from_numpy(pixels), version)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_scenes_have_the_band_order_of_the_package() -> None:
    assert list(scenes.BANDS) == Modality.SENTINEL2_L2A.band_order
    assert Modality.SENTINEL2_L2A.name == module._SENTINEL2


def test_embeddings_average_tokens_then_modalities() -> None:
    one, two = torch.zeros(2, 1, 1, 2, 3, 4), torch.ones(2, 5, 5, 2, 1, 4)
    one[1, 0, 0, 1, 2] = 6.0  # one token of six
    embeddings = module.mean_tokens({"one": one, "two": two})
    assert embeddings.tolist() == [[0.5] * 4, [1.0] * 4]


@pytest.mark.parametrize(("s2", "s1", "landsat"), MIXES)
def test_evaluates_only_points_with_sentinel2_alone(
    workload: Workload, s2: bool, s1: bool, landsat: bool
) -> None:
    params = SMALL.replace(use_s2=s2, use_s1=s1, use_landsat=landsat)
    found = workload.evaluation(params)
    batches = workload.calibration(params, CPU)
    if (s2, s1, landsat) == (True, False, False):
        assert [evaluation.metric for evaluation in found] == METRICS
        assert len(batches) == 4
    else:
        assert found is None
        [batch] = batches
        for mine, measured in zip(batch, workload.inputs(params, CPU), strict=True):
            assert torch.equal(mine, measured)


@pytest.mark.parametrize(("batch_size", "expected"), [(2, 2), (128, 32)])
def test_calibrates_on_train_scenes(workload: Workload, batch_size: int, expected: int) -> None:
    params = SMALL.replace(batch_size=batch_size, num_timesteps=3)
    batches = workload.calibration(params, CPU)
    assert len(batches) == 4
    for index, (timestamps, data, mask) in enumerate(batches):
        rows = range(index * expected, (index + 1) * expected)
        assert torch.equal(
            data, module.normalize(scenes.scene_batch(rows, "train", 8, 3), params.model_version)
        )
        assert timestamps.shape == (expected, 3, 3)
        assert timestamps[-1].tolist() == [[1, 2, 2020], [1, 6, 2020], [1, 10, 2020]]
        assert (mask.shape, mask.dtype) == ((expected, 8, 8, 3, 3), torch.uint8)
        assert not mask.any()


def test_scenes_have_the_layout_of_measured_inputs(workload: Workload) -> None:
    for mine, measured in zip(
        workload.calibration(SMALL, CPU)[0], workload.inputs(SMALL, CPU), strict=True
    ):
        assert mine.shape == measured.shape
        assert mine.is_contiguous()
        # Only floating-point inputs are cast.
        assert mine.dtype == measured.dtype or mine.is_floating_point()


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train": 110, "selection": 10, "certification": 60}
    monkeypatch.setattr(scenes, "SIZES", sizes)


@pytest.mark.usefixtures("few_scenes")
def test_random_encoder_separates_scenes(workload: Workload) -> None:
    params = SMALL.replace(bf16=False, batch_size=25, num_timesteps=1)
    model = build_eager(workload, params, CPU)

    @torch.inference_mode()
    def forward(timestamps: Any, data: Any, mask: Any) -> dict[str, torch.Tensor]:
        output: dict[str, torch.Tensor] = model(timestamps, data, mask)
        return output

    for evaluation in workload.evaluation(params):
        ids, scores = evaluation.scores(forward, evaluation.fit(forward))
        assert list(ids) == list(range(60))
        assert 0.6 < scores.mean() <= 1  # 0.1 by chance


def test_workloads_of_the_same_images_are_equal() -> None:
    pool, params = ModelPool(), SMALL.replace(int8_enabled=True)

    def keys(path: Path | None) -> Any:
        # Calibration identifies the candidate's workload.
        workload = olmoearth(path)
        return pool.key(workload, params), part_key(workload.evaluation)

    none, one, two = (keys(path) for path in (None, Path("a"), Path("b")))
    assert keys(None) == none
    assert keys(Path("a")) == one
    for index in (0, 1):
        assert len({none[index], one[index], two[index]}) == 3


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rasterio = pytest.importorskip("rasterio")
    rng = np.random.default_rng(0)
    for index, name in enumerate(["Forest", "River"]):
        (tmp_path / name).mkdir()
        for number in range(40):
            pixels = rng.normal(1000 + 1500 * index, 50, (13, 10, 10)).astype(np.uint16)
            pixels[12] = 4321  # B8A
            with (
                warnings.catch_warnings(action="ignore"),
                rasterio.open(
                    tmp_path / name / f"{number:02}.tif",
                    "w",
                    driver="GTiff",
                    height=10,
                    width=10,
                    count=13,
                    dtype="uint16",
                ) as file,
            ):
                file.write(pixels)
    return tmp_path


def test_folder_of_images_replaces_scenes(images: Path) -> None:
    workload = load_workload("olmoearth", Path(), eval_data=images)
    found = workload.evaluation(SMALL)
    assert [evaluation.metric for evaluation in found] == METRICS

    def forward(timestamps: Any, data: Any, mask: Any) -> dict[str, torch.Tensor]:
        assert data.shape[1:] == (8, 8, 2, 12)
        assert torch.equal(data[:, :, :, 0], data[:, :, :, 1])
        assert timestamps[0].tolist() == [[1, geotiff.MONTH, 2020]] * 2
        assert mask.shape == (*data.shape[:-1], 3)
        assert not mask.any()
        return {"sentinel2_l2a": data.unsqueeze(4)}

    for evaluation in found:
        ids, scores = evaluation.scores(forward, evaluation.fit(forward))
        assert len(ids) == len(set(ids)) == 44
        assert {name.split("/")[0] for name in ids} == {"Forest", "River"}
        assert scores.tolist() == [1.0] * 44


def test_calibrates_on_train_images_of_the_folder(images: Path) -> None:
    batches = olmoearth(images).calibration(SMALL, CPU)
    assert [len(data) for _, data, _ in batches] == [2] * 4
    raw = torch.full((1, 12), 4321.0)
    b8a = scenes.BANDS.index("B8A")
    expected = module.normalize(raw, SMALL.model_version)[0, b8a]
    for _, data, _ in batches:
        assert (data[..., b8a] == expected).all()


def test_rejects_images_smaller_than_the_point_in_one_line(images: Path) -> None:
    with pytest.raises(WorkloadError) as caught:
        olmoearth(images).evaluation(SMALL.replace(image_size=16))
    assert str(caught.value) == (
        f"images in {images} must be 16x16 or larger (image_size=16), got 10x10"
    )
