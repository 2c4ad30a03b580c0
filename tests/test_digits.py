"""The workload that is trained on handwritten digits."""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn

from pytest_int8bench import RunParams, apply_int8_quant, is_transformer_linear
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.models import ModelPool
from pytest_int8bench.quantize import coverage

digits = pytest.importorskip("pytest_int8bench.workloads.digits", exc_type=ImportError)

CPU = torch.device("cpu")
POINT = RunParams(gpu_type="cpu", batch_size=4, compile_mode="off")
WORKLOAD = digits.digits()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that the one training of this session wrote, in whichever worker."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "digits"))
        digits.trained_weights.cache_clear()
        with FileLock(folder / "digits.lock"):
            digits.trained_weights()
        yield digits.cache_folder() / digits.cache_name()
    digits.trained_weights.cache_clear()


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of a process that has not built the model yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digits.trained_weights.cache_clear()
    yield tmp_path / "pytest-int8bench"
    monkeypatch.undo()
    digits.trained_weights.cache_clear()
    digits.trained_weights()  # read again, for the tests that follow


@pytest.fixture
def trainings(trained: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recipes that were trained from here on: at once, with the weights that are known."""
    weights = torch.load(trained, weights_only=True)
    calls: list[Any] = []

    def train(recipe: Any) -> dict[str, torch.Tensor]:
        calls.append(recipe)
        return {name: value.clone() for name, value in weights.items()}

    monkeypatch.setattr(digits, "_train", train)
    return calls


def forward_of(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([model(part.bfloat16()).float() for part in images.split(100)])

    return forward


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_splits_are_disjoint_and_cover_the_data() -> None:
    splits = digits.splits()
    assert {name: len(split.ids) for name, split in splits.items()} == {
        "train": 800,
        "selection": 200,
        "certification": 797,
    }
    together = np.concatenate([split.ids for split in splits.values()])
    assert sorted(together) == list(range(1797))


def test_splits_are_stratified() -> None:
    splits = digits.splits()
    whole = torch.cat([split.labels for split in splits.values()]).bincount(minlength=10) / 1797
    for split in splits.values():
        counts = split.labels.bincount(minlength=10)
        assert (counts - whole * len(split.ids)).abs().max() <= 1.5


def test_images_are_those_of_the_data() -> None:
    data = digits.load_digits()
    for split in digits.splits().values():
        assert split.images.shape == (len(split.ids), 1, 8, 8)
        assert torch.equal((split.images[:, 0] + 1) * 8, torch.tensor(data.images[split.ids]))
        assert torch.equal(split.labels, torch.tensor(data.target[split.ids]))
        assert torch.equal(split.images.bfloat16().float(), split.images)


def test_bf16_is_right_for_97_percent_of_the_certification_split(trained: Path) -> None:
    ids, scores = WORKLOAD.evaluation.scores(forward_of(WORKLOAD.build(POINT).bfloat16()))
    assert list(ids) == list(digits.splits()["certification"].ids)
    assert scores.shape == (797,)
    assert set(scores) <= {0.0, 1.0}
    assert scores.mean() >= 0.97


@pytest.mark.parametrize("smoothquant", [False, True])
def test_w8a8_loses_a_point_at_most(trained: Path, smoothquant: bool) -> None:
    baseline = WORKLOAD.build(POINT).bfloat16()
    batches = [(images.bfloat16(),) for (images,) in WORKLOAD.calibration(POINT, CPU)]
    candidate = apply_int8_quant(
        copy.deepcopy(baseline), mode="w8a8", smoothquant=smoothquant, calibration=batches
    )
    assert len(coverage(candidate).converted) == 16
    for scores in (WORKLOAD.evaluation.scores, WORKLOAD.evaluation.selection):
        ids, before = scores(forward_of(baseline))
        again, after = scores(forward_of(candidate))
        assert list(ids) == list(again)
        assert abs(after.mean() - before.mean()) <= 0.015


def test_selection_and_calibration_see_no_certification_image(trained: Path) -> None:
    seen = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.zeros(len(images), 10)

    ids, _ = WORKLOAD.evaluation.selection(forward)
    splits = digits.splits()
    assert list(ids) == list(splits["selection"].ids)
    assert torch.equal(seen[0], splits["selection"].images)
    calibration = torch.cat([images for (images,) in WORKLOAD.calibration(POINT, CPU)])
    assert torch.equal(calibration, splits["train"].images[:256])


def test_scores_say_which_images_are_right() -> None:
    labels = digits.splits()["certification"].labels

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.one_hot(labels, 10).float()
        logits[0] = logits[0].roll(1)
        logits[torch.nonzero(labels == 0)[0]] = torch.nan  # argmax would say 0
        return logits

    _, scores = WORKLOAD.evaluation.scores(forward)
    wrong = {0, int(torch.nonzero(labels == 0)[0])}
    assert set(np.flatnonzero(scores == 0)) == wrong


def test_the_default_filter_takes_attention_and_mlp() -> None:
    model = digits.VisionTransformer()
    chosen = {name for name, part in model.named_modules() if is_transformer_linear(part, name)}
    leaves = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert chosen == {f"blocks.{n}.{leaf}" for n in range(4) for leaf in leaves}
    for name in chosen:  # what CUDA's INT8 product takes
        linear: Any = model.get_submodule(name)
        assert linear.in_features % 8 == linear.out_features % 8 == 0


def test_the_model_is_one_graph() -> None:
    torch._dynamo.reset()
    model = digits.VisionTransformer().eval()
    images = digits.splits()["train"].images[:2]
    with torch.inference_mode():
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize("batch_size", [1, 4, 2000])
def test_inputs_repeat_the_training_images(batch_size: int) -> None:
    params = POINT.replace(batch_size=batch_size)
    (images,) = WORKLOAD.inputs(params, CPU)
    assert images.shape == (batch_size, 1, 8, 8)
    train = digits.splits()["train"].images
    assert torch.equal(images, train.repeat(3, 1, 1, 1)[:batch_size])
    assert dict(WORKLOAD.units(params)) == {"samples": batch_size, "tokens": 16 * batch_size}
    with torch.inference_mode():
        assert digits.VisionTransformer().eval()(images).shape == (batch_size, 10)


def test_build_returns_new_modules_with_the_same_weights(trained: Path) -> None:
    first, second = WORKLOAD.build(POINT), WORKLOAD.build(POINT)
    assert same(first.state_dict(), second.state_dict())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert same(second.state_dict(), WORKLOAD.build(POINT).state_dict())
    assert not same(first.state_dict(), second.state_dict())


def test_two_workloads_share_their_models() -> None:
    pool = ModelPool()
    assert pool.key(digits.digits(), POINT) == pool.key(digits.digits(), POINT)


def test_one_seed_gives_one_model() -> None:
    short = digits.Recipe(steps=3)
    weights = digits._train(short)
    assert same(weights, digits._train(short))
    assert not same(weights, digits._train(digits.Recipe(steps=3, seed=1)))
    assert not same(weights, digits._train(digits.Recipe(steps=4)))


def test_training_keeps_the_modes_of_the_caller_out() -> None:
    short = digits.Recipe(steps=2)
    expected = digits._train(short)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        weights = digits._train(short)
        assert torch.is_inference_mode_enabled()
    assert same(weights, expected)
    assert not any(value.is_inference() for value in weights.values())
    torch.set_default_dtype(torch.float64)
    try:
        assert same(digits._train(short), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_training_and_building_leave_global_state_alone(trained: Path) -> None:
    def state() -> tuple[Any, ...]:
        numpy = np.random.get_state()[1]
        return (torch.get_rng_state().tolist(), list(numpy), random.getstate())

    before = state()
    digits._train(digits.Recipe(steps=2))
    digits.splits.__wrapped__()
    WORKLOAD.build(POINT)
    assert state() == before


def test_training_gives_the_threads_back() -> None:
    torch.set_num_threads(2)
    try:
        digits._train(digits.Recipe(steps=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_augmented_images_keep_their_range() -> None:
    images = digits.splits()["train"].images[:50]
    moved = digits._augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert -1 - 1e-5 <= float(moved.min()) <= float(moved.max()) <= 1 + 1e-5
    assert not any(torch.equal(one, other) for one, other in zip(images, moved, strict=True))


def test_a_cached_file_is_not_trained_again(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    (folder / trained.name).write_bytes(trained.read_bytes())

    def train(recipe: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(digits, "_train", train)
    assert same(WORKLOAD.build(POINT).state_dict(), torch.load(trained, weights_only=True))


def test_the_first_build_is_cached(trained: Path, folder: Path, trainings: list[Any]) -> None:
    for _ in range(2):
        WORKLOAD.build(POINT)
    assert trainings == [digits.RECIPE]
    assert [path.name for path in folder.iterdir()] == [trained.name]
    assert same(
        torch.load(folder / trained.name, weights_only=True),
        torch.load(trained, weights_only=True),
    )


def spoil(kind: str, path: Path, good: Path) -> None:
    whole = good.read_bytes()
    weights = torch.load(good, weights_only=True)
    if kind == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("not weights")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "missing":
        torch.save({name: weights[name] for name in list(weights)[1:]}, path)
    elif kind == "shape":
        torch.save({name: value[:1] for name, value in weights.items()}, path)
    elif kind == "nan":
        torch.save({name: value * torch.nan for name, value in weights.items()}, path)
    elif kind == "code":
        torch.save({**weights, "more": Path("x")}, path)


@pytest.mark.parametrize(
    "kind", ["half", "text", "empty", "list", "missing", "shape", "nan", "code"]
)
def test_a_damaged_file_is_trained_anew_and_replaced(
    kind: str, trained: Path, folder: Path, trainings: list[Any]
) -> None:
    folder.mkdir()
    spoil(kind, folder / trained.name, trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = WORKLOAD.build(POINT)
    assert trainings == [digits.RECIPE]
    good = torch.load(trained, weights_only=True)
    assert same(model.state_dict(), good)
    assert same(torch.load(folder / trained.name, weights_only=True), good)


def test_a_folder_that_cannot_be_written_warns_once(folder: Path, trainings: list[Any]) -> None:
    folder.write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="cannot be kept, each process trains them") as caught:
        WORKLOAD.build(POINT)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WORKLOAD.build(POINT)
    assert len(trainings) == 1


def test_an_interrupted_write_leaves_nothing(
    folder: Path, trainings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        WORKLOAD.build(POINT)
    assert list(folder.iterdir()) == []


def test_a_model_that_learned_nothing_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained = digits._train(digits.Recipe(steps=0))
    monkeypatch.setattr(digits, "_train", lambda recipe: untrained)
    with pytest.raises(WorkloadError, match=r"reached \d+\.\d% top-1 on the selection split, must"):
        WORKLOAD.build(POINT)
    assert not folder.exists()


@pytest.mark.parametrize("value", [None, "", "relative"])
def test_the_cache_is_in_the_home_folder_by_default(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert digits.cache_folder() == tmp_path / ".cache" / "pytest-int8bench"


def test_the_cache_tells_recipes_and_versions_of_torch_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {digits.cache_name(), digits.cache_name(digits.Recipe(seed=1))}
    for version in ("9.8.7", "9.8.1+cu130", "9.9.0"):
        monkeypatch.setattr(torch, "__version__", version)
        names.add(digits.cache_name())
    assert len(names) == 4
