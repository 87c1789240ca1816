"""What pictures show, as a model says it, or an ensemble: the weighted mean of its members' probabilities.

Answers about many pictures go into a file that is there once all are given: CSV, JSON lines or Parquet. Until then they
lie beside it, an answer a line, and a call that was killed goes on behind the last of them:

    .answers.csv.unfinished     first what the answers depend on, then an answer a line
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import csv
from torch import Tensor

from aliprod.errors import Refused
from aliprod.inference.pictures import Picture, Size, Squares, read
from aliprod.inference.predict import BATCH, Ready, ready, seen
from aliprod.inference.probabilities import tempered
from aliprod.models.weights import MODEL
from aliprod.processes import ReadProgress, ordered_map
from aliprod.recipe import Views
from aliprod.store import commit
from aliprod.store.lineage import Voice

CHUNK = BATCH["ten_crop"]  # pictures that are looked at together
Answer = dict[str, Any]
_ROWS = 4096  # that are written at once


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

    @torch.inference_mode()
    def probabilities(self, pictures: Sequence[Squares]) -> Tensor:
        """The weighted mean (n, K) of the members' probabilities of pictures, at least one, in float32."""
        parts = []
        for member in self.members:
            config, feed = member.config, member.feed
            pixels = torch.from_numpy(np.stack([one[config.resize, config.interpolation] for one in pictures]))
            parts.append(seen(member.model, pixels.to(feed.device), config.crop, self.views, feed).cpu())
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

    Yields path, class_id, name, probability and the top classes; or path and error, for what is no picture. Failed: a
    process died of a picture. Unreachable: a place elsewhere does not answer.
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


@dataclass(frozen=True)
class Answered:
    """The file of all answers; ``unreadable``: how many pictures have an error instead of a class."""

    path: str
    pictures: int
    unreadable: int


def write_answers(
    out: Path, recogniser: Recogniser, pictures: Sequence[Picture], processes: int
) -> Iterator[ReadProgress | Answered]:
    """Write what `classify` answers to ``out``, whose ending says how. Whole chunks of pictures are kept from a call
    that was killed, as far as the pictures are still the same, and so is the model: the bytes are those of a single
    call. StorageFull: no room, or no right to write; what is there is kept.
    """
    unfinished = out.with_name(f".{out.name}.unfinished")
    head = json.dumps(recogniser.facts).encode() + b"\n"
    with commit.storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = unfinished.open("ab+", buffering=0)
        done, broken = _kept(unfinished, head, pictures)
    found = done
    with file:
        for answer in classify(recogniser, pictures[found:], processes):
            with commit.storage(out):
                file.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            done, broken = done + 1, broken + ("error" in answer)
            yield ReadProgress(done, len(pictures), found, broken)
    with commit.storage(out):
        fresh = out.with_name(f".{out.name}.partial")
        with unfinished.open("rb") as lines:
            next(lines)
            _convert(lines, fresh, out.suffix, recogniser.top)
        os.replace(fresh, out)
        unfinished.unlink()
    yield Answered(str(out), len(pictures), broken)


def _kept(unfinished: Path, head: bytes, pictures: Sequence[Picture]) -> tuple[int, int]:
    """How many answers of an earlier call hold, and how many of them are errors. What is behind them is cut off."""
    kept = end = broken = errors = 0
    with unfinished.open("rb+") as file:
        if file.readline() == head:
            end = len(head)
            for number, (picture, line) in enumerate(zip(pictures, file, strict=False), 1):
                answer = _answer(line)
                if answer.get("path") != picture.shown:
                    break
                errors += "error" in answer
                if number % CHUNK == 0 or number == len(pictures):
                    kept, end, broken = number, file.tell(), errors
        file.truncate(end)
        if not end:
            file.seek(0)
            file.write(head)
    return kept, broken


def _answer(line: bytes) -> Answer:
    try:
        return dict(json.loads(line))
    except ValueError:  # the last one, cut short
        return {}


def _convert(lines: IO[bytes], fresh: Path, suffix: str, top: int) -> None:
    if suffix == ".jsonl":
        with fresh.open("wb") as file:
            shutil.copyfileobj(lines, file)
        return
    kinds = {"class_id": pa.int64(), "name": pa.string(), "probability": pa.float64()}
    columns = [(f"{name}{_place(rank)}", kind) for rank in range(top) for name, kind in kinds.items()]
    schema = pa.schema([("path", pa.string()), *columns, ("error", pa.string())])
    writer = csv.CSVWriter if suffix == ".csv" else pq.ParquetWriter
    with writer(fresh, schema) as file:
        while some := [_row(json.loads(line)) for line in islice(lines, _ROWS)]:
            file.write_table(pa.Table.from_pylist(some, schema))


def _row(answer: Answer) -> dict[str, Any]:
    """An answer as a flat row: class_id, name and probability, then class_id_2 and so on."""
    path = answer["path"].encode("utf-8", "backslashreplace").decode()  # a file's name may be no text at all
    row = {"path": path, "error": answer.get("error")}
    for rank, one in enumerate(answer.get("top", ())):
        row |= {f"{name}{_place(rank)}": value for name, value in one.items()}
    return row


def _place(rank: int) -> str:
    return f"_{rank + 1}" if rank else ""
