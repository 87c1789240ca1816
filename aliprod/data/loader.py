"""Rows become batches, from any step on.

The order is a function of (seed, epoch), a picture's augmentation of (seed, epoch, image id): the number of
loader processes or ranks, or a restart, changes nothing of what a step sees.
"""

import logging
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from aliprod.catalogue.catalogue import Images
from aliprod.catalogue.decode import LEAST_SIDE, Unreadable, decode_anyway
from aliprod.data import augment, selection, soft_labels
from aliprod.data.auto_augment import GREY
from aliprod.data.pixels import Picture, picture_of
from aliprod.data.training_set import TrainingSet
from aliprod.errors import Refused
from aliprod.randomness import seed_of
from aliprod.recipe import Stage

View = tuple[int, int, int]  # row, epoch, how often the row was seen earlier in this epoch

log = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_PATIENCE_SECONDS = 3600  # for a batch of a loader process
_SUBSTITUTES = 20  # pictures of the same class that are tried for an unreadable one


@dataclass(frozen=True)
class Batch:
    """What a step sees on one rank.

    Attributes:
        images: (B, 3, crop, crop) float32, normalised, channels last.
        labels: (B,) int64.
        rows: (B,) int64 rows of the split, on the CPU.
        epoch, step: since the job began.
        seed: of whatever the network draws in this step, on this rank.
        weights: (B,) float32, of each image's class loss; None: 1.
        second: as many images of the reversed sampler, where they are asked for.
        teacher: (B, K) float32, the teachers' mean probabilities, where there are teachers.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    epoch: int
    step: int
    seed: int
    weights: Tensor | None = None
    second: "Batch | None" = None
    teacher: Tensor | None = None

    def rows_of(self, some: slice) -> "Batch":
        """The images of a slice, with all that is known of each."""
        return replace(
            self,
            images=self.images[some],
            labels=self.labels[some],
            rows=self.rows[some],
            weights=None if self.weights is None else self.weights[some],
            second=None if self.second is None else self.second.rows_of(some),
            teacher=None if self.teacher is None else self.teacher[some],
        )

    def split(self, count: int, group: int) -> list["Batch"]:
        """At most ``count`` parts of whole groups, in order, each with a seed of its own."""
        if count == 1:
            return [self]
        size = group * -(-len(self.rows) // (group * count))
        starts = enumerate(range(0, len(self.rows), size))
        return [
            replace(self.rows_of(slice(start, start + size)), seed=seed_of(self.seed, "part", number))
            for number, start in starts
        ]


@dataclass(frozen=True)
class Feed:
    """Where and how pictures are read: which rank of how many, loader processes, device, a network's input."""

    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    rank: int = 0
    world_size: int = 1
    processes: int = 0


class TrainBatches:
    """The batches of a stage, epoch by epoch.

    Args:
        group: this many images of one class stand together in a batch.
        second: each batch has a second one beside it, from the reversed sampler.
    Attributes:
        steps_per_epoch: whole batches only, since a partial one disturbs the norm layers. Where the images make no
            whole batch, all of them are the only one.
    Raises:
        Refused: a batch cannot be dealt to the ranks in equal parts of whole groups; groups from another sampler.
    """

    def __init__(self, data: TrainingSet, stage: Stage, feed: Feed, group: int = 1, second: bool = False) -> None:
        if group > 1 and stage.sampler != "shuffled":
            what = f'sampler = "{stage.sampler}" deals no groups of {group} images of one class.'
            raise Refused(what, advice="The objective asks for them: leave sampler out.")
        self.data, self.stage, self.feed, self.group, self.second = data, stage, feed, group, second
        self.images = data.images
        groups = len(self._units(0))
        self.groups_per_batch = _groups_per_batch(stage.batch_size, group, groups, feed.world_size)
        self.steps_per_epoch = groups // self.groups_per_batch
        self._steps = _Steps()
        self._loader = data_loader(
            _TrainViews(self.images, stage, feed.interpolation), self._steps, feed.processes, feed.device
        )

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step ``skip`` on, on the device."""
        first_step = epoch * self.steps_per_epoch
        self._steps.batches = self._steps_of(epoch, skip)
        for offset, (pixels, labels, centres, rows) in enumerate(self._loader):
            batch = self._batch(pixels, labels, centres, rows, epoch, first_step + skip + offset)
            yield _halved(batch) if self.second else batch

    def _batch(self, pixels: Tensor, labels: Tensor, centres: Tensor, rows: Tensor, epoch: int, step: int) -> Batch:
        sent = partial(Tensor.to, device=self.feed.device, non_blocking=True)
        images = augment.on_device(sent(pixels), sent(centres), self.feed.mean, self.feed.std)
        seed = seed_of(self.stage.seed, "step", step, self.feed.rank)
        weights, teacher = self.data.weights, self.data.teacher
        return Batch(
            images,
            sent(labels),
            rows,
            epoch,
            step,
            seed,
            weights=None if weights is None else sent(torch.from_numpy(weights[rows.numpy()])),
            teacher=None if teacher is None else self._taught(teacher, rows),
        )

    def _taught(self, teacher: soft_labels.SoftLabels, rows: Tensor) -> Tensor:
        classes, probabilities = (part.to(self.feed.device, non_blocking=True) for part in teacher.rows(rows.numpy()))
        return soft_labels.spread(classes, probabilities, teacher.num_classes)

    def ids(self, rows: Tensor) -> list[str]:
        """Image ids of the rows of a batch."""
        return [self.images.ids[int(row)].as_py() for row in rows]

    def _units(self, epoch: int) -> np.ndarray:
        """(U, group) rows of this epoch in order."""
        labels, seed = self.images.labels, self.stage.seed
        if self.group > 1:
            return selection.grouped(labels, self.group, seed, epoch)
        if self.stage.sampler == "class_balanced":
            return selection.class_balanced_order(labels, seed, epoch)[:, None]
        return selection.order(len(labels), seed, epoch)[:, None]

    def _steps_of(self, epoch: int, skip: int) -> Iterator[list[View]]:
        """This rank's views of each step from ``skip`` on: global batch k is a slice, a rank a strided slice of it."""
        sides = [self._units(epoch)]
        if self.second:
            sides.append(selection.reversed_order(self.images.labels, self.stage.seed, epoch)[:, None])
        repeats = _repeats(np.concatenate([side.ravel() for side in sides])).reshape(len(sides), *sides[0].shape)
        size, rank, world = self.groups_per_batch, self.feed.rank, self.feed.world_size
        for step in range(skip, self.steps_per_epoch):
            mine = slice(step * size + rank, (step + 1) * size, world)
            views: list[View] = []
            for side, again in zip(sides, repeats, strict=True):
                rows, earlier = side[mine].ravel().tolist(), again[mine].ravel().tolist()
                views += [(row, epoch, repeat) for row, repeat in zip(rows, earlier, strict=True)]
            yield views


def squared_batches(images: Images, side: int, feed: Feed, batch_size: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """A split in order, squared to ``side`` for validation and ten-crop; each picture once, over all ranks.

    Of an unreadable picture what can be seen is shown, and it is named in the log: its row may not vanish from a
    submission.

    Yields:
        Rows (n,) int64 and pixels (n, 3, side, side) uint8 on the device.
    """
    rows = np.arange(feed.rank, len(images), feed.world_size)
    batches = [rows[i : i + batch_size].tolist() for i in range(0, len(rows), batch_size)]
    loader = data_loader(_Squares(images, side, feed.interpolation), batches, feed.processes, feed.device)
    for chunk, pixels in zip(batches, loader, strict=True):
        yield np.asarray(chunk, dtype=np.int64), pixels.to(feed.device, non_blocking=True)


def _halved(batch: Batch) -> Batch:
    """The first half of a batch, with the other as its second."""
    half = len(batch.rows) // 2
    return replace(batch.rows_of(slice(0, half)), second=batch.rows_of(slice(half, None)))


def _groups_per_batch(batch_size: int, group: int, groups: int, world_size: int) -> int:
    whole = batch_size // group
    if whole < 1 or whole % world_size:
        raise Refused(
            f"batch_size = {batch_size} cannot be dealt to {world_size} ranks in groups of {group} of one class.",
            advice=f"Make it a multiple of {group * world_size}.",
        )
    if groups < world_size:
        raise Refused(f"{groups * group} training images are too few for {world_size} ranks.", advice="Ask for fewer.")
    return min(whole, groups - groups % world_size)


def _repeats(rows: np.ndarray) -> np.ndarray:
    """How often each row stood earlier in ``rows``: a picture seen again gets another augmentation."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    first = np.searchsorted(ordered, ordered, side="left")
    repeats = np.empty(len(rows), dtype=np.int64)
    repeats[order] = np.arange(len(rows)) - first
    return repeats


class _Steps(Sampler[list[View]]):
    """The batches that the loader takes next; renewed each epoch, so that loader processes live on."""

    def __init__(self) -> None:
        self.batches: Iterable[list[View]] = ()

    def __iter__(self) -> Iterator[list[View]]:
        return iter(self.batches)


class _TrainViews(Dataset[tuple[Tensor, int, Tensor, int]]):
    def __init__(self, images: Images, stage: Stage, interpolation: str) -> None:
        self.images, self.stage, self.interpolation = images, stage, interpolation

    def __getitem__(self, view: View) -> tuple[Tensor, int, Tensor, int]:
        row, epoch, repeat = view
        seed = seed_of(self.stage.seed, epoch, self.images.ids[row].as_py(), repeat)
        pixels, centre = augment.train_view(self._picture(row), self.stage, seed, self.interpolation)
        return pixels, int(self.images.labels[row]), centre, row

    def _picture(self, row: int) -> Picture:
        picture = _readable(self.images, row)
        return self._substitute(row) if picture is None else picture

    def _substitute(self, row: int) -> Picture:
        """The next readable picture of the class of an unreadable one."""
        same = np.flatnonzero(self.images.labels == self.images.labels[row])
        after = np.roll(same, -int(np.searchsorted(same, row)) - 1)[:_SUBSTITUTES]
        pictures = (_readable(self.images, int(other)) for other in after)
        return next((picture for picture in pictures if picture is not None), _grey(self.stage.crop))


class _Squares(Dataset[Tensor]):
    def __init__(self, images: Images, side: int, interpolation: str) -> None:
        self.images, self.side, self.interpolation = images, side, interpolation

    def __getitem__(self, row: int) -> Tensor:
        return augment.square(_visible(self.images, row), self.side, self.interpolation)


def _readable(images: Images, row: int) -> Picture | None:
    try:
        return picture_of(images.source(row))
    except Unreadable as reason:
        _warn(images, row, reason)
        return None


def _visible(images: Images, row: int) -> Image.Image:
    """What can be seen of a picture that may not be left out."""
    try:
        picture, reason = decode_anyway(images.source(row))
    except Unreadable as leads_out:
        picture, reason = _grey(LEAST_SIDE), str(leads_out)
    if reason:
        _warn(images, row, reason)
    return picture


def _warn(images: Images, row: int, reason: object) -> None:
    log.warning("%s %s; `aliprod data check` lists all such pictures.", images.root / images.paths[row].as_py(), reason)


def _grey(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), GREY)


def data_loader(
    dataset: Dataset,  # type: ignore[type-arg]
    batches: Sampler | Sequence,  # type: ignore[type-arg]
    processes: int,
    device: torch.device = _CPU,
) -> DataLoader:  # type: ignore[type-arg]
    """A PyTorch loader for a device. It waits an hour for a batch of its processes, then raises.

    They are forked from a clean server, since forking a training process can hang. The server has imported this module:
    else every process would, for seconds, and again at each validation.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    workers = {"persistent_workers": True, "multiprocessing_context": context} if processes else {}
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=processes,
        timeout=_PATIENCE_SECONDS if processes else 0,
        pin_memory=device.type == "cuda",
        **workers,  # type: ignore[arg-type]
    )
