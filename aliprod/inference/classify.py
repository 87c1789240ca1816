"""What pictures show, as a model says it, or an ensemble: the weighted mean of its members' probabilities."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aliprod.catalogue.decode import Unreadable, decode
from aliprod.data.augment import square
from aliprod.errors import Refused
from aliprod.inference.pictures import Picture
from aliprod.inference.predict import BATCH, Ready, look, ready
from aliprod.inference.probabilities import tempered
from aliprod.models.weights import MODEL
from aliprod.processes import pool
from aliprod.recipe import Views
from aliprod.store import commit
from aliprod.store.lineage import Voice

CHUNK = BATCH["ten_crop"]  # pictures that are looked at together
Size = tuple[int, str]  # the side to which a picture is squared, in pixels, and the interpolation
Squares = Mapping[Size, np.ndarray]  # a picture at each size that is asked for: (3, side, side) uint8
Answer = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Recogniser:
    """Members that are asked together, and how: the views of a picture, and how many classes are said of it."""

    voices: Sequence[Voice]
    members: Sequence[Ready]
    views: Views
    top: int

    @classmethod
    def load(cls, voices: Sequence[Voice], views: Views = "ten_crop", top: int = 5) -> "Recogniser":
        """Refused: a folder holds no weights, or they know other classes than the first."""
        members = [ready(voice.folder) for voice in voices]
        for voice, member in zip(voices, members, strict=True):
            if member.classes.ids != members[0].classes.ids:
                raise Refused("knows other classes than the first member.", voice.folder, "Run the plan again.")
        return cls(voices, members, views, min(top, len(members[0].classes.ids)))

    @property
    def facts(self) -> dict[str, Any]:
        """All that an answer depends on, but for the picture."""
        members = [(commit.sha256(one.folder / MODEL), one.weight, one.temperature) for one in self.voices]
        return {"members": members, "views": self.views, "top": self.top}

    @property
    def sizes(self) -> set[Size]:
        """What its members see of a picture."""
        return {(member.config.resize, member.config.interpolation) for member in self.members}

    def answers(self, pictures: Sequence[Squares]) -> list[Answer]:
        """What each picture shows, by probabilities in float32: class_id, name and probability of the top classes."""
        classes, total = self.members[0].classes, torch.zeros(())
        for member, voice in zip(self.members if pictures else (), self.voices, strict=bool(pictures)):
            config, feed = member.config, replace(member.feed, dtype=torch.float32)
            pixels = torch.from_numpy(np.stack([one[config.resize, config.interpolation] for one in pictures]))
            seen = look(member.model, pixels.to(feed.device), config.crop, self.views, feed).cpu()
            seen = seen if voice.temperature is None else tempered(seen, voice.temperature).float()
            total = total + seen * (voice.weight / sum(one.weight for one in self.voices))
        found = []
        for row in total if pictures else ():
            values, places = row.topk(self.top)
            top = [
                {"class_id": classes.ids[place], "name": classes.names[place], "probability": round(value, 6)}
                for value, place in zip(values.tolist(), places.tolist(), strict=True)
            ]
            found.append({**top[0], "top": top})
        return found


def classify(recogniser: Recogniser, pictures: Sequence[Picture], processes: int) -> Iterator[Answer]:
    """Classify pictures, read by so many processes; memory does not grow with their number.

    Yields:
        path, class_id, name, probability and the top classes; or path and error, for what is no picture.
    Raises:
        Failed: a process died of a picture. Unreachable: a place elsewhere does not answer.
    """
    chunks = [pictures[low : low + CHUNK] for low in range(0, len(pictures), CHUNK)]
    with pool(processes if len(chunks) > 1 else 1) as readers:
        read, advice = partial(_read, recogniser.sizes), "Take out the picture that kills it."
        seen = readers.ordered_map(read, chunks, lambda chunk: chunk[0].shown, advice)
        for chunk, found in zip(chunks, seen, strict=True):
            answers = iter(recogniser.answers([one for one in found if not isinstance(one, str)]))
            for picture, one in zip(chunk, found, strict=True):
                yield {"path": picture.shown, **({"error": one} if isinstance(one, str) else next(answers))}


def squares(sizes: set[Size], source: Path | bytes) -> Squares:
    """A picture at each of these sizes. Unreadable: as `decode`."""
    image = decode(source)
    return {size: square(image, *size).numpy() for size in sizes}


def _read(sizes: set[Size], pictures: Sequence[Picture]) -> list[Squares | str]:
    return [_seen(sizes, picture) for picture in pictures]


def _seen(sizes: set[Size], picture: Picture) -> Squares | str:
    try:
        return squares(sizes, picture.source())
    except Unreadable as reason:
        return str(reason)
