"""Pictures/s and memory of `aliprod predict` for N and for 4N files, and beside it what its network alone does.

JPEGs of 400 x 300 pixels in one folder, a small network (mobilenetv3_small_050 at 64 pixels) that is not trained, its
centre crop. Memory: the most that the command and its processes hold together (PSS, so that what they share counts
once), asked ten times a second.

    OMP_WAIT_POLICY=passive python benchmarks/many_pictures.py [--files 2000]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from ratio import header

from aliprod.inference.classify import CHUNK, Recogniser
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.store.lineage import Voice

NETWORK = "mobilenetv3_small_050"
CLASSES = 100


def main() -> None:
    """Predict N files, then 4N, then ask the network alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    asked = parser.parse_args()
    print(header())
    with tempfile.TemporaryDirectory(prefix="many-pictures-") as temporary:
        folder = Path(temporary)
        small_network(folder / "weights")
        found = [predicted(folder, count) for count in (asked.files, 4 * asked.files)]
        for count, seconds, memory in found:
            print(f"{count:,} files: {count / seconds:,.0f} files/s with its start, peak {memory / 2**20:,.0f} MiB")
        (few, few_seconds, few_memory), (many, many_seconds, many_memory) = found
        rate = (many - few) / (many_seconds - few_seconds)
        print(f"between: {rate:,.0f} files/s; memory of 4N over N: {many_memory / few_memory:.3f}")
        recogniser = Recogniser.load([Voice(folder / "weights")], "center")
        print(f"the network alone, batches of {CHUNK}: {bare_rate(recogniser, CHUNK):,.0f} pictures/s")


def small_network(folder: Path, seed: int = 0) -> None:
    """A weights folder of a network that is not trained."""
    torch.manual_seed(seed)
    model = Classifier(NETWORK, num_classes=CLASSES)
    torch.nn.init.normal_(model.classifier.weight)
    folder.mkdir(parents=True)
    config = weights.Config(NETWORK, (0.5,) * 3, (0.25,) * 3, "bicubic", resize=72, crop=64)
    weights.save(folder, model.state_dict(), config, weights.Classes(tuple(range(CLASSES)), ("",) * CLASSES))


def picture(seed: int) -> Image.Image:
    """Smooth noise, so that its JPEG is of a photograph's size."""
    small = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    return Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC)


def bare_rate(recogniser: Recogniser, batch: int, seconds: float = 5.0) -> float:
    """Pictures/s of the forward passes alone, on pictures that are decoded already."""
    pictures = [{size: np.zeros((3, size[0], size[0]), np.uint8) for size in recogniser.sizes}] * batch
    recogniser.answers(pictures)
    began, done = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        recogniser.answers(pictures)
        done += batch
    return done / (time.perf_counter() - began)


def predicted(folder: Path, count: int) -> tuple[int, float, int]:
    """How many, seconds of the command, and the most bytes that it held."""
    pictures = folder / str(count)
    pictures.mkdir()
    for number in range(count):
        file = pictures / f"{number:07d}.jpg"
        if number < 200:
            picture(number).save(file, quality=85)
        else:
            file.hardlink_to(pictures / f"{number % 200:07d}.jpg")
    out = folder / f"{count}.csv"
    command = [
        sys.executable,
        "-m",
        "aliprod",
        "predict",
        folder / "weights",
        pictures,
        "--views",
        "centre",
        "--out",
        out,
    ]
    began, most = time.perf_counter(), 0
    with psutil.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, held(process))
            time.sleep(0.1)
    seconds = time.perf_counter() - began
    lines = out.read_text().count("\n")
    if lines != count + 1:
        raise SystemExit(f"{out} has {lines} lines for {count} files")
    return count, seconds, most


def held(process: psutil.Process) -> int:
    """PSS of a process and its children, in bytes."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().pss
    except psutil.Error:  # one ended
        return 0
    return total


if __name__ == "__main__":
    main()
