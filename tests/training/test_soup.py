"""soup: weights that are a mean of others', made without a step of training."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.decode import decode
from aliprod.catalogue.sources import read
from aliprod.data.augment import normalise, square
from aliprod.data.training_set import write_pseudo_labels
from aliprod.models import weights
from aliprod.models.classifier import Classifier, normalisation
from aliprod.recipe import Inputs, LearningRate, Machine, PseudoLabels, Soup, Stage, TrainingJob
from aliprod.store import commit
from aliprod.training import job
from aliprod.training.candidates import blended
from aliprod.training.learner import set_up
from aliprod.training.loop import train

NETWORK = "test_resnet.r160_in1k"
CONFIG = weights.Config(NETWORK, (0.5,) * 3, (0.25,) * 3, "bilinear", 40, 32)
STAGE = Stage(resize=40, crop=32, batch_size=8, soup=Soup(of=("a", "b")))
GREEDY = STAGE.model_copy(update={"soup": Soup(of=("a", "b"), greedy=True)})


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def drawn(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Classifier(NETWORK, 4).state_dict()


def ingredient(
    folder: Path, packages: Catalogue, tensors: dict[str, Tensor], error: float | None = None, unit: bool = False
) -> Path:
    config = replace(CONFIG, top1_error=error, unit_weights=unit)
    classes = weights.Classes(tuple(packages.classes.tolist()), packages.names)
    commit.write(folder, partial(weights.save, tensors=tensors, config=config, classes=classes))
    return folder


def made(stage: Stage, packages: Catalogue, ingredients: Sequence[Path]) -> tuple[dict[str, float], dict[str, Tensor]]:
    best, metrics = blended(set_up(stage, NETWORK, packages, Machine()), ingredients)
    return metrics, best.tensors


def parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the norm statistics."""
    names = [name for name, _ in Classifier(NETWORK, 4).named_parameters()]
    return {name: tensors[name] for name in names}


def test_each_weight_is_the_mean_of_the_ingredients_whatever_their_order(packages: Catalogue, tmp_path: Path) -> None:
    tensors = [drawn(seed) for seed in range(3)]
    folders = [ingredient(tmp_path / f"{n}", packages, own) for n, own in enumerate(tensors)]
    metrics, found = made(STAGE, packages, folders)
    for name, tensor in parameters(found).items():
        mean = torch.stack([own[name].double() for own in tensors]).mean(dim=0)
        torch.testing.assert_close(tensor, mean.float(), rtol=0, atol=0)
    assert metrics["soup/ingredients"] == 3
    _, other = made(STAGE, packages, folders[::-1])
    for name, tensor in found.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def test_norm_statistics_are_those_of_the_stages_images_not_of_the_ingredients(
    packages: Catalogue, tmp_path: Path
) -> None:
    tensors = drawn(0)
    spoilt = {name: tensor + 7 if "running" in name else tensor for name, tensor in tensors.items()}
    plain, other = (
        made(STAGE, packages, [ingredient(tmp_path / name, packages, own)] * 2)[1]
        for name, own in (("plain", tensors), ("spoilt", spoilt))
    )
    assert all(torch.equal(other[name], tensor) for name, tensor in plain.items())
    assert not torch.equal(plain["backbone.bn1.running_mean"], tensors["backbone.bn1.running_mean"])


def seen_by_the_stem(model: Classifier, pictures: Sequence[Path]) -> Tensor:
    """(C,) mean of what the first norm layer sees of pictures, each as the whole."""
    squares = torch.stack([square(decode(path), 32, CONFIG.interpolation) for path in pictures])
    mean, std, _ = normalisation(NETWORK)
    with torch.no_grad():
        stem: Tensor = model.backbone.conv1(normalise(squares, mean, std))
    return stem.mean(dim=(0, 2, 3))


def test_norm_statistics_are_of_the_images_that_the_stage_adds_and_of_none_that_it_drops(
    packages: Catalogue, tmp_path: Path
) -> None:
    shutil.copytree(packages.root, tmp_path / "packages")
    catalogue = read(tmp_path / "packages")
    shutil.copyfile(catalogue.train.path(3), catalogue.train.path(20))  # of another class
    kept_rows = np.delete(np.arange(32), [3, 20])
    commit.write(tmp_path / "kept", lambda new: np.save(new / "kept.npy", kept_rows))
    surest = catalogue.test.ids.take([5, 17, 30])
    write_pseudo_labels(tmp_path / "pseudo", surest, catalogue.classes[[0, 1, 3]], np.array([0.9, 0.9, 0.9]), {})
    stage = STAGE.model_copy(
        update={
            "resize": 32,
            "augmentation": ("resize",),
            "batch_size": 64,
            "precision": "float32",
            "duplicates": "drop",
            "pseudo_labels": PseudoLabels(by=("net/a",)),
        }
    )
    folders = tuple(ingredient(tmp_path / f"{seed}", catalogue, drawn(seed)) for seed in range(2))
    inputs = Inputs(soup=folders, pseudo_labels=tmp_path / "pseudo", kept=tmp_path / "kept")
    list(job.run(TrainingJob("net/soup", "0123", NETWORK, stage, tmp_path / "job", inputs), catalogue))
    model, _, _ = weights.load(tmp_path / "job" / "weights")
    kept = [catalogue.train.path(row) for row in range(32) if row not in (3, 20)]
    added = [catalogue.test.path(row) for row in (5, 17, 30)]
    expected = seen_by_the_stem(model, kept + added)
    torch.testing.assert_close(model.backbone.bn1.running_mean, expected, rtol=0, atol=1e-4)  # resizing rounds
    for mistaken in (kept, [*map(catalogue.train.path, range(32)), *added]):
        assert (seen_by_the_stem(model, mistaken) - expected).abs().max() > 1e-3


@pytest.fixture(scope="module")
def learnt(packages: Catalogue) -> tuple[dict[str, Tensor], float]:
    """Weights that tell the packages apart, better than by chance, and their error."""
    lr = LearningRate(backbone=0.02, heads=0.1)
    stage = Stage(resize=40, crop=32, batch_size=8, epochs=6, lr=lr, augmentation=("resize",))
    *_, last = train(stage, NETWORK, packages)
    assert last.state.best is not None
    assert last.state.best.top1_error is not None
    return last.state.best.tensors, last.state.best.top1_error


def test_a_greedy_soup_leaves_out_what_would_spoil_it(
    packages: Catalogue, tmp_path: Path, learnt: tuple[dict[str, Tensor], float]
) -> None:
    tensors, error = learnt
    negated = tensors | {"classifier.weight": -tensors["classifier.weight"]}  # the mean answers the first class always
    good = ingredient(tmp_path / "good", packages, tensors, error)
    bad = ingredient(tmp_path / "bad", packages, negated, 1 - error)
    alone, _ = made(GREEDY, packages, [good])
    assert alone["val/top1_error"] < 0.75
    metrics, found = made(GREEDY, packages, [bad, good])
    assert metrics == alone
    assert metrics["soup/ingredients"] == 1
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in parameters(found).items())
    whole, _ = made(STAGE, packages, [bad, good])
    assert whole["val/top1_error"] == 0.75  # of four classes


def test_a_greedy_soup_is_never_worse_than_its_best_ingredient_with_statistics_taken_anew(
    packages: Catalogue, tmp_path: Path, learnt: tuple[dict[str, Tensor], float]
) -> None:
    tensors, error = learnt
    folders = [ingredient(tmp_path / "best", packages, tensors, error)]
    for seed in range(3):
        other = {name: tensor.lerp(tensors[name], 0.7) if tensor.is_floating_point() else tensor
                 for name, tensor in drawn(seed).items()}  # fmt: skip
        folders.append(ingredient(tmp_path / f"{seed}", packages, other, error + 0.1 * (seed + 1)))
    alone, greedy = (made(GREEDY, packages, some)[0]["val/top1_error"] for some in (folders[:1], folders))
    assert greedy <= alone


def test_rows_of_unit_length_are_mixed_as_such(packages: Catalogue, tmp_path: Path) -> None:
    tensors = drawn(0)
    angular = ingredient(tmp_path / "angular", packages, tensors, unit=True)
    plain = ingredient(tmp_path / "plain", packages, drawn(1))
    weight = tensors["classifier.weight"].double()
    unit = weight / weight.square().sum(dim=1, keepdim=True).sqrt()
    _, found = made(STAGE, packages, [angular, plain])
    expected = (unit + drawn(1)["classifier.weight"].double()) / 2
    torch.testing.assert_close(found["classifier.weight"].double(), expected, rtol=0, atol=1e-7)


def test_a_soup_is_a_finished_job_of_no_steps(packages: Catalogue, tmp_path: Path) -> None:
    folders = tuple(ingredient(tmp_path / f"{seed}", packages, drawn(seed)) for seed in range(2))
    work = TrainingJob("net/soup", "0123", NETWORK, STAGE, tmp_path / "job", Inputs(soup=folders))
    (progress,) = job.run(work, packages)
    record = commit.read(tmp_path / "job" / "weights")
    assert record is not None
    assert (record["steps"], record["kind"]) == (0, "soup")
    assert record["top1_error"] == progress.metrics["val/top1_error"]
    model, config, _ = weights.load(tmp_path / "job" / "weights")
    assert (config.kind, config.job) == ("soup", "net/soup")
    assert progress.state.best is not None
    assert all(torch.equal(tensor, progress.state.best.tensors[name]) for name, tensor in model.state_dict().items())
    assert list(job.run(work, packages)) == []
