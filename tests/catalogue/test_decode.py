"""decode: a picture is upright RGB of 8 bits, or a reason."""

import io
import json
import os
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from aliprod.catalogue.decode import MOST_PIXELS, Unreadable, decode, decode_anyway, opened

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def slope(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture in which every corner differs."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 128 // (width + height)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def folder(class_id: str | None) -> str:
    return "" if class_id is None else class_id.zfill(5)


def cases_of(shared: Path, expect: str) -> list[tuple[str, Path]]:
    root = shared / "data" / "broken"
    cases = json.loads((root / "expected.json").read_text())["cases"]
    asked = [case for case in cases if case["expect"] == expect]
    return [(case["case"], root / case["split"] / folder(case["class_id"]) / case["image_id"]) for case in asked]


def test_every_picture_that_broken_calls_readable_is_read(shared: Path) -> None:
    cases = cases_of(shared, "read")
    assert len(cases) > 30
    for case, path in cases:
        image = decode(path)
        assert image.mode == "RGB", case


def test_every_picture_file_that_broken_calls_damaged_is_refused_with_a_reason(shared: Path) -> None:
    for case, path in cases_of(shared, "skip"):
        if case not in ("path in the id", "unknown class in val") and not case.startswith(
            "class_id"
        ):  # the row is at fault
            with pytest.raises(Unreadable, match=r"^(is|has|cannot) "):
                decode(path)


def test_the_odd_photographs_of_grocery_look_as_they_should(shared: Path) -> None:
    grocery = shared / "data" / "grocery"
    upright = decode(grocery / "train/00047/4974231.jpg")
    assert upright.size == (256, 341)  # 341 x 256 in the file, on its side
    for name in (
        "train/00038/6312058.jpg",
        "train/00045/5461854.jpg",
        "train/00034/8580601.jpg",
        "val/00036/2231822.jpg",
    ):
        pixels = np.asarray(decode(grocery / name))
        assert 40 < pixels.mean() < 220, name
    assert decode(grocery / "test/7415798.jpg").size == (160, 120)


def test_sixteen_bits_keep_their_brightness(shared: Path) -> None:
    path = shared / "data/broken/train/00002/1100011.png"
    with Image.open(path) as image:
        truth = np.asarray(image).astype(float) / 65535
    assert abs(np.asarray(decode(path))[..., 0].mean() / 255 - truth.mean()) < 1 / 255


@pytest.mark.parametrize("kind", FORMATS)
def test_the_content_decides_and_not_the_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(slope(), kind))
    difference = np.asarray(decode(path)).astype(int) - np.asarray(slope())
    assert np.abs(difference).mean() < 12  # GIF's palette and JPEG lose a little


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(np.full((12, 12), 40_000, np.uint16)) if mode == "I;16" else slope(mode)
    content = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr", "PA") else "PNG")
    assert decode(content).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_pillows_own_transposition_turns_it(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(slope(), kind, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(content)), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode: str) -> None:
    content = encoded(Image.new(mode, (16, 16), 0), "PNG")
    assert (np.asarray(decode(content)) == 255).all()


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (16, 16), 3)
    image.putpalette([0, 0, 0] * 256)
    for kind in ("PNG", "GIF"):
        assert (np.asarray(decode(encoded(image, kind, transparency=3))) == 255).all(), kind


def test_of_an_animation_the_first_frame_counts() -> None:
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        content = encoded(red, kind, save_all=True, append_images=[blue], **options)
        assert decode(content).getpixel((8, 8)) == (255, 0, 0), kind


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_a_bomb_is_refused_by_its_header_alone(kind: str) -> None:
    side = 8000
    assert side * side > MOST_PIXELS
    content = bytearray(encoded(slope(), kind))  # 24 x 16 pixels under a header that says more
    if kind == "PNG":
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "GIF":
        content[6:10] = struct.pack("<HH", side, side)
    else:
        content[18:26] = struct.pack("<ii", side, side)
    with pytest.raises(Unreadable, match="8,000 x 8,000"):
        decode(bytes(content))


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(Unreadable, match="not a file"):
        decode(tmp_path / "pipe.jpg")


def test_postscript_is_never_handed_to_an_interpreter() -> None:
    with pytest.raises(Unreadable, match="no JPEG"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")


@pytest.mark.filterwarnings(
    "ignore:.*:UserWarning:PIL"
)  # as decode.py itself asks for; pytest puts its own filters first
def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    block = exif.tobytes()
    content = encoded(slope(), "JPEG", exif=block[: len(block) // 2])
    assert min(decode(content).size) == 16


@given(
    st.sampled_from(FORMATS),
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
)
def test_damage_gives_a_picture_or_a_reason_and_nothing_else(kind: str, cut: int, flips: list[tuple[int, int]]) -> None:
    content = bytearray(encoded(slope(), kind))
    for position, value in flips:
        content[position % len(content)] = value
    content = content[: len(content) - cut % len(content) if cut % 3 == 0 else None]
    image, reason = decode_anyway(bytes(content))
    assert image.mode == "RGB"
    assert reason or image.tobytes() == decode(bytes(content)).tobytes()


@given(st.floats(0.05, 0.97))
def test_a_jpeg_that_breaks_off_is_refused_and_its_upper_part_can_be_had(share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    whole = encoded(noise, "JPEG")
    part = whole[: int(len(whole) * share)]
    with pytest.raises(Unreadable):
        decode(part)
    image, reason = decode_anyway(part)
    assert reason
    if share > 0.5:
        np.testing.assert_array_equal(np.asarray(image)[:8], np.asarray(decode(whole))[:8])


def test_what_cannot_be_seen_at_all_is_grey(tmp_path: Path) -> None:
    for source in (b"", b"<html>", tmp_path / "nothing.jpg", tmp_path):
        image, reason = decode_anyway(source)
        assert reason
        assert image.getcolors() == [(256 * 256, (128, 128, 128))]


def test_threads_see_the_same_pixels() -> None:
    contents = [encoded(slope(size=(24 + i, 16)), kind) for i, kind in enumerate(FORMATS * 10)]
    alone = [decode(content).tobytes() for content in contents]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda content: decode(content).tobytes(), contents)) == alone


# Work for one picture


def refused_within(seconds: float, content: bytes, why: str) -> None:
    began = time.process_time()
    with pytest.raises(Unreadable, match=why):
        decode(content)
    assert decode_anyway(content)[1]
    assert time.process_time() - began < seconds


def test_a_progressive_jpeg_of_thousands_of_scans_is_refused_before_one_is_decoded() -> None:
    plain = encoded(Image.new("L", (7000, 7000), 90), "JPEG", progressive=True, quality=50)
    scan = plain[plain.rindex(b"\xff\xda") : -2]
    bomb = plain[:-2] + 3000 * scan + plain[-2:]
    assert len(bomb) < 1_000_000
    refused_within(5, bomb, r"goes 3,00\d times over 7,000 x 7,000 pixels")
    hidden = plain[:-2] + b"\xff\xfe\x00\x04\xff\xd9" + 3000 * scan + plain[-2:]  # an end marker within a comment
    refused_within(5, hidden, r"goes 3,00\d times")


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"progressive": True, "exif": b"Exif\0\0" + b"\xff\xda" * 99}]
)
def test_an_ordinary_jpeg_of_the_largest_size_is_not(options: dict[str, object]) -> None:
    content = encoded(Image.new("RGB", (10_000, 5_000)), "JPEG", **options)
    assert opened(content).size == (10_000, 5_000)


@pytest.mark.parametrize(
    ("kind", "at", "segment"),
    [
        ("JPEG", 2, b"\xff\xfe\0\2"),
        ("PNG", 33, b"\0\0\0\0teSt" + struct.pack(">I", zlib.crc32(b"teSt"))),
        ("GIF", 13, b"!\xfe\1a\0"),
    ],
)
def test_a_picture_of_millions_of_segments_is_refused_at_once(kind: str, at: int, segment: bytes) -> None:
    plain = encoded(slope(), kind)
    if kind == "GIF":
        at += 3 * (2 << (plain[10] & 7))
    assert decode(plain[:at] + 100 * segment + plain[at:]).size == (24, 16)
    refused_within(5, plain[:at] + 2_000_000 * segment + plain[at:], "has more than 50,000 segments")
