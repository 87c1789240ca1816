"""loader: what a step sees is a function of the plan, not of processes, ranks or restarts."""

import gc
import json
import logging
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.decode import decode
from aliprod.catalogue.sources import read
from aliprod.data import selection
from aliprod.data.augment import normalise, on_device, picture_of, square, train_view
from aliprod.data.loader import Feed, TrainBatch, TrainBatches, squared_batches
from aliprod.data.training_set import Features, TrainingSet, training_set, write_soft_labels
from aliprod.errors import Refused
from aliprod.randomness import seed_of
from aliprod.recipe import Inputs, PerClass, Stage
from aliprod.store.resumable import ResumableRows

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEED = Feed(torch.device("cpu"), MEAN, STD, "bicubic")
STAGE = Stage(
    resize=40, crop=32, batch_size=8, augmentation=("random_resized_crop", "flip", "auto_augment", "cutout"), seed=5
)


def batches(catalogue: Catalogue, group: int = 1, stage: Stage = STAGE, feed: Feed = FEED) -> TrainBatches:
    return TrainBatches(training_set(catalogue, stage), stage, feed, group)


def assert_equal(one: list[TrainBatch], other: list[TrainBatch]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert_same(a, b)


def assert_same(a: TrainBatch, b: TrainBatch) -> None:
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.rows, b.rows)
    assert (a.epoch, a.step, a.seed) == (b.epoch, b.step, b.seed)
    for mine, others in ((a.weights, b.weights), (a.teacher, b.teacher)):
        assert (mine is None) == (others is None)
        assert mine is None or torch.equal(mine, others)
    assert (a.second is None) == (b.second is None)
    if a.second is not None:
        assert_same(a.second, b.second)


def test_progressive_sizes_grow_with_the_epochs(packages: Catalogue) -> None:
    stage = STAGE.model_copy(update={"crops": (16, 24, 32), "epochs": 7})
    sides = [next(batches(packages, stage=stage).epoch(epoch)).images.shape[-1] for epoch in range(7)]
    assert sides == [16, 16, 16, 24, 24, 32, 32]
    assert [stage.at(epoch).resize for epoch in (0, 3, 6)] == [20, 30, 40]


def test_a_batch_holds_the_views_that_seed_epoch_and_image_id_name(packages: Catalogue) -> None:
    loader = batches(packages)
    for batch in loader.epoch(3):
        for image, label, row in zip(batch.images, batch.labels, batch.rows.tolist(), strict=True):
            image_id = packages.train.ids[row].as_py()
            seed = seed_of(STAGE.seed, 3, image_id, 0)
            pixels, erased = train_view(picture_of(packages.train.path(row)), STAGE, seed, "bicubic")
            assert torch.equal(image, on_device(pixels[None], erased[None], MEAN, STD)[0])
            assert label == packages.train.labels[row]


@pytest.mark.parametrize("processes", [1, 2])
def test_loader_processes_change_nothing_in_two_epochs(packages: Catalogue, processes: int) -> None:
    alone, helped = batches(packages), batches(packages, feed=replace(FEED, processes=processes))
    for epoch in (0, 1):
        assert_equal(list(alone.epoch(epoch)), list(helped.epoch(epoch)))


def test_an_epoch_that_is_left_in_its_middle_keeps_no_loader_process(packages: Catalogue) -> None:
    gc.disable()  # at its end Python waits five seconds for each process of a loader that only the collector could free
    try:
        left = batches(packages, feed=replace(FEED, processes=1))
        loader, epoch = weakref.ref(left._loader), left.epoch(0)
        next(epoch)
        del left, epoch
        assert loader() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("skip", [1, 3])
def test_an_epoch_is_the_same_from_its_middle_on(packages: Catalogue, skip: int) -> None:
    assert_equal(list(batches(packages).epoch(2))[skip:], list(batches(packages).epoch(2, skip=skip)))


def test_an_epoch_shows_every_image_once_and_each_epoch_in_another_view(packages: Catalogue) -> None:
    loader = batches(packages)
    epochs = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(torch.cat([batch.rows for batch in epoch]).tolist()) == list(range(32))
    orders = [torch.cat([batch.rows for batch in epoch]) for epoch in epochs]
    assert not torch.equal(*orders)
    views = [
        torch.cat([batch.images for batch in epoch])[order.argsort()]
        for epoch, order in zip(epochs, orders, strict=True)
    ]
    assert not any(torch.equal(first, second) for first, second in zip(*views, strict=True))
    assert [batch.step for batch in epochs[1]] == [4, 5, 6, 7]


def in_shares(shares: int | str) -> Stage:
    return Stage.model_validate(STAGE.model_dump() | {"shares": shares})


@pytest.mark.parametrize("group", [1, 4])
def test_the_shares_of_a_step_together_are_the_step(packages: Catalogue, group: int) -> None:
    whole = list(batches(packages, group).epoch(1))
    shares = list(batches(packages, group, in_shares(2)).epoch(1))
    for batch, *parts in zip(whole, shares[0::2], shares[1::2], strict=True):
        assert {len(part.rows) for part in parts} == {len(batch.rows) // 2}
        seen = {image.numpy().tobytes() for image in batch.images}
        assert {image.numpy().tobytes() for part in parts for image in part.images} == seen
        assert Counter(torch.cat([part.rows for part in parts]).tolist()) == Counter(batch.rows.tolist())
        assert len({part.seed for part in parts}) == 2  # shares draw apart


def test_the_ranks_have_the_shares_of_cached_features_that_one_has(packages: Catalogue) -> None:
    """Rows stand where their pictures would, from any step on; their features are what is shown."""
    stage = STAGE.model_copy(update={"shares": 2})
    data = training_set(packages, stage)
    pooled = np.arange(3 * len(data.images), dtype=np.float16).reshape(-1, 3)
    cached = replace(data, features=Features((pooled,), np.arange(len(pooled))))
    pictures, alone = (list(TrainBatches(one, stage, FEED).epoch(1, skip=2)) for one in (data, cached))
    ranks = [TrainBatches(cached, stage, replace(FEED, rank=rank, world_size=2)).epoch(1, skip=2) for rank in (0, 1)]
    dealt = [share for step in zip(*ranks, strict=True) for share in step]
    for seen, one, other in zip(pictures, alone, dealt, strict=True):
        assert torch.equal(seen.rows, one.rows)
        assert torch.equal(one.rows, other.rows)
        assert (seen.seed, seen.step) == (one.seed, one.step) == (other.seed, other.step)
        assert torch.equal(one.labels, seen.labels)
        expected = torch.from_numpy(pooled[one.rows]).float()
        assert torch.equal(one.images, expected)
        assert torch.equal(other.images, expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_have_the_shares_of_a_step_in_order(packages: Catalogue, ranks: int) -> None:
    stage = in_shares(4)
    feeds = [replace(FEED, rank=rank, world_size=ranks) for rank in range(ranks)]
    dealt = [list(batches(packages, 1, stage, feed).epoch(1, skip=1)) for feed in feeds]
    each = 4 // ranks
    together = [share for step in range(3) for mine in dealt for share in mine[step * each : (step + 1) * each]]
    assert_equal(together, list(batches(packages, 1, stage).epoch(1, skip=1)))
    assert [share.step for share in together] == [5] * 4 + [6] * 4 + [7] * 4
    one = [list(batches(packages, 1, stage, feed).epoch(1, shares=(2,))) for feed in feeds]
    for mine in one:
        assert_equal(mine, list(batches(packages, 1, stage).epoch(1))[2::4])


def test_groups_of_one_class_stand_together_in_every_share(packages: Catalogue) -> None:
    for batch in batches(packages, 4, in_shares(2)).epoch(0):
        assert batch.labels.shape == (4,)
        assert len(set(batch.labels.tolist())) == 1


def test_an_image_that_is_repeated_in_an_epoch_is_seen_otherwise(packages: Catalogue) -> None:
    few = Stage.model_validate(STAGE.model_dump() | {"images": PerClass(per_class=2)})
    loader = batches(packages, 4, few)
    for batch in loader.epoch(0):
        assert max(Counter(batch.rows.tolist()).values()) == 2  # groups of 4 of classes of 2
        assert len({image.numpy().tobytes() for image in batch.images}) == len(batch.images)


def test_a_balanced_stage_names_its_images_by_their_own_ids(packages: Catalogue) -> None:
    few = Stage.model_validate(STAGE.model_dump() | {"images": PerClass(per_class=2)})
    loader = batches(packages, stage=few)
    (batch,) = loader.epoch(0)
    label_of = dict(zip(packages.train.ids.to_pylist(), packages.train.labels.tolist(), strict=True))
    assert [label_of[image_id] for image_id in loader.ids(batch.rows)] == batch.labels.tolist()
    assert Counter(batch.labels.tolist()) == dict.fromkeys(range(4), 2)


def test_images_that_make_no_whole_batch_are_one_batch_of_equal_parts(packages: Catalogue) -> None:
    large = Stage.model_validate(STAGE.model_dump() | {"batch_size": 66, "shares": "ranks"})
    loaders = [batches(packages, stage=large, feed=replace(FEED, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(batch.rows) for loader in loaders for batch in loader.epoch(0)] == [10, 10, 10]


@pytest.mark.parametrize(("batch_size", "group", "world_size"), [(8, 4, 4), (3, 4, 1), (8, 1, 3)])
def test_a_batch_that_cannot_be_dealt_in_whole_groups_is_refused(
    packages: Catalogue, batch_size: int, group: int, world_size: int
) -> None:
    stage = Stage.model_validate(STAGE.model_dump() | {"batch_size": batch_size, "shares": "ranks"})
    with pytest.raises(Refused, match=f"batch_size = {batch_size} cannot be dealt"):
        batches(packages, group, stage, replace(FEED, world_size=world_size))


def test_fewer_images_than_shares_are_refused(packages: Catalogue) -> None:
    stage = Stage.model_validate(STAGE.model_dump() | {"batch_size": 64, "shares": 64})
    with pytest.raises(Refused, match="32 training images are too few for 64 shares"):
        batches(packages, stage=stage)


def test_shares_that_cannot_be_dealt_to_the_ranks_are_refused(packages: Catalogue) -> None:
    with pytest.raises(Refused, match="2 shares of a step cannot be dealt to 4 ranks"):
        batches(packages, stage=in_shares(2), feed=replace(FEED, world_size=4))


@pytest.fixture
def copied(packages: Catalogue, tmp_path: Path) -> Catalogue:
    """A catalogue whose files may be broken."""
    shutil.copytree(packages.root, tmp_path / "packages")
    return read(tmp_path / "packages")


def test_an_unreadable_training_picture_is_replaced_by_one_of_its_class(
    copied: Catalogue, caplog: pytest.LogCaptureFixture
) -> None:
    broken = 5
    copied.train.path(broken).write_bytes(b"no picture")
    stage = Stage.model_validate(STAGE.model_dump() | {"augmentation": ("resize",)})
    seen = {row: image for batch in batches(copied, stage=stage).epoch(0) for row, image in _rows(batch)}
    same_class = np.flatnonzero(copied.train.labels == copied.train.labels[broken])
    others = [seen[row] for row in same_class.tolist() if row != broken]
    assert any(torch.equal(seen[broken], other) for other in others)
    assert len(seen) == 32
    assert f"{copied.train.path(broken)} is no JPEG" in caplog.text


def _rows(batch: TrainBatch) -> list[tuple[int, torch.Tensor]]:
    return list(zip(batch.rows.tolist(), batch.images, strict=True))


def test_a_class_without_a_readable_picture_is_grey(copied: Catalogue, caplog: pytest.LogCaptureFixture) -> None:
    for row in np.flatnonzero(copied.train.labels == 2).tolist():
        copied.train.path(row).unlink()
    stage = Stage.model_validate(STAGE.model_dump() | {"augmentation": ("resize",)})
    grey = normalise(torch.full((3, 32, 32), 128, dtype=torch.uint8), MEAN, STD)
    for batch in batches(copied, stage=stage).epoch(0):
        for image, label in zip(batch.images, batch.labels, strict=True):
            assert torch.equal(image, grey) == (int(label) == 2)
    assert "is not there" in caplog.text


@pytest.mark.parametrize(("world_size", "processes"), [(1, 0), (1, 2), (3, 0), (50, 0)])
def test_every_row_of_a_split_is_squared_once_in_order_over_all_ranks(
    packages: Catalogue, world_size: int, processes: int
) -> None:
    found: dict[int, torch.Tensor] = {}
    for rank in range(world_size):
        feed = replace(FEED, rank=rank, world_size=world_size, processes=processes)
        rows_of_rank: list[int] = []
        for rows, pixels in squared_batches(packages.test, 24, feed, 7):
            assert len(rows) <= 7
            rows_of_rank += rows.tolist()
            found |= dict(zip(rows.tolist(), pixels, strict=True))
        assert rows_of_rank == [row for row in range(40) if row // 7 % world_size == rank]
    assert sorted(found) == list(range(40))
    for row, pixels in found.items():
        assert torch.equal(pixels, square(decode(packages.test.path(row)), 24, "bicubic"))


def test_of_a_broken_test_picture_what_is_there_is_shown_and_its_row_stays(
    copied: Catalogue, caplog: pytest.LogCaptureFixture
) -> None:
    half, gone, outside = (copied.test.path(row) for row in (3, 10, 20))
    before = square(decode(half), 24, "bicubic")
    content = half.read_bytes()
    half.write_bytes(content[: len(content) // 2])
    gone.unlink()
    outside.unlink()
    outside.symlink_to("/etc/hostname")
    squares = {
        row: p
        for rows, pixels in squared_batches(copied.test, 24, FEED, 16)
        for row, p in zip(rows, pixels, strict=True)
    }
    assert len(squares) == 40
    assert torch.equal(squares[3][:, :5], before[:, :5])
    assert torch.equal(squares[3][:, -5:], torch.full((3, 5, 24), 128, dtype=torch.uint8))
    for row in (10, 20):
        assert torch.equal(squares[row], torch.full((3, 24, 24), 128, dtype=torch.uint8))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert f"{gone} is not there; `aliprod data check` lists all such pictures." in warnings
    assert any(f"{outside} is a link that leads out" in warning for warning in warnings)


def test_all_test_rows_of_the_broken_catalogue_are_squared(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    catalogue = read(shared / "data" / "broken")
    expected = json.loads((shared / "data" / "broken" / "expected.json").read_text())
    cases = expected if isinstance(expected, list) else expected["cases"]
    named = [case["image_id"] for case in cases if case["split"] == "test" and case["expect"] == "predict"]
    ids = catalogue.test.ids.to_pylist()
    squares = {
        ids[row]: p
        for rows, pixels in squared_batches(catalogue.test, 24, FEED, 4)
        for row, p in zip(rows, pixels, strict=True)
    }
    assert sorted(squares) == sorted(ids)
    assert len(named) == 3
    assert all(image_id in caplog.text for image_id in named)


# What an objective needs beside images and labels


@pytest.fixture(scope="module")
def known(packages: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """The training images, a weight and a teacher's probabilities of each; those of row r say r."""
    table = torch.full((32, 4), 0.125)
    table[torch.arange(32), torch.arange(32) % 4] = 0.625
    folder = tmp_path_factory.mktemp("teacher") / "soft"
    write_soft_labels(ResumableRows(folder, packages.train.ids, packages.classes, {}, 256), lambda rows: [table[rows]])
    data = training_set(packages, STAGE, Inputs(teachers=(folder,)))
    return replace(data, weights=np.arange(32, dtype=np.float32) / 32)


def with_all(known: TrainingSet, feed: Feed = FEED, stage: Stage = STAGE) -> TrainBatches:
    return TrainBatches(known, stage, feed, second=True)


def assert_known_of_each(batch: TrainBatch) -> None:
    """Weight and teacher are those of the rows, to the bit: all these numbers are exact in float16."""
    assert batch.weights is not None
    assert batch.teacher is not None
    assert torch.equal(batch.weights, batch.rows / 32)
    assert torch.equal(batch.teacher.argmax(dim=1), batch.rows % 4)
    assert torch.equal(batch.teacher.sum(dim=1), torch.ones(len(batch.rows)))


def test_each_batch_has_a_second_one_as_large_from_the_reversed_sampler(
    packages: Catalogue, known: TrainingSet
) -> None:
    plain, double = list(batches(packages).epoch(1)), list(with_all(known).epoch(1))
    seconds = [batch.second for batch in double if batch.second is not None]
    assert len(seconds) == len(plain) == 4
    drawn = torch.cat([second.rows for second in seconds])
    assert drawn.tolist() == selection.reversed_order(packages.train.labels, STAGE.seed, 1).tolist()
    for batch, second, alone in zip(double, seconds, plain, strict=True):
        assert torch.equal(batch.rows, alone.rows)
        assert torch.equal(batch.images, alone.images)
        assert second.images.shape == batch.images.shape
        assert second.second is None
        assert second.labels.tolist() == packages.train.labels[second.rows.numpy()].tolist()
        assert_known_of_each(batch)
        assert_known_of_each(second)


def test_an_image_that_both_samplers_draw_is_augmented_anew(known: TrainingSet) -> None:
    both = list(with_all(known).epoch(0))
    views = [
        (row, image.numpy().tobytes())
        for batch in both
        for side in (batch, batch.second)
        if side is not None
        for row, image in zip(side.rows.tolist(), side.images, strict=True)
    ]
    assert max(Counter(row for row, _ in views).values()) > 2
    assert len(set(views)) == len(views) == 64


@pytest.mark.parametrize("sampler", ["shuffled", "class_balanced"])
def test_what_is_known_of_images_hangs_on_neither_processes_nor_a_resume(known: TrainingSet, sampler: str) -> None:
    stage = Stage.model_validate(STAGE.model_dump() | {"sampler": sampler})
    whole = list(with_all(known, stage=stage).epoch(1))
    assert_equal(whole, list(with_all(known, replace(FEED, processes=1), stage).epoch(1)))
    assert_equal(whole[3:], list(with_all(known, stage=stage).epoch(1, skip=3)))


def test_the_shares_have_first_and_second_batch_alike(known: TrainingSet) -> None:
    whole = list(with_all(known).epoch(0))
    shares = list(with_all(known, stage=in_shares(2)).epoch(0))
    for batch, *parts in zip(whole, shares[0::2], shares[1::2], strict=True):
        for side, *own in ((batch, *parts), (batch.second, *(part.second for part in parts))):
            assert {len(part.rows) for part in own} == {4}
            images = {image.numpy().tobytes() for part in own for image in part.images}
            assert images == {image.numpy().tobytes() for image in side.images}
            for part in own:
                assert_known_of_each(part)


def test_a_class_balanced_stage_sees_the_rows_of_that_sampler_each_time_in_another_view(packages: Catalogue) -> None:
    stage = Stage.model_validate(STAGE.model_dump() | {"sampler": "class_balanced"})
    seen = list(batches(packages, stage=stage).epoch(2))
    drawn = torch.cat([batch.rows for batch in seen])
    assert drawn.tolist() == selection.class_balanced_order(packages.train.labels, STAGE.seed, 2).tolist()
    assert len({image.numpy().tobytes() for batch in seen for image in batch.images}) == 32


def test_groups_of_one_class_are_not_quietly_taken_from_another_sampler_than_asked_for(packages: Catalogue) -> None:
    stage = Stage.model_validate(STAGE.model_dump() | {"sampler": "class_balanced"})
    with pytest.raises(Refused, match='sampler = "class_balanced" deals no groups of 4 images of one class'):
        batches(packages, 4, stage)
