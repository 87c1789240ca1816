"""Probabilities of images: one forward path for validation, test-time augmentation and files of any kind."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from aliprod.catalogue.catalogue import Catalogue, Images
from aliprod.data.augment import normalise
from aliprod.data.loader import Feed, squared_batches
from aliprod.data.training_set import Features
from aliprod.inference.metrics import mean_class_error
from aliprod.inference.ten_crop import crops, mean_probabilities
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.recipe import Stage, Views
from aliprod.store.epochs import TOP1
from aliprod.store.resumable import SHARD_STEP

# Pictures in one forward pass, 256 or 320 crops: they bound the memory of activations, and divide a shard's rows. The
# last batch of a split may be smaller: no padding, since nothing here compiles or tunes itself for a shape.
BATCH = {"center": SHARD_STEP, "ten_crop": SHARD_STEP // 8}


@dataclass(frozen=True)
class Ready:
    """A weights folder, loaded to predict with: the model in eval mode, on the device of ``feed``."""

    model: Classifier
    config: weights.Config
    classes: weights.Classes
    feed: Feed


def ready(folder: Path, processes: int = 0, device: torch.device | None = None) -> Ready:
    """Load a weights folder onto a device, None: this process's GPU where it has one; ``processes`` of them read
    pictures. Refused: it is no weights folder, or one that is damaged."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config, classes = weights.load(folder)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    feed = Feed(device, config.mean, config.std, config.interpolation, processes=processes, dtype=precision(device))
    return Ready(model, config, classes, feed)


def precision(device: torch.device, stated: str = "auto") -> torch.dtype:
    """The dtype of a forward pass, as in a stage: ``auto`` is bfloat16 on GPUs that have it, else float32."""
    if stated != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[stated]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model runs at ``dtype``."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


@torch.inference_mode()
def predict(
    model: Classifier, images: Images, resize: int, crop: int, views: Views, feed: Feed
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Probabilities of a split in order, this rank's share of it, by a model in eval mode on ``feed.device``.

    Each picture is decoded and squared once and sent as 8-bit pixels; it is cropped on the device. The probabilities
    of ten crops (test-time augmentation) are averaged after the softmax.

    Yields:
        Rows (n,) int64 and probabilities (n, K) float32 on the CPU.
    """
    for rows, pixels in squared_batches(images, resize, feed, BATCH[views]):
        yield rows, look(model, pixels, crop, views, feed).cpu()


@torch.inference_mode()
def pooled(model: Classifier, images: Images, resize: int, crop: int, feed: Feed) -> Iterator[Tensor]:
    """Features (n, F) of a split's centre crops in order, block after block, by a model in eval mode."""
    for _, pixels in squared_batches(images, resize, feed, BATCH["center"]):
        with autocast(feed.device, feed.dtype):
            yield model.pool(model.features(_normalised(_cut(pixels, crop, "center"), feed)))


@torch.inference_mode()
def _of_features(model: Classifier, features: Features, feed: Feed) -> Iterator[tuple[np.ndarray, Tensor]]:
    """`predict` of what is known of each picture: by a model that takes features for images."""
    size = BATCH["center"]
    for low in range(feed.rank * size, len(features), feed.world_size * size):
        rows = np.arange(low, min(low + size, len(features)))
        logits: Tensor = model(features.take(rows).to(feed.device).float())
        yield rows, mean_probabilities(logits.float()[:, None]).cpu()


def of_val(
    model: Classifier, catalogue: Catalogue, stage: Stage, feed: Feed, known: Features | None = None
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """`predict` of val as it is scored, by the centre crop; ``known``: features that the model takes for images."""
    if known is not None:
        return _of_features(model, known, feed)
    return predict(model, catalogue.val, *stage.test_view, "center", feed)


def predicted(member: Ready, images: Images, views: Views) -> Iterator[Tensor]:
    """The probabilities (n, K) alone of `predict`, block after block, at the device's precision."""
    config, feed = member.config, member.feed
    for _, block in predict(member.model, images, config.resize, config.crop, views, feed):
        yield block


@torch.inference_mode()
def look(model: Classifier, pixels: Tensor, crop: int, views: Views, feed: Feed) -> Tensor:
    """`seen` at the precision of ``feed``, on whose device the pictures are."""
    with autocast(feed.device, feed.dtype):
        return seen(model, pixels, crop, views, feed)


def seen(model: Classifier, pixels: Tensor, crop: int, views: Views, feed: Feed) -> Tensor:
    """Probabilities (n, K) float32 of squared pictures (n, 3, side, side) uint8."""
    cut = _cut(pixels, crop, views)
    logits: Tensor = model(_normalised(cut, feed))
    return mean_probabilities(logits.float().view(*cut.shape[:2], -1))


def _cut(pixels: Tensor, crop: int, views: Views) -> Tensor:
    """Views (n, V, 3, crop, crop) of squared pictures."""
    if views == "ten_crop":
        return crops(pixels, crop)
    offset = round((pixels.shape[-1] - crop) / 2)
    return pixels[:, None, :, offset : offset + crop, offset : offset + crop]


def _normalised(cut: Tensor, feed: Feed) -> Tensor:
    """Views as a network takes them, (n V, 3, crop, crop)."""
    return normalise(cut.flatten(0, 1), feed.mean, feed.std).contiguous(memory_format=torch.channels_last)


def nothing() -> None:
    """Do nothing."""


def top1_errors(
    model: Classifier,
    catalogue: Catalogue,
    stage: Stage,
    feed: Feed,
    between: Callable[[], None] = nothing,
    known: Features | None = None,
) -> dict[str, float]:
    """How well a model knows val, by the centre crop; empty without validation images.

    Args:
        between: called as often on each rank, before each block of images.
        known: features of val, which the model takes for images.
    Returns:
        Top-1 and top-5 error, means over classes; top-1 error per image; the loss (cross entropy), a mean over images.
    """
    if not len(catalogue.val):
        return {}
    was_training = model.training
    model.eval()
    labels = torch.from_numpy(catalogue.val.labels)
    scores = torch.zeros(3, len(labels), dtype=torch.float64)  # class, classes above the label, loss
    blocks = of_val(model, catalogue, stage, feed, known)
    for _ in range(0, len(catalogue.val), BATCH["center"] * feed.world_size):
        between()
        for rows, probabilities in islice(blocks, 1):  # the last may be another rank's
            own = probabilities.gather(1, labels[rows, None])
            above, loss = (probabilities > own).sum(dim=1), -own.clamp(min=torch.finfo(own.dtype).tiny).log()[:, 0]
            scores[:, rows] = torch.stack([probabilities.argmax(dim=1).double(), above.double(), loss.double()])
    model.train(was_training)
    everywhere = scores.to(feed.device)
    if feed.world_size > 1:
        dist.all_reduce(everywhere)  # each rank filled its own rows, the others are zero
    predicted, ranks, losses = everywhere.cpu()
    in_five = torch.where(ranks < 5, labels, predicted.long())
    return {
        TOP1: float(mean_class_error(labels, predicted.long(), catalogue.num_classes)),
        "val/top1_error_per_image": float((labels != predicted).double().mean()),
        "val/top5_error": float(mean_class_error(labels, in_five, catalogue.num_classes)),
        "val/loss": float(losses.mean()),
    }
