"""The sum of the members' probabilities, what it predicts, and the submission (methods.md, 8).

Rows are matched by image id and columns by class id, never by position; the sum has its ids in the order of the
submission and its class ids ascending. It is exact, so neither the order of members, rows or columns nor the size
of a block changes a byte: every float16 in 0 to 1 is a multiple of 2**-24, so float32 is exact for sums below one,
float64 for all sums of up to 127 such numbers. Adding everything in float64, or as int32, takes twice as long.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from aliprod.ensemble.match import Places, match_columns, match_rows, submission_order
from aliprod.ensemble.score import predicted_classes, top1_error
from aliprod.errors import Failed, Refused
from aliprod.inference.probabilities import Probabilities, check, tolerance
from aliprod.store import commit
from aliprod.store.resumable import append

MOST = 127  # members or sum of weights: 127 * 2**24 is below 2**31, so int32 would do as well
TOP = 5  # classes kept for each image
TILE = 2**18  # entries added at a time: they and the member's stay in a core's cache
STRIP = 64
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of the rows low to high (exclusive).

    Attributes:
        rounded: (n, K) float32, the nearest to each sum; below one that is the sum itself.
        columns: (n, 5 or K) the highest sums' columns, ties to the first. values: those sums, exact, float64.
        candidates: (n, k) columns, ascending, with all whose sum is one or more. candidate_sums: exact, float64.
    """

    low: int
    high: int
    rounded: Tensor
    columns: Tensor
    values: Tensor
    candidates: Tensor
    candidate_sums: Tensor

    def exact(self) -> Tensor:
        """The sums: (n, K) float64."""
        return self.rounded.double().scatter_(1, self.candidates, self.candidate_sums)


@dataclass(frozen=True, eq=False)
class MatchedMembers:
    """Members whose rows and columns have been matched.

    Attributes:
        weights: whole numbers, above zero.
        ids: (N,) in the order of the submission. classes: (K,) class ids, ascending.
        rows: for each member, where its rows stand: (N,). columns: where its columns stand, None: in order.
    """

    members: tuple[Probabilities, ...]
    weights: tuple[int, ...]
    ids: pa.StringArray
    classes: npt.NDArray[np.int64]
    rows: tuple[Places, ...]
    columns: tuple[Tensor | None, ...]

    def sums(self, low: int, high: int, out: Tensor | None = None) -> Sums:
        """Add up rows low to high (exclusive). Memory: 4 bytes an entry, and 2 for each member of another order.

        Args:
            out: (high - low or more, K) float32, to hold the sums; used again, it saves a third of the time.
        Raises:
            Failed: a row is no distribution; names member, image and row.
        """
        parts = [self._part(member, low, high) for member in range(len(self.members))]
        rounded = torch.empty(high - low, len(self.classes)) if out is None else out[: high - low]
        totals, candidates = _add(parts, self.weights, rounded)
        doubtful = ~((totals - 1).abs() <= tolerance(len(self.classes)) - 2**-14)  # NaN too; float32 sums err by less
        for member in doubtful.any(dim=1).nonzero()[:, 0].tolist():
            store, rows = self.members[member], self.rows[member][low:high]
            check(parts[member], self.ids[low:high], rows.tolist(), store.name, store.split)
        exact = sum(
            (part.gather(1, candidates).double() * weight for part, weight in zip(parts, self.weights, strict=True)),
            torch.zeros(candidates.shape, dtype=torch.float64),
        )
        rounded.scatter_(1, candidates, exact.float())
        return Sums(low, high, rounded, *_top(rounded, candidates, exact), candidates, exact)

    def _part(self, member: int, low: int, high: int) -> Tensor:
        part = from_dlpack(self.members[member].take(self.rows[member][low:high]))
        columns = self.columns[member]
        return part if columns is None else part.index_select(1, columns)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What an ensemble predicts: ids (N,) in the order of the submission, predicted class ids (N,) int64."""

    ids: pa.StringArray
    predicted: Tensor


def match(members: Sequence[Probabilities], weights: Sequence[int] | None = None) -> MatchedMembers:
    """Find each image's row and each class's column in every member.

    Args:
        weights: whole numbers, one a member, default 1; a member of weight 0 is not looked at.
    Raises:
        Refused: no member, or weights that cannot be added exactly.
        Failed: a member lacks an image or has another class list.
    """
    weights = [1] * len(members) if weights is None else list(weights)
    if len(weights) != len(members) or not 1 <= sum(weights) <= MOST or any(w < 0 or w != int(w) for w in weights):
        raise Refused(
            f"{len(members)} members cannot be added with the weights {weights}.",
            advice=f"Each member needs a whole number from 0 on; together at least 1 and at most {MOST}: "
            "so many float16 numbers add up exactly.",
        )
    members = [member for member, weight in zip(members, weights, strict=True) if weight]
    names = [member.name for member in members]
    ids, rows = match_rows(names, [member.ids for member in members])
    classes, columns = match_columns(names, [member.classes for member in members])
    in_order = np.arange(len(classes))
    return MatchedMembers(
        tuple(members),
        tuple(int(weight) for weight in weights if weight),
        ids,
        classes,
        tuple(rows),
        tuple(None if np.array_equal(places, in_order) else torch.from_numpy(places) for places in columns),
    )


def each_block(ensemble: MatchedMembers, rows_per_block: int | None = None) -> Iterator[Sums]:
    """Yield the sums block by block, in one buffer: what a block's ``rounded`` holds is gone with the next block.

    Args:
        rows_per_block: memory is bounded by it; default: as many as make 64 MB in float32.
    Raises:
        Failed: as in `MatchedMembers.sums`.
    """
    rows, num_classes = len(ensemble.ids), len(ensemble.classes)
    size = rows_per_block or max(1, BLOCK_BYTES // (4 * max(1, num_classes)))
    buffer = torch.empty(min(size, rows), num_classes)
    for low in range(0, rows, size):
        yield ensemble.sums(low, min(low + size, rows), buffer)


def write_ensemble(
    folder: Path,
    members: Sequence[Probabilities],
    weights: Sequence[int] | None = None,
    record: Mapping[str, Any] | None = None,
    rows_per_block: int | None = None,
) -> Predictions:
    """Add the members up and commit the result in place of what ``folder`` held; until then that stays.

        sums-00000.npy ...   (n, K) float32: the exact sums, rounded once
        rows.parquet         image_id, label (class id, null where unknown), in the order of the submission
        classes.parquet      class_id, ascending
        predictions.parquet  image_id, class_id, top_classes (five class ids), shares (their sums over the weights' sum)
        submission.csv       id, predicted
        scores.json          top-1 errors (means over classes) of ensemble and members, null without labels

    Args:
        record: further facts of the manifest, beside the members' records, weights and digests.
    Returns:
        What these members' ensemble predicts.
    Raises:
        Failed, Refused: as in `match` and `MatchedMembers.sums`; nothing was written.
        StorageFull: no room; nothing was written.
    """
    ensemble = match(members, weights)
    origins = [
        {**member.record, "weight": weight, "probabilities": commit.digest(member.folder)}
        for member, weight in zip(ensemble.members, ensemble.weights, strict=True)
    ]
    facts = {**(record or {}), "members": origins}
    if commit.read(folder) == facts:
        return read_predictions(folder)
    written: list[Predictions] = []  # another driver may replace what stands in the folder at any time
    commit.replace(folder, lambda staging: written.append(_fill(staging, ensemble, rows_per_block)), facts)
    return written[-1]


def read_predictions(folder: Path) -> Predictions:
    """Read what a committed ensemble predicts.

    Raises:
        Failed: there is none.
    """
    if commit.read(folder) is None:
        raise Failed("holds no finished ensemble.", folder, "Submit jobs/ensemble.py: it is added up anew.")
    table = pq.read_table(folder / "predictions.parquet", columns=["image_id", "class_id"])
    return Predictions(table["image_id"].combine_chunks(), torch.from_numpy(table["class_id"].to_numpy().copy()))


def add_members(members: Sequence[tuple[Sequence[str], Tensor, Tensor]]) -> tuple[list[str], Tensor, Tensor]:
    """Add members in memory, exactly.

    Args:
        members: (ids, classes (K,) int64, probabilities (N, K) float16) each, rows and columns in any order.
    Returns:
        ids in the order of the submission, classes (K,) ascending, sums (N, K) float64.
    Raises:
        Refused: no member, or more than can be added exactly.
        Failed: an image is missing, a class list is another, a row is no distribution; names the member.
    """
    if not 1 <= len(members) <= MOST:
        raise Refused(f"{len(members)} members cannot be added exactly.", advice=f"Take 1 to {MOST}.")
    names = [f"member {number}" for number in range(len(members))]
    given = [pa.array(ids, pa.string()) for ids, _, _ in members]
    ids, rows = match_rows(names, given)
    classes, columns = match_columns(names, [part.cpu().numpy() for _, part, _ in members])
    for name, named, (_, _, part) in zip(names, given, members, strict=True):
        check(part, named, range(len(named)), name)
    sums = torch.zeros(len(ids), len(classes), dtype=torch.float64)
    for (_, _, part), places, order in zip(members, rows, columns, strict=True):
        sums += part.cpu()[torch.from_numpy(places)][:, torch.from_numpy(order)].double()
    return ids.to_pylist(), torch.from_numpy(classes), sums


def top_classes(sums: Tensor, classes: Tensor, count: int) -> Tensor:
    """The classes of the highest sums, ties to the first in ``classes``.

    Args:
        sums: (N, K). classes: (K,) class ids.
    Returns:
        (N, count) class ids, from the highest sum down; K of them where there are fewer than count.
    """
    return classes[_highest(sums, count)]


def submission(ids: Sequence[str] | pa.StringArray, predicted: Tensor | Sequence[int]) -> str:
    """The CSV that AliProducts takes: id,predicted, a line an image.

    Args:
        ids: (N,) as the catalogue gives them, in any order. predicted: (N,) class ids.
    """
    numbers: dict[str, int] = dict(zip(map(str, ids), map(int, predicted), strict=True))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "predicted"])
    writer.writerows((name, numbers[name]) for name in sorted(numbers, key=submission_order))
    return text.getvalue()


def _add(parts: Sequence[Tensor], weights: Sequence[int], sums: Tensor) -> tuple[Tensor, Tensor]:
    """Write float32 sums (n, K); return each part's row sums (members, n) and the columns of the k highest (n, k).

    k is such that every sum of one or more is among them: all sums of a row add up to the weights' sum.
    """
    rows, num_classes = parts[0].shape
    k = min(num_classes, max(TOP + 1, int(sum(weights) * (1 + tolerance(num_classes)))))
    step = max(1, TILE // max(1, num_classes))
    totals, columns = torch.empty(len(parts), rows), torch.empty(rows, k).long()
    converted = torch.empty(step, num_classes)
    padded = torch.full((step, -(-num_classes // STRIP) * STRIP), -1.0)  # below every sum
    for low in range(0, rows, step):
        high = min(low + step, rows)
        tile, added = padded[: high - low, :num_classes].zero_(), converted[: high - low]
        for member, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            added.copy_(part[low:high])  # converting first is much faster than adding mixed types
            torch.sum(added, dim=1, out=totals[member, low:high])
            tile.add_(added, alpha=weight)
        sums[low:high] = tile
        columns[low:high] = _candidates(padded[: high - low], k)
    return totals, columns


def _candidates(padded: Tensor, k: int) -> Tensor:
    """Columns of the k highest of each row, ascending: as topk, but four times as fast, since they lie in the k strips
    with the highest maxima."""
    strips = padded.view(len(padded), -1, STRIP)
    chosen = strips.amax(dim=2).topk(min(k, strips.shape[1]), dim=1).indices
    places = strips.gather(1, chosen[:, :, None].expand(-1, -1, STRIP)).flatten(1).topk(k, dim=1).indices
    return (chosen.gather(1, places // STRIP) * STRIP + places % STRIP).sort(dim=1).values


def _top(rounded: Tensor, candidates: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and exact values of the TOP highest of each row, from the exact sums of the candidates."""
    best = _highest(sums, TOP)
    columns, values = candidates.gather(1, best), sums.gather(1, best)
    tied = (sums >= values[:, -1:]).all(dim=1)  # columns that are no candidates may have the same sum
    if candidates.shape[1] < rounded.shape[1] and bool(tied.any()):
        columns[tied] = _highest(rounded[tied].double().scatter_(1, candidates[tied], sums[tied]), TOP)
    return columns, values


def _highest(values: Tensor, count: int) -> Tensor:
    """Columns of the highest values, ties to the first: (N, min(count, K))."""
    count = min(count, values.shape[1])
    top = values.topk(min(count + 1, values.shape[1]), dim=1)
    columns = top.indices[:, :count].clone()
    tied = (top.values[:, 1:] == top.values[:, :-1]).any(dim=1)  # topk says nothing about the order of equals
    rest = values[tied]
    for place in range(count if len(rest) else 0):
        first = rest.argmax(dim=1, keepdim=True)  # the first of equals
        columns[tied, place] = first[:, 0]
        rest.scatter_(1, first, -torch.inf)
    return columns


def _fill(staging: Path, ensemble: MatchedMembers, rows_per_block: int | None) -> Predictions:
    classes, total = torch.from_numpy(ensemble.classes), sum(ensemble.weights)
    per_shard = min(8192, max(1, 2**28 // (4 * max(1, len(classes)))))
    best = torch.empty(len(ensemble.ids), min(TOP, len(classes)), dtype=torch.int64)
    shares = torch.empty(best.shape, dtype=torch.float64)
    for sums in each_block(ensemble, rows_per_block):
        append(staging / "sums", sums.rounded.numpy(), sums.low, len(ensemble.ids), per_shard)
        best[sums.low : sums.high], shares[sums.low : sums.high] = classes[sums.columns], sums.values / total
    labels = ensemble.members[0].labels.take(pa.array(ensemble.rows[0]))
    found = Predictions(ensemble.ids, best[:, 0])
    errors = _scores(labels, found, ensemble.members)
    (staging / "scores.json").write_text(json.dumps(errors, indent=1), encoding="utf-8")
    (staging / "submission.csv").write_text(submission(found.ids, found.predicted), encoding="utf-8")
    pq.write_table(pa.table({"image_id": ensemble.ids, "label": labels}), staging / "rows.parquet")
    pq.write_table(pa.table({"class_id": ensemble.classes}), staging / "classes.parquet")
    predictions = {
        "image_id": ensemble.ids,
        "class_id": best[:, 0].numpy(),
        "top_classes": _lists(best),
        "shares": _lists(shares),
    }
    pq.write_table(pa.table(predictions), staging / "predictions.parquet")
    return found


def _scores(labels: pa.Int64Array, found: Predictions, members: Sequence[Probabilities]) -> dict[str, Any]:
    if labels.null_count == len(labels):
        return {"ensemble": None, "members": {member.name: None for member in members}}
    return {
        "ensemble": top1_error(labels, found.predicted.numpy()),
        "members": {member.name: top1_error(member.labels, predicted_classes(member)) for member in members},
    }


def _lists(rows: Tensor) -> pa.ListArray:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.flatten().numpy()))
