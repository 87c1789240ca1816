"""What a CUDA GPU makes of it: training, starvation, ten-crop. Refuses where there is none.

- Training images/s of the five backbones at 224 and 448 pixels on synthetic batches, against the loop of timm's
  benchmark script with the same settings (bfloat16 autocast, channels_last, SGD, same batch, cudnn's autotuner on).
  The project's exact mode (deterministic kernels, no autotuner) is timed beside it.
- Starvation: the real loop on a catalogue against the step on one batch.
- Ten-crop: images/s x 10 against views/s of single views.

Each figure comes after 20 steps that are not counted, over 100 that are, with the device synchronised at both ends; the
sides alternate. Losses of the first step are compared before.

    python benchmarks/gpu.py [--networks resnet50 ...] [--crops 224 448] [--batch 128] [--rounds 3]
                             [--catalogue PATH --loader-processes 16]
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from ratio import Side, alternate, header, show
from torch import Tensor, nn

from aliprod.data import sources
from aliprod.data.catalogue import Catalogue, Images
from aliprod.data.loader import Batch, Feed
from aliprod.inference.predict import look
from aliprod.models.recogniser import Recogniser, normalisation
from aliprod.recipe import Stage
from aliprod.training.benchmark import measure
from aliprod.training.learner import Learner, autocast, place
from aliprod.training.optimizer import Optimizer

BACKBONES = ("resnet50", "seresnext50_32x4d", "legacy_seresnet101", "efficientnet_b3", "efficientnet_b4")
CLASSES = 1000
WARM_UP, COUNTED = 20, 100


@dataclass(frozen=True)
class Loop:
    """Steps of one side on one batch."""

    step: Callable[[int], Tensor]
    exact: bool

    def __call__(self) -> None:
        torch.use_deterministic_algorithms(self.exact, warn_only=True)
        torch.backends.cudnn.benchmark = not self.exact
        for number in range(WARM_UP):
            self.step(number)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for number in range(COUNTED):
            self.step(number)
        torch.cuda.synchronize()
        Clock.seconds += time.perf_counter() - began


class Clock:
    """The time of counted steps alone."""

    seconds = 0.0

    @classmethod
    def read(cls) -> float:
        return cls.seconds


def main() -> None:
    """All rows, or a refusal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(BACKBONES))
    parser.add_argument("--crops", nargs="+", type=int, default=[224, 448])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--catalogue", type=Path)
    parser.add_argument("--loader-processes", type=int, default=16)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA GPU, and PyTorch sees none here: nothing was measured.")
    print(header(("torch", "timm")), torch.cuda.get_device_name(), sep=", ")
    for network in asked.networks:
        for crop in asked.crops:
            training(network, crop, asked.batch * 224**2 // crop**2, asked.rounds)
        ten_crop(network, asked.rounds)
    if asked.catalogue:
        starvation(asked.networks[0], asked.catalogue, asked.batch, asked.loader_processes, asked.rounds)


def training(network: str, crop: int, batch_size: int, rounds: int) -> None:
    """Ours, exact and not, against timm's loop."""
    stage = Stage(resize=max(crop, 256), crop=crop, batch_size=batch_size, precision="bfloat16")
    here = place()
    images = torch.randn(batch_size, 3, crop, crop, device=here.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch_size,), device=here.device)
    batch = Batch(images, labels, torch.arange(batch_size), 0, 0, 0)
    learner = Learner(stage, network, nothing(), here)
    model = timm.create_model(network, num_classes=CLASSES).to(here.device, memory_format=torch.channels_last)
    model.load_state_dict(learner.model.backbone.state_dict(), strict=False)
    optimizer = Optimizer(learner, stage, steps_per_epoch=10**6)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    criterion = nn.CrossEntropyLoss()

    def ours(step: int) -> Tensor:
        loss = torch.stack(list(learner(batch).values())).sum()
        optimizer.step(loss, step)
        return loss.detach()

    def theirs(_: int) -> Tensor:
        sgd.zero_grad()
        with autocast(here.device, torch.bfloat16):
            output = model(images)
        loss: Tensor = criterion(output, labels)
        loss.backward()
        sgd.step()
        return loss.detach()

    learner.train()
    model.train()
    if abs(float(ours(0)) - float(theirs(0))) > 0.5:  # other heads: both are near log(1000)
        sys.exit(f"{network}: the first losses differ, no equal work")
    loops = {"aliprod": Loop(ours, False), "aliprod, exact": Loop(ours, True), "timm's loop": Loop(theirs, False)}
    fast, exact, bare = alternate(loops, rounds, Clock.read, warm_up=1)
    print(f"{network} at {crop}, batch {batch_size}:")
    for side in (fast, exact, bare):
        print(f"  {side.name}: {COUNTED * batch_size / side.median:,.0f} images/s")
    show("images/s, ours / timm's (bar >= 0.97)", fast, bare)
    show("images/s, exact / not exact", exact, fast)
    print(f"  peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    torch.cuda.reset_peak_memory_stats()


def ten_crop(network: str, rounds: int, images: int = 25) -> None:
    """Ten views cut on the device against as many single views."""
    here = place()
    model = Recogniser(network, CLASSES).to(here.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    feed = Feed(here.device, *normalisation(network))
    pixels = torch.randint(256, (10 * images, 3, 256, 256), dtype=torch.uint8, device=here.device)

    def views(kind: str, some: Tensor) -> Callable[[int], Tensor]:
        return lambda _: look(model, some, 224, kind, feed, torch.bfloat16)  # type: ignore[arg-type]

    loops = {
        "ten crops": Loop(views("ten_crop", pixels[:images]), True),
        "single views": Loop(views("center", pixels), True),
    }
    ours, theirs = alternate(loops, rounds, Clock.read, warm_up=1)
    print(f"{network}, {10 * images} views of 224 pixels a batch:")
    show("ten-crop images/s x 10 / single views/s (bar >= 0.95)", ours, theirs)


def starvation(network: str, path: Path, batch_size: int, processes: int, rounds: int) -> None:
    """The real loop against the step alone."""
    catalogue = sources.read(path)
    augmentation = ("random_resized_crop", "flip", "auto_augment", "cutout")
    stage = Stage(batch_size=batch_size, augmentation=augmentation, precision="bfloat16")
    shares = []
    for _ in range(rounds):
        real, alone = (
            measure(part, stage, network, catalogue, COUNTED, loader_processes=processes)  # type: ignore[arg-type]
            for part in ("train", "step")
        )
        shares.append(1 - real.images_per_second / alone.images_per_second)
    side = Side("starved", tuple(shares))
    print(
        f"{network} on {path} with {processes} loader processes: starved {100 * side.median:.1f} % "
        f"({100 * min(shares):.1f} to {100 * max(shares):.1f}), bar <= 2 %"
    )


def nothing() -> Catalogue:
    """A catalogue of classes without images."""
    import pyarrow as pa

    none = Images("train", pa.array([], pa.string()), np.empty(0, np.int64), pa.array([], pa.string()), Path())
    return Catalogue(Path(), np.arange(CLASSES), ("",) * CLASSES, none, none, none, None, None, ())


if __name__ == "__main__":
    main()
