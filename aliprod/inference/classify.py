"""Classes of pictures of any kind, from one model or from several together. It needs no cluster."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from aliprod.catalogue.annotations import PICTURE_SUFFIXES
from aliprod.catalogue.decode import Unreadable, decode
from aliprod.data.augment import square
from aliprod.errors import Refused
from aliprod.inference.predict import Ready, look, ready
from aliprod.models import weights

_PICTURES = 32  # at a time
_TOP = 5


def classify(folders: Sequence[Path], inputs: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Classify each picture in files and folders.

    Args:
        folders: of weights; their probabilities are averaged.
    Yields:
        path, class_id, name, probability and the top five; or path and error, for what is no picture.
    Raises:
        Refused: a folder holds no weights, or they know other classes than the first.
    """
    paths = [path for given in inputs for path in _files(given)]
    models, classes = _load(folders)
    for low in range(0, len(paths), _PICTURES):
        yield from _classified(paths[low : low + _PICTURES], models, classes)


def _classified(paths: Sequence[Path], models: Sequence[Ready], classes: weights.Classes) -> Iterator[dict[str, Any]]:
    seen = [_decoded(path) for path in paths]
    pictures = [picture for picture in seen if isinstance(picture, Image.Image)]
    probabilities = iter(_probabilities(pictures, models)) if pictures else iter(())
    for path, picture in zip(paths, seen, strict=True):
        if isinstance(picture, str):
            yield {"path": str(path), "error": picture}
        else:
            yield {"path": str(path), **_answer(next(probabilities), classes)}


def _probabilities(pictures: Sequence[Image.Image], models: Sequence[Ready]) -> Tensor:
    """(n, K): the mean of the members' ten-crop probabilities."""
    total: Tensor | float = 0.0
    for member in models:
        side, crop = member.config.resize, member.config.crop
        pixels = torch.stack([square(picture, side, member.config.interpolation) for picture in pictures])
        pixels = pixels.to(member.feed.device)
        total = total + look(
            member.model, pixels, crop, "ten_crop", replace(member.feed, dtype=torch.float32)
        ).cpu() / len(models)
    assert isinstance(total, Tensor)  # noqa: S101  there is at least one member
    return total


def _answer(row: Tensor, classes: weights.Classes) -> dict[str, Any]:
    values, places = row.topk(min(_TOP, len(row)))
    top = [
        {"class_id": classes.ids[place], "name": classes.names[place], "probability": round(value, 6)}
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]
    return {**top[0], "top": top}


def _decoded(path: Path) -> Image.Image | str:
    try:
        return decode(path)
    except Unreadable as reason:
        return str(reason)


def _files(given: Path) -> list[Path]:
    if given.is_dir():
        return sorted(path for path in given.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    return [given]


def _load(folders: Sequence[Path]) -> tuple[list[Ready], weights.Classes]:
    loaded = [ready(folder) for folder in folders]
    for folder, member in zip(folders, loaded, strict=True):
        if member.classes.ids != loaded[0].classes.ids:
            raise Refused("knows other classes than the first member.", folder, "Run the plan again.")
    return loaded, loaded[0].classes
