"""candidates: of all that an epoch can end with, the best on validation."""

import torch
from torch import Tensor, nn

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import Feed, TrainBatches
from aliprod.data.training_set import training_set
from aliprod.recipe import Stage
from aliprod.training import candidates
from aliprod.training.candidates import best_candidate
from aliprod.training.ema import Average
from aliprod.training.learner import Learner, Place, Setup

NETWORK = "test_resnet.r160_in1k"
CPU = torch.device("cpu")


def setup_with(stage: Stage, packages: Catalogue, objective: object) -> Setup:
    stage = Stage.model_validate(stage.model_dump() | {"objective": objective, "crop": 64, "resize": 64})
    feed = Feed(CPU, (0.5,) * 3, (0.5,) * 3, "bicubic")
    learner = Learner(stage, NETWORK, packages, Place(CPU))
    batches = TrainBatches(training_set(packages, stage), stage, feed, learner.needs.group)
    return Setup(learner, packages, feed, batches)


def test_an_objective_that_destroys_images_is_scored_with_statistics_of_whole_ones_too(
    packages: Catalogue, stage: Stage
) -> None:
    setup = setup_with(stage, packages, {"name": "dcl", "parts": 2})
    learner = setup.learner
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    best, errors = best_candidate(setup, Average(learner.model, 0.9), epoch=1)
    kinds = ("", "_raw_restated", "_averaged", "_averaged_restated")
    top1 = {f"val/top1_error{per}{kind}" for per in ("", "_per_image") for kind in kinds}
    assert set(errors) == top1 | {"val/top5_error", "val/loss"}
    assert best.top1_error == min(errors[f"val/top1_error{kind}"] for kind in kinds)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.model.state_dict().items())


def test_others_keep_the_statistics_that_they_were_trained_with(packages: Catalogue, stage: Stage) -> None:
    setup = setup_with(stage, packages, "cross_entropy")
    _, errors = best_candidate(setup, None, epoch=0)
    assert set(errors) == {"val/top1_error", "val/top1_error_per_image", "val/top5_error", "val/loss"}


def test_statistics_taken_anew_are_the_means_over_the_epochs_images(packages: Catalogue, stage: Stage) -> None:
    setup = setup_with(stage, packages, {"name": "dcl", "parts": 2})
    learner, batches = setup.learner, setup.batches
    first = next(module for module in learner.model.modules() if isinstance(module, nn.BatchNorm2d))
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean(dim=(0, 2, 3))))
    learner.train()
    with torch.no_grad():
        for batch in batches.epoch(2):
            learner.model.features(batch.images)
    hook.remove()
    candidates.restated(setup, epoch=2)
    torch.testing.assert_close(first.running_mean, torch.stack(seen).mean(dim=0))
