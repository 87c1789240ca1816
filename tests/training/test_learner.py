"""learner: what a rank's bytes hang on is set, and what it draws is drawn from the step's seed."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import TrainBatch
from aliprod.recipe import Machine, Stage
from aliprod.training.learner import Learner, Place, place

CPU = Place(torch.device("cpu"))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_place_sets_the_threads_it_says(threads: int) -> None:
    assert place(Machine(cpus_per_worker=threads)).environment()["threads"] == torch.get_num_threads() == threads


def test_a_place_asks_for_deterministic_kernels_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here = place(Machine())
    assert (here.rank, here.world_size) == (0, 1)
    assert torch.are_deterministic_algorithms_enabled()


def batch(seed: int) -> TrainBatch:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return TrainBatch(images, torch.arange(8) % 4, torch.arange(8), epoch=0, step=0, seed=seed)


def test_dropout_is_a_function_of_the_steps_seed(packages: Catalogue) -> None:
    learner = Learner(Stage(crop=32, drop_rate=0.5), "test_resnet", packages, CPU)
    losses = [learner(batch(seed))["cross_entropy"].item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_weights_begin_as_the_seed_says_whatever_was_drawn_before(packages: Catalogue) -> None:
    def first_weight(seed: int) -> torch.Tensor:
        torch.rand(int(torch.randint(100, ())))
        return Learner(Stage(crop=32, seed=seed), "test_resnet", packages, CPU).model.classifier.weight

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_heads_are_the_classifier_and_the_objectives_own(packages: Catalogue) -> None:
    learner = Learner(Stage(crop=64, resize=64, objective="lio"), "test_resnet", packages, CPU)
    heads = {id(p) for p in learner.head_parameters()}
    backbone = {id(p) for p in learner.model.backbone.parameters()}
    assert heads | backbone == {id(p) for p in learner.parameters()}
    assert not heads & backbone
    assert len(heads) > 1
    assert learner.needs.group == 4


def test_losses_are_float32_under_half_precision(packages: Catalogue) -> None:
    learner = Learner(Stage(crop=32, precision="bfloat16"), "test_resnet", packages, CPU)
    loss = learner(batch(0))["cross_entropy"]
    whole = Learner(Stage(crop=32, precision="float32"), "test_resnet", packages, CPU)(batch(0))["cross_entropy"]
    assert loss.dtype == torch.float32
    assert loss.item() != whole.item()
    assert loss.item() == pytest.approx(whole.item(), rel=0.05)
