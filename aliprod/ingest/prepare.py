"""The images of a catalogue become shards: each is read once, judged and normalised.

A JPEG that is upright RGB and small enough is stored byte for byte: encoding it again would lose detail for nothing.
All others are written anew, their colours at half the size as in most photographs, which decode in 0.8 of the time.

A shard is a function of its rows and the settings, whichever process makes it: a committed folder beside OUT, so that a
call that was killed goes on after the last of them. OUT itself appears when all are there.
"""

import hashlib
import io
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, features
from pydantic import BaseModel

from aliprod.catalogue import shards
from aliprod.catalogue.annotations import renumbered
from aliprod.catalogue.catalogue import Catalogue, Flaw, Images, Integers
from aliprod.catalogue.decode import LEAST_SIDE, decode_anyway, plain_jpeg
from aliprod.catalogue.remote_folder import RemoteFolder, folder_at
from aliprod.catalogue.sources import PLAIN, Reading, read
from aliprod.errors import Refused
from aliprod.ingest.check import first_picture, judged, not_listed
from aliprod.processes import ReadProgress, ordered_map
from aliprod.shown import escaped
from aliprod.store import commit
from aliprod.store.layout import cache, key_of

SHARD = 512  # rows: some 25 MB of photographs, what one process makes in seconds
ROW_GROUP = 128  # rows, measured best in order: 64 to 256
SUBSAMPLING = "4:2:0"
MOST_SIDE = 65_500  # that a JPEG can have in libjpeg
MOST_STORED = 8 * 2**20  # bytes of a JPEG that is kept as it is; what has more is mostly no picture

_SCHEMA = pa.schema(
    [pa.field("image_id", pa.string(), nullable=False), ("class_id", pa.int64()), pa.field("jpeg", pa.binary(), False)]
)


@dataclass(frozen=True)
class Settings:
    """What the stored bytes depend on besides the pictures."""

    short_side: int = 512
    quality: int = 90


@dataclass(frozen=True)
class PreparedCatalogue:
    """What is there now."""

    path: str
    images: int
    skipped: int  # images that were left out
    fingerprint: str
    bytes: int  # of the shards
    problems: tuple[Flaw, ...]

    def as_json(self) -> dict[str, Any]:
        """For ``aliprod data prepare --json``."""
        return {name: value for name, value in vars(self).items() if name != "problems"}

    def text(self) -> str:
        """For a terminal: the first problems, and what is there."""
        lines = [escaped(f"{problem.path}: {problem.problem}") for problem in self.problems[:20]]
        if len(self.problems) > 20:
            lines.append(f"... and {len(self.problems) - 20:,} more, in {self.path}/{commit.MANIFEST}")
        lines.append(f"{self.path}: {self.images:,} images, {self.skipped:,} skipped, {self.bytes:,} bytes")
        return "\n".join(lines)


def prepare(
    path: str | Path,
    out: str | Path,
    settings: Settings,
    max_skipped: float = 0.5,
    processes: int = 1,
    reading: Reading = PLAIN,
) -> Iterator[ReadProgress | PreparedCatalogue]:
    """Write the shards of a catalogue; what is written already, by a call that was killed, is verified and kept.

    Args:
        path, out: of this machine, or URIs of buckets: pictures are read from there as they are needed, and shards are
            made on this machine's disk first (`layout.cache`). ``out`` must not exist, be empty, or hold what this very
            call has written before.
        max_skipped: the share of all images that may be unreadable.
    Raises:
        Refused: as `sources.read`; too much is unreadable, then nothing is left behind; ``out`` holds something else.
        StorageFull, Unreachable (of a URI), Failed (a process died of a picture): what is done is kept.
    """
    source, target = folder_at(path), folder_at(out)
    with _catalogue(source, reading) as catalogue:
        if isinstance(target, Path):
            local = target.resolve()
        elif (says := target.manifest()) is not None:
            files = says.get("files", {})
            sizes, digests = ({name: file[what] for name, file in files.items()} for what in ("bytes", "sha256"))
            found = shards.parsed(says.get("record"), digests, target.uri)
            yield _prepared(found, sizes, target.uri, catalogue, settings)
            return
        else:
            local = cache() / "uploads" / hashlib.sha256(target.uri.encode()).hexdigest()
        yield from _Run(catalogue, local, settings, max_skipped, processes).unless_done()
        sizes = {file.name: file.stat().st_size for file in local.iterdir()}
        done = _prepared(shards.manifest(local), sizes, str(local), catalogue, settings)
        if isinstance(target, RemoteFolder):
            target.upload(local)
            shutil.rmtree(local)
            done = replace(done, path=target.uri)
        yield done


@contextmanager
def _catalogue(source: Path | RemoteFolder, reading: Reading) -> Iterator[Catalogue]:
    if isinstance(source, Path):
        yield read(source, reading)
        return
    with tempfile.TemporaryDirectory(prefix="aliprod-") as folder:
        source.outline(Path(folder))
        yield read(Path(folder), reading, source)


class _Run:
    """One call, and the count of what has been done."""

    def __init__(self, catalogue: Catalogue, out: Path, settings: Settings, max_skipped: float, processes: int) -> None:
        self.catalogue, self.out, self.work = catalogue, out, out.parent / f".{out.name}.preparing"
        self.settings, self.max_skipped, self.processes = settings, max_skipped, processes
        self.problems = [*(Flaw(catalogue.root.name, note) for note in catalogue.notes), *catalogue.problems]
        self.images = self.broken = self.of = self.found = 0
        self.sizes: dict[str, list[tuple[int, int]]] = {}  # of each split: rows and bytes of JPEG in each shard

    def unless_done(self) -> Iterator[ReadProgress]:
        """Write the catalogue where it is not there."""
        with commit.storage(self.out):
            free = not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir()))
            if not free and not (self.out / commit.MANIFEST).exists():
                advice = "Name a new or empty folder, or remove this one first."
                raise Refused("there is something already; nothing was written.", self.out, advice)
            self.work.mkdir(parents=True, exist_ok=True)
        with shards.alone(self.work / "lock", wait=False):
            if not (self.out / commit.MANIFEST).exists():
                try:
                    yield from self._write()
                except Refused:  # shards that were made while a mount was gone are not to be found the next time
                    shutil.rmtree(self.work, ignore_errors=True)
                    raise
            shutil.rmtree(self.work, ignore_errors=True)

    def _write(self) -> Iterator[ReadProgress]:
        self.problems += not_listed(self.catalogue)
        self.images = self.broken = sum(flaw.skipped for flaw in self.problems)
        self.of = self.images + sum(map(len, self.catalogue.splits))
        train = yield from self._make(self.catalogue.train, self.catalogue.classes)
        left = self._without_empty_classes(train)
        val = yield from self._make(left.val, left.classes)
        yield from self._make(left.test, left.classes)
        self._publish(replace(left, val=val))

    def _make(self, images: Images, classes: Integers) -> Generator[ReadProgress, None, Images]:
        """Make the shards of a split; the images that are in them."""
        left_out: list[int] = []
        sizes = self.sizes[images.split] = []
        advice = "Take out the picture that kills it; the same command goes on."
        class_ids = np.append(classes, -1)  # the last: of label -1
        recipes = (
            ShardRecipe(self.work / f"{images.split}-{number:05}", part, class_ids[part.labels], self.settings)
            for number, part in enumerate(images.chunks(SHARD))
        )
        # Two at least, as a picture that kills its decoder is then named.
        processes = min(self.processes, max(2, -(-len(images) // SHARD)))
        made = ordered_map(make_shard, recipes, processes, lambda recipe: first_picture(recipe.images), advice)
        for number, result in enumerate(made):
            left_out += [number * SHARD + row for row in result.left_out]
            sizes.append((result.rows - len(result.left_out), result.jpeg_bytes))
            self.images += result.rows
            self.found += result.rows if result.found else 0
            self._count_broken(result.problems, len(result.left_out) + result.shown_anyway)
            yield ReadProgress(self.images, self.of, self.found, self.broken)
        return images.take(np.delete(np.arange(len(images)), left_out))

    def _count_broken(self, problems: list[Flaw], images: int) -> None:
        """Refuse as soon as it is certain that too much is broken, not after hours: perhaps a mount is gone."""
        self.problems += problems
        self.broken += images
        if self.broken > self.max_skipped * self.of:
            what = f"{self.broken:,} of {self.of:,} images cannot be used, and --max-skipped is {self.max_skipped:g}."
            first = next((f"The first: {p.path} {p.problem}. " for p in self.problems if p.skipped), "")
            advice = "Is all of the catalogue there? `aliprod data check` lists what is wrong. Nothing was written."
            raise Refused(what, self.catalogue.train.location, first + advice)

    def _without_empty_classes(self, train: Images) -> Catalogue:
        """The catalogue of the classes of which these training images are left."""
        if not len(train):
            advice = "`aliprod data check` lists them all."
            raise Refused("has no training image that can be read.", train.location, advice)
        was, kept = self.catalogue, np.unique(train.labels)
        label = np.full(was.num_classes + 1, -1, np.int64)  # the last: of label -1
        label[kept] = np.arange(len(kept))
        what = "class {}: no training image can be read, so it is no class"
        self.problems += [Flaw("train", what.format(class_id)) for class_id in np.delete(was.classes, kept).tolist()]
        val = replace(was.val, labels=label[was.val.labels])
        lost = val.paths.filter(pa.array(val.labels < 0)).to_pylist()
        self.images += len(lost)
        self._count_broken([Flaw(path, "its class has no training image: skipped", True) for path in lost], len(lost))
        return replace(
            was,
            classes=was.classes[kept],
            names=tuple(was.names[old] for old in kept.tolist()),
            train=replace(train, labels=label[train.labels]),
            val=val.take(np.flatnonzero(val.labels >= 0)),
            test_labels=None if was.test_labels is None else label[was.test_labels],
            ancestor=None if was.ancestor is None else renumbered(was.ancestor[:, kept]),
            prepared="",
        )

    def _publish(self, left: Catalogue) -> None:
        record = shards.Record(
            prepared=shards.FORMAT,
            short_side=self.settings.short_side,
            quality=self.settings.quality,
            source=self.catalogue.annotation,
            content=left.annotation,
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
            for images in left.splits:
                known = left.labels(images.split)
                shards.write_rows(folder, images.split, images.ids, images.labels if known is None else known)

        shards.remove_partials(self.out)
        if self.out.exists():
            self.out.rmdir()  # it is empty
        commit.write(self.out, fill, record.model_dump())


def _prepared(
    found: shards.Manifest, sizes: dict[str, int], out: str, catalogue: Catalogue, settings: Settings
) -> PreparedCatalogue:
    """What is there, in files of these sizes; refused where it is not what was asked for."""
    record = found.record
    asked = (catalogue.annotation, settings.short_side, settings.quality)
    if (record.source, record.short_side, record.quality) != asked:
        otherwise = f"short side {record.short_side}, quality {record.quality}"
        what = f"holds another catalogue, or one that was prepared otherwise: {otherwise}."
        raise Refused(what, out, "Name another folder, or remove this one first.")
    return PreparedCatalogue(
        path=out,
        images=sum(rows for split in record.shards.values() for rows, _ in split),
        skipped=len(record.skipped),
        fingerprint=found.fingerprint,
        bytes=sum(sizes[name] for name in record.file_names()),
        problems=tuple(Flaw(path, problem) for path, problem in (*record.skipped, *record.problems)),
    )


@dataclass(frozen=True)
class ShardRecipe:
    """What one shard is made of, and its folder, named as its file."""

    folder: Path
    images: Images
    class_ids: Integers  # (n,), -1 unknown
    settings: Settings


class ShardResult(BaseModel):
    """What became of the rows of a shard."""

    rows: int
    left_out: list[int] = []
    shown_anyway: int = 0  # test rows whose picture is damaged
    jpeg_bytes: int = 0
    problems: list[Flaw] = []
    found: bool = False  # by an earlier call


def make_shard(recipe: ShardRecipe) -> ShardResult:
    """Make a shard, or find it: by all that its bytes depend on but the pictures' contents, with its bytes verified."""
    folder, images = recipe.folder, recipe.images
    facts = {
        "versions": [shards.FORMAT, SHARD, ROW_GROUP, PIL.__version__, features.version("jpg"), pa.__version__],
        "settings": asdict(recipe.settings) | {"subsampling": SUBSAMPLING},
        "source": [images.location, images.store and images.store.fingerprint],
        "rows": [images.ids.to_pylist(), recipe.class_ids.tolist(), images.paths.to_pylist()],
        "sizes": [] if images.store or images.remote else [images.size(row) for row in range(len(images))],
    }
    record: dict[str, Any] = {"facts": key_of(facts)}
    there = commit.read(folder) or {}
    if there.get("facts") == record["facts"] and not commit.verify(folder):
        return ShardResult.model_validate(there["result"] | {"found": True})
    shutil.rmtree(folder, ignore_errors=True)
    result = ShardResult(rows=len(images))

    def fill(staging: Path) -> None:
        _write(staging, recipe, result)
        record["result"] = result.model_dump()  # before it is written

    commit.write(folder, fill, record)
    return result


def _write(folder: Path, recipe: ShardRecipe, result: ShardResult) -> None:
    with pq.ParquetWriter(
        folder / f"{recipe.folder.name}.parquet",
        _SCHEMA,
        compression={"image_id": "zstd", "class_id": "zstd", "jpeg": "none"},
        use_dictionary=["class_id"],
        write_statistics=["image_id", "class_id"],
        write_page_checksum=True,
    ) as file:
        for start in range(0, result.rows, ROW_GROUP):
            rows = range(start, min(start + ROW_GROUP, result.rows))
            recipe.images.ask(rows)
            jpegs = {row: jpeg for row in rows if (jpeg := _jpeg(recipe, row, result)) is not None}
            result.jpeg_bytes += sum(map(len, jpegs.values()))
            if jpegs:
                ids, class_ids = recipe.images.ids.take(pa.array(jpegs, pa.int64())), recipe.class_ids[list(jpegs)]
                known = pa.array(class_ids, pa.int64(), mask=class_ids < 0)
                table = pa.table([ids, known, pa.array(jpegs.values(), pa.binary())], schema=_SCHEMA)
                file.write_table(table, row_group_size=ROW_GROUP)


def _jpeg(recipe: ShardRecipe, row: int, result: ShardResult) -> bytes | None:
    """The JPEG of a row, None where it is left out; a test row never is, as the submission needs it."""
    content, image, flaw = judged(recipe.images, row)
    if flaw:
        result.problems.append(flaw)
    if image:
        return stored(content, image, recipe.settings)
    if recipe.images.split != "test":
        result.left_out.append(row)
        return None
    result.shown_anyway += 1
    return _encoded(decode_anyway(content)[0], recipe.settings)


def stored(content: bytes, image: Image.Image, settings: Settings) -> bytes:
    """A picture as it is stored: upright RGB, never enlarged, as JPEG. ``image``: ``content``, decoded."""
    fits = min(image.size) <= settings.short_side and len(content) <= MOST_STORED
    return content if fits and plain_jpeg(content) else _encoded(image, settings)


def _encoded(image: Image.Image, settings: Settings) -> bytes:
    scale = min(1.0, settings.short_side / min(image.size), MOST_SIDE / max(image.size))
    if scale < 1:
        width, height = (max(LEAST_SIDE, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=settings.quality, subsampling=SUBSAMPLING, comment=b"")
    return file.getvalue()
