"""The bytes of a picture become an upright RGB image of 8 bits, or a reason why not.

Whatever lies in a catalogue may be hostile: only six formats are tried, told apart by content, never by name,
and the work that a picture makes, its size, scans and segments, is judged before a pixel is decoded.
"""

import io
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from aliprod.catalogue.annotations import UNREAD

MOST_PIXELS = 50_000_000
MOST_BYTES = 256 * 2**20  # of a file: 50 M pixels in any of the formats stay below
MOST_SCANNED = 20 * MOST_PIXELS  # of a JPEG, whose pixels each scan goes over again; progressive ones have about ten
MOST_SEGMENTS = 50_000  # of a JPEG or PNG, and of a GIF before its picture: Pillow reads each in Python
LEAST_SIDE = 8  # less is a tracking pixel or a separator line, no photograph

_HEIF = rb"....ftyp(hei|hev|mif1|msf1|avi)"
_JPEG = rb"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff([^\0\xff\x01\xd0-\xd8])", re.DOTALL)  # but for those without a segment
_SCAN, _END = b"\xda", b"\xd9"
_FORMATS: dict[re.Pattern[bytes], Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    re.compile(_JPEG): JpegImageFile,
    re.compile(rb"\x89PNG\r\n\x1a\n"): PngImageFile,
    re.compile(rb"RIFF....WEBP", re.DOTALL): WebPImageFile,
    re.compile(rb"GIF8[79]a"): GifImageFile,
    re.compile(rb"BM"): BmpImageFile,
    re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"): TiffImageFile,
}
# What Pillow's parsers raise at damaged files, as fuzzing has shown, and their relatives.
_DAMAGE = (
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, AssertionError, EOFError,
    RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError, Warning,
)  # fmt: skip
_TURNS = Image.Transpose
_UPRIGHT = {  # by EXIF orientation; 1 is upright
    2: _TURNS.FLIP_LEFT_RIGHT, 3: _TURNS.ROTATE_180, 4: _TURNS.FLIP_TOP_BOTTOM, 5: _TURNS.TRANSPOSE,
    6: _TURNS.ROTATE_270, 7: _TURNS.TRANSVERSE, 8: _TURNS.ROTATE_90,
}  # fmt: skip

# A damaged EXIF block does not make a picture unreadable. Set once, here: filters are not safe to change in threads.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")


class Unreadable(Exception):
    """Not a picture that can be used; the text is the reason."""


def decode(source: Path | bytes, least: int = 0) -> Image.Image:
    """A picture as it is to be seen: RGB, 8 bits, turned by its EXIF orientation, alpha laid on white.

    Of an animation the first frame. All of the file is decoded: half a JPEG is no picture. Safe in threads. With
    ``least`` a JPEG may come at an eighth of its size, its sides no shorter than that: several times as fast.
    Unreadable: no such file, none of the six formats, damaged, or of a size that is refused.
    """
    image = opened(source)
    try:
        if least:
            image.draft(None, (least, least))
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        rgb = _as_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)
    except _DAMAGE as error:
        raise Unreadable(f"is damaged: {_reason(error)}") from error


def decode_anyway(source: Path | bytes) -> tuple[Image.Image, str]:
    """What can be seen of a picture that may not be left out, and "" or the reason why it is not all there.

    A test row stays in the submission: of a JPEG that breaks off the part that is there, else a grey picture.
    """
    try:
        return decode(source), ""
    except Unreadable as unreadable:
        reason = str(unreadable)
    with suppress(Unreadable):
        content = content_of(source)
        if re.match(_JPEG, content):
            return decode(content + b"\xff\xd9"), reason  # an end marker: the decoder leaves the rest grey
    return Image.new("RGB", (256, 256), (128, 128, 128)), reason


def opened(source: Path | bytes) -> ImageFile.ImageFile:
    """A picture whose header was read and judged, and whose pixels were not. Unreadable: as `decode`."""
    content = content_of(source)
    parse = next((parse for start, parse in _FORMATS.items() if start.match(content)), None)
    if parse is None:
        named = UNREAD if re.match(_HEIF, content, re.DOTALL) else "is no JPEG, PNG, WebP, GIF, BMP or TIFF"
        raise Unreadable(named if content else "is empty")
    scans = 0
    if walk := _WALKS.get(parse):
        segments = list(islice(walk(content), MOST_SEGMENTS + 1))
        if len(segments) > MOST_SEGMENTS:
            raise Unreadable(f"has more than {MOST_SEGMENTS:,} segments")
        scans = segments.count(_SCAN)
    try:
        image = parse(io.BytesIO(content))  # not Image.open, whose own limit only warns
    except _DAMAGE as error:
        raise Unreadable(f"is damaged: {_reason(error)}") from error
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise Unreadable(f"is {width:,} x {height:,} pixels large; more than {MOST_PIXELS:,} are refused")
    if width * height * scans > MOST_SCANNED:
        raise Unreadable(f"goes {scans:,} times over {width:,} x {height:,} pixels: decoding it would take minutes")
    if min(width, height) < LEAST_SIDE:
        raise Unreadable(f"is {width} x {height} pixels small; a side below {LEAST_SIDE} is refused")
    return image


def _jpeg(content: bytes) -> Iterator[bytes]:
    """The markers of a JPEG's segments, up to its end; what is entropy-coded is passed over."""
    at = 0
    while (found := _MARKER.search(content, at)) and found[1] != _END:
        yield found[1]
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2])


def _png(content: bytes) -> Iterator[bytes]:
    """The names of a PNG's chunks."""
    at = 8
    while at < len(content):
        yield content[at + 4 : at + 8]
        at += 12 + int.from_bytes(content[at : at + 4])


def _gif(content: bytes) -> Iterator[bytes]:
    """A byte for each block of a GIF's extensions before its first picture."""
    palette = content[10:11] + b"\0"
    at = 13 + (3 * (2 << (palette[0] & 7)) if palette[0] & 0x80 else 0)
    while content[at : at + 1] == b"!":
        at += 2
        while size := content[at : at + 1].strip(b"\0"):
            yield size
            at += 1 + size[0]
        at += 1
        yield b"!"


_WALKS: dict[Any, Callable[[bytes], Iterator[bytes]]] = {JpegImageFile: _jpeg, PngImageFile: _png, GifImageFile: _gif}


def animated(content: bytes) -> bool:
    """Whether there are pictures after the first."""
    try:
        return bool(getattr(opened(content), "is_animated", False))
    except (Unreadable, *_DAMAGE):
        return False


def plain_jpeg(content: bytes) -> JpegImageFile | None:
    """A picture, unread, where it is a JPEG of upright RGB, so that its pixels are what `decode` shows. Unreadable: as
    `decode`, where its header is reason enough."""
    image = opened(content)
    if isinstance(image, JpegImageFile) and image.mode == "RGB" and _orientation(image) not in _UPRIGHT:
        return image
    return None


def baseline_jpeg(content: bytes) -> bool:
    """Whether it is a plain JPEG of the kinds that every build of libjpeg-turbo decodes to the same pixels."""
    image = plain_jpeg(content)
    return image is not None and "progressive" not in image.info and get_sampling(image) >= 0  # 4:4:4, 4:2:2, 4:2:0


def content_of(source: Path | bytes) -> bytes:
    """The bytes of a file that may be a picture. Unreadable: no such file, a folder, a pipe, or far too large."""
    if isinstance(source, bytes):
        return source
    try:
        status = source.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise Unreadable("is a folder" if stat.S_ISDIR(status.st_mode) else "is not a file")
        if status.st_size > MOST_BYTES:
            raise Unreadable(f"has {status.st_size:,} bytes; more than {MOST_BYTES:,} are refused")
        return source.read_bytes()
    except FileNotFoundError as error:
        raise Unreadable("is not there") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Unreadable(f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    """A picture without the file's bytes and headers, which an opened one would keep alive."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise Unreadable("has 32 bits a channel, whose brightness has no fixed scale")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        seen = image.convert("RGBA")
        white = Image.new("RGB", seen.size, "white")
        white.paste(seen, mask=seen.getchannel("A"))
        return white
    return image.convert("RGB")  # a copy, where it is RGB already


def _reason(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
