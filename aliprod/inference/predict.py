"""Probabilities of images: one forward path for validation, test-time augmentation and files of any kind."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aliprod.catalogue.catalogue import Images
from aliprod.data.augment import normalise
from aliprod.data.loader import Feed, squared_batches
from aliprod.data.training_set import Features
from aliprod.inference.ten_crop import crops, mean_probabilities
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.processes import keep_freed_memory
from aliprod.recipe import Views
from aliprod.store.resumable import SHARD_STEP

# Pictures in one forward pass, 256 or 320 crops: they bound the memory of activations, and divide a shard's rows. The
# last batch of a split may be smaller: no padding, since nothing here compiles or tunes itself for a shape.
BATCH = {"center": SHARD_STEP, "ten_crop": SHARD_STEP // 8}
_CPU_PASSES = 8  # a CPU's share of a batch: larger ones take as long or longer, and gigabytes


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
    device = device or own_device()
    model, config, classes = weights.load(folder)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    feed = Feed(device, config.mean, config.std, config.interpolation, processes=processes, dtype=precision(device))
    return Ready(model, config, classes, feed)


def own_device() -> torch.device:
    """This process's GPU; where it has none the CPU, for which it then keeps the memory that it frees."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    keep_freed_memory()
    return torch.device("cpu")


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

    Each picture is decoded and squared once and sent as 8-bit pixels; it is cropped on the device. Yields rows (n,)
    int64 and probabilities (n, K) float32 on the CPU.
    """
    for rows, pixels in squared_batches(images, resize, feed, BATCH[views]):
        with autocast(feed.device, feed.dtype):
            probabilities = seen(model, pixels, crop, views, feed)
        yield rows, probabilities.cpu()


@torch.inference_mode()
def pooled(model: Classifier, images: Images, resize: int, crop: int, feed: Feed) -> Iterator[Tensor]:
    """Features (n, F) of a split's centre crops in order, block after block, by a model in eval mode."""

    def look(part: Tensor) -> Tensor:
        return model.pool(model.features(_cut(part, crop, "center", feed)))

    for _, pixels in squared_batches(images, resize, feed, BATCH["center"]):
        with autocast(feed.device, feed.dtype):
            yield _in_passes(look, pixels, "center")


@torch.inference_mode()
def of_features(model: Classifier, features: Features, feed: Feed) -> Iterator[tuple[np.ndarray, Tensor]]:
    """`predict` of what is known of each picture: by a model that takes features for images."""
    size = BATCH["center"]
    for low in range(feed.rank * size, len(features), feed.world_size * size):
        rows = np.arange(low, min(low + size, len(features)))
        logits: Tensor = model(features.take(rows).to(feed.device).float())
        yield rows, mean_probabilities(logits.float()[:, None]).cpu()


def predicted(member: Ready, images: Images, views: Views) -> Iterator[Tensor]:
    """The probabilities (n, K) alone of `predict`, block after block, at the device's precision."""
    config, feed = member.config, member.feed
    for _, block in predict(member.model, images, config.resize, config.crop, views, feed):
        yield block


def seen(model: Classifier, pixels: Tensor, crop: int, views: Views, feed: Feed) -> Tensor:
    """Probabilities (n, K) float32 of squared pictures (n, 3, side, side) uint8, at least one, on the device of
    ``feed``."""
    return _in_passes(partial(seen_at_once, model, crop=crop, views=views, feed=feed), pixels, views)


def seen_at_once(model: Classifier, pixels: Tensor, crop: int, views: Views, feed: Feed) -> Tensor:
    """`seen` in one forward pass, whatever the number of pictures: what an export records."""
    logits: Tensor = model(_cut(pixels, crop, views, feed))
    views_of_each = logits.float().view(pixels.shape[0], -1, logits.shape[1])  # len() would fix it in an export
    return mean_probabilities(views_of_each)


def _in_passes(look: Callable[[Tensor], Tensor], pixels: Tensor, views: Views) -> Tensor:
    """What ``look`` makes of at least one squared picture (n, ...): of a few at a time where it works on a CPU."""
    size = BATCH[views] // _CPU_PASSES if pixels.device.type == "cpu" else len(pixels)
    return torch.cat([look(part) for part in pixels.split(size)])


def _cut(pixels: Tensor, crop: int, views: Views, feed: Feed) -> Tensor:
    """Views of squared pictures as a network takes them, (n V, 3, crop, crop)."""
    if views == "ten_crop":
        cut = crops(pixels, crop).flatten(0, 1)
    else:
        offset = round((pixels.shape[-1] - crop) / 2)
        cut = pixels[..., offset : offset + crop, offset : offset + crop]
    return normalise(cut, feed.mean, feed.std).contiguous(memory_format=torch.channels_last)
