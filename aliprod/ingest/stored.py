"""One shard: its pictures become upright RGB of a bounded size, as JPEG.

A JPEG that is upright RGB and small enough already is stored byte for byte: decoding and encoding it again would lose
detail and change what is trained on, and gain nothing. All others are written anew, at quality 90 by default and
without chroma subsampling, so that the second loss stays small beside the first.

A shard is a function of its rows and the settings, whichever process makes it and whenever.
"""

import io
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, features
from pydantic import BaseModel

from aliprod.catalogue.catalogue import Flaw, Images, Integers
from aliprod.catalogue.decode import LEAST_SIDE, decode_anyway, plain_jpeg
from aliprod.catalogue.shards import FORMAT
from aliprod.ingest.check import judged
from aliprod.store import commit
from aliprod.store.keys import key_of

SHARD = 512  # rows: some 25 MB of photographs, what one process makes in seconds
ROW_GROUP = 128  # rows, measured best in order: 64 to 256
MOST_SIDE = 65_500  # that a JPEG can have in libjpeg
MOST_STORED = 8 * 2**20  # bytes of a JPEG that is kept as it is; what has more is mostly no picture

_RESULT = "made.json"
_SCHEMA = pa.schema(
    [pa.field("image_id", pa.string(), nullable=False), ("class_id", pa.int64()), pa.field("jpeg", pa.binary(), False)]
)


@dataclass(frozen=True)
class Settings:
    """What the stored bytes depend on besides the pictures."""

    short_side: int = 512
    quality: int = 90


@dataclass(frozen=True)
class ShardRecipe:
    """What one shard is made of, and its folder. ``class_ids``: (n,), -1 unknown."""

    folder: Path
    images: Images
    class_ids: Integers
    settings: Settings

    @property
    def digest(self) -> str:
        """sha256 of all that the shard's bytes depend on, but the contents of the pictures."""
        images = self.images
        says = {
            "versions": [FORMAT, SHARD, ROW_GROUP, PIL.__version__, features.version("jpg"), pa.__version__],
            "settings": asdict(self.settings),
            "source": [images.location, images.store and images.store.fingerprint],
            "rows": [images.ids.to_pylist(), self.class_ids.tolist(), images.paths.to_pylist()],
        }
        return key_of(says)


class ShardResult(BaseModel):
    """What became of the rows of a shard. ``found``: by an earlier call."""

    rows: int
    left_out: list[int] = []
    shown_anyway: int = 0  # test rows whose picture is damaged
    jpeg_bytes: int = 0
    problems: list[Flaw] = []
    found: bool = False


def make_shard(recipe: ShardRecipe) -> ShardResult:
    """Make a shard, or find it: by its commit record, with its bytes verified."""
    folder, record = recipe.folder, {"digest": recipe.digest}
    if commit.read(folder) == record and not commit.verify(folder):
        made = (folder / _RESULT).read_text(encoding="utf-8")
        return ShardResult.model_validate_json(made).model_copy(update={"found": True})
    shutil.rmtree(folder, ignore_errors=True)
    result = ShardResult(rows=len(recipe.images))
    commit.write(folder, lambda staging: _write(staging, recipe, result), record)
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
            jpegs = {row: jpeg for row in rows if (jpeg := _jpeg(recipe, row, result)) is not None}
            result.jpeg_bytes += sum(map(len, jpegs.values()))
            if jpegs:
                file.write_table(_table(recipe, jpegs), row_group_size=ROW_GROUP)
    (folder / _RESULT).write_text(result.model_dump_json(), encoding="utf-8")


def _table(recipe: ShardRecipe, jpegs: dict[int, bytes]) -> pa.Table:
    class_ids = recipe.class_ids[list(jpegs)]
    columns = [
        recipe.images.ids.take(pa.array(jpegs, pa.int64())),
        pa.array(class_ids, pa.int64(), mask=class_ids < 0),
        pa.array(jpegs.values(), pa.binary()),
    ]
    return pa.table(columns, schema=_SCHEMA)


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
