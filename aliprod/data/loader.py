"""Rows become batches, from any step on.

The order is a function of (seed, epoch), a share of (seed, step, its number), a picture's augmentation of (seed,
epoch, image id): the number of loader processes or ranks, or a restart, changes nothing of what a step sees.
"""

import logging
import multiprocessing
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from aliprod.catalogue.catalogue import Images, Integers
from aliprod.catalogue.decode import LEAST_SIDE, Unreadable, decode_anyway
from aliprod.data import augment, augment_batch, selection
from aliprod.data.augment import GREY, Picture, picture_of
from aliprod.data.augment_batch import Cut, Packed
from aliprod.data.selection import epoch_size
from aliprod.data.training_set import Features, TrainingSet, spread
from aliprod.errors import Refused
from aliprod.randomness import seed_of
from aliprod.recipe import Stage

View = tuple[int, int, int]  # row, epoch, how often the row was seen earlier in this epoch

log = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_PATIENCE_SECONDS = 3600  # for a batch of a loader process
_SUBSTITUTES = 20  # pictures of the same class that are tried for an unreadable one


@dataclass(frozen=True)
class TrainBatch:
    """What a step sees at once: a share of its images, a micro-batch.

    ``rows``: of the split, on the CPU. ``epoch``, ``step``: since the job began.
    """

    images: Tensor  # (B, 3, crop, crop) float32, normalised, channels last; (B, F) where features are cached
    labels: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64
    epoch: int
    step: int
    seed: int  # of whatever the network draws in this share of the step
    weights: Tensor | None = None  # (B,) float32, of each image's class loss; None: 1
    second: "TrainBatch | None" = None  # as many images of the reversed sampler, where they are asked for
    teacher: Tensor | None = None  # (B, K) float32, the teachers' mean probabilities

    def __getitem__(self, some: slice) -> "TrainBatch":
        """The images of a slice, with all that is known of each."""
        named = {name: getattr(self, name) for name in ("images", "labels", "rows", "weights", "second", "teacher")}
        return replace(self, **{name: value[some] for name, value in named.items() if value is not None})


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
    dtype: torch.dtype = torch.float32  # of a forward pass that predicts; softmax and means are float32


class TrainBatches:
    """The steps of a stage, epoch by epoch, in the shares that this rank works on.

    Args:
        group: this many images of one class stand together in a batch.
        second: each batch has a second one beside it, from the reversed sampler.
    Raises:
        Refused: as `epoch_size`; groups from another sampler; shares that cannot be dealt to the ranks.
    """

    def __init__(self, data: TrainingSet, stage: Stage, feed: Feed, group: int = 1, second: bool = False) -> None:
        if group > 1 and stage.sampler != "shuffled":
            what = f'sampler = "{stage.sampler}" deals no groups of {group} images of one class.'
            raise Refused(what, advice="The objective asks for them: leave sampler out.")
        self.data, self.stage, self.feed, self.group, self.second = data, stage, feed, group, second
        self.images = data.images
        self.shares = feed.world_size if stage.shares == "ranks" else stage.shares
        if self.shares % feed.world_size:
            what = f"{self.shares} shares of a step cannot be dealt to {feed.world_size} ranks."
            raise Refused(what, advice="The number of ranks divides shares: 1, 2, 4 ... as many as there are shares.")
        each = self.shares // feed.world_size
        self.mine = range(feed.rank * each, (feed.rank + 1) * each)  # this rank's shares of a step
        counts = np.bincount(self.images.labels)
        self.groups_per_batch, self.steps_per_epoch = epoch_size(counts, stage.batch_size, group, self.shares)
        self._steps = _Steps()
        read = partial(_train_view, self.images, stage, feed.interpolation)
        collate = _packed if stage.augment == "device" else None
        self._loader = data_loader(self.images, read, self._steps, feed.processes, feed.device, collate)

    def epoch(self, epoch: int, skip: int = 0, shares: Sequence[int] | None = None) -> Iterator[TrainBatch]:
        """The shares of one epoch from step ``skip`` on, on the device, one after the other; ``shares``: the numbers
        of those that are asked for, of each step, without them `mine`."""
        first, shares = epoch * self.steps_per_epoch, shares or self.mine
        self._steps.batches = views = self._views(epoch, skip, shares)
        features = self.data.features
        loaded = self._loader if features is None else map(partial(_cached, features, self.images.labels), views)
        order = product(range(first + skip, first + self.steps_per_epoch), shares)
        try:
            for (pixels, labels, erased, rows), (step, share) in zip(loaded, order, strict=True):
                images, marks = self._images(pixels, erased), self._marks(rows)
                seed = seed_of(self.stage.seed, "step", step, share)
                batch = TrainBatch(images, self._sent(labels), rows, epoch, step, seed, **marks)
                half = len(batch.rows) // 2
                yield replace(batch[:half], second=batch[half:]) if self.second else batch
        finally:  # the loader holds them, they hold this and so the loader: Python would wait 5 s for each process
            views.close()

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.feed.device, non_blocking=True)

    def _images(self, pixels: Tensor | Packed, erased: Tensor) -> Tensor:
        if isinstance(pixels, Packed):
            pixels = augment_batch.views(pixels, self.feed.interpolation, self.feed.device)
        elif self.data.features is not None:
            return self._sent(pixels).float()
        return augment.on_device(self._sent(pixels), self._sent(erased), self.feed.mean, self.feed.std)

    def _marks(self, rows: Tensor) -> dict[str, Any]:
        """What else is known of the images: their weights, and the teachers' probabilities."""
        marks, places = dict[str, Any](), rows.numpy()
        if self.data.weights is not None:
            marks["weights"] = self._sent(torch.from_numpy(self.data.weights[places]))
        if (teacher := self.data.teacher) is not None:
            classes, probabilities = map(self._sent, teacher.rows(places))
            marks["teacher"] = spread(classes, probabilities, teacher.num_classes)
        return marks

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

    def _views(self, epoch: int, skip: int, shares: Sequence[int]) -> Generator[list[View]]:
        """The views of shares from step ``skip`` on: a step is a slice of the order, a share every so many of it."""
        sides = self._units(epoch)[None]
        if self.second:
            rare = selection.reversed_order(self.images.labels, self.stage.seed, epoch)
            sides = np.concatenate([sides, rare[None, :, None]])
        order = np.argsort(sides, axis=None, kind="stable")
        repeats = np.empty_like(sides)  # how often each row stood earlier: seen again it is augmented in another way
        np.put(repeats, order, selection.place_in_run(sides.ravel()[order]))
        size = self.groups_per_batch
        for step, share in product(range(skip, self.steps_per_epoch), shares):
            its = slice(step * size + share, (step + 1) * size, self.shares)
            rows, earlier = (of[:, its].ravel().tolist() for of in (sides, repeats))
            yield [(row, epoch, repeat) for row, repeat in zip(rows, earlier, strict=True)]


def squared_batches(images: Images, side: int, feed: Feed, batch_size: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """A split in order, rows (n,) int64 and pixels (n, 3, side, side) uint8 on the device, over all ranks.

    Blocks of rows are dealt to the ranks whole: a picture stands beside the same others whatever their number. Of an
    unreadable one what can be seen is shown, and it is named in the log: its row may not vanish from a submission.
    """
    starts = range(feed.rank * batch_size, len(images), feed.world_size * batch_size)
    batches = [range(start, min(start + batch_size, len(images))) for start in starts]
    read = partial(_square, images, side, feed.interpolation)
    loader = data_loader(images, read, batches, feed.processes, feed.device)
    for rows, pixels in zip(batches, loader, strict=True):
        yield np.array(rows), pixels.to(feed.device, non_blocking=True)


class _Steps(Sampler[list[View]]):
    """The batches that the loader takes next; renewed each epoch, so that loader processes live on."""

    batches: Iterable[list[View]] = ()

    def __iter__(self) -> Iterator[list[View]]:
        return iter(self.batches)


def _cached(features: Features, labels: Integers, views: list[View]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a loader makes of views, with features in place of pixels: they are read at once."""
    rows = np.array([row for row, *_ in views])
    return features.take(rows), torch.from_numpy(labels[rows]), torch.empty(0), torch.from_numpy(rows)


def _train_view(images: Images, stage: Stage, interpolation: str, view: View) -> tuple[Tensor | Cut, int, Tensor, int]:
    """Pixels (or what the device makes them from), label, erased box, and row of a view."""
    row, epoch, repeat = view
    stage = stage.at(epoch)
    seed = seed_of(stage.seed, epoch, images.ids[row].as_py(), repeat)
    see = augment_batch.cut if stage.augment == "device" else augment.train_view
    seen, erased = see(_picture(images, row, stage.crop), stage, seed, interpolation)
    return seen, int(images.labels[row]), erased, row


def _packed(seen: list[tuple[Cut, int, Tensor, int]]) -> tuple[Any, ...]:
    cuts, *others = zip(*seen, strict=True)
    return augment_batch.pack(cuts), *(default_collate(list(other)) for other in others)


def _picture(images: Images, row: int, side: int) -> Picture:
    """A picture; of an unreadable one the next readable one of its class, or grey."""
    if (picture := _readable(images, row)) is None:
        same = np.flatnonzero(images.labels == images.labels[row])
        after = np.roll(same, -int(np.searchsorted(same, row)) - 1)[:_SUBSTITUTES]
        pictures = (_readable(images, int(other)) for other in after)
        picture = next((found for found in pictures if found is not None), _grey(side))
    return picture


def _square(images: Images, side: int, interpolation: str, row: int) -> Tensor:
    """What can be seen of a picture, which may not be left out, squared."""
    try:
        picture, reason = decode_anyway(images.source(row))
    except Unreadable as leads_out:
        picture, reason = _grey(LEAST_SIDE), str(leads_out)
    if reason:
        _warn(images, row, reason)
    return augment.square(picture, side, interpolation)


def _readable(images: Images, row: int) -> Picture | None:
    try:
        return picture_of(images.source(row))
    except Unreadable as reason:
        _warn(images, row, reason)
        return None


def _warn(images: Images, row: int, reason: object) -> None:
    log.warning("%s %s; `aliprod data check` lists all such pictures.", images.root / images.paths[row].as_py(), reason)


def _grey(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), GREY)


class _Mapped(Dataset[Any]):
    def __init__(self, images: Images, read: Callable[[Any], Any]) -> None:
        self.images, self.read = images, read

    def __getitems__(self, keys: Sequence[int | View]) -> list[Any]:  # what PyTorch asks for a whole batch
        self.images.ask(key if isinstance(key, int) else key[0] for key in keys)
        return [self.read(key) for key in keys]


def data_loader(
    images: Images,
    read: Callable[[Any], Any],
    batches: Sampler[Any] | Sequence[Any],
    processes: int,
    device: torch.device = _CPU,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """A PyTorch loader of what ``read`` makes of each entry of a batch, a row of the images or a view, for a device.

    Its processes are forked from a clean server, since forking a training process can hang. The server has imported
    this module: else every process would, for seconds, and again at each validation.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    workers: dict[str, Any] = {"persistent_workers": True, "multiprocessing_context": context} if processes else {}
    return DataLoader(
        _Mapped(images, read),
        batch_sampler=batches,
        num_workers=processes,
        collate_fn=collate,
        timeout=_PATIENCE_SECONDS if processes else 0,
        pin_memory=device.type == "cuda",
        **workers,
    )
