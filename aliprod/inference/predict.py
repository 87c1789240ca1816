"""Probabilities of images: one forward path for validation, test-time augmentation and files of any kind."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from aliprod.catalogue.annotations import PICTURE_SUFFIXES
from aliprod.catalogue.catalogue import Catalogue, Images
from aliprod.catalogue.decode import Unreadable, decode
from aliprod.data.augment import normalise, square
from aliprod.data.loader import Feed, squared_batches
from aliprod.errors import Refused, listing
from aliprod.inference.metrics import mean_class_error
from aliprod.inference.probabilities import tempered
from aliprod.inference.ten_crop import crops, mean_probabilities
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.recipe import Stage, Views
from aliprod.store.epochs import TOP1
from aliprod.store.lineage import Voice
from aliprod.store.resumable import SHARD_STEP

# Pictures in one forward pass, 256 or 320 crops: they bound the memory of activations, and divide a shard's rows. The
# last batch of a split may be smaller: no padding, since nothing here compiles or tunes itself for a shape.
BATCH = {"center": SHARD_STEP, "ten_crop": SHARD_STEP // 8}
_TOP = 5  # classes that are said of a file


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
    if views == "ten_crop":
        cut = crops(pixels, crop)
    else:
        offset = round((pixels.shape[-1] - crop) / 2)
        cut = pixels[:, None, :, offset : offset + crop, offset : offset + crop]
    images = normalise(cut.flatten(0, 1), feed.mean, feed.std).contiguous(memory_format=torch.channels_last)
    logits: Tensor = model(images)
    return mean_probabilities(logits.float().view(*cut.shape[:2], -1))


def nothing() -> None:
    """Do nothing."""


def top1_errors(
    model: Classifier, catalogue: Catalogue, stage: Stage, feed: Feed, between: Callable[[], None] = nothing
) -> dict[str, float]:
    """Mean over classes and over images of the centre crop's top-1 error; empty without validation images.

    ``between`` is called as often on each rank, before each block of images.
    """
    if not len(catalogue.val):
        return {}
    was_training = model.training
    model.eval()
    predicted = np.zeros(len(catalogue.val), dtype=np.int64)
    blocks = predict(model, catalogue.val, stage.resize, stage.crop, "center", feed)
    for _ in range(0, len(catalogue.val), BATCH["center"] * feed.world_size):
        between()
        for rows, probabilities in islice(blocks, 1):  # the last may be another rank's
            predicted[rows] = probabilities.argmax(dim=1).numpy()
    model.train(was_training)
    everywhere = torch.from_numpy(predicted).to(feed.device)
    if feed.world_size > 1:
        dist.all_reduce(everywhere)  # each rank filled its own rows, the others are zero
    labels = torch.from_numpy(catalogue.val.labels)
    error = mean_class_error(labels, everywhere.cpu(), catalogue.num_classes)
    return {
        TOP1: float(error),
        "val/top1_error_per_image": float((labels != everywhere.cpu()).double().mean()),
    }


def classify(voices: Sequence[Voice], inputs: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Classify each picture in files and folders by the weighted mean of what folders of weights say.

    Yields:
        path, class_id, name, probability and the top five; or path and error, for what is no picture.
    Raises:
        Refused: there is no picture; a folder holds no weights, or they know other classes than the first.
    """
    paths = [path for given in inputs for path in files(given)]
    if not paths:
        raise Refused("holds no picture.", listing(map(str, inputs)), f"Pictures are {listing(PICTURE_SUFFIXES)}.")
    members = loaded(voices)
    for low in range(0, len(paths), BATCH["ten_crop"]):
        some = paths[low : low + BATCH["ten_crop"]]
        seen = [_decoded(path) for path in some]
        pictures = [picture for picture in seen if isinstance(picture, Image.Image)]
        answers = iter(_answers(pictures, members, voices) if pictures else ())
        for path, picture in zip(some, seen, strict=True):
            yield {"path": str(path), **({"error": picture} if isinstance(picture, str) else next(answers))}


def loaded(voices: Sequence[Voice], device: torch.device | None = None) -> list[Ready]:
    """Members, each `ready`. Refused: a folder holds no weights, or they know other classes than the first."""
    members = [ready(voice.folder, device=device) for voice in voices]
    for voice, member in zip(voices, members, strict=True):
        if member.classes.ids != members[0].classes.ids:
            raise Refused("knows other classes than the first member.", voice.folder, "Run the plan again.")
    return members


def asked(pictures: Sequence[Image.Image], members: Sequence[Ready], voices: Sequence[Voice], views: Views) -> Tensor:
    """The weighted mean (n, K) of the members' probabilities of pictures, in float32."""
    parts = []
    for member in members:
        config, feed = member.config, replace(member.feed, dtype=torch.float32)
        pixels = torch.stack([square(picture, config.resize, config.interpolation) for picture in pictures])
        parts.append(look(member.model, pixels.to(feed.device), config.crop, views, feed).cpu())
    return mean(parts, voices)


def mean(parts: Sequence[Tensor], voices: Sequence[Voice]) -> Tensor:
    """The mean of members' probabilities (n, K), each tempered, by what they count."""
    total = torch.zeros(())
    for part, voice in zip(parts, voices, strict=True):
        even = part if voice.temperature is None else tempered(part, voice.temperature).float()
        total = total + even * (voice.weight / sum(one.weight for one in voices))
    return total


def files(given: Path) -> list[Path]:
    """The pictures below a folder, by their suffixes, or the one file that is given."""
    if given.is_dir():
        return sorted(path for path in given.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    return [given]


def _decoded(path: Path) -> Image.Image | str:
    try:
        return decode(path)
    except Unreadable as reason:
        return str(reason)


def _answers(
    pictures: Sequence[Image.Image], members: Sequence[Ready], voices: Sequence[Voice]
) -> Iterator[dict[str, Any]]:
    """What each picture shows, by the ten-crop probabilities."""
    classes = members[0].classes
    for row in asked(pictures, members, voices, "ten_crop"):
        values, places = row.topk(min(_TOP, len(row)))
        top = [
            {"class_id": classes.ids[place], "name": classes.names[place], "probability": round(value, 6)}
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
        ]
        yield {**top[0], "top": top}
