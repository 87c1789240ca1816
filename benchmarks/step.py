"""What a step of our loop costs beyond a hand-written PyTorch loop that does the same work.

Same network, pictures, batches, clipping, learning rates, averaged weights and sums of the loss; the weights after the
last step must be equal to the bit. Lightning and Accelerate run beside it where they are importable (their weights
are compared too). The sides alternate; a step is the CPU time of the whole process between the ends of two steps. The
pictures are tiny, so that a small difference shows; the share of a real step is told beside it.

    python benchmarks/step.py [--rounds 10] [--seeds 0 1] [--real resnet50 --real-batch 16]
"""

import argparse
import logging
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ratio import Side, cpu, header
from torch import Tensor, nn
from torch.nn import functional

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import Feed, TrainBatch, TrainBatches
from aliprod.data.training_set import training_set
from aliprod.models.classifier import Classifier, normalisation
from aliprod.recipe import DEFAULT_MACHINE, LearningRate, Stage
from aliprod.training.learner import Learner, place, set_up
from aliprod.training.loop import Progress, Step, steps
from aliprod.training.optimizer import cosine_lr_at

NETWORK = "test_resnet"
WARM_UP = 20  # steps at the beginning of a round that are not counted
Weights = dict[str, Tensor]
Stamps = list[float]


def main() -> None:
    """Compare over two sets of pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--real", default="resnet50")
    parser.add_argument("--real-batch", type=int, default=16)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    place(DEFAULT_MACHINE)
    print(header())
    step_seconds = real_step(asked.real, asked.real_batch)
    print(f"a real step ({asked.real}, {asked.real_batch} images of 224 pixels): {step_seconds * 1000:.0f} ms CPU")
    for seed in asked.seeds:
        folder = Path(tempfile.mkdtemp(prefix="step-"))
        try:
            compare(photos(folder / "photos", seed, 8 * asked.steps), seed, asked.rounds, step_seconds)
        finally:
            shutil.rmtree(folder)


def compare(catalogue: Catalogue, seed: int, rounds: int, real_seconds: float) -> None:
    """All sides in turn, on one set of pictures."""
    lr = LearningRate(schedule="cosine", warmup_epochs=0.1)
    stage = Stage(
        seed=seed, resize=32, crop=32, batch_size=8, lr=lr, augmentation=("resize",), ema=0.99, precision="float32"
    )
    sides: dict[str, Callable[[Stage, Catalogue, Stamps], Weights]] = {"aliprod": ours, "bare": bare, **others()}
    weights, rounds_of = {}, {name: list[float]() for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            stamps: Stamps = []
            weights[name] = side(stage, catalogue, stamps)
            if number:
                counted = stamps[WARM_UP:]
                rounds_of[name].append((counted[-1] - counted[0]) / (len(counted) - 1))
    for name, found in weights.items():
        if not all(torch.equal(found[key], tensor) for key, tensor in weights["bare"].items()):
            sys.exit(f"{name} and the bare loop end with other weights: no equal work")
    found = [Side(name, tuple(seconds)) for name, seconds in rounds_of.items()]
    theirs = next(side for side in found if side.name == "bare")
    print(f"pictures of seed {seed}: equal weights after {len(stamps)} steps, {rounds} rounds")
    for side in found:
        more = [1000 * (a - b) for a, b in zip(side.rounds, theirs.rounds, strict=True)]
        share = statistics.median(more) / 10 / real_seconds
        print(
            f"  {side.name}: {1000 * side.median:.3f} ms a step, {statistics.median(more):+.3f} ms "
            f"({min(more):+.3f} to {max(more):+.3f}) beside the bare loop, {share:+.2f} % of a real step"
        )


def ours(stage: Stage, catalogue: Catalogue, stamps: Stamps) -> Weights:
    """`aliprod.training.loop.steps`, whose checkpoints nobody asks for."""
    for event in steps(set_up(stage, NETWORK, catalogue, DEFAULT_MACHINE)):
        if isinstance(event, Step):
            stamps.append(cpu())
    assert isinstance(event, Progress)
    assert event.last is not None
    return event.last.tensors


def bare(stage: Stage, catalogue: Catalogue, stamps: Stamps) -> Weights:
    """What a person would write."""
    model, sgd, batches = parts(stage, catalogue)
    average = [p.detach().clone() for p in model.parameters()]
    total = torch.zeros(())
    for batch in batches.epoch(0):
        torch.manual_seed(batch.seed)
        loss = functional.cross_entropy(model(batch.images), batch.labels)
        sgd.zero_grad()
        loss.backward()
        finish(model, sgd, average, stage, batches.steps_per_epoch, batch.step)
        total += loss.detach()
        stamps.append(cpu())
    return averaged(model, average)


def finish(model: nn.Module, sgd: torch.optim.SGD, average: list[Tensor], stage: Stage, steps: int, step: int) -> None:
    """Clip, set the rates of the step, update, average."""
    nn.utils.clip_grad_norm_([p for group in sgd.param_groups for p in group["params"]], 5.0, foreach=True)
    for group, base in zip(sgd.param_groups, (stage.lr.backbone, stage.lr.backbone, stage.lr.heads), strict=True):
        group["lr"] = cosine_lr_at(step, base, steps, 0.1, 1)
    sgd.step()
    move(average, model, step)


@torch.no_grad()
def move(average: list[Tensor], model: nn.Module, step: int) -> None:
    """Averaged weights, with a warm-up."""
    torch._foreach_lerp_(average, list(model.parameters()), 1 - min(0.99, (2 + step) / (11 + step)))


def parts(stage: Stage, catalogue: Catalogue) -> tuple[Classifier, torch.optim.SGD, TrainBatches]:
    """A network that begins as ours does, its optimizer, and the same batches."""
    here = place(DEFAULT_MACHINE)
    model = Learner(stage, NETWORK, catalogue, here).model
    backbone = list(model.backbone.parameters())
    groups = [
        {"params": [p for p in backbone if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in backbone if p.ndim <= 1], "weight_decay": 0.0},
        {"params": list(model.classifier.parameters()), "weight_decay": 1e-4},
    ]
    feed = Feed(here.device, *normalisation(NETWORK))
    batches = TrainBatches(training_set(catalogue, stage), stage, feed)
    return model, torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True), batches


def averaged(model: nn.Module, average: list[Tensor]) -> Weights:
    """A state dict of the averaged weights."""
    names = [name for name, _ in model.named_parameters()]
    return dict(model.state_dict()) | dict(zip(names, average, strict=True))


def others() -> dict[str, Callable[[Stage, Catalogue, Stamps], Weights]]:
    """The frameworks that are there."""
    found: dict[str, Callable[[Stage, Catalogue, Stamps], Weights]] = {}
    try:
        import accelerate  # noqa: F401

        found["Accelerate"] = with_accelerate
    except ImportError:
        print("Accelerate is not importable here")
    try:
        import lightning  # noqa: F401

        found["Lightning"] = with_lightning
    except ImportError:
        print("Lightning is not importable here")
    return found


def with_accelerate(stage: Stage, catalogue: Catalogue, stamps: Stamps) -> Weights:
    """The loop of Accelerate's quick tour."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    bare_model, sgd, batches = parts(stage, catalogue)
    average = [p.detach().clone() for p in bare_model.parameters()]
    model, optimizer = accelerator.prepare(bare_model, sgd)
    total = torch.zeros(())
    for batch in batches.epoch(0):
        with accelerator.accumulate(model):
            torch.manual_seed(batch.seed)
            loss = functional.cross_entropy(model(batch.images), batch.labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_([p for group in sgd.param_groups for p in group["params"]], 5.0)
            for group, base in zip(
                optimizer.param_groups, (stage.lr.backbone, stage.lr.backbone, stage.lr.heads), strict=True
            ):
                group["lr"] = cosine_lr_at(batch.step, base, batches.steps_per_epoch, 0.1, 1)
            optimizer.step()
            move(average, bare_model, batch.step)
            total += loss.detach()
        stamps.append(cpu())
    return averaged(bare_model, average)


def with_lightning(stage: Stage, catalogue: Catalogue, stamps: Stamps) -> Weights:
    """A LightningModule with automatic optimisation, without logger, bar and checkpoints."""
    import lightning

    model, sgd, batches = parts(stage, catalogue)
    average = [p.detach().clone() for p in model.parameters()]
    steps = batches.steps_per_epoch

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.total = torch.zeros(())

        def training_step(self, batch: TrainBatch, number: int) -> Tensor:  # noqa: ARG002
            torch.manual_seed(batch.seed)
            loss = functional.cross_entropy(self.model(batch.images), batch.labels)
            self.total += loss.detach()
            return loss

        def optimizer_step(self, epoch: int, number: int, optimizer: object, closure: object = None) -> None:
            for group, base in zip(
                sgd.param_groups, (stage.lr.backbone, stage.lr.backbone, stage.lr.heads), strict=True
            ):
                group["lr"] = cosine_lr_at(number, base, steps, 0.1, 1)
            super().optimizer_step(epoch, number, optimizer, closure)  # type: ignore[arg-type]

        def transfer_batch_to_device(self, batch: TrainBatch, device: object, number: int) -> TrainBatch:  # noqa: ARG002
            return batch

        def on_train_batch_end(self, outputs: object, batch: TrainBatch, number: int) -> None:  # noqa: ARG002
            move(average, self.model, number)
            stamps.append(cpu())

        def configure_optimizers(self) -> torch.optim.SGD:
            return sgd

    class Epoch:
        def __iter__(self):  # type: ignore[no-untyped-def]
            return batches.epoch(0)

        def __len__(self) -> int:
            return steps

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=5.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), Epoch())
    return averaged(model, average)


def photos(folder: Path, seed: int, images: int) -> Catalogue:
    """Tiny pictures of 8 classes, and none to validate with."""
    draw = np.random.default_rng(seed)
    for number in range(images):
        place_of = folder / "train" / f"{number % 8}"
        place_of.mkdir(parents=True, exist_ok=True)
        pixels = (draw.random((40, 40, 3)) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(place_of / f"{number:06}.jpg")
    catalogue = sources.read(folder)
    return replace(catalogue, val=catalogue.val.take(np.arange(0)))


def real_step(network: str, batch_size: int) -> float:
    """Seconds of CPU of one step of a network of real size: forward, backward and update alone."""
    model = Classifier(network, 1000).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    images = torch.randn(batch_size, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.int64)
    taken = []
    for _ in range(3):
        began = cpu()
        functional.cross_entropy(model(images), labels).backward()
        sgd.step()
        sgd.zero_grad()
        taken.append(cpu() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
