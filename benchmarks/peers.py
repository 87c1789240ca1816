"""The train transform against what peers offer for the same files: CPU time of a picture, all threads.

Each peer does random resized crop to 224 with the same interpolation, flip and AutoAugment, and ends at 8 bits; each
draws for itself, so the work is the same in kind and not pixel for pixel: what differs is printed. All start from the
bytes in memory, since a peer's own format is about reading, which `read_rows.py` measures. Peers that cannot be
imported are named and left out.

DALI pays for each run of its pipeline, so it is given batches: on one thread, on the CPU, nothing ahead of time. Its
resizing is not Pillow's by our tolerance, so ours is also measured with `resizing = "torch"`, which is nearer than it.

    python benchmarks/peers.py FOLDER [--pictures 20] [--rounds 40] [--interpolation bicubic]
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

from aliprod.data import augment
from aliprod.data.augment import picture_of, train_view
from aliprod.recipe import Stage

Batch = tuple[Path, ...]
Views = Callable[[Batch, int], Any]
BATCH = 20  # pictures in a run of DALI's pipeline: 1 costs it 1.3 times as much a picture as 40
ITS_OWN = {  # what reads and decodes with Pillow and leaves the transform to torchvision: the baseline of transform.py
    "webdataset": "WebDataset",
    "litdata": "LitData",
    "streaming": "Mosaic Streaming",
}


def main() -> None:
    """Measure each peer in turn with ours."""
    asked = arguments(__doc__)
    torch.set_num_threads(1)
    decoder = "simplejpeg" if augment.simplejpeg else "Pillow"
    print(header(("timm", "torch", "torchvision", "pillow")), f"decoder {decoder}", asked.interpolation, sep=", ")
    for module, name in {**ITS_OWN, "nvidia.dali": "DALI", "ffcv": "FFCV"}.items():
        print(f"  {name}: {why_left_out(module)}")
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        for name, paths in picture_sets(asked.folder, Path(folder), asked.pictures).items():
            print(f"{name}: {len(paths)} pictures, {describe(paths)}")
            contents = {path: path.read_bytes() for path in paths}
            ours = our_views(contents, asked.interpolation, STAGE)
            near = our_views(contents, asked.interpolation, STAGE.model_copy(update={"resizing": "torch"}))
            timm = timm_views(contents, asked.interpolation)
            against(f"{name}, timm, uint8 prefetcher", ours, timm, [(path,) for path in paths], asked.rounds)
            if importable("nvidia.dali"):
                batches = [tuple(paths[n : n + BATCH]) for n in range(0, len(paths), BATCH)]
                print(f"  {dali_differs(contents, batches[0], asked.interpolation)}")
                dali = dali_views(contents, asked.interpolation)
                against(f"{name}, DALI, batches of {len(batches[0])}", ours, dali, batches, asked.rounds)
                against(f"{name}, DALI, ours resized by torch", near, dali, batches, asked.rounds)


def against(what: str, ours: Views, theirs: Views, batches: list[Batch], rounds: int) -> None:
    """Print what a picture takes."""
    sides = interleave({"aliprod": ours, "theirs": theirs}, batches, rounds)
    pictures = sum(map(len, batches)) / len(batches)
    show(f"{what} (bar: >= 1.2)", sides[0], sides[1], "us", 1e6 / pictures)


def importable(module: str) -> bool:
    """Whether a peer is there."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def why_left_out(module: str) -> str:
    """Of a peer, or that it is measured."""
    if not importable(module):
        return "left out, cannot be imported"
    if module in ITS_OWN:
        return "left out: it reads, and leaves decoding and transform to Pillow and torchvision (transform.py)"
    return "measured" if module == "nvidia.dali" else "can be imported, and is not measured here"


def our_views(contents: dict[Path, bytes], interpolation: str, stage: Stage) -> Views:
    """As the loader makes them."""
    places = {path: 1000 * number for number, path in enumerate(contents)}

    def views(batch: Batch, number: int) -> object:
        return [train_view(picture_of(contents[path]), stage, places[path] + number, interpolation) for path in batch]

    return views


def timm_views(contents: dict[Path, bytes], interpolation: str) -> Views:
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

    def view(path: Path) -> np.ndarray:
        with Image.open(io.BytesIO(contents[path])) as image:
            seen: np.ndarray = transform(image.convert("RGB"))
        if seen.dtype != torch.uint8 and seen.dtype != np.uint8:
            raise SystemExit(f"timm's transform ends at {seen.dtype}")
        return seen

    return lambda batch, _: [view(path) for path in batch]


def dali_views(contents: dict[Path, bytes], interpolation: str) -> Views:
    """(n, 224, 224, 3) uint8. The decoder decodes what the crop needs."""
    from nvidia.dali import fn, types
    from nvidia.dali.auto_aug.auto_augment import auto_augment_image_net

    def graph(raw: Any) -> Any:
        crop = fn.decoders.image_random_crop(
            raw, device="cpu", output_type=types.RGB, random_area=STAGE.scale, random_aspect_ratio=(3 / 4, 4 / 3)
        )
        side = [STAGE.crop, STAGE.crop]
        resized = fn.resize(crop, size=side, interp_type=dali_filter(interpolation), antialias=True)
        flipped = fn.flip(resized, horizontal=fn.random.coin_flip(probability=0.5))
        return auto_augment_image_net(flipped, shape=side, interp_type=types.INTERP_NN)

    run = dali_pipeline(graph)
    return lambda batch, _: run([contents[path] for path in batch])


def dali_differs(contents: dict[Path, bytes], batch: Batch, interpolation: str) -> str:
    """How far decoding and resizing whole pictures are from Pillow's, and what else is not as ours."""
    from nvidia.dali import fn, types

    def graph(raw: Any) -> Any:
        decoded = fn.decoders.image(raw, device="cpu", output_type=types.RGB)
        side = [STAGE.crop, STAGE.crop]
        return fn.resize(decoded, size=side, interp_type=dali_filter(interpolation), antialias=True)

    theirs = dali_pipeline(graph)([contents[path] for path in batch]).as_array().astype(int)
    mode = Image.Resampling[interpolation.upper()]
    side = (STAGE.crop, STAGE.crop)
    pillow = [np.asarray(Image.open(io.BytesIO(contents[path])).convert("RGB").resize(side, mode)) for path in batch]
    apart = np.abs(theirs - np.stack(pillow).astype(int))
    return (
        f"DALI decodes and resizes to within {apart.mean():.2f} of Pillow in the mean, {apart.max()} at most, of 255; "
        "its AutoAugment has the paper's policies with magnitudes of its own"
    )


def dali_filter(interpolation: str) -> Any:
    """Of its names."""
    from nvidia.dali import types

    return {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[interpolation]


def dali_pipeline(graph: Callable[[Any], Any]) -> Callable[[list[bytes]], Any]:
    """Run a graph on encoded pictures: synchronously, on one thread, nothing prefetched."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(enable_conditionals=True)
    def pipeline() -> Any:
        return graph(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1))

    made = pipeline(
        batch_size=BATCH,
        num_threads=1,
        device_id=None,
        seed=0,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    made.build()

    def run(encoded: list[bytes]) -> Any:
        made.feed_input("encoded", [np.frombuffer(picture, np.uint8) for picture in encoded])
        (seen,) = made.run()
        return seen

    return run


if __name__ == "__main__":
    main()
