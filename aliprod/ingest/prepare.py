"""The images of a catalogue become shards: each is read once, judged and normalised (`stored`).

Each shard is a committed folder beside OUT, so that a call that was killed goes on after the last of them; OUT itself
appears when all are there.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from aliprod.catalogue import shards, tree
from aliprod.catalogue.catalogue import Catalogue, Flaw, Images
from aliprod.catalogue.remote_folder import RemoteFolder, folder_at
from aliprod.catalogue.sources import read
from aliprod.errors import Refused
from aliprod.ingest.check import first_picture, not_listed
from aliprod.ingest.stored import SHARD, Settings, ShardRecipe, make_shard
from aliprod.processes import Pool, pool
from aliprod.store import commit


@dataclass(frozen=True)
class PrepareProgress:
    """So many images ``of`` all are done, ``found`` of them by an earlier call that was cut short."""

    images: int
    of: int
    found: int
    broken: int

    def line(self, seconds: float) -> str:
        """For a terminal, after so many seconds."""
        here = self.images - self.found
        left = f"{seconds * (self.of - self.images) / here:,.0f} s left" if here else "..."
        found = f", {self.found:,} found" if self.found else ""
        return f"{self.images:,} of {self.of:,} images{found}, {self.broken:,} unreadable, {left}"


@dataclass(frozen=True)
class PreparedCatalogue:
    """What is there now. ``skipped``: images that were left out; ``bytes``: of the shards."""

    path: str
    images: int
    skipped: int
    fingerprint: str
    bytes: int
    problems: tuple[Flaw, ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """For ``aliprod data prepare --json``."""
        return {name: value for name, value in vars(self).items() if name != "problems"}

    def text(self, most: int = 20) -> str:
        """For a terminal: the first problems, and what is there."""
        lines = [f"{problem.path}: {problem.problem}" for problem in self.problems[:most]]
        if len(self.problems) > most:
            lines.append(f"... and {len(self.problems) - most:,} more, in {self.path}/{commit.MANIFEST}")
        said = f"{self.path}: {self.images:,} images, {self.skipped:,} skipped, {self.bytes:,} bytes"
        return "\n".join([*lines, said])


def prepare(
    path: str | Path, out: str | Path, settings: Settings, max_skipped: float = 0.5, processes: int = 1
) -> Iterator[PrepareProgress | PreparedCatalogue]:
    """Write the shards of a catalogue; what is written already, by a call that was killed, is verified and kept.

    Args:
        path, out: of this machine, or URIs of what pyarrow reaches: pictures are read from there one by one, and
            shards are made on this machine's disk first (`shards.cache`).
        out: must not exist, be empty, or hold what this very call has written before.
        max_skipped: the share of all images that may be unreadable.
        processes: that work side by side; they change no byte.
    Yields:
        A PrepareProgress per shard; at the end the PreparedCatalogue.
    Raises:
        Refused: as `sources.read`; too much is unreadable, then nothing is left behind; ``out`` holds something else.
        StorageFull: no room; what is done is kept.
        Unreachable: of a URI; what is done is kept.
        Failed: a process died of a picture.
    """
    source, target = folder_at(path), folder_at(out)
    with _catalogue(source) as catalogue:
        if isinstance(target, Path):
            local = target.resolve()
        elif (says := target.manifest()) is not None:
            yield _prepared_there(target, says, catalogue, settings)
            return
        else:
            local = shards.cache() / "uploads" / hashlib.sha256(target.shown.encode()).hexdigest()
        yield from _prepare(catalogue, local, settings, max_skipped, processes)
        done = _prepared_here(local, catalogue, settings)
        if isinstance(target, RemoteFolder):
            target.upload(local)
            shutil.rmtree(local)
            done = replace(done, path=target.shown)
        yield done


@contextmanager
def _catalogue(source: Path | RemoteFolder) -> Iterator[Catalogue]:
    if isinstance(source, Path):
        yield read(source)
        return
    with tempfile.TemporaryDirectory(prefix="aliprod-") as folder:
        source.outline(Path(folder))
        found = read(Path(folder))
        train, val, test = (replace(images, remote=source) for images in found.splits)
        yield replace(found, train=train, val=val, test=test)


def _prepare(
    catalogue: Catalogue, out: Path, settings: Settings, max_skipped: float, processes: int
) -> Iterator[PrepareProgress]:
    work = out.parent / f".{out.name}.preparing"
    with commit.storage(out):
        if out.exists() and not (out / commit.MANIFEST).exists() and not (out.is_dir() and not any(out.iterdir())):
            advice = "Name a new or empty folder, or remove this one first."
            raise Refused("there is something already; nothing was written.", out, advice)
        work.mkdir(parents=True, exist_ok=True)
    with shards.alone(work / "lock", wait=False):
        if not (out / commit.MANIFEST).exists():
            try:
                with pool(processes) as makers:
                    yield from _Run(catalogue, work, settings, max_skipped, makers).write(out)
            except Refused:  # shards that were made while a mount was gone are not to be found the next time
                shutil.rmtree(work, ignore_errors=True)
                raise
        shutil.rmtree(work, ignore_errors=True)


class _Run:
    """One call: what it is asked for, and the count of what has been done."""

    def __init__(self, catalogue: Catalogue, work: Path, settings: Settings, max_skipped: float, makers: Pool) -> None:
        self.catalogue, self.work, self.settings, self.makers = catalogue, work, settings, makers
        self.max_skipped = max_skipped
        self.problems = [*catalogue.problems, *not_listed(catalogue)]
        self.images = self.broken = sum(flaw.skipped for flaw in self.problems)
        self.of = self.images + sum(map(len, catalogue.splits))
        self.found = 0
        self.sizes: dict[str, list[tuple[int, int]]] = {}  # of each split: rows and bytes of JPEG in each shard

    def write(self, out: Path) -> Iterator[PrepareProgress]:
        """Make all shards, and ``out`` of them."""
        train = yield from self._make(self.catalogue.train)
        val = yield from self._make(self._of_classes(train))
        yield from self._make(self.catalogue.test)
        left = replace(self.catalogue, train=train, val=val, prepared="")
        self._publish(out, _without_empty_classes(left))

    def _make(self, images: Images) -> Generator[PrepareProgress, None, Images]:
        """Make the shards of a split; the images that are in them."""
        left_out: list[int] = []
        sizes = self.sizes[images.split] = []
        advice = "Take out the picture that kills it; the same command goes on."
        recipes = self._recipes(images)
        made = self.makers.ordered_map(make_shard, recipes, lambda recipe: first_picture(recipe.images), advice)
        for number, result in enumerate(made):
            left_out += [number * SHARD + row for row in result.left_out]
            sizes.append((result.rows - len(result.left_out), result.jpeg_bytes))
            self.images += result.rows
            self.found += result.rows if result.found else 0
            self._count_broken(result.problems, len(result.left_out) + result.shown_anyway)
            yield PrepareProgress(self.images, self.of, self.found, self.broken)
        return images.take(np.delete(np.arange(len(images)), left_out)) if left_out else images

    def _recipes(self, images: Images) -> Iterator[ShardRecipe]:
        class_ids = np.append(self.catalogue.classes, -1)  # the last: of label -1
        for number, part in enumerate(images.chunks(SHARD)):
            folder = self.work / Path(shards.shard_name(images.split, number)).stem
            yield ShardRecipe(folder, part, class_ids[part.labels], self.settings)

    def _count_broken(self, problems: list[Flaw], images: int) -> None:
        """Refuse as soon as it is certain that too much is broken, not after hours: perhaps a mount is gone."""
        self.problems += problems
        self.broken += images
        if self.broken > self.max_skipped * self.of:
            first = next((f"The first: {p.path} {p.problem}. " for p in self.problems if p.skipped), "")
            raise Refused(
                f"{self.broken:,} of {self.of:,} images cannot be used, and --max-skipped is {self.max_skipped:g}.",
                self.catalogue.train.location,
                f"{first}Is all of the catalogue there? `aliprod data check` lists what is wrong. Nothing was written.",
            )

    def _of_classes(self, train: Images) -> Images:
        """The val images of classes of which a training image is left."""
        if not len(train):
            advice = "`aliprod data check` lists them all."
            raise Refused("has no training image that can be read.", train.location, advice)
        val = self.catalogue.val
        lost = np.setdiff1d(np.arange(self.catalogue.num_classes), train.labels)
        self.problems += [
            Flaw("train", f"class {class_id}: no training image can be read, so it is no class")
            for class_id in self.catalogue.classes[lost].tolist()
        ]
        without = np.isin(val.labels, lost)
        paths = val.paths.filter(pa.array(without)).to_pylist()
        self.images += len(paths)
        self._count_broken([Flaw(path, "its class has no training image: skipped", True) for path in paths], len(paths))
        return val.take(np.flatnonzero(~without)) if paths else val

    def _publish(self, out: Path, left: Catalogue) -> None:
        record = shards.Record(
            prepared=shards.FORMAT,
            short_side=self.settings.short_side,
            quality=self.settings.quality,
            source=self.catalogue.fingerprint,
            content=left.fingerprint,
            classes=left.classes.tolist(),
            names=list(left.names),
            ancestor=None if left.ancestor is None else left.ancestor.tolist(),
            counts={
                images.split: np.bincount(images.labels, minlength=left.num_classes).tolist()
                for images in (left.train, left.val)
            },
            test_labels=left.test_labels is not None,
            shards=self.sizes,
            skipped=[(flaw.path, flaw.problem) for flaw in self.problems if flaw.skipped],
            problems=[(flaw.path, flaw.problem) for flaw in self.problems if not flaw.skipped],
        )

        def fill(folder: Path) -> None:
            for name in record.file_names():
                commit.link(self.work / Path(name).stem / name, folder / name)
            write_index(folder, left)

        shards.remove_partials(out)
        if out.exists():
            out.rmdir()  # it is empty
        commit.write(out, fill, record.model_dump())


def _without_empty_classes(catalogue: Catalogue) -> Catalogue:
    kept = np.unique(catalogue.train.labels)
    label = np.full(catalogue.num_classes + 1, -1, np.int64)  # the last: of label -1
    label[kept] = np.arange(len(kept))
    train, val = (replace(images, labels=label[images.labels]) for images in (catalogue.train, catalogue.val))
    return replace(
        catalogue,
        classes=catalogue.classes[kept],
        names=tuple(catalogue.names[old] for old in kept.tolist()),
        train=train,
        val=val,
        test_labels=None if catalogue.test_labels is None else label[catalogue.test_labels],
        ancestor=None if catalogue.ancestor is None else tree.renumbered(catalogue.ancestor[:, kept]),
    )


def write_index(folder: Path, catalogue: Catalogue) -> None:
    """Write the ids and labels of all splits."""
    unknown = catalogue.test.labels if catalogue.test_labels is None else catalogue.test_labels
    shards.write_rows(folder, "train", catalogue.train.ids, catalogue.train.labels)
    shards.write_rows(folder, "val", catalogue.val.ids, catalogue.val.labels)
    shards.write_rows(folder, "test", catalogue.test.ids, unknown)


# What is there


def _prepared_here(out: Path, catalogue: Catalogue, settings: Settings) -> PreparedCatalogue:
    found = shards.manifest(out)
    size = sum((out / name).stat().st_size for name in found.record.file_names())
    return _prepared(str(out), found, size, catalogue, settings)


def _prepared_there(
    out: RemoteFolder, says: dict[str, Any], catalogue: Catalogue, settings: Settings
) -> PreparedCatalogue:
    """By its manifest, which was written last."""
    files = says.get("files", {})
    found = shards.parsed(says.get("record"), {name: file["sha256"] for name, file in files.items()}, out.shown)
    size = sum(files[name]["bytes"] for name in found.record.file_names())
    return _prepared(out.shown, found, size, catalogue, settings)


def _prepared(
    out: str, found: shards.Manifest, size: int, catalogue: Catalogue, settings: Settings
) -> PreparedCatalogue:
    record = found.record
    asked = (catalogue.fingerprint, settings.short_side, settings.quality)
    if (record.source, record.short_side, record.quality) != asked:
        raise Refused(
            f"holds another catalogue, or one that was prepared otherwise: short side {record.short_side}, "
            f"quality {record.quality}.",
            out,
            "Name another folder, or remove this one first.",
        )
    return PreparedCatalogue(
        path=out,
        images=sum(rows for split in record.shards.values() for rows, _ in split),
        skipped=len(record.skipped),
        fingerprint=found.fingerprint,
        bytes=size,
        problems=tuple(Flaw(path, problem) for path, problem in (*record.skipped, *record.problems)),
    )
