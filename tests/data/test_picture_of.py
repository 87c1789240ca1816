"""picture_of: the faster decoder shows what `decode` shows, and refuses what it refuses."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aliprod.catalogue.decode import Unreadable, decode
from aliprod.data.augment import picture_of

pytest.importorskip("simplejpeg", reason="needs the extra `fast`")


def outcome(read: object, content: bytes) -> tuple[tuple[int, ...], bytes] | str:
    try:
        seen = np.asarray(read(content))  # type: ignore[operator]
    except Unreadable as reason:
        return str(reason)
    return seen.shape, seen.tobytes()


def jpeg(picture: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", **options)
    return file.getvalue()


def rough(height: int, width: int) -> np.ndarray:
    """Detail at every scale."""
    draw = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), np.uint8)).resize((width, height))
    return (np.asarray(coarse) // 2 + draw.integers(0, 128, (height, width, 3), np.uint8)).astype(np.uint8)


def test_every_photograph_has_pillows_pixels(shared: Path) -> None:
    odd = ("train/00038", "train/00045", "train/00047", "train/00034", "val/00036", "test")
    paths = [path for folder in odd for path in sorted((shared / "data/grocery" / folder).glob("*.jpg"))[:40]]
    for path in paths:
        assert outcome(picture_of, path.read_bytes()) == outcome(decode, path.read_bytes()), path


def test_every_broken_file_has_the_same_pixels_or_the_same_reason(shared: Path) -> None:
    for path in sorted((shared / "data/broken").rglob("*")):
        if path.is_file():
            assert outcome(picture_of, path.read_bytes()) == outcome(decode, path.read_bytes()), path


@pytest.mark.parametrize("kind", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_every_kind_of_jpeg_has_pillows_pixels(subsampling: str, kind: dict[str, object]) -> None:
    for quality, height, width in ((30, 8, 8), (75, 33, 65), (95, 64, 50), (90, 17, 120)):
        content = jpeg(rough(height, width), quality=quality, subsampling=subsampling, **kind)
        assert outcome(picture_of, content) == outcome(decode, content)


@given(st.integers(0, 5000), st.lists(st.tuples(st.integers(2, 10_000), st.integers(0, 255)), max_size=3))
def test_damage_does_to_pixels_what_it_does_to_decode(cut: int, flips: list[tuple[int, int]]) -> None:
    content = bytearray(jpeg(rough(48, 40), quality=60))
    for position, value in flips:
        content[position % len(content)] = value
    content = content[: len(content) - cut % len(content) if cut % 3 == 0 else None]
    assert outcome(picture_of, bytes(content)) == outcome(decode, bytes(content))
