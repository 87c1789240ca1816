"""A photograph of a rendered package: in front of a shelf, in a pose and a light of its own."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from aliprod.synth.packages import colour


def photograph(face: Image.Image, seed: int) -> Image.Image:
    """A package in front of a shelf: RGB, 100 to 160 pixels a side.

    Args:
        face: RGBA, as `packages.face` draws it.
        seed: of the place, pose, light and noise.
    """
    drawn = np.random.default_rng(seed)
    width, height = (int(side) for side in drawn.integers(100, 161, 2))
    scene = _shelf(width, height, drawn)
    package = face.transform(
        (width, height), Image.Transform.PERSPECTIVE, _pose(face, width, height, drawn), Image.Resampling.BICUBIC
    )
    shadow = package.getchannel("A").filter(ImageFilter.BoxBlur(4)).point([level * 2 // 5 for level in range(256)])
    scene.paste((20, 16, 12), (int(drawn.integers(-5, 6)), int(drawn.integers(2, 7))), shadow)
    scene.paste(package, mask=package)
    if drawn.random() < 0.15:
        _occlude(scene, drawn)
    if drawn.random() < 0.3:
        scene = scene.filter(ImageFilter.GaussianBlur(drawn.uniform(0.4, 1.1)))
    return _lit(scene, drawn)


def _shelf(width: int, height: int, drawn: np.random.Generator) -> Image.Image:
    """A blotchy wall or board; often with neighbours at the sides and the edge of a shelf below."""
    wall = np.array(colour(drawn.uniform(), drawn.uniform(0, 0.35), drawn.uniform(0.35, 0.95)))
    wall = wall + drawn.normal(0, drawn.uniform(2, 28), (7, 6, 1)) + drawn.normal(0, drawn.uniform(0, 8), (7, 6, 3))
    blotches = Image.fromarray(np.clip(wall, 0, 255).astype(np.uint8))
    scene = blotches.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(scene)
    if drawn.random() < 0.4:
        _neighbours(draw, width, height, drawn)
    if drawn.random() < 0.5:
        edge = height * drawn.uniform(0.85, 0.97)
        draw.rectangle((0, edge, width, height), colour(drawn.uniform(), 0.15, drawn.uniform(0.3, 0.8)))
        draw.line((0, edge, width, edge), (40, 38, 36), 2)
    return scene


def _neighbours(draw: ImageDraw.ImageDraw, width: int, height: int, drawn: np.random.Generator) -> None:
    for side in (-0.2, 0.8):
        if drawn.random() < 0.7:
            left, top = width * (side + drawn.uniform(-0.1, 0.1)), height * drawn.uniform(0, 0.4)
            colours = [colour(drawn.uniform(), drawn.uniform(0.1, 0.7), drawn.uniform(0.3, 0.9)) for _ in range(2)]
            draw.rounded_rectangle((left, top, left + 0.4 * width, height + 9), 6, colours[0])
            middle = (top + height) / 2
            draw.rectangle((left + 4, middle, left + 0.4 * width - 4, middle + 0.2 * height), colours[1])


def _pose(face: Image.Image, width: int, height: int, drawn: np.random.Generator) -> list[float]:
    """The eight numbers of the perspective that takes a picture's pixels to a face's.

    Rotated by up to 15 degrees, scaled to 80 to 98 % of what fits, off centre, each corner pulled by up to 4 %.
    """
    turn = math.radians(drawn.uniform(-15, 15))
    scale = drawn.uniform(0.8, 0.98) * min(width / face.width, height / face.height)
    centre = np.array([width, height]) * (0.5 + drawn.uniform(-0.06, 0.06, 2))
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * face.size
    offset = (corners - np.array(face.size) / 2) * (1 + drawn.uniform(-0.04, 0.04, (4, 2))) * scale
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    rows, targets = [], []
    for (x, y), (u, v) in zip(offset @ rotation + centre, corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        targets += [u, v]
    return [float(number) for number in np.linalg.solve(np.array(rows), np.array(targets))]


def _occlude(scene: Image.Image, drawn: np.random.Generator) -> None:
    """Something in front of a corner or side: a price tag, a neighbour, a thumb."""
    wide, high = scene.width * drawn.uniform(0.2, 0.4), scene.height * drawn.uniform(0.15, 0.35)
    x, y = scene.width * drawn.choice([0.2, 0.8]), scene.height * drawn.uniform(0.3, 0.95)
    paint = colour(drawn.uniform(0, 0.15), drawn.uniform(0, 0.6), drawn.uniform(0.4, 1))
    box = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
    ImageDraw.Draw(scene).rounded_rectangle(box, drawn.uniform(1, high / 2), paint)


def _lit(scene: Image.Image, drawn: np.random.Generator) -> Image.Image:
    """Exposure, a slope of light, a tint and the sensor's noise."""
    x = np.linspace(-1, 1, scene.width, dtype=np.float32)
    y = np.linspace(-1, 1, scene.height, dtype=np.float32)[:, None]
    slope = drawn.uniform(-0.18, 0.18, 2).astype(np.float32)
    gain = np.float32(drawn.uniform(0.75, 1.2)) + slope[0] * x + slope[1] * y
    tint = drawn.uniform(0.93, 1.07, 3).astype(np.float32)
    noise = drawn.standard_normal((scene.height, scene.width, 1), dtype=np.float32) * np.float32(drawn.uniform(0, 9))
    pixels = np.asarray(scene).astype(np.float32) * gain[..., None] * tint + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
