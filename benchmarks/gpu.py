"""What a CUDA GPU makes of it: training, shares, ten-crop, augmentation, equal bytes, starvation.

Refuses where there is none.

- Training images/s of the five backbones at 224 and 448 pixels on one synthetic batch on the device, against the loop
  of timm's benchmark script (huggingface/pytorch-image-models, benchmark.py, `--bench train --amp --channels-last`)
  with the same settings: bfloat16 autocast, channels_last, TF32, cudnn's autotuner, SGD with momentum, same batch. Its
  side is made faster than the script: SGD is fused, and no step waits for the device. Ours clips the gradient and
  looks for losses that are not finite besides. Both begin with the same weights; their first losses are compared.
  The project's exact mode (deterministic kernels, no autotuner) is timed beside it.
- What settings bring: the same step with `compile`, in float32 (TF32), and with weights not channels-last.
- Shares: a batch of twice the size in 2, 4 and 8 shares against the same in one, exact.
- Ten-crop: images/s x 10 against views/s of single views.
- Augmentation: images/s of what augment = "device" leaves to the device, of pictures of 320 x 427, against the step
  that follows it; and whether its bytes are the CPU's.
- Equal bytes: an epoch and its validation in 4 shares by 1, 1, 2 and 4 ranks, each time in new processes; in bfloat16
  and float16. Ranks of one GPU cannot meet by NCCL: these meet by gloo.
- Starvation, with `--catalogue`: the real loop against the step on one batch.

Each figure comes after 20 steps that are not counted (5 in later rounds), with the device synchronised at both ends;
the sides alternate, and each sets the modes of PyTorch that it needs. `head_memory.py` measures the head of 50,030
classes.

    python benchmarks/gpu.py [--networks resnet50 ...] [--crops 224 448] [--batch 128] [--rounds 3] [--counted 50]
                             [--sections training settings shares ten_crop augmentation equal_bytes starvation]
                             [--catalogue PATH --loader-processes 16]
    python benchmarks/gpu.py --on-cpu   (tiny, on a machine without a GPU: that every line runs, no figure)
"""

import argparse
import gc
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ratio import Side, alternate, header, show
from torch import Tensor, nn

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue, Images
from aliprod.data.augment import on_device
from aliprod.data.augment_batch import cut, pack, views
from aliprod.data.loader import Feed, TrainBatch
from aliprod.inference.predict import seen
from aliprod.models.classifier import Classifier, normalisation
from aliprod.recipe import Machine, Stage
from aliprod.synth.synth import synthesise
from aliprod.training.learner import Learner, Place, autocast, place
from aliprod.training.loop import gradients, train
from aliprod.training.optimizer import Optimizer
from aliprod.training.shares import ShareMean
from aliprod.training.speed import measure

BACKBONES = ("resnet50", "seresnext50_32x4d", "legacy_seresnet101", "efficientnet_b3", "efficientnet_b4")
CLASSES = 1000
RANKS = (1, 1, 2, 4)
Step = Callable[[int], Tensor]


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    crops: tuple[int, ...]
    batch: int  # images of 224 pixels; fewer of larger ones
    rounds: int
    warm_up: int = 20
    again: int = 5  # of a later round
    counted: int = 50


class Loop:
    """Steps of one side on one batch.

    Attributes:
        seconds: of counted steps so far.
        peak: bytes that they needed at most beyond what lay on the device before.
    """

    def __init__(self, step: Step, exact: bool, extent: Extent) -> None:
        self.step, self.exact, self.extent = step, exact, extent
        self.seconds, self.peak = 0.0, 0

    def __call__(self) -> None:
        place(Machine(exact=self.exact))
        before = start_of_peak()
        for number in range(self.extent.again if self.seconds else self.extent.warm_up):
            self.step(number)
        synchronise()
        began = time.perf_counter()
        for number in range(self.extent.counted):
            self.step(number)
        synchronise()
        self.seconds += time.perf_counter() - began
        self.peak = max(self.peak, end_of_peak() - before)


def in_turn(loops: dict[str, Loop], extent: Extent) -> list[Side]:
    """Seconds of the counted steps, round by round."""
    return alternate(loops, extent.rounds, lambda: sum(loop.seconds for loop in loops.values()), warm_up=0)


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def start_of_peak() -> int:
    """Bytes on the device; the peak is counted from here on."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def end_of_peak() -> int:
    """The most bytes since."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def main() -> None:
    """All rows, or a refusal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--crops", nargs="+", type=int, default=[224, 448])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counted", type=int, default=50)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--catalogue", type=Path)
    parser.add_argument("--loader-processes", type=int, default=16)
    parser.add_argument("--on-cpu", action="store_true")
    asked = parser.parse_args()
    extent = Extent(tuple(asked.crops), asked.batch, asked.rounds, counted=asked.counted)
    networks: list[str] = asked.networks or list(BACKBONES)
    if asked.on_cpu:
        extent, networks = Extent((64, 96), 8, 1, warm_up=1, counted=2), asked.networks or ["test_resnet"]
    elif not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA GPU, and PyTorch sees none here: nothing was measured.")
    print(header(("torch", "timm")), torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", sep=", ")
    for network in networks:
        for name in asked.sections:
            began = time.perf_counter()
            if name != "starvation":
                SECTIONS[name](network, extent)
            elif asked.catalogue:
                starvation(network, asked.catalogue, extent, asked.loader_processes)
            print(f"  [{name}: {time.perf_counter() - began:.0f} s]", flush=True)
            gc.collect()  # the memory of graphs
        print(f"  {clocks()}", flush=True)


def clocks() -> str:
    """What the GPU runs at after all that."""
    if shutil.which("nvidia-smi") is None:
        return "clocks unknown: there is no nvidia-smi"
    query = "--query-gpu=clocks.sm,clocks.max.sm,power.draw,temperature.gpu,utilization.gpu"
    answer = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, check=False)
    return " | ".join(answer.stdout.splitlines())


def synthetic(batch_size: int, crop: int, here: Place) -> TrainBatch:
    """Noise on the device."""
    images = torch.randn(batch_size, 3, crop, crop, device=here.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch_size,), device=here.device)
    return TrainBatch(images, labels, torch.arange(batch_size), epoch=0, step=0, seed=0)


def stage_of(crop: int, extent: Extent) -> Stage:
    """As many pixels a step at any crop. The rates are low: one batch is seen again and again."""
    batch_size = max(2, extent.batch * 224**2 // crop**2)
    low = {"backbone": 1e-4, "heads": 1e-4}
    return Stage(resize=max(crop, 256), crop=crop, batch_size=batch_size, precision="bfloat16", lr=low)  # type: ignore[arg-type]


def our_step(
    learner: Learner, batch: TrainBatch, shares: int = 1, memory: torch.memory_format = torch.channels_last
) -> Step:
    """Forward, backward and update as `aliprod.training.loop` makes them."""
    optimizer = Optimizer(learner, learner.stage, steps_per_epoch=10**6)
    mean = ShareMean(learner, learner.trained(), shares)
    parts = [
        replace(batch, images=images.contiguous(memory_format=memory), labels=labels)
        for images, labels in zip(batch.images.chunk(shares), batch.labels.chunk(shares), strict=True)
    ]
    learner.train()

    def step(number: int) -> Tensor:
        losses, _ = gradients(learner, optimizer, mean, parts)
        optimizer.update(number)
        return torch.stack(list(losses.values())).sum()

    return step


def their_step(learner: Learner, batch: TrainBatch) -> Step:
    """Timm's loop, from the learner's weights on."""
    device = learner.place.device
    model = timm.create_model(learner.model.network, num_classes=CLASSES).to(device, memory_format=torch.channels_last)
    model.load_state_dict(learner.model.backbone.state_dict(), strict=False)
    with torch.no_grad():
        model.get_classifier().weight.copy_(learner.model.classifier.weight)
        model.get_classifier().bias.zero_()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    criterion = nn.CrossEntropyLoss()
    model.train()

    def step(_: int) -> Tensor:
        sgd.zero_grad()
        with autocast(device, torch.bfloat16):
            loss: Tensor = criterion(model(batch.images), batch.labels)
        loss.backward()
        sgd.step()
        return loss.detach()

    return step


def training(network: str, extent: Extent) -> None:
    """Ours, exact and not, against timm's loop, at each crop."""
    for crop in extent.crops:
        here, stage = place(Machine()), stage_of(crop, extent)
        batch = synthetic(stage.batch_size, crop, here)
        learner = Learner(stage, network, nothing(), here)
        theirs, ours = their_step(learner, batch), our_step(learner, batch)
        first = float(ours(0)), float(theirs(0))
        if not abs(first[0] - first[1]) < 0.1:  # the classifier computes in float32, timm's in bfloat16
            sys.exit(f"{network}: the first losses are {first[0]:.4f} and {first[1]:.4f}, no equal work")
        loops = {
            "aliprod": Loop(ours, False, extent),
            "aliprod, exact": Loop(ours, True, extent),
            "timm's loop": Loop(theirs, False, extent),
        }
        fast, exact, bare = in_turn(loops, extent)
        print(f"{network} at {crop}, batch {stage.batch_size}, first losses {first[0]:.4f} and {first[1]:.4f}:")
        for side in (fast, exact, bare):
            speed = extent.counted * stage.batch_size / side.median
            print(f"  {side.name}: {speed:,.0f} images/s, {loops[side.name].peak / 1e9:.2f} GB beside weights")
        show("images/s, ours / timm's (bar >= 0.97)", fast, bare)
        show("images/s, exact / not exact", exact, fast)


def settings(network: str, extent: Extent) -> None:
    """The exact step of bfloat16, channels last, against one other setting at a time."""
    machine, stage = Machine(), stage_of(extent.crops[0], extent)
    batch, loops = synthetic(stage.batch_size, stage.crop, place(machine)), {}
    variants = {
        "as it is": (stage, machine),
        "float32": (stage.model_copy(update={"precision": "float32"}), machine),
        "not channels-last": (stage, machine),
        "compiled": (stage, machine.model_copy(update={"compile": True})),
    }
    for name, (recipe, computer) in variants.items():
        learner = Learner(recipe, network, nothing(), place(computer))
        memory = torch.contiguous_format if name == "not channels-last" else torch.channels_last
        learner.to(memory_format=memory)  # type: ignore[call-overload]
        loops[name] = Loop(our_step(learner, batch, memory=memory), True, extent)
    bare, *others = in_turn(loops, extent)
    print(f"{network} at {stage.crop}, batch {stage.batch_size}:")
    for side in others:
        show(f"images/s, {side.name} / as it is", side, bare)


def shares(network: str, extent: Extent) -> None:
    """One batch in more and more shares."""
    stage = stage_of(extent.crops[0], replace(extent, batch=2 * extent.batch))
    here = place(Machine())
    batch, loops = synthetic(stage.batch_size, stage.crop, here), {}
    for count in (1, 2, 4, 8):
        step = our_step(Learner(stage, network, nothing(), here), batch, count)
        loops[f"in {count}"] = Loop(step, True, extent)
    bare, *others = in_turn(loops, extent)
    print(f"{network} at {stage.crop}, batch {stage.batch_size}, peak in one {loops['in 1'].peak / 1e9:.2f} GB:")
    for side in others:
        show(f"images/s, {side.name} shares ({loops[side.name].peak / 1e9:.2f} GB) / in one", side, bare)


def ten_crop(network: str, extent: Extent) -> None:
    """Ten views cut on the device against as many single views."""
    here, images = place(Machine()), max(1, extent.batch // 4)
    model = Classifier(network, CLASSES).to(here.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    feed = Feed(here.device, *normalisation(network), dtype=torch.bfloat16)
    pixels = torch.randint(256, (10 * images, 3, 256, 256), dtype=torch.uint8, device=here.device)

    def views(kind: str, some: Tensor) -> Step:
        def look(_: int) -> Tensor:
            with torch.inference_mode(), autocast(feed.device, feed.dtype):
                return seen(model, some, 224, kind, feed)  # type: ignore[arg-type]

        return look

    loops = {
        "ten crops": Loop(views("ten_crop", pixels[:images]), True, extent),
        "single views": Loop(views("center", pixels), True, extent),
    }
    ours, theirs = in_turn(loops, extent)
    print(f"{network}, {10 * images} views of 224 pixels a batch, {extent.counted * 10 * images / ours.median:,.0f}/s:")
    show("ten-crop images/s x 10 / single views/s (bar >= 0.95)", ours, theirs)


def augmentation(network: str, extent: Extent) -> None:
    """The device's part of the train view beside a step."""
    said = {"augment": "device", "augmentation": ("random_resized_crop", "flip", "auto_augment", "cutout")}
    here, stage = place(Machine()), stage_of(extent.crops[0], extent).model_copy(update=said)
    mean, std, interpolation = normalisation(network)
    pictures = torch.randint(256, (stage.batch_size, 320, 427, 3), dtype=torch.uint8)
    cuts, boxes = zip(*(cut(picture, stage, seed, interpolation) for seed, picture in enumerate(pictures)), strict=True)
    packed, erased = pack(cuts), torch.stack(boxes)
    seen = views(packed, interpolation, here.device).cpu()
    if not torch.equal(seen, views(packed, interpolation, torch.device("cpu"))):
        sys.exit(f"{network}: views of the device have OTHER BYTES than the CPU's")

    def augmented(_: int) -> Tensor:
        return on_device(views(packed, interpolation, here.device), erased.to(here.device), mean, std)

    step = our_step(Learner(stage, network, nothing(), here), synthetic(stage.batch_size, stage.crop, here))
    loops = {"augmentation": Loop(augmented, True, extent), "step": Loop(step, True, extent)}
    ours, steps = in_turn(loops, extent)
    speed = extent.counted * stage.batch_size / ours.median
    print(f"{network} at {stage.crop}, batch {stage.batch_size}, the CPU's bytes: {speed:,.0f} images/s are augmented")
    show(f"step / augmentation ({loops['augmentation'].peak / 1e9:.2f} GB)", ours, steps)


def equal_bytes(network: str, extent: Extent) -> None:
    """Processes of their own for each number of ranks, one after the other."""
    with tempfile.TemporaryDirectory(prefix="bytes-") as folder:
        batch_size = max(8, extent.batch // 2)
        synthesise(Path(folder) / "packages", classes=4, images=4 * batch_size, seed=0)
        for precision in ("bfloat16", "float16"):
            asked = {"batch_size": batch_size, "shares": 4, "precision": precision}
            stage, found = stage_of(extent.crops[0], extent).model_copy(update=asked), []
            for number, ranks in enumerate(RANKS):
                out = Path(folder) / f"{precision}-{number}"
                mp.spawn(hash_weights, (ranks, stage, network, Path(folder), out), nprocs=ranks)
                found.append(out.read_text())
            equal = "the same bytes" if len(set(found)) == 1 else f"OTHER BYTES: {found}"
            print(f"{network} at {stage.crop}, {precision}, by {RANKS} ranks: {equal}")


def hash_weights(rank: int, ranks: int, stage: Stage, network: str, folder: Path, out: Path) -> None:
    """Write the sha256 of all weights after an epoch."""
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=ranks)
    (progress,) = train(stage, network, sources.read(folder / "packages"))
    assert progress.last is not None
    tensors = progress.last.tensors
    if rank == 0:
        out.write_text(
            hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
        )
    if ranks > 1:
        dist.destroy_process_group()


def starvation(network: str, path: Path, extent: Extent, processes: int) -> None:
    """The real loop against the step alone."""
    catalogue = sources.read(path)
    augmentation = ("random_resized_crop", "flip", "auto_augment", "cutout")
    stage = Stage(batch_size=extent.batch, augmentation=augmentation, precision="bfloat16")
    starved = []
    for _ in range(extent.rounds):
        real, alone = (
            measure(part, stage, network, catalogue, extent.counted, Machine(loader_processes=processes))  # type: ignore[arg-type]
            for part in ("train", "step")
        )
        starved.append(1 - real["images_per_second"] / alone["images_per_second"])
    side = Side("starved", tuple(starved))
    print(
        f"{network} on {path} with {processes} loader processes: starved {100 * side.median:.1f} % "
        f"({100 * min(starved):.1f} to {100 * max(starved):.1f}), bar <= 2 %"
    )


def nothing() -> Catalogue:
    """A catalogue of classes without images."""
    import pyarrow as pa

    none = Images("train", pa.array([], pa.string()), np.empty(0, np.int64), pa.array([], pa.string()), Path())
    return Catalogue(Path(), np.arange(CLASSES), ("",) * CLASSES, none, none, none, None, None, ())


SECTIONS: dict[str, Callable[..., None]] = {
    section.__name__: section
    for section in (training, settings, shares, ten_crop, augmentation, equal_bytes, starvation)
}

if __name__ == "__main__":
    main()
