"""The images of a catalogue become shards: each is read once, judged and normalised (`stored`).

Each shard is a committed folder beside OUT, so that a call that was killed goes on after the last of them; OUT itself
appears when all are there.
"""

import hashlib
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from aliprod.catalogue import shards
from aliprod.catalogue.catalogue import Catalogue, Flaw, Images, Integers
from aliprod.catalogue.shards import FORMAT, Record, shard_name
from aliprod.catalogue.sources import read
from aliprod.errors import Failed, Refused
from aliprod.ingest.check import not_listed
from aliprod.ingest.processes import Pool, pool
from aliprod.ingest.remote import Remote, place
from aliprod.ingest.stored import SHARD, Made, Settings, Shard, make
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
class Prepared:
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
) -> Iterator[PrepareProgress | Prepared]:
    """Write the shards of a catalogue; what is written already, by a call that was killed, is verified and kept.

    Args:
        path, out: of this machine, or URIs of what pyarrow reaches: pictures are read from there one by one, and
            shards are made on this machine's disk first (`shards.cache`).
        out: must not exist, be empty, or hold what this very call has written before.
        max_skipped: the share of all images that may be unreadable.
        processes: that work side by side; they change no byte.
    Yields:
        A PrepareProgress per shard; at the end what was Prepared.
    Raises:
        Refused: as `sources.read`; too much is unreadable, then nothing is left behind; ``out`` holds something else.
        StorageFull: no room; what is done is kept.
        Unreachable: of a URI; what is done is kept.
        Failed: a process died of a picture.
    """
    source, target = place(path), place(out)
    with _catalogue(source) as catalogue:
        remote = source if isinstance(source, Remote) else None
        if isinstance(target, Path):
            yield from _prepare_here(catalogue, target.resolve(), settings, max_skipped, processes, remote)
        elif (says := target.manifest()) is None:
            local = shards.cache() / "uploads" / hashlib.sha256(target.shown.encode()).hexdigest()
            for step in _prepare_here(catalogue, local, settings, max_skipped, processes, remote):
                if isinstance(step, Prepared):
                    target.upload(local)
                    shutil.rmtree(local)
                    yield replace(step, path=target.shown)
                else:
                    yield step
        else:
            yield _prepared_there(target, says, catalogue, settings)


@contextmanager
def _catalogue(source: Path | Remote) -> Iterator[Catalogue]:
    if isinstance(source, Path):
        yield read(source)
        return
    with tempfile.TemporaryDirectory(prefix="aliprod-") as folder:
        source.outline(Path(folder))
        yield read(Path(folder))


def _prepare_here(
    catalogue: Catalogue, out: Path, settings: Settings, max_skipped: float, processes: int, remote: Remote | None
) -> Iterator[PrepareProgress | Prepared]:
    work = out.parent / f".{out.name}.preparing"
    _check_free(out)
    with commit.storage(out):
        work.mkdir(parents=True, exist_ok=True)
    with shards.alone(work / "lock", wait=False):
        if not (out / commit.MANIFEST).exists():
            several = pool(processes, _follow_parent) if processes > 1 else nullcontext()
            with _refusals_leave_nothing(work), several as makers:
                run = _Run(work, settings, catalogue, makers, processes, max_skipped, remote)
                yield from _prepare(catalogue, out, run)
        shutil.rmtree(work, ignore_errors=True)
    yield _prepared(out, catalogue, settings)


class _Run:
    """One call: its processes, and the count of what has been done."""

    def __init__(
        self,
        work: Path,
        settings: Settings,
        catalogue: Catalogue,
        pool: Pool | None,
        processes: int,
        max_skipped: float,
        remote: Remote | None,
    ) -> None:
        self.work, self.settings, self.pool, self.processes = work, settings, pool, processes
        self.max_skipped, self.remote = max_skipped, remote
        self.root = remote.shown if remote else catalogue.root
        self.class_ids = np.append(catalogue.classes, -1)
        self.problems = [*catalogue.problems, *not_listed(catalogue)]
        self.images = self.broken = sum(problem.skipped for problem in self.problems)
        self.of = self.images + len(catalogue.train) + len(catalogue.val) + len(catalogue.test)
        self.found = 0

    def shards(self, images: Images) -> Generator[PrepareProgress, None, list[Made]]:
        """Make the shards of a split."""
        made = []
        for shard in _in_order(self.pool, self.processes, self._tasks(images)):
            made.append(shard)
            self.images += shard.rows
            self.found += shard.rows if shard.found else 0
            self.count_broken(shard.problems, len(shard.left_out) + shard.shown_anyway)
            yield PrepareProgress(self.images, self.of, self.found, self.broken)
        return made

    def count_broken(self, problems: list[Flaw], images: int) -> None:
        """Refuse as soon as it is certain that too much is broken, not after hours: perhaps a mount is gone."""
        self.problems += problems
        self.broken += images
        if self.broken > self.max_skipped * self.of:
            first = next((f"The first: {p.path} {p.problem}. " for p in self.problems if p.skipped), "")
            raise Refused(
                f"{self.broken:,} of {self.of:,} images cannot be used, and --max-skipped is {self.max_skipped:g}.",
                self.root,
                f"{first}Is all of the catalogue there? `aliprod data check` lists what is wrong. Nothing was written.",
            )

    def _tasks(self, images: Images) -> Iterator[Shard]:
        for number, start in enumerate(range(0, len(images), SHARD)):
            part = images.take(np.arange(start, min(start + SHARD, len(images))))
            folder = self.work / Path(shard_name(images.split, number)).stem
            yield Shard(folder, part, self.class_ids[part.labels], self.settings, self.remote)


def _prepare(catalogue: Catalogue, out: Path, run: _Run) -> Iterator[PrepareProgress]:
    made = {"train": (yield from run.shards(catalogue.train))}
    train = _kept(catalogue.train, made["train"])
    val = _of_classes(train, catalogue, run)
    made["val"] = yield from run.shards(val)
    made["test"] = yield from run.shards(catalogue.test)
    left = replace(catalogue, train=train, val=_kept(val, made["val"]), prepared="")
    _publish(out, run, made, catalogue.fingerprint, _without_empty_classes(left))


def _kept(images: Images, made: list[Made]) -> Images:
    left_out = [number * SHARD + row for number, shard in enumerate(made) for row in shard.left_out]
    return images.take(np.delete(np.arange(len(images)), left_out)) if left_out else images


def _of_classes(train: Images, catalogue: Catalogue, run: _Run) -> Images:
    """The val images of classes of which a training image is left."""
    if not len(train):
        raise Refused("has no training image that can be read.", catalogue.root, "`aliprod data check` lists them all.")
    lost = np.setdiff1d(np.arange(catalogue.num_classes), train.labels)
    run.problems += [
        Flaw("train", f"class {class_id}: no training image can be read, so it is no class")
        for class_id in catalogue.classes[lost].tolist()
    ]
    val = catalogue.val
    without = np.isin(val.labels, lost)
    paths = val.paths.filter(pa.array(without)).to_pylist()
    run.images += len(paths)
    run.count_broken([Flaw(path, "its class has no training image: skipped", True) for path in paths], len(paths))
    return val.take(np.flatnonzero(~without)) if paths else val


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
        ancestor=None if catalogue.ancestor is None else np.stack([_numbered(row[kept]) for row in catalogue.ancestor]),
    )


def _numbered(nodes: Integers) -> Integers:
    """The nodes of a level, numbered by first appearance."""
    _, first, inverse = np.unique(nodes, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


# Processes


def _in_order(pool: Pool | None, processes: int, tasks: Iterator[Shard]) -> Iterator[Made]:
    """Never more tasks in flight than the processes need."""
    if pool is None:
        yield from map(make, tasks)
        return
    ahead: deque[tuple[Shard, Future[Made]]] = deque()
    for task in tasks:
        ahead.append((task, pool.submit(make, task)))
        if len(ahead) > 2 * processes:
            yield _result(pool, *ahead.popleft())
    while ahead:
        yield _result(pool, *ahead.popleft())


def _result(pool: Pool, task: Shard, made: "Future[Made]") -> Made:
    try:
        return pool.result(made)
    except BrokenProcessPool as error:
        raise Failed(
            "A process died while it read pictures.",
            f"{task.place}/{task.images.paths[0].as_py()} and the pictures after it",
            "Was it out of memory? Take out the picture that kills it; the same command goes on.",
        ) from error


def _follow_parent() -> None:
    """A process of the pool ends when its parent was killed, and leaves to it what Ctrl-C means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


@contextmanager
def _refusals_leave_nothing(work: Path) -> Iterator[None]:
    """Shards that were made while a mount was gone are not to be found the next time."""
    try:
        yield
    except Refused:
        shutil.rmtree(work, ignore_errors=True)
        raise


# OUT


def _check_free(out: Path) -> None:
    with commit.storage(out):
        if out.exists() and not (out / commit.MANIFEST).exists() and not (out.is_dir() and not any(out.iterdir())):
            advice = "Name a new or empty folder, or remove this one first."
            raise Refused("there is something already; nothing was written.", out, advice)


def _publish(out: Path, run: _Run, made: dict[str, list[Made]], source: str, left: Catalogue) -> None:
    counts = {
        images.split: np.bincount(images.labels, minlength=left.num_classes).tolist()
        for images in (left.train, left.val)
    }
    record = Record(
        prepared=FORMAT,
        short_side=run.settings.short_side,
        quality=run.settings.quality,
        source=source,
        content=left.fingerprint,
        classes=left.classes.tolist(),
        names=list(left.names),
        ancestor=None if left.ancestor is None else left.ancestor.tolist(),
        counts=counts,
        test_labels=left.test_labels is not None,
        shards={
            split: [(shard.rows - len(shard.left_out), shard.jpeg_bytes) for shard in made[split]] for split in made
        },
        skipped=[(problem.path, problem.problem) for problem in run.problems if problem.skipped],
        problems=[(problem.path, problem.problem) for problem in run.problems if not problem.skipped],
    )

    def fill(folder: Path) -> None:
        for name in record.file_names():
            _link(run.work / Path(name).stem / name, folder / name)
        write_index(folder, left)

    shards.remove_partials(out)
    if out.exists():
        out.rmdir()  # it is empty
    commit.write(out, fill, record.model_dump())


def write_index(folder: Path, catalogue: Catalogue) -> None:
    """The ids and labels of all splits."""
    unknown = catalogue.test.labels if catalogue.test_labels is None else catalogue.test_labels
    shards.write_rows(folder, "train", catalogue.train.ids, catalogue.train.labels)
    shards.write_rows(folder, "val", catalogue.val.ids, catalogue.val.labels)
    shards.write_rows(folder, "test", catalogue.test.ids, unknown)


def _link(file: Path, to: Path) -> None:
    """A second name for a file, so that a call that is killed now loses nothing; a copy where a mount has no links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


def _prepared(out: Path, catalogue: Catalogue, settings: Settings) -> Prepared:
    found = shards.manifest(out)
    size = sum((out / name).stat().st_size for name in found.record.file_names())
    return _said(str(out), found, size, catalogue, settings)


def _prepared_there(out: Remote, says: dict[str, Any], catalogue: Catalogue, settings: Settings) -> Prepared:
    """By its manifest, which was written last."""
    files = says.get("files", {})
    found = shards.parsed(says.get("record"), {name: file["sha256"] for name, file in files.items()}, out.shown)
    size = sum(files[name]["bytes"] for name in found.record.file_names())
    return _said(out.shown, found, size, catalogue, settings)


def _said(out: str, found: shards.Manifest, size: int, catalogue: Catalogue, settings: Settings) -> Prepared:
    record = found.record
    if (record.source, record.short_side, record.quality) != (
        catalogue.fingerprint,
        settings.short_side,
        settings.quality,
    ):
        raise Refused(
            f"holds another catalogue, or one that was prepared otherwise: short side {record.short_side}, "
            f"quality {record.quality}.",
            out,
            "Name another folder, or remove this one first.",
        )
    return Prepared(
        path=out,
        images=sum(rows for split in record.shards.values() for rows, _ in split),
        skipped=len(record.skipped),
        fingerprint=found.fingerprint,
        bytes=size,
        problems=tuple(Flaw(path, problem) for path, problem in (*record.skipped, *record.problems)),
    )
