"""What pictures show, as a model says it, or an ensemble: the weighted mean of its members' probabilities."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aliprod.errors import Refused
from aliprod.inference.pictures import Picture, Size, Squares, read
from aliprod.inference.predict import BATCH, Ready, look, ready
from aliprod.inference.probabilities import tempered
from aliprod.models.weights import MODEL
from aliprod.processes import ordered_map
from aliprod.recipe import Views
from aliprod.store import commit
from aliprod.store.lineage import Voice

CHUNK = BATCH["ten_crop"]  # pictures that are looked at together
Answer = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Recogniser:
    """Members that are asked together, and how: the views of a picture, and how many classes are said of it."""

    voices: Sequence[Voice]
    members: Sequence[Ready]
    views: Views
    top: int

    @classmethod
    def load(
        cls, voices: Sequence[Voice], views: Views = "ten_crop", top: int = 5, device: torch.device | None = None
    ) -> "Recogniser":
        """Refused: a folder holds no weights, or they know other classes than the first."""
        members = [ready(voice.folder, device=device) for voice in voices]
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

    def probabilities(self, pictures: Sequence[Squares]) -> Tensor:
        """The weighted mean (n, K) of the members' probabilities of pictures, at least one, in float32."""
        parts = []
        for member in self.members:
            config, feed = member.config, replace(member.feed, dtype=torch.float32)
            pixels = torch.from_numpy(np.stack([one[config.resize, config.interpolation] for one in pictures]))
            parts.append(look(member.model, pixels.to(feed.device), config.crop, self.views, feed).cpu())
        return mean(parts, self.voices)

    def answers(self, pictures: Sequence[Squares]) -> list[Answer]:
        """What each picture, of at least one, shows: class_id, name and probability of the top classes."""
        classes, found = self.members[0].classes, list[Answer]()
        for row in self.probabilities(pictures):
            values, places = row.topk(self.top)
            top = [
                {"class_id": classes.ids[place], "name": classes.names[place], "probability": round(value, 6)}
                for value, place in zip(values.tolist(), places.tolist(), strict=True)
            ]
            found.append({**top[0], "top": top})
        return found


def mean(parts: Sequence[Tensor], voices: Sequence[Voice]) -> Tensor:
    """The mean of members' probabilities (n, K), each tempered, by what they count."""
    total = torch.zeros(())
    for part, voice in zip(parts, voices, strict=True):
        even = part if voice.temperature is None else tempered(part, voice.temperature).float()
        total = total + even * (voice.weight / sum(one.weight for one in voices))
    return total


def classify(recogniser: Recogniser, pictures: Sequence[Picture], processes: int) -> Iterator[Answer]:
    """Classify pictures, read by so many processes; memory does not grow with their number.

    Yields:
        path, class_id, name, probability and the top classes; or path and error, for what is no picture.
    Raises:
        Failed: a process died of a picture. Unreachable: a place elsewhere does not answer.
    """
    chunks = [pictures[low : low + CHUNK] for low in range(0, len(pictures), CHUNK)]
    processes, look = processes if len(chunks) > 1 else 1, partial(read, recogniser.sizes)
    advice = "Take out the picture that kills it."
    seen = ordered_map(look, chunks, processes, lambda chunk: chunk[0].shown, advice)
    for chunk, found in zip(chunks, seen, strict=True):
        sound = [one for one in found if not isinstance(one, str)]
        answers = iter(recogniser.answers(sound) if sound else ())
        for picture, one in zip(chunk, found, strict=True):
            yield {"path": picture.shown, **({"error": one} if isinstance(one, str) else next(answers))}
