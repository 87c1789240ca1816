"""loop: training learns, begins where it is told to, and stops before a bad step."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.sources import read
from aliprod.data.loader import Feed, TrainBatches
from aliprod.data.training_set import training_set
from aliprod.errors import NonFiniteLoss, Refused
from aliprod.inference.metrics import mean_class_error
from aliprod.inference.predict import predict
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.recipe import Inputs, LearningRate, Machine, Stage
from aliprod.store import commit
from aliprod.training import learner, loop
from aliprod.training.loop import Progress, Step, steps, train
from aliprod.training.optimizer import lr_at

NETWORK = "test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def changed(stage: Stage, **settings: object) -> Stage:
    return Stage.model_validate(stage.model_dump() | settings)


def captured(progress: Progress, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    progress.snapshot()(folder)
    return load_file(folder / "learner.safetensors")


def test_32_photographs_are_learnt_by_heart(shared: Path) -> None:
    catalogue = read(shared / "data" / "tiny")
    rows = np.concatenate([np.flatnonzero(catalogue.train.labels == label)[:4] for label in range(8)])
    few = catalogue.train.take(rows)
    catalogue = Catalogue(
        catalogue.root, catalogue.classes, catalogue.names, few, few, few, None, None, ()
    )  # validated on what it is trained on
    lr = LearningRate(backbone=0.05, heads=0.1, schedule="cosine", warmup_epochs=2)
    stage = Stage(resize=64, crop=64, batch_size=16, epochs=20, lr=lr, augmentation=("resize",), precision="float32")
    errors = [progress.metrics["val/top1_error"] for progress in train(stage, "test_efficientnet", catalogue)]
    assert errors[0] > 0.5
    assert errors[-1] == 0.0


def test_the_same_bytes_come_out_twice_and_others_with_another_seed(
    packages: Catalogue, stage: Stage, tmp_path: Path
) -> None:
    stage = changed(stage, epochs=1)
    one, two, other = (
        captured(next(train(s, NETWORK, packages)), tmp_path / name)
        for name, s in (("one", stage), ("two", stage), ("other", changed(stage, seed=1)))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_is_due_every_so_many_steps_and_at_the_ends_of_epochs(packages: Catalogue, stage: Stage) -> None:
    due = [
        (progress.state.step, progress.last is not None)
        for progress in train(stage, NETWORK, packages, machine=Machine(save_every_steps=2))
    ]
    assert due == [(2, False), (4, True), (6, False), (8, True), (10, False), (12, True)]


def test_each_step_is_yielded_and_the_last_of_an_epoch_says_so(packages: Catalogue, stage: Stage) -> None:
    events = steps(learner.set_up(stage, NETWORK, packages, Machine(save_every_steps=4)))
    seen = [event.last if isinstance(event, Step) else "epoch" for event in events]
    assert seen == [False, False, False, True, "epoch"] * 3


def test_a_mid_epochs_line_is_the_mean_of_the_steps_so_far(packages: Catalogue, stage: Stage) -> None:
    one_by_one = [
        p.metrics["train/loss_cross_entropy"]
        for p in islice(train(stage, NETWORK, packages, machine=Machine(save_every_steps=1)), 4)
    ]
    every_two = [
        p.metrics["train/loss_cross_entropy"]
        for p in islice(train(stage, NETWORK, packages, machine=Machine(save_every_steps=2)), 2)
    ]
    assert every_two == [one_by_one[1], one_by_one[3]]
    assert len(set(one_by_one)) == 4


@pytest.fixture(scope="module")
def parent(packages: Catalogue, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (progress,) = train(changed(stage, epochs=1), NETWORK, packages)
    assert progress.last is not None
    return kept(tmp_path_factory.mktemp("parent") / "weights", packages, progress.last.tensors)


def kept(folder: Path, packages: Catalogue, tensors: dict[str, torch.Tensor]) -> Path:
    config = weights.Config(NETWORK, (0.5,) * 3, (0.5,) * 3, "bicubic", 40, 32)
    classes = weights.Classes(tuple(packages.classes.tolist()), packages.names)
    commit.write(folder, partial(weights.save, tensors=tensors, config=config, classes=classes))
    return folder


def test_a_child_begins_with_its_parents_backbone_and_head(
    packages: Catalogue, stage: Stage, parent: Path, tmp_path: Path
) -> None:
    still = changed(stage, lr={"backbone": 1e-12, "heads": 1e-12}, seed=9, ema=None)
    child = captured(next(train(still, NETWORK, packages, Inputs(start=parent))), tmp_path / "child")
    for name, tensor in load_file(parent / "model.safetensors").items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(child[f"model.{name}"], tensor, rtol=0, atol=1e-9)


def test_a_parent_of_another_catalogue_is_refused(packages: Catalogue, stage: Stage, parent: Path) -> None:
    other = replace(packages, classes=packages.classes + 1)
    with pytest.raises(Refused, match="another class list"):
        next(train(stage, NETWORK, other, Inputs(start=parent)))


def parameters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "running" not in name and "num_batches" not in name}


@pytest.fixture(scope="module")
def undisturbed(
    packages: Catalogue, stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, torch.Tensor]]:
    """The network after each step where no loss is bad."""
    good, folder = changed(stage, objective={"name": "own.spoilt", "step": -1}), tmp_path_factory.mktemp("undisturbed")
    every = train(good, NETWORK, packages, machine=Machine(save_every_steps=1))
    return {progress.state.step: captured(progress, folder / f"{progress.state.step}") for progress in every}


@pytest.mark.parametrize("check_steps", [loop._CHECK_STEPS, 2])
@pytest.mark.parametrize("step", [4, 6, 11])
def test_a_bad_loss_stops_the_job_with_its_weights_as_before_to_the_bit(
    packages: Catalogue,
    stage: Stage,
    undisturbed: dict[int, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    check_steps: int,
) -> None:
    monkeypatch.setattr(loop, "_CHECK_STEPS", check_steps)
    bad, before = changed(stage, objective={"name": "own.spoilt", "step": step}), undisturbed[step]
    seen: list[Progress] = []
    with pytest.raises(NonFiniteLoss):
        seen.extend(train(bad, NETWORK, packages))  # it goes on for some steps, without effect
    after = captured(seen[-1], tmp_path / "after")  # its network is still the one that was trained
    assert before.keys() == after.keys()
    for name, tensor in parameters(after).items():
        assert torch.equal(tensor, before[name]), name


def test_a_bad_loss_is_noticed_at_the_next_check(
    packages: Catalogue, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_CHECK_STEPS", 2)
    bad = changed(stage, batch_size=4, objective={"name": "own.spoilt", "step": 10})  # of steps 8 to 15 of epoch 1
    seen: list[Step | Progress] = []
    with pytest.raises(NonFiniteLoss):
        seen.extend(steps(learner.set_up(bad, NETWORK, packages, Machine())))
    assert sum(isinstance(event, Step) for event in seen) == 11  # the twelfth checks


@pytest.mark.parametrize("check_steps", [loop._CHECK_STEPS, 3])
@pytest.mark.parametrize("step", [0, 5, 11])
def test_a_bad_loss_is_laid_at_the_door_of_its_step_and_images(
    packages: Catalogue, stage: Stage, monkeypatch: pytest.MonkeyPatch, step: int, check_steps: int
) -> None:
    monkeypatch.setattr(loop, "_CHECK_STEPS", check_steps)
    feed = Feed(torch.device("cpu"), (0.5,) * 3, (0.5,) * 3, "bicubic")
    batches = TrainBatches(training_set(packages, stage), stage, feed)
    batch = next(batches.epoch(step // 4, skip=step % 4))
    rate = lr_at(step, stage.lr.backbone, 4, 1, [], 0.1)
    with pytest.raises(NonFiniteLoss) as raised:
        list(train(changed(stage, objective={"name": "own.spoilt", "step": step}), NETWORK, packages))
    assert f"not finite in epoch {step // 4 + 1}, step {step} (class nan; lr {rate:g})" in raised.value.what
    assert f"Images: {', '.join(batches.ids(batch.rows))}\n" in raised.value.advice


def test_averaged_weights_are_scored_beside_the_raw_ones_and_the_better_are_kept(
    packages: Catalogue, stage: Stage
) -> None:
    for progress in train(stage, NETWORK, packages):
        assert progress.last is not None
        raw, averaged = progress.metrics["val/top1_error"], progress.metrics["val/top1_error_averaged"]
        assert progress.last.top1_error == min(raw, averaged)
        assert progress.last.kind == ("averaged" if averaged <= raw else "raw")


def test_the_best_epochs_weights_are_kept_to_the_end(packages: Catalogue, stage: Stage) -> None:
    errors, of_last = [], []
    for progress in train(changed(stage, epochs=5), NETWORK, packages):
        assert progress.last is not None
        assert progress.state.best is not None
        errors.append(progress.last.top1_error)
        of_last.append({name: tensor.clone() for name, tensor in progress.last.tensors.items()})
    best = errors.index(min(errors))  # the first of equals
    assert progress.state.best.epoch == best
    assert progress.state.best.top1_error == errors[best]
    for name, tensor in progress.state.best.tensors.items():
        assert torch.equal(tensor, of_last[best][name])


def test_without_validation_images_the_last_epoch_is_the_best(packages: Catalogue, stage: Stage) -> None:
    bare = replace(packages, val=packages.val.take(np.arange(0)))
    bests = [progress.state.best for progress in train(stage, NETWORK, bare)]
    assert [best.epoch for best in bests if best is not None] == [0, 1, 2]
    assert bests[-1] is not None
    assert bests[-1].top1_error is None


def test_the_validation_error_is_the_metric_of_the_centre_crops(packages: Catalogue, stage: Stage) -> None:
    setup = learner.set_up(stage, NETWORK, packages, Machine())
    model, feed, errors = setup.learner.model, setup.feed, setup.top1_errors()
    assert model.training
    model.eval()
    batches = list(predict(model, packages.val, 40, 32, "center", feed))
    rows = torch.cat([probabilities for _, probabilities in batches])
    predicted = rows.argmax(dim=1)
    labels = torch.from_numpy(packages.val.labels)
    assert errors["val/top1_error"] == mean_class_error(labels, predicted, 4)
    assert errors["val/top1_error_per_image"] == (labels != predicted).double().mean()
    assert errors["val/loss"] == pytest.approx(float(torch.nn.functional.nll_loss(rows.log(), labels)), rel=1e-5)
    assert errors["val/top5_error"] == 0, "of four classes"


def test_the_top_5_error_is_a_mean_over_classes_of_labels_that_five_others_surpass(
    packages: Catalogue, stage: Stage
) -> None:
    seven = replace(packages, classes=np.arange(7), val=replace(packages.val, labels=np.arange(len(packages.val)) % 7))
    setup = learner.set_up(stage, NETWORK, seven, Machine())
    model, feed, error = setup.learner.model, setup.feed, setup.top1_errors()["val/top5_error"]
    model.eval()
    rows = torch.cat([probabilities for _, probabilities in predict(model, seven.val, 40, 32, "center", feed)])
    missed = (rows.topk(5).indices != torch.from_numpy(seven.val.labels)[:, None]).all(dim=1).double()
    assert error == pytest.approx(np.mean([float(missed[seven.val.labels == label].mean()) for label in range(7)]))
    assert 0 < error < 1


# The classifier alone (cRT)


def untrained(folder: Path, packages: Catalogue, seed: int) -> Path:
    """Weights of a network that has seen nothing, norm statistics of its own."""
    torch.manual_seed(seed)
    model = Classifier(NETWORK, packages.num_classes)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5).sub_(1.0 if "mean" in name else 0.0)
    return kept(folder, packages, model.state_dict())


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_stage_that_trains_the_classifier_alone_moves_no_bit_of_the_backbone(
    packages: Catalogue, stage: Stage, tmp_path: Path, ema: float | None
) -> None:
    start = untrained(tmp_path / "parent", packages, 0)
    before = weights.read(start)
    alone = changed(stage, start="full", trains="classifier", sampler="class_balanced", ema=ema, drop_path_rate=0.1)
    for progress in train(alone, NETWORK, packages, Inputs(start=start)):
        assert progress.last is not None
        after = progress.last.tensors
        moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert moved == {"classifier.weight"}


def test_a_stage_that_trains_the_norms_goes_on_with_the_classifier_it_is_given(
    packages: Catalogue, stage: Stage, tmp_path: Path
) -> None:
    start = untrained(tmp_path / "parent", packages, 0)
    before = weights.read(start)
    still = changed(stage, start="full", trains="norms", ema=None, epochs=1, lr={"backbone": 1e-30, "heads": 1e-30})
    *_, last = train(still, NETWORK, packages, Inputs(start=start))
    assert torch.equal(last.last.tensors["classifier.weight"], before["classifier.weight"])
    *_, last = train(changed(stage, start="full", trains="norms", ema=None), NETWORK, packages, Inputs(start=start))
    moved = {name for name, tensor in last.last.tensors.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, tensor in before.items() if tensor.ndim != 4}  # all but the convolutions


def test_frozen_norm_statistics_stay_those_of_the_start_to_the_bit(
    packages: Catalogue, stage: Stage, tmp_path: Path
) -> None:
    start = untrained(tmp_path / "parent", packages, 0)
    before = weights.read(start)
    frozen = changed(stage, start="full", norm_statistics="frozen", shares="ranks")
    for progress in train(frozen, NETWORK, packages, Inputs(start=start)):
        after = progress.last.tensors
        moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert not {name for name in moved if "running_" in name or "num_batches" in name}
        assert {name for name, tensor in before.items() if tensor.ndim == 4} < moved  # all convolutions


def test_a_stage_with_frozen_norm_statistics_sees_what_inference_sees(
    packages: Catalogue, stage: Stage, tmp_path: Path
) -> None:
    start = untrained(tmp_path / "parent", packages, 0)
    alone = changed(stage, start="full", norm_statistics="frozen", ema=None, drop_path_rate=0.0)
    setup = learner.set_up(alone, NETWORK, packages, Machine())
    setup.learner.model.load_state_dict(weights.read(start))
    setup.top1_errors()  # which sets the mode, and sets it back
    images = torch.randn(4, 3, 32, 32)
    trained = setup.learner.model(images)
    setup.learner.model.eval()
    assert torch.equal(trained, setup.learner.model(images))


def test_a_stage_is_scored_and_predicts_at_its_own_size_of_tests(packages: Catalogue, stage: Stage) -> None:
    stage = changed(stage, epochs=1, test_crop=48, ema=None)
    assert stage.test_view == (60, 48)
    setup = learner.set_up(stage, NETWORK, packages, Machine())
    *_, last = steps(setup)
    expected = setup.top1_errors()
    setup.learner.model.load_state_dict(last.last.tensors)
    labels, feed = torch.from_numpy(packages.val.labels), setup.feed
    setup.learner.model.eval()
    found = torch.cat([block for _, block in predict(setup.learner.model, packages.val, 60, 48, "center", feed)])
    error = mean_class_error(labels, found.argmax(dim=1), packages.num_classes)
    assert expected["val/top1_error"] == pytest.approx(float(error))


def test_the_classifier_alone_is_drawn_anew_whatever_the_parents_is(
    packages: Catalogue, stage: Stage, tmp_path: Path
) -> None:
    still = {"backbone": 1e-30, "heads": 1e-30}  # too little to move a weight
    alone = changed(stage, start="full", trains="classifier", epochs=1, ema=None, lr=still)

    def classifier(parent: int, **settings: object) -> torch.Tensor:
        start = tmp_path / f"{parent}"
        if not start.exists():
            untrained(start, packages, parent)
        *_, last = train(changed(alone, **settings), NETWORK, packages, Inputs(start=start))
        assert last.last is not None
        found = last.last.tensors["classifier.weight"]
        assert not torch.equal(found, weights.read(start)["classifier.weight"])
        return found

    drawn = classifier(0)
    assert torch.equal(drawn, classifier(1))
    assert not torch.equal(drawn, classifier(0, seed=1))
    assert drawn.std().item() == pytest.approx(0.01, rel=0.1)  # of a new classifier's


def test_an_objective_is_told_the_counts_of_what_it_trains_on(packages: Catalogue, stage: Stage) -> None:
    """Of a balanced view all classes have as many images: logit adjustment then is cross entropy."""
    balanced = changed(stage, images={"per_class": 2}, epochs=1)
    losses = [
        next(iter(train(changed(balanced, objective={"name": name}), NETWORK, packages))).metrics["train/loss"]
        for name in ("cross_entropy", "logit_adjustment")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
