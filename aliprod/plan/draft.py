"""A first plan for somebody's own photographs, fit for them and for the machine, with its reasons in comments."""

import re
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.decode import Unreadable, opened
from aliprod.plan.source import toml_of

_LOOKED_AT = 64  # pictures whose sizes are read
_GB = 1e9
_MANY_EPOCHS = 10  # in which heavy augmentation pays: benchmarks/RESULTS.md, transfer.py
_FEW = 100_000  # photographs that are too few to take norm statistics anew from
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
        with suppress(Unreadable):
            sides.append(min(opened(images.source(row)).size))
    train, val, test = map(len, catalogue.splits)
    side = int(np.percentile(sides, 25)) if sides else 0
    return Photographs(train, val, test, tuple(catalogue.class_counts.tolist()), side)


def draft(name: str, path: str, photographs: Photographs, computer: Computer, reading: dict[str, object]) -> str:
    """The text of a plan. ``path``: of the catalogue, as it is to stand in the plan. ``reading``: its further settings
    of [catalogue]."""
    counts, gpus, online = sorted(photographs.counts), computer.gpus, computer.online
    median = counts[len(counts) // 2]
    uneven = counts[-1] > 3 * median  # then classes are balanced in a stage of its own
    last = "balanced" if uneven else "full"
    backbones = _LARGE if gpus else _SMALL if online else _FROM_SCRATCH
    epochs = _epochs(photographs, computer, len(backbones) * (1 + uneven))
    shares = max(1, _batch_size(photographs, computer) // 32)
    machine = f"{gpus} GPUs" if gpus else f"{computer.cpus} CPUs and no GPU"
    loaders = f"loader_processes = {min(8, computer.cpus // max(1, gpus))}"
    alone = """use_gpu = false
cpus_per_worker = 1
loader_processes = 0
poll_seconds = 0.2  # short jobs would mostly wait for Ray's 2 s"""
    return f"""\
# Drafted by `aliprod init` for {photographs.train:,} training photographs of {len(counts):,} classes,
# {counts[0]:,} to {counts[-1]:,} of each, and a machine of {machine}. Every value is yours to
# change: what it changes is trained anew, the rest is kept. docs/plan.md explains each.
format = 1
name = {toml_of(name)}
seed = 0

[catalogue]
{_settings({"path": path, **reading})}

[backbones]  # our name = timm's name
{_settings(backbones)}

[defaults]  # of every stage
{_defaults(photographs, computer, epochs)}
{_stages(online, shares, epochs, median if uneven else None)}
[jobs]
{_settings(dict.fromkeys(backbones, ["probe"] * online + ["full"] + ["balanced"] * uneven))}

[ensemble]  # the last stage of each; their probabilities are added
members = {toml_of([f"{backbone}/{last}" for backbone in backbones])}

[cluster]
{loaders if gpus else alone}
"""


def _defaults(photographs: Photographs, computer: Computer, epochs: int) -> str:
    """The settings of every stage, line by line."""
    crop, resize = _sizes(photographs, computer)
    batch_size = _batch_size(photographs, computer)
    offline = "" if computer.online else "  # the hub of weights was not reached; true is far better"
    lines = [
        f"pretrained = {toml_of(computer.online)}{offline}",
        f"resize = {resize}",
        f"crop = {crop}  # pixels; the pictures' short side is {photographs.short_side} or more in most",
        'objective = { name = "cross_entropy", smoothing = 0.1 }',
        "ema = 0.99",
        f"batch_size = {batch_size}",
    ]
    if (shares := batch_size // 32) > 1:
        lines.append(f"shares = {shares}  # a job may have as many GPUs; the result does not depend on how many")
    if computer.online and photographs.train < _FEW:
        lines.append('norm_statistics = "frozen"  # of the pretrained weights: few photographs would spoil them')
    if epochs < _MANY_EPOCHS:
        lines.append('augmentation = ["random_resized_crop", "flip"]  # no more: photographs are seen a few times')
        lines.append("scale = [0.25, 1.0]")
    else:
        lines.append('augmentation = ["random_resized_crop", "flip", "auto_augment"]')
    return "\n".join(lines)


def plain(name: str) -> str:
    """A plan's name, made of a folder's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:60] or "photographs"


def _settings(table: dict[str, Any]) -> str:
    return "\n".join(f"{key} = {toml_of(value)}" for key, value in table.items())


def _sizes(photographs: Photographs, computer: Computer) -> tuple[int, int]:
    """Crop and resize: no larger than the pictures are; half of the usual on CPUs."""
    crop, resize = (224, 256) if computer.gpus else (128, 144)
    while crop > 64 and photographs.short_side < 0.8 * crop:
        crop, resize = crop // 64 * 32, resize // 64 * 32 + 8
    return crop, resize


def _batch_size(photographs: Photographs, computer: Computer) -> int:
    """A power of two; eight steps an epoch or more."""
    most = 32
    if computer.gpus:
        most = 256 if computer.gpu_bytes > 40 * _GB else 128 if computer.gpu_bytes > 14 * _GB else 64
    return 1 << (min(most, max(8, photographs.train // 8)).bit_length() - 1)


def _epochs(photographs: Photographs, computer: Computer, trainings: int) -> int:
    """As many as show a small catalogue often and a large one seldom: on GPUs some 400,000 images a training, without
    them 10,000 for each CPU in all trainings together."""
    shown = 400_000 if computer.gpus else 10_000 * computer.cpus / trainings
    return max(4, min(30, ceil(shown / max(1, photographs.train))))


def _stages(online: bool, shares: int, epochs: int, per_class: int | None) -> str:
    """The tables of the stages; ``per_class``: images of a class in the balanced one, None: there is none."""
    fresh = 1 if online else 5  # weights that are learned from nothing take higher rates
    alone = "\nshares = 1  # features take no GPU long" if shares > 1 else ""
    probe = f"""
[stages.probe]  # the floor: a classifier on features of the pretrained weights alone
trains = "classifier"
features = "cached"
epochs = {_PROBE_EPOCHS}{alone}
optimizer = {{ name = "adamw" }}
lr = {{ heads = 0.003, schedule = "cosine", warmup_epochs = 1 }}
"""
    full = f"""
[stages.full]  # all photographs
images = "all"
epochs = {epochs}
lr = {{ backbone = {0.01 * fresh:g}, heads = 0.05, schedule = "cosine", warmup_epochs = 1 }}
"""
    balanced = f"""
[stages.balanced]  # classes alike: half of them have {per_class} images or more
start = "full"
images = {{ per_class = {per_class} }}
epochs = {max(2, epochs // 2)}
lr = {{ backbone = {0.003 * fresh:g}, heads = 0.03, schedule = "cosine", warmup_epochs = 0.5 }}
"""
    return (probe if online else "") + full + (balanced if per_class else "")
