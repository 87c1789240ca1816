"""The train transform at 224, CPU time of a picture from file to pixels, against torchvision's v1 as in ImageFolder.

Both sides read the same files and take the same draws; that they see the same pixels (mean 0.05 of 255, 2 at most) is
checked first, view by view. Theirs: PIL, RandomResizedCrop, flip, AutoAugment, ToTensor, Normalize, cutout. Ours ends
at 8 bits, as it is sent to the device, where it is normalised and cut out; that work on the CPU is measured beside it.

Sets of pictures: those below FOLDER as they are, and leaves of 580 x 800 put together from six of them each (the size
and, at quality 92, the detail of a product photograph); of each, two sets that have no picture in common. Then the
second bar: ours from a store of short side 320 against theirs from the leaves, which are not the same pixels. And what
a loader is left with where augment = "device", against all of it, both to a batch that can be sent.

    python benchmarks/transform.py FOLDER [--pictures 20] [--rounds 40] [--interpolation bicubic]
                                          [--sections views store device]
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ratio import Side, header, interleave, interval, show
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy, _apply_op

from aliprod.catalogue.decode import Unreadable, decode
from aliprod.data import augment
from aliprod.data.augment import on_device, train_view
from aliprod.data.augment_batch import Packed, cut, pack
from aliprod.ingest.prepare import Settings, stored
from aliprod.recipe import Stage

STAGE = Stage(augmentation=("random_resized_crop", "flip", "auto_augment", "cutout"), scale=(0.08, 1.0), crop=224)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = [128, 128, 128]
LEAF = (580, 800)
SECTIONS = ("views", "store", "device")


def arguments(description: str | None) -> argparse.Namespace:
    """Which pictures, how often, resized how."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--pictures", type=int, default=20, help="of each set")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--interpolation", choices=["bicubic", "bilinear"], default="bicubic")
    return parser.parse_args()


def main() -> None:
    """Check, then measure."""
    asked = arguments(__doc__)
    torch.set_num_threads(1)
    print(header(), f"decoder {'simplejpeg' if augment.simplejpeg else 'Pillow'}", asked.interpolation, sep=", ")
    ours, theirs = our_view(asked.interpolation), older_view(asked.interpolation)
    with tempfile.TemporaryDirectory(prefix="transform-") as folder:
        sets = picture_sets(asked.folder, Path(folder), asked.pictures)
        if "views" in asked.sections:
            found: list[float] = []
            for name, paths in sets.items():
                print(f"{name}: {len(paths)} pictures, {describe(paths)}")
                print(f"  {check_equal(ours, theirs, paths)}")
                found += measure(name, ours, theirs, paths, asked.rounds)
            print(f"mean of {len(sets)} sets: {statistics.mean(found):.3f} (bar: >= 1.5, stretch 1.8)")
        for name, paths in sets.items():
            small = {path: prepared(path, Path(folder)) for path in paths}
            if name.startswith("leaves") and "store" in asked.sections:
                measure_store(name, ours, theirs, small, asked.rounds)
            if "device" in asked.sections:
                measure_device(f"{name}, store of 320", ours, [*small.values()], asked.rounds, asked.interpolation)


View = Callable[[Path, int], Tensor]


def our_view(interpolation: str) -> View:
    """As the loader makes it: (224, 224, 3) uint8."""
    return lambda path, seed: train_view(augment.picture_of(path), STAGE, seed, interpolation)[0]


def older_view(interpolation: str) -> Callable[[Path, int], tuple[Image.Image, Tensor]]:
    """Torchvision's v1 under our draws: the picture before ToTensor, and what comes out at the end."""
    mode = F.InterpolationMode(interpolation)
    crop = transforms.RandomResizedCrop(STAGE.crop, STAGE.scale, (3 / 4, 4 / 3), mode)
    flip = transforms.RandomHorizontalFlip()
    its = AutoAugment(AutoAugmentPolicy.IMAGENET)

    def view(path: Path, seed: int) -> tuple[Image.Image, Tensor]:
        torch.manual_seed(seed)
        with path.open("rb") as file:
            image = flip(crop(Image.open(file).convert("RGB")))
        space = its._augmentation_space(10, image.size[::-1])
        for name, probability, place in its.policies[int(torch.randint(len(its.policies), ()))]:
            if torch.rand(()) <= probability:
                magnitudes, signed = space[name]
                magnitude = float(magnitudes[place]) if place is not None else 0.0
                negative = signed and torch.rand(()) <= 0.5
                image = _apply_op(image, name, -magnitude if negative else magnitude, F.InterpolationMode.NEAREST, GREY)
        pixels = F.normalize(F.to_tensor(image), MEAN, STD)
        row, column = torch.randint(STAGE.crop, (2,)).tolist()
        half = STAGE.crop // 8
        pixels[:, max(0, row - half) : row + half, max(0, column - half) : column + half] = 0.0
        return image, pixels

    return view


def picture_sets(folder: Path, made: Path, pictures: int) -> dict[str, list[Path]]:
    """Two disjoint sets of files as they are, two of leaves."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and same_for_both(path)]
    if len(files) < 2 * pictures:
        sys.exit(f"{folder}: {len(files)} pictures that both sides read alike; {2 * pictures} are needed")
    files = [files[int(place)] for place in np.linspace(0, len(files) - 1, 2 * pictures)]
    halves = {"a": files[::2], "b": files[1::2]}
    leaves = {f"leaves {name}": [leaf(half, n, made / f"{name}{n}.jpg") for n in range(pictures)]
              for name, half in halves.items()}  # fmt: skip
    return {f"as they are {name}": half for name, half in halves.items()} | leaves


def same_for_both(path: Path) -> bool:
    """Theirs does not turn by EXIF and knows no white behind transparency."""
    try:
        image = decode(path)
    except Unreadable:
        return False
    with Image.open(path) as theirs:
        return bool(np.array_equal(np.asarray(theirs.convert("RGB")), np.asarray(image)))


def leaf(paths: list[Path], number: int, to: Path) -> Path:
    """Six photographs on one sheet."""
    sheet = Image.new("RGB", LEAF)
    width, height = LEAF[0] // 2, LEAF[1] // 3 + 1
    for place in range(6):
        tile = decode(paths[(number + 7 * place) % len(paths)]).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(tile, (place % 2 * width, place // 2 * height))
    sheet.save(to, "JPEG", quality=92)
    return to


def describe(paths: list[Path]) -> str:
    """Median size, and bits a pixel."""
    sizes = [decode(path).size for path in paths]
    bits = sum(8 * path.stat().st_size for path in paths) / sum(width * height for width, height in sizes)
    width, height = (int(statistics.median(side)) for side in zip(*sizes, strict=True))
    return f"{width} x {height} in the median, {bits:.2f} bits a pixel"


def check_equal(ours: View, theirs: Callable[[Path, int], tuple[Image.Image, Tensor]], paths: list[Path]) -> str:
    """Every picture under five seeds."""
    most, means = 0, []
    for seed, path in enumerate(paths * 5):
        difference = np.abs(ours(path, seed).numpy().astype(int) - np.asarray(theirs(path, seed)[0]).astype(int))
        most, means = max(most, int(difference.max())), [*means, float(difference.mean())]
    if most > 2 or max(means) > 0.05:
        sys.exit(f"not the same work: differs by {most} at most, {max(means):.4f} in the mean of a view")
    mean = statistics.mean(means)
    return (
        f"same work: of 255, {most} apart at most, {mean:.4f} in the mean, {max(means):.4f} in that of the worst view"
    )


def measure(
    name: str, ours: View, theirs: Callable[[Path, int], object], paths: list[Path], rounds: int
) -> list[float]:
    """The ratio of a set, and the same with the rest of our work done on the CPU."""

    def whole(path: Path, seed: int) -> Tensor:
        centre = torch.tensor([[seed % STAGE.crop, 7 * seed % STAGE.crop]])
        return on_device(ours(path, seed)[None], centre, MEAN, STD)

    places = {path: 1000 * number for number, path in enumerate(paths)}
    names = ("aliprod", "torchvision v1", "aliprod, with what is the device's work")
    views = (ours, theirs, whole)
    sides = interleave(
        {side: lambda path, number, view=view: view(path, places[path] + number)
         for side, view in zip(names, views, strict=True)},
        paths, rounds,
    )  # fmt: skip
    show(f"{name}, to 8 bits", sides[0], sides[1], "us", 1e6)
    show(f"{name}, to normalised floats on the CPU", sides[2], sides[1], "us", 1e6)
    return [interval(sides[0], sides[1])[0]]


def prepared(path: Path, folder: Path) -> Path:
    """The picture as a store of short side 320 has it."""
    content, to = path.read_bytes(), folder / f"320-{path.parent.name}-{path.name}"
    to.write_bytes(stored(content, decode(content), Settings(short_side=320)))
    return to


def measure_device(name: str, ours: View, paths: list[Path], rounds: int, interpolation: str) -> None:
    """A loader's part with augment = "device" against the whole view, batch by batch."""

    def loaders(batch: list[Path], number: int) -> Packed:
        pictures = ((augment.picture_of(path), 1000 * place + number) for place, path in enumerate(batch))
        return pack([cut(picture, STAGE, seed, interpolation)[0] for picture, seed in pictures])

    def whole(batch: list[Path], number: int) -> Tensor:
        return torch.stack([ours(path, 1000 * place + number) for place, path in enumerate(batch)])

    sent = loaders(paths, 0).pixels.numel() / len(paths)
    print(f"{name}: {len(paths)} pictures, {describe(paths)}, {sent:,.0f} bytes of each are sent")
    device, cpu = interleave({'augment = "device"': loaders, 'augment = "cpu"': whole}, [paths], rounds)
    show(f"{name}, CPU of a loader", device, cpu, "us a picture", 1e6 / len(paths))
    for side in (device, cpu):
        print(f"  four such cores feed {4 * len(paths) / side.median:,.0f} images/s with {side.name}")


def measure_store(
    name: str, ours: View, theirs: Callable[[Path, int], object], small: dict[Path, Path], rounds: int
) -> None:
    """Ours from a prepared picture of short side 320, theirs from the leaf."""
    paths = [*small]
    places = {path: 1000 * number for number, path in enumerate(paths)}
    sides: list[Side] = interleave(
        {
            "aliprod, store of 320": lambda path, number: ours(small[path], places[path] + number),
            "torchvision v1, originals": lambda path, number: theirs(path, places[path] + number),
        },
        paths,
        rounds,
    )
    show(f"{name}, store of 320 against originals (bar: >= 2.5, stretch 3)", sides[0], sides[1], "us", 1e6)


if __name__ == "__main__":
    main()
