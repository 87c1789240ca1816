"""A product package: `look` says in words and numbers what it shows, `face` draws it, `photograph` takes its picture.
Look and face are functions of (seed, class number); the fonts are those that Pillow ships."""

import colorsys
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from aliprod.randomness import seed_of

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
Tone = Literal["main", "dark", "light", "accent", "metal", "paper"]
# Drawn in this order; the numbers are corners, x before y, and of a rounded rectangle the radius after them.
Part = tuple[Literal["ellipse", "polygon", "rectangle"], tuple[float, ...], Tone]

FAMILY_SIZES = (2, 2, 2, 2, 3, 3, 3, 3, 4)  # and again from the start
WIDTH, HEIGHT = 256, 352  # of the drawing; a face is half of it, so that edges are smooth
KINDS = [  # section, kind, shape: neighbours differ in shape
    ("Drinks", "Soda", "can"), ("Pantry", "Pasta", "box"), ("Drinks", "Juice", "bottle"),
    ("Snacks", "Crisps", "bag"), ("Pantry", "Jam", "jar"), ("Care", "Cream", "tube"),
    ("Pantry", "Soup", "can"), ("Snacks", "Biscuits", "box"), ("Care", "Shampoo", "bottle"),
    ("Pantry", "Rice", "bag"), ("Pantry", "Honey", "jar"), ("Care", "Toothpaste", "tube"),
    ("Pets", "Cat food", "can"), ("Drinks", "Tea", "box"), ("Home", "Cleaner", "bottle"),
    ("Snacks", "Nuts", "bag"), ("Drinks", "Coffee", "jar"), ("Pantry", "Mustard", "tube"),
    ("Drinks", "Tonic", "can"), ("Pets", "Treats", "box"), ("Pantry", "Oil", "bottle"),
    ("Home", "Tabs", "bag"), ("Care", "Balm", "jar"), ("Home", "Polish", "tube"),
]  # fmt: skip
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
FLAVOURS = (
    "Classic", "Light", "Zero", "Mild", "Lemon", "Cherry", "Mint", "Vanilla", "Cocoa", "Apple", "Peach", "Ginger",
    "Berry", "Rose", "Spicy", "Mango", "Melon", "Olive", "Pepper", "Plum", "Sea salt", "Honey", "Lime", "Fig", "Aloe",
)  # fmt: skip
AMOUNTS = ("100", "150", "200", "250", "330", "400", "500", "750", "900", "1 L", "2x", "4x", "6+1")
EMBLEMS = ((4, 0.3), (40, 1.0), (3, 0.5), (5, 0.45), (4, 0.71), (9, 0.7), (6, 0.4))  # a star's corners, inner radius
PATTERNS = ("bars", "plain", "dots", "slants", "checks", "lines", "zigzag")
_font = cache(ImageFont.load_default)  # of a size
LAYOUTS: tuple[tuple[Part, ...], ...] = (  # of the label's ground, in shares of its sides
    (("rectangle", (0.1, 0.25, 0.9, 0.78, 0.06), "paper"),),
    (("rectangle", (0, 0.26, 1, 0.78), "paper"),),
    (("ellipse", (0.02, 0.23, 0.98, 0.84), "paper"),),
    (("rectangle", (0, 0.25, 1, 1), "paper"), ("rectangle", (0, 0.92, 1, 1), "main")),
    (("polygon", (0, 0.38, 1, 0.2, 1, 0.74, 0, 0.92), "paper"),),
)


@dataclass(frozen=True)
class Shape:
    """A package's silhouette, what is drawn over the label afterwards, the label's box, how round it is (0 to 1)."""

    body: tuple[Part, ...]
    trim: tuple[Part, ...]
    front: Box
    round: float


SHAPES = {
    "box": Shape(
        (("polygon", (14, 44, 58, 14, 244, 14, 244, 306, 200, 340, 14, 340), "main"),),
        (("polygon", (200, 44, 244, 14, 244, 306, 200, 340), "dark"),
         ("polygon", (14, 44, 58, 14, 244, 14, 200, 44), "light"),
         ("polygon", (200, 196, 244, 164, 244, 206, 200, 240), "accent")), (14, 44, 200, 340), 0.0),
    "can": Shape(
        (("rectangle", (36, 26, 220, 332, 16), "main"), ("ellipse", (36, 296, 220, 348), "main")),
        (("ellipse", (36, 8, 220, 52), "metal"), ("ellipse", (46, 14, 210, 48), "dark"),
         ("ellipse", (52, 18, 204, 50), "metal"), ("ellipse", (104, 24, 152, 40), "accent")), (36, 46, 220, 326), 1.0),
    "bottle": Shape(
        (("rectangle", (106, 30, 150, 140, 4), "main"), ("polygon", (106, 76, 150, 76, 192, 136, 64, 136), "main"),
         ("rectangle", (60, 118, 196, 348, 26), "main")),
        (("rectangle", (100, 6, 156, 56, 8), "accent"),), (60, 140, 196, 334), 0.9),
    "bag": Shape(
        (("polygon", (30, 14, 226, 14, 216, 60, 228, 180, 216, 300, 226, 340), "main"),
         ("polygon", (226, 340, 30, 340, 40, 300, 28, 180, 40, 60, 30, 14), "main")),
        (("polygon", (30, 14, 226, 14, 222, 36, 34, 36), "accent"), ("rectangle", (30, 320, 226, 340, 0), "dark")),
        (34, 44, 222, 314), 0.5),
    "jar": Shape(
        (("rectangle", (30, 74, 226, 344, 34), "main"),),
        (("rectangle", (44, 34, 212, 86, 10), "accent"), ("rectangle", (44, 76, 212, 88, 6), "metal")),
        (30, 100, 226, 322), 0.8),
    "tube": Shape(
        (("polygon", (44, 12, 212, 12, 182, 300, 74, 300), "main"),),
        (("polygon", (44, 12, 212, 12, 210, 34, 46, 34), "dark"), ("rectangle", (78, 290, 178, 346, 8), "accent")),
        (66, 40, 190, 286), 0.6),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What every picture of one class shows; all down to ``paper`` it shares with its family."""

    section: str
    kind: str
    shape: str
    brand: str
    layout: tuple[Part, ...]
    slim: float  # the width over that of the drawing
    main: Colour
    paper: Colour
    flavour: str
    amount: str
    emblem: tuple[int, float]
    pattern: str
    accent: Colour

    @property
    def family(self) -> str:
        """Unique in a catalogue: no two families have one brand."""
        return f"{self.brand} {self.kind}"


def family_of(number: int) -> tuple[int, int]:
    """The family of a class and its place among the members; both from 0."""
    members = [(family, place) for family, size in enumerate(FAMILY_SIZES) for place in range(size)]
    round_, among = divmod(number, len(members))
    family, place = members[among]
    return round_ * len(FAMILY_SIZES) + family, place


def look(seed: int, number: int) -> Look:
    """What class ``number`` of the catalogues of ``seed`` looks like. Neighbouring families differ in shape and, by the
    golden ratio, far in hue. Members step through flavours, amounts, emblems and patterns by strides prime to the
    lists' lengths, so that no two of a family agree in any."""
    family, member = family_of(number)
    drawn = np.random.default_rng(seed_of(seed, "family", family))
    start = seed_of(seed, "members", family) + member
    section, kind, shape = KINDS[(family + seed_of(seed, "kinds")) % len(KINDS)]
    hue = (seed_of(seed, "hues") / 2**32 + family * 0.618034) % 1.0
    value = (0.85, 0.6, 0.95)[family % 3]
    brand = (family * 101_159 + seed_of(seed, "brands")) % len(SYLLABLES) ** 3  # a prime: each family has its own
    syllables = np.unravel_index(brand, (len(SYLLABLES),) * 3)
    return Look(
        section=section,
        kind=kind,
        shape=shape,
        brand="".join(SYLLABLES[i] for i in syllables).title(),
        layout=LAYOUTS[(family + seed_of(seed, "layouts")) % len(LAYOUTS)],
        slim=float(drawn.uniform(0.8, 1.1)),
        main=colour(hue, drawn.uniform(0.55, 0.95), value),
        paper=colour(drawn.uniform(), drawn.uniform(0.02, 0.2), 0.98),
        flavour=FLAVOURS[start * 7 % len(FLAVOURS)],
        amount=AMOUNTS[start * 5 % len(AMOUNTS)],
        emblem=EMBLEMS[start % len(EMBLEMS)],
        pattern=PATTERNS[start * 2 % len(PATTERNS)],
        accent=colour(hue + 0.2 + 0.22 * member, 0.9, (0.9, 0.45)[member % 2]),
    )


def face(look: Look) -> Image.Image:
    """The front of a package: RGBA, 176 pixels high and about 128 wide, transparent around it."""
    shape = SHAPES[look.shape]
    drawing = Image.new("RGBA", (WIDTH, HEIGHT))
    _parts(ImageDraw.Draw(drawing), shape.body, look)
    outline = drawing.getchannel("A")
    _label(ImageDraw.Draw(drawing), shape.front, look)
    drawing.putalpha(outline)
    _parts(ImageDraw.Draw(drawing), shape.trim, look)
    return _shaded(drawing, shape.round).resize((round(look.slim * WIDTH / 2), HEIGHT // 2), Image.Resampling.LANCZOS)


def colour(hue: float, saturation: float, value: float) -> Colour:
    """From hue (any number, modulo 1), saturation and value (0 to 1)."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _ink(ground: Colour) -> Colour:
    """Black or white, whichever can be read on ``ground``."""
    return (24, 20, 28) if 0.3 * ground[0] + 0.59 * ground[1] + 0.11 * ground[2] > 140 else (250, 250, 245)


def _parts(draw: ImageDraw.ImageDraw, parts: Iterable[Part], look: Look, box: Box = (0, 0, 1, 1)) -> None:
    """Draw parts, whose numbers are shares of the sides of ``box``."""
    left, top, right, bottom = box
    draws: dict[str, Any] = {"ellipse": draw.ellipse, "polygon": draw.polygon, "rectangle": draw.rounded_rectangle}
    tones: dict[Tone, Colour] = {
        "main": look.main,
        "dark": _mix(look.main, (0, 0, 0), 0.35),
        "light": _mix(look.main, (255, 255, 255), 0.3),
        "accent": look.accent,
        "metal": (196, 198, 204),
        "paper": look.paper,
    }
    for figure, shares, tone in parts:
        corners, radius = (shares[:4], shares[4:]) if figure == "rectangle" else (shares, ())
        where = [left + (right - left) * x for x in corners]
        where[1::2] = [top + (bottom - top) * y for y in corners[1::2]]
        draws[figure](where, *((right - left) * share for share in radius), fill=tones[tone])


def _label(draw: ImageDraw.ImageDraw, front: Box, look: Look) -> None:
    """Brand on top, the layout's ground with emblem and flavour, a band with the pattern, the amount."""
    left, top, right, bottom = front
    wide, high, middle = right - left, bottom - top, (left + right) // 2
    _parts(draw, look.layout, look, front)
    _text(draw, look.brand, (middle, top + 0.13 * high), (0.9 * wide, 0.2 * high), _ink(look.main))
    (corners, inner), y, radius = look.emblem, top + 0.44 * high, 0.19 * min(wide, high)
    turns = [(math.pi * i / corners, radius * (inner if i % 2 else 1.0)) for i in range(2 * corners)]
    draw.polygon([(middle + r * math.sin(turn), y - r * math.cos(turn)) for turn, r in turns], look.accent)
    _text(draw, look.flavour, (middle, top + 0.69 * high), (0.72 * wide, 0.15 * high), _ink(look.paper))
    _band(draw, look, (left, top + round(0.79 * high), right, top + round(0.91 * high)))
    _text(draw, look.amount, (middle, top + 0.95 * high), (0.4 * wide, 0.1 * high), _ink(look.main))


def _band(draw: ImageDraw.ImageDraw, look: Look, box: Box) -> None:
    left, top, right, bottom = box
    high = bottom - top
    middle, thick = (top + bottom) // 2, high // 6
    draw.rectangle(box, look.accent)
    ink = _ink(look.accent)
    for x in range(left, right, high):
        half, far = x + high // 2, x + high
        cells = {
            "bars": (x, top, half, top, half, bottom, x, bottom),
            "slants": (x, bottom, half, top, far, top, half, bottom),
            "checks": (x, top, half, top, half, bottom, far, bottom),
            "zigzag": (x, bottom, half, top, far, bottom),
            "lines": (x, middle - thick, far, middle - thick, far, middle + thick, x, middle + thick),
        }
        if look.pattern in cells:
            draw.polygon(cells[look.pattern], ink)
        elif look.pattern == "dots":
            draw.ellipse((x + high // 5, top + high // 5, x + 4 * high // 5, bottom - high // 5), ink)


def _text(
    draw: ImageDraw.ImageDraw, words: str, middle: tuple[float, float], room: tuple[float, float], ink: Colour
) -> None:
    """Words around ``middle``, as large as the width and height of ``room`` allow."""
    size = min(room[1], 50 * room[0] / _font(50).getlength(words))
    draw.text(middle, words, ink, _font(round(size)), anchor="mm", stroke_width=1)


def _shaded(drawing: Image.Image, roundness: float) -> Image.Image:
    """Light from the upper left; round bodies darken to their sides and have a streak of gloss."""
    x = np.linspace(-1, 1, drawing.width, dtype=np.float32)
    y = np.linspace(0, 1, drawing.height, dtype=np.float32)[:, None]
    light = (1 - 0.12 * y) * (1.05 - roundness * 0.6 * (x + 0.2) ** 2)
    gloss = 60 * roundness * np.maximum(0, 1 - np.abs(x + 0.35) / 0.12)
    pixels = np.asarray(drawing).astype(np.float32)
    pixels[..., :3] = pixels[..., :3] * light[..., None] + gloss[:, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def photograph(face: Image.Image, seed: int) -> Image.Image:
    """A `face` in front of a shelf: RGB, 100 to 160 pixels a side. ``seed``: of the place, pose, light and noise."""
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
    """The eight numbers of the perspective that takes a picture's pixels to a face's: rotated by up to 15 degrees,
    scaled to 80 to 98 % of what fits, off centre, each corner pulled by up to 4 %."""
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
