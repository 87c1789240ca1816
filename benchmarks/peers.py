"""The train transform against what peers offer for the same files: CPU time of a picture, all threads.

Each peer does random resized crop to 224 with the same interpolation, flip and AutoAugment, and ends at 8 bits; each
draws for itself, so the work is the same in kind and not pixel for pixel: what differs is printed. All start from the
bytes in memory, since a peer's own format is about reading, which `read_rows.py` measures. Peers that cannot be
imported are named and left out.

    python benchmarks/peers.py FOLDER [--pictures 60] [--rounds 5] [--interpolation bicubic]
"""

import importlib.util
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from ratio import header, interleave, show
from transform import STAGE, arguments, describe, picture_sets

from aliprod.data import pixels
from aliprod.data.augment import train_view

Transform = Callable[[Path, int], Any]
ITS_OWN = {  # what reads and decodes with Pillow and leaves the transform to torchvision: the baseline of transform.py
    "webdataset": "WebDataset",
    "litdata": "LitData",
    "streaming": "Mosaic Streaming",
}


def main() -> None:
    """Measure each peer in turn with ours."""
    asked = arguments(__doc__)
    torch.set_num_threads(1)
    decoder = "simplejpeg" if pixels.simplejpeg else "Pillow"
    print(header(("timm", "torch", "torchvision", "pillow")), f"decoder {decoder}", asked.interpolation, sep=", ")
    for module, name in {**ITS_OWN, "nvidia.dali": "DALI", "ffcv": "FFCV"}.items():
        print(f"  {name}: {why_left_out(module)}")
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        for name, paths in picture_sets(asked.folder, Path(folder), asked.pictures).items():
            print(f"{name}: {len(paths)} pictures, {describe(paths)}")
            contents = {path: path.read_bytes() for path in paths}
            places = {path: 1000 * number for number, path in enumerate(paths)}
            peers = {"timm, uint8 prefetcher": timm_view(contents, asked.interpolation)}
            for peer, theirs in peers.items():

                def ours(path: Path, number: int, places=places, contents=contents) -> object:  # type: ignore[no-untyped-def]
                    return train_view(
                        pixels.pixels_of(contents[path]), STAGE, places[path] + number, asked.interpolation
                    )

                sides = interleave({"aliprod": ours, peer: theirs}, paths, asked.rounds)
                show(f"{name}, {peer} (bar: >= 1.2)", sides[0], sides[1], "us", 1e6)


def why_left_out(module: str) -> str:
    """Of a peer that is not measured."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return "left out, cannot be imported"
    if module in ITS_OWN:
        return "left out: it reads, and leaves decoding and transform to Pillow and torchvision (transform.py)"
    return "can be imported, and is not measured here"


def timm_view(contents: dict[Path, bytes], interpolation: str) -> Transform:
    """`create_transform` as timm's loader builds it for its prefetcher: (3, 224, 224) uint8; erasing is the GPU's."""
    from timm.data import create_transform

    transform = create_transform(
        (3, STAGE.crop, STAGE.crop),
        is_training=True,
        use_prefetcher=True,
        auto_augment="original-mstd0.0",
        color_jitter=None,
        interpolation=interpolation,
        scale=STAGE.scale,
    )

    def view(path: Path, _: int) -> np.ndarray:
        with Image.open(io.BytesIO(contents[path])) as image:
            seen: np.ndarray = transform(image.convert("RGB"))
        if seen.dtype != torch.uint8 and seen.dtype != np.uint8:
            raise SystemExit(f"timm's transform ends at {seen.dtype}")
        return seen

    return view


if __name__ == "__main__":
    main()
