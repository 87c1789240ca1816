"""Answers about many pictures, in a file that is there once all are given: CSV, JSON lines or Parquet.

Until then they lie beside it, an answer a line, and a call that was killed goes on behind the last of them:

    .answers.csv.unfinished     first what the answers depend on, then an answer a line
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from aliprod.inference.classify import CHUNK, Answer, Recogniser
from aliprod.inference.pictures import Picture
from aliprod.processes import ReadProgress
from aliprod.store import commit

_ROWS = 4096  # that are written at once


@dataclass(frozen=True)
class Answered:
    """The file of all answers; ``unreadable``: how many pictures have an error instead of a class."""

    path: str
    pictures: int
    unreadable: int


def write(
    out: Path, recogniser: Recogniser, pictures: Sequence[Picture], ask: Callable[[Sequence[Picture]], Iterator[Answer]]
) -> Iterator[ReadProgress | Answered]:
    """Write what ``ask`` answers to ``out``, whose ending says how. Whole chunks of pictures are kept from a call that
    was killed, as far as the pictures are still the same, and so is the model: the bytes are those of a single call.

    Raises:
        StorageFull: no room, or no right to write; what is there is kept.
    """
    unfinished = out.with_name(f".{out.name}.unfinished")
    head = json.dumps(recogniser.facts).encode() + b"\n"
    with commit.storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = unfinished.open("ab+", buffering=0)
        done, broken = _kept(unfinished, head, pictures)
    found = done
    with file:
        for answer in ask(pictures[found:]):
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
    schema = pa.schema([("path", pa.string()), *_columns(top), ("error", pa.string())])
    writer = csv.CSVWriter if suffix == ".csv" else pq.ParquetWriter
    with writer(fresh, schema) as file:
        while some := [_row(json.loads(line)) for line in islice(lines, _ROWS)]:
            file.write_table(pa.Table.from_pylist(some, schema))


def _columns(top: int) -> Iterable[tuple[str, pa.DataType]]:
    kinds = {"class_id": pa.int64(), "name": pa.string(), "probability": pa.float64()}
    return ((f"{name}{_place(rank)}", kind) for rank in range(top) for name, kind in kinds.items())


def _row(answer: Answer) -> dict[str, Any]:
    """An answer as a flat row: class_id, name and probability, then class_id_2 and so on."""
    path = answer["path"].encode("utf-8", "backslashreplace").decode()  # a file's name may be no text at all
    row = {"path": path, "error": answer.get("error")}
    for rank, one in enumerate(answer.get("top", ())):
        row |= {f"{name}{_place(rank)}": value for name, value in one.items()}
    return row


def _place(rank: int) -> str:
    return f"_{rank + 1}" if rank else ""
