"""A first plan for somebody's own photographs, fit for them and for the machine, with its reasons in comments."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.decode import Unreadable, opened
from aliprod.plan.source import toml_of

_LOOKED_AT = 64  # pictures whose sizes are read
_GB = 1e9
_PROBE_EPOCHS = 30  # seconds on thousands of images: benchmarks/RESULTS.md, features.py
_LARGE = {  # our name = timm's name, of the seed's five
    "resnet50": "resnet50.tv_in1k",
    "seresnext50": "seresnext50_32x4d.racm_in1k",
    "efficientnet-b3": "efficientnet_b3.ra2_in1k",
}
_SMALL = {"resnet18": "resnet18.tv_in1k", "mobilenetv3": "mobilenetv3_large_100.ra_in1k"}
_FROM_SCRATCH = {"resnet10t": "resnet10t", "resnet14t": "resnet14t"}


@dataclass(frozen=True)
class Photographs:
    """What a plan depends on: images of each class, and a short side that three quarters of the pictures reach."""

    train: int
    val: int
    test: int
    counts: tuple[int, ...]
    short_side: int


@dataclass(frozen=True)
class Computer:
    """What trains. ``gpu_bytes``: memory of its smallest GPU. ``online``: whether pretrained weights can be had."""

    cpus: int
    gpus: int = 0
    gpu_bytes: int = 0
    online: bool = True


def look_at(catalogue: Catalogue) -> Photographs:
    """Count the images of a catalogue, and read the sizes of a few."""
    images = catalogue.train
    rows = np.linspace(0, len(images) - 1, min(_LOOKED_AT, len(images))).astype(int)
    sides = list[int]()
    for row in rows.tolist():
        try:
            sides.append(min(opened(images.source(row)).size))
        except Unreadable:
            continue
    train, val, test = map(len, catalogue.splits)
    side = int(np.percentile(sides, 25)) if sides else 0
    return Photographs(train, val, test, tuple(catalogue.class_counts.tolist()), side)


def draft(name: str, path: str, photographs: Photographs, computer: Computer, reading: dict[str, object]) -> str:
    """The text of a plan.

    Args:
        path: of the catalogue, as it is to stand in the plan. ``reading``: its further settings of [catalogue].
    """
    return "\n".join(_Draft(photographs, computer).lines(name, path, reading)) + "\n"


def plain(name: str) -> str:
    """A plan's name, made of a folder's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:60] or "photographs"


class _Draft:
    def __init__(self, photographs: Photographs, computer: Computer) -> None:
        self.photographs, self.computer = photographs, computer
        counts = sorted(photographs.counts)
        self.median = counts[len(counts) // 2]
        self.uneven = counts[-1] > 3 * self.median
        self.backbones = _LARGE if computer.gpus else _SMALL if computer.online else _FROM_SCRATCH
        self.crop, self.resize = self._sizes()
        self.batch_size, self.shares = self._batch()
        self.stages = ["full", *["balanced"] * self.uneven]
        self.epochs = self._epochs()

    def _sizes(self) -> tuple[int, int]:
        """Crop and resize: no larger than the pictures are; half of the usual on CPUs."""
        crop, resize = (224, 256) if self.computer.gpus else (128, 144)
        while crop > 64 and self.photographs.short_side < 0.8 * crop:
            crop, resize = crop // 64 * 32, resize // 64 * 32 + 8
        return crop, resize

    def _batch(self) -> tuple[int, int]:
        if self.computer.gpus:
            most = 256 if self.computer.gpu_bytes > 40 * _GB else 128 if self.computer.gpu_bytes > 14 * _GB else 64
        else:
            most = 32
        fitting = max(8, self.photographs.train // 8)  # eight steps an epoch or more
        size = 2 ** min(most.bit_length() - 1, fitting.bit_length() - 1)
        return size, max(1, size // 32)

    def _epochs(self) -> int:
        """As many as show a small catalogue often and a large one seldom: on GPUs some 400,000 images a
        training, without them 10,000 for each CPU in all trainings together."""
        trainings = len(self.backbones) * len(self.stages)
        shown = 400_000 if self.computer.gpus else 10_000 * self.computer.cpus / trainings
        return max(4, min(30, ceil(shown / max(1, self.photographs.train))))

    def lines(self, name: str, path: str, reading: dict[str, object]) -> Iterator[str]:
        """The plan, line by line."""
        photographs, computer = self.photographs, self.computer
        classes, few = len(photographs.counts), min(photographs.counts)
        machine = f"{computer.gpus} GPUs" if computer.gpus else f"{computer.cpus} CPUs and no GPU"
        yield f"# Drafted by `aliprod init` for {photographs.train:,} training photographs of {classes:,} classes,"
        yield f"# {few:,} to {max(photographs.counts):,} of each, and a machine of {machine}. Every value is yours to"
        yield "# change: what it changes is trained anew, the rest is kept. docs/plan.md explains each."
        yield from ["format = 1", f"name = {json.dumps(name)}", "seed = 0", "", "[catalogue]"]
        yield f"path = {toml_of(path)}"
        yield from (f"{key} = {toml_of(value)}" for key, value in reading.items())
        yield from ["", "[backbones]  # our name = timm's name"]
        yield from (f"{ours} = {json.dumps(timm)}" for ours, timm in self.backbones.items())
        yield from self._defaults()
        yield from self._stages()
        yield from ["", "[jobs]"]
        stages = ["probe"] * computer.online + self.stages
        yield from (f"{backbone} = {json.dumps(stages)}" for backbone in self.backbones)
        yield from ["", "[ensemble]  # the last stage of each; their probabilities are added"]
        members = [f"{backbone}/{self.stages[-1]}" for backbone in self.backbones]
        yield f"members = {json.dumps(members)}"
        yield from ["", "[cluster]"]
        yield from ([] if computer.gpus else ["use_gpu = false", "cpus_per_worker = 1"])
        yield f"loader_processes = {min(8, computer.cpus // max(1, computer.gpus)) if computer.gpus else 0}"
        yield from ([] if computer.gpus else ["poll_seconds = 0.2  # short jobs would mostly wait for Ray's 2 s"])

    def _defaults(self) -> Iterator[str]:
        yield from ["", "[defaults]  # of every stage"]
        why = "" if self.computer.online else "  # the hub of weights was not reached; true is far better"
        yield f"pretrained = {json.dumps(self.computer.online)}{why}"
        yield f"resize = {self.resize}"
        yield f"crop = {self.crop}  # pixels; the pictures' short side is {self.photographs.short_side} or more in most"
        yield 'augmentation = ["random_resized_crop", "flip", "auto_augment"]'
        yield 'objective = { name = "cross_entropy", smoothing = 0.1 }'
        yield f"batch_size = {self.batch_size}"
        if self.shares > 1:
            yield f"shares = {self.shares}  # a job may have as many GPUs; the result does not depend on how many"
        yield "ema = 0.99"

    def _stages(self) -> Iterator[str]:
        if self.computer.online:
            yield from ["", "[stages.probe]  # the floor: a classifier on features of the pretrained weights alone"]
            yield from ['trains = "classifier"', 'features = "cached"', f"epochs = {_PROBE_EPOCHS}"]
            yield from ["shares = 1  # features take no GPU long"] if self.shares > 1 else []
            yield 'optimizer = { name = "adamw" }'
            yield 'lr = { heads = 0.003, schedule = "cosine", warmup_epochs = 1 }'
        fresh = 1 if self.computer.online else 5  # weights that are learned from nothing take higher rates
        yield from ["", "[stages.full]  # all photographs", 'images = "all"', f"epochs = {self.epochs}"]
        yield f'lr = {{ backbone = {0.01 * fresh:g}, heads = 0.05, schedule = "cosine", warmup_epochs = 1 }}'
        if self.uneven:
            yield from ["", f"[stages.balanced]  # classes alike: half of them have {self.median} images or more"]
            yield from ['start = "full"', f"images = {{ per_class = {self.median} }}"]
            yield f"epochs = {max(2, self.epochs // 2)}"
            yield f'lr = {{ backbone = {0.003 * fresh:g}, heads = 0.03, schedule = "cosine", warmup_epochs = 0.5 }}'
