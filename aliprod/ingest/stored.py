"""One shard: its pictures become upright RGB of a bounded size, as JPEG.

A JPEG that is upright RGB and small enough already is stored byte for byte: decoding and encoding it again would lose
detail and change what is trained on, and gain nothing. All others are written anew, at quality 90 by default and
without chroma subsampling, so that the second loss stays small beside the first.

A shard is a function of its rows and the settings, whichever process makes it and whenever.
"""

import hashlib
import io
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, features

from aliprod.catalogue.catalogue import Flaw, Images, Integers
from aliprod.catalogue.decode import LEAST_SIDE, Unreadable, animated, content_of, decode, decode_anyway, plain_jpeg
from aliprod.catalogue.identity import printable
from aliprod.catalogue.shards import FORMAT
from aliprod.ingest.remote import Remote
from aliprod.store import commit

SHARD = 512  # rows: some 25 MB of photographs, what one process makes in seconds
ROW_GROUP = 128  # rows, measured best in order: 64 to 256
MOST_SIDE = 65_500  # that a JPEG can have in libjpeg
MOST_STORED = 8 * 2**20  # bytes of a JPEG that is kept as it is; what has more is mostly no picture

_OUTCOME = "made.json"
_SCHEMA = pa.schema(
    [pa.field("image_id", pa.string(), nullable=False), ("class_id", pa.int64()), pa.field("jpeg", pa.binary(), False)]
)


@dataclass(frozen=True)
class Settings:
    """What the stored bytes hang on besides the pictures."""

    short_side: int = 512
    quality: int = 90


@dataclass(frozen=True)
class Shard:
    """One shard. ``class_ids``: (n,), -1 unknown. ``remote``: where the pictures are, if not on this machine."""

    folder: Path
    images: Images
    class_ids: Integers
    settings: Settings
    remote: Remote | None = None

    @property
    def place(self) -> str:
        """The folder of the pictures, for people."""
        return self.remote.shown if self.remote else str(self.images.root)

    def content(self, row: int) -> bytes:
        """The file of a row, as it is.

        Raises:
            Unreadable: as `content_of`.
            Unreachable: as `Remote.content`.
        """
        if self.remote:
            return self.remote.content(self.images.paths[row].as_py())
        return content_of(self.images.source(row))

    @property
    def digest(self) -> str:
        """sha256 of all that its bytes hang on, but the contents of the pictures."""
        says = {
            "versions": [FORMAT, SHARD, ROW_GROUP, PIL.__version__, features.version("jpg"), pa.__version__],
            "settings": asdict(self.settings),
            "source": [self.place, self.images.store and self.images.store.fingerprint],
            "rows": [self.images.ids.to_pylist(), self.class_ids.tolist(), self.images.paths.to_pylist()],
        }
        return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()


@dataclass
class Made:
    """What became of the rows of a task. ``found``: by an earlier call."""

    rows: int
    left_out: list[int] = field(default_factory=list)
    shown_anyway: int = 0  # test rows whose picture is damaged
    jpeg_bytes: int = 0
    problems: list[Flaw] = field(default_factory=list)
    found: bool = False

    @classmethod
    def read(cls, file: Path) -> "Made":
        says = json.loads(file.read_text(encoding="utf-8"))
        problems = [Flaw(**problem) for problem in says.pop("problems")]
        return cls(**says | {"problems": problems, "found": True})


def make(task: Shard) -> Made:
    """Make a shard, or find it: by its commit record, with its bytes verified."""
    digest = task.digest
    record = commit.read(task.folder)
    if record == {"digest": digest} and not commit.verify(task.folder):
        return Made.read(task.folder / _OUTCOME)
    shutil.rmtree(task.folder, ignore_errors=True)
    commit.write(task.folder, partial(_write, task), {"digest": digest})
    return replace(Made.read(task.folder / _OUTCOME), found=False)


def _write(task: Shard, folder: Path) -> None:
    made = Made(len(task.images))
    with pq.ParquetWriter(
        folder / f"{task.folder.name}.parquet",
        _SCHEMA,
        compression={"image_id": "zstd", "class_id": "zstd", "jpeg": "none"},
        use_dictionary=["class_id"],
        write_statistics=["image_id", "class_id"],
        write_page_checksum=True,
    ) as file:
        for start in range(0, made.rows, ROW_GROUP):
            _write_rows(file, task, range(start, min(start + ROW_GROUP, made.rows)), made)
    (folder / _OUTCOME).write_text(json.dumps(asdict(made)), encoding="utf-8")


def _write_rows(file: pq.ParquetWriter, task: Shard, rows: range, made: Made) -> None:
    pictures = {row: jpeg for row in rows if (jpeg := _picture(task, row, made)) is not None}
    kept = list(pictures)
    class_ids = task.class_ids[kept]
    columns = [
        task.images.ids.take(pa.array(kept, pa.int64())),
        pa.array(class_ids, pa.int64(), mask=class_ids < 0),
        pa.array(pictures.values(), pa.binary()),
    ]
    made.jpeg_bytes += sum(map(len, pictures.values()))
    if kept:
        file.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=ROW_GROUP)


def _picture(task: Shard, row: int, made: Made) -> bytes | None:
    """The JPEG of a row, None where it is left out; a test row never is, as the submission needs it."""
    content, path = b"", task.images.paths[row].as_py()
    try:
        content = task.content(row)
        jpeg = stored(content, task.settings)
    except Unreadable as unreadable:
        if task.images.split != "test":
            made.left_out.append(row)
            made.problems.append(Flaw(path, printable(f"{unreadable}: skipped"), skipped=True))
            return None
        made.shown_anyway += 1
        seen = "predicted from what can be seen of it, else from grey"
        made.problems.append(Flaw(path, printable(f"{unreadable}: {seen}")))
        return _encoded(decode_anyway(content)[0], task.settings)
    if animated(content):
        made.problems.append(Flaw(path, "is animated: its first frame is the picture"))
    return jpeg


def stored(content: bytes, settings: Settings) -> bytes:
    """A picture as it is stored: upright RGB, never enlarged, as JPEG.

    Raises:
        Unreadable: as `decode`.
    """
    image = decode(content)
    if min(image.size) <= settings.short_side and len(content) <= MOST_STORED and plain_jpeg(content):
        return content
    return _encoded(image, settings)


def _encoded(image: Image.Image, settings: Settings) -> bytes:
    scale = min(1.0, settings.short_side / min(image.size), MOST_SIDE / max(image.size))
    if scale < 1:
        width, height = (max(LEAST_SIDE, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=settings.quality, subsampling="4:4:4", comment=b"")
    return file.getvalue()
