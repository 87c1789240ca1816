"""The sum of the members' probabilities, what it predicts, and the submission.

Rows are matched by image id and columns by class id, never by position; the sum has its ids in the order of the
submission and its class ids ascending. It is exact, so neither the order of members, rows or columns nor the size
of a block changes a byte: every float16 in 0 to 1 is a multiple of 2**-24, so float32 is exact for sums below one,
float64 for all sums of up to 127 such numbers. Adding everything in float64, or as int32, takes twice as long.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from aliprod.data.selection import surest
from aliprod.errors import Failed, Refused
from aliprod.inference.probabilities import Probabilities, check, tempered, tolerance
from aliprod.store import commit
from aliprod.store.layout import PREDICTIONS
from aliprod.store.resumable import append

MOST = 127  # members or sum of weights: 127 * 2**24 is below 2**31, so int32 would do as well
TOP = 5  # classes kept for each image
TILE = 2**18  # entries added at a time: they and the member's stay in a core's cache
STRIP = 64
BLOCK_BYTES = 64 * 2**20
_FEW_ROWS = 64  # 13 MB of sums at 50,030 classes

Places: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of the rows low to high (exclusive).

    ``rounded``: (n, K) float32, the nearest to each sum; below one that is the sum itself. ``columns``: (n, 5 or K) of
    the highest sums, ties to the first; ``values``: those sums, exact, float64.
    """

    low: int
    high: int
    rounded: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class MatchedMembers:
    """Members whose rows and columns have been matched, with weights above zero.

    ``ids``: (N,) in the order of the submission. ``classes``: (K,) class ids, ascending. ``rows``: where each member
    has them, (N,); ``columns``: the same, None: in order. ``temperatures``: one a member, or none.
    """

    members: tuple[Probabilities, ...]
    weights: tuple[int, ...]
    ids: pa.StringArray
    classes: npt.NDArray[np.int64]
    rows: tuple[Places, ...]
    columns: tuple[Tensor | None, ...]
    temperatures: tuple[float, ...] = ()

    @property
    def labels(self) -> pa.Int64Array:
        """Class ids of the images (N,), null where unknown."""
        return self.members[0].labels.take(pa.array(self.rows[0]))

    def part(self, number: int, places: Places | slice) -> Tensor:
        """A member's rows (n, K) float16 of those places in ``ids``; tempered, they are rounded to float16 too, so that
        their sums stay exact. Failed: a row that is to be tempered is no distribution."""
        columns = self.columns[number]
        part = from_dlpack(self.members[number].take(self.rows[number][places]))
        part = part if columns is None else part.index_select(1, columns)
        if not self.temperatures:
            return part
        self.check(number, part, places)
        return tempered(part, self.temperatures[number]).half()

    def check(self, number: int, part: Tensor, places: Places | slice) -> None:
        """Failed: one of a member's rows of those places is no distribution; names member, image and row."""
        member, rows = self.members[number], self.rows[number][places]
        check(part, member.ids.take(pa.array(rows)), rows.tolist(), member.name, member.split)

    def sums(self, low: int, high: int, out: Tensor | None = None) -> Sums:
        """Add up rows low to high (exclusive). Memory: 4 bytes an entry, and 2 for each member of another order.

        ``out``: (high - low or more, K) float32, to hold the sums; used again, it saves a third of the time. Failed: as
        `check`.
        """
        parts = [self.part(number, slice(low, high)) for number in range(len(self.members))]
        rounded = torch.empty(high - low, len(self.classes)) if out is None else out[: high - low]
        totals, candidates = _add(parts, self.weights, rounded)
        doubtful = ~((totals - 1).abs() <= tolerance(len(self.classes)) - 2**-14)  # NaN too; float32 sums err by less
        for number in doubtful.any(dim=1).nonzero()[:, 0].tolist():
            self.check(number, parts[number], slice(low, high))
        exact = torch.zeros(candidates.shape, dtype=torch.float64)
        for part, weight in zip(parts, self.weights, strict=True):
            exact.add_(part.gather(1, candidates), alpha=weight)
        rounded.scatter_(1, candidates, exact.float())
        return Sums(low, high, rounded, *_top(rounded, candidates, exact))


def match(
    members: Sequence[Probabilities], weights: Sequence[int] | None = None, temperatures: Sequence[float] = ()
) -> MatchedMembers:
    """Find each image's row and each class's column in every member; those of weight 0 are not looked at. Refused: no
    member, or weights that cannot be added exactly. Failed: a member lacks an image or has another class list."""
    weights = [1] * len(members) if weights is None else list(weights)
    if len(weights) != len(members) or not 1 <= sum(weights) <= MOST or any(w < 0 or w != int(w) for w in weights):
        raise Refused(
            f"{len(members)} members cannot be added with the weights {weights}.",
            advice=f"Each member needs a whole number from 0 on; together at least 1 and at most {MOST}: "
            "so many float16 numbers add up exactly.",
        )
    members = list(compress(members, weights))
    names = [member.name for member in members]
    ids, rows = _match_rows(names, [member.ids for member in members])
    classes, columns = _match_columns(names, [member.classes for member in members])
    in_order = np.arange(len(classes))
    return MatchedMembers(
        tuple(members),
        tuple(map(int, compress(weights, weights))),
        ids,
        classes,
        tuple(rows),
        tuple(None if np.array_equal(places, in_order) else torch.from_numpy(places) for places in columns),
        tuple(compress(temperatures, weights)),
    )


def each_block(ensemble: MatchedMembers, rows_per_block: int | None = None) -> Iterator[Sums]:
    """Yield the sums block by block (64 MB of them by default), in one buffer: what a block's ``rounded`` holds is gone
    with the next block."""
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
    temperatures: Sequence[float] = (),
) -> None:
    """Add the members up and commit the result in place of what ``folder`` held; until then that stays.

        sums-00000.npy ...   (n, K) float32: the exact sums, rounded once
        rows.parquet         image_id, label (class id, null where unknown), in the order of the submission
        classes.parquet      class_id, ascending
        predictions.parquet  image_id, class_id, top_classes (five class ids), shares (their sums over the weights' sum)
        submission.csv       id, predicted

    ``record``: further facts of the manifest, beside the members' records, weights and digests. Failed, Refused,
    StorageFull: as in `match` and `MatchedMembers.sums`, or no room; nothing was written.
    """
    ensemble = match(members, weights, temperatures)
    origins = [
        {**member.record, "weight": weight, "probabilities": commit.digest(member.folder)}
        for member, weight in zip(ensemble.members, ensemble.weights, strict=True)
    ]
    for origin, temperature in zip(origins, ensemble.temperatures, strict=False):
        origin["temperature"] = temperature
    facts = {**(record or {}), "members": origins}
    if commit.read(folder) != facts:
        commit.replace(folder, lambda staging: _fill(staging, ensemble, rows_per_block), facts)


def confident(
    members: Sequence[Probabilities], threshold: float, per_class: int
) -> tuple[pa.StringArray, Places, npt.NDArray[np.float32]]:
    """Images whose mean probability reaches ``threshold``, at most ``per_class`` a class, the surest first (Lee 2013):
    ids, class ids and mean probabilities (n,). Memory grows with the ids alone."""
    ensemble = match(members)
    top, best = np.empty(len(ensemble.ids)), np.empty(len(ensemble.ids), dtype=np.int64)
    for block in each_block(ensemble, _FEW_ROWS):
        top[block.low : block.high] = block.values[:, 0] / len(members)
        best[block.low : block.high] = block.columns[:, 0]
    chosen = surest(top, best, threshold, per_class)
    return ensemble.ids.take(pa.array(chosen)), ensemble.classes[best[chosen]], top[chosen].astype(np.float32)


def add_members(members: Sequence[tuple[Sequence[str], Tensor, Tensor]]) -> tuple[list[str], Tensor, Tensor]:
    """Add members in memory, exactly: (ids, classes (K,), probabilities (N, K)) each, rows and columns in any order.

    Returns ids in the order of the submission, classes (K,) ascending, sums (N, K) float64. Refused, Failed: as in
    `match`; a row is no distribution.
    """
    if not 1 <= len(members) <= MOST:
        raise Refused(f"{len(members)} members cannot be added exactly.", advice=f"Take 1 to {MOST}.")
    names = [f"member {number}" for number in range(len(members))]
    given = [pa.array(ids, pa.string()) for ids, _, _ in members]
    ids, rows = _match_rows(names, given)
    classes, columns = _match_columns(names, [part.cpu().numpy() for _, part, _ in members])
    for name, named, (_, _, part) in zip(names, given, members, strict=True):
        check(part, named, range(len(named)), name)
    sums = torch.zeros(len(ids), len(classes), dtype=torch.float64)
    for (_, _, part), places, order in zip(members, rows, columns, strict=True):
        sums += part.cpu()[torch.from_numpy(places)][:, torch.from_numpy(order)].double()
    return ids.to_pylist(), torch.from_numpy(classes), sums


def top_classes(sums: Tensor, classes: Tensor, count: int) -> Tensor:
    """The class ids (N, count or K) of the highest of sums (N, K), from the highest down, ties to the first."""
    return classes[_highest(sums, count)]


def submission(ids: Sequence[str] | pa.StringArray, predicted: Tensor | Places | Sequence[int]) -> str:
    """The CSV that AliProducts takes: id,predicted, a line an image, of ids in any order and their class ids."""
    numbers: dict[str, int] = dict(zip(map(str, ids), map(int, predicted), strict=True))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "predicted"])
    writer.writerows((name, numbers[name]) for name in sorted(numbers, key=submission_order))
    return text.getvalue()


def _add(parts: Sequence[Tensor], weights: Sequence[int], sums: Tensor) -> tuple[Tensor, Tensor]:
    """Write float32 sums (n, K); return each part's row sums (members, n) and the columns of the k highest (n, k), such
    that every sum of one or more is among them: all sums of a row add up to the weights' sum."""
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
    rest, columns = values.clone(), list[Tensor]()
    for _ in range(min(count, values.shape[1])):  # topk says nothing about the order of equals
        columns.append(rest.argmax(dim=1, keepdim=True))  # the first of them
        rest.scatter_(1, columns[-1], -torch.inf)
    return torch.cat(columns, dim=1)


def _fill(staging: Path, ensemble: MatchedMembers, rows_per_block: int | None) -> None:
    ids, classes, total = ensemble.ids, torch.from_numpy(ensemble.classes), sum(ensemble.weights)
    per_shard = min(8192, max(1, 2**28 // (4 * max(1, len(classes)))))
    best = torch.empty(len(ids), min(TOP, len(classes)), dtype=torch.int64)
    shares = torch.empty(best.shape, dtype=torch.float64)
    for sums in each_block(ensemble, rows_per_block):
        append(staging / "sums", sums.rounded.numpy(), sums.low, len(ids), per_shard)
        best[sums.low : sums.high], shares[sums.low : sums.high] = classes[sums.columns], sums.values / total
    predicted = best[:, 0].numpy()
    (staging / "submission.csv").write_text(submission(ids, predicted), encoding="utf-8")
    pq.write_table(pa.table({"image_id": ids, "label": ensemble.labels}), staging / "rows.parquet")
    pq.write_table(pa.table({"class_id": ensemble.classes}), staging / "classes.parquet")
    predictions = {"class_id": predicted, "top_classes": _lists(best), "shares": _lists(shares)}
    pq.write_table(pa.table({"image_id": ids} | predictions), staging / PREDICTIONS)


def _lists(rows: Tensor) -> pa.ListArray:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(offsets, rows.flatten().numpy())


def submission_order(name: str) -> tuple[int, int, str, str]:
    """Sort key of image ids: stems that are all digits first, by that number; then the rest as strings."""
    stem = name.rsplit(".", 1)[0]
    if not (stem.isascii() and stem.isdigit()):
        return (1, 0, "", name)
    digits = stem.lstrip("0")
    return (0, len(digits), digits, name)  # as int() would order them, but of any length


def _match_rows(names: Sequence[str], ids: Sequence[pa.StringArray]) -> tuple[pa.StringArray, list[Places]]:
    """The ids in the order of the submission, and where each member (of these names) has them."""
    for name, own in zip(names, ids, strict=True):
        if own is ids[0] or not own.equals(ids[0]):
            _same_images(name, own, names[0], ids[0])
    ordered = pa.array(sorted(ids[0].to_pylist(), key=submission_order), pa.string())
    return ordered, [np.asarray(pc.index_in(ordered, value_set=own), dtype=np.int64) for own in ids]


def _same_images(name: str, own: pa.StringArray, other_name: str, other: pa.StringArray) -> None:
    advice = (
        "Nothing was written. All members must have predicted one image set: delete the probabilities of the "
        "member that is wrong and submit jobs/ensemble.py."
    )
    twice = pc.filter(own.value_counts().field("values"), pc.greater(own.value_counts().field("counts"), 1))
    if len(twice):
        raise Failed(f"has more than one row for image {twice[0]}.", name, advice)
    for lacking, has, poor, rich in ((name, other_name, own, other), (other_name, name, other, own)):
        missing = rich.filter(pc.invert(pc.is_in(rich, value_set=poor)))
        if len(missing):
            what = f"has no probabilities of image {missing[0]}, which {has} has ({len(missing):,} such images)."
            raise Failed(what, lacking, advice)


def _match_columns(names: Sequence[str], classes: Sequence[Places]) -> tuple[Places, list[Places]]:
    """The class ids, ascending, and where each member (of these names) has them."""
    order = np.argsort(classes[0])
    ordered = classes[0][order]
    orders = [order if np.array_equal(own, classes[0]) else np.argsort(own) for own in classes]
    for name, own, places in zip(names, classes, orders, strict=True):
        if np.array_equal(own[places], ordered) and (np.diff(ordered) > 0).all():
            continue
        other = np.setxor1d(own, ordered)
        example = f"class {other[0]} is in only one of them" if len(other) else "a class id occurs twice"
        raise Failed(
            f"has another class list ({len(own):,} classes) than {names[0]} ({len(ordered):,}): {example}.",
            name,
            "Nothing was written. All members must have been trained on one catalogue.",
        )
    return ordered, orders
