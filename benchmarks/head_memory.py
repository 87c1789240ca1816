"""Peak memory of training the head of 50,030 classes, against the arithmetic floor.

The floor is what must be there: weights, gradients and momentum in float32. The bar allows two buffers of logits
(B x K, float32) beside it. Trained is the classifier alone, by the project's own optimizer and objective, on given
features. On a GPU the allocator's own count is exact. On a CPU it is the growth of the process's peak of resident
memory: pages that the C library keeps after a free count too, so it is an upper bound.

    python benchmarks/head_memory.py [--batch 256] [--features 2048] [--classes 50030] [--precision float32]
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from ratio import header
from torch import Tensor, nn

from aliprod.data.loader import TrainBatch
from aliprod.objectives import Context
from aliprod.objectives.cross_entropy import Objective
from aliprod.recipe import Machine, Stage
from aliprod.training.learner import autocast, place, precision
from aliprod.training.optimizer import Optimizer


class Pooled(nn.Module):
    """A classifier without a backbone: its classifier computes in float32, as `Classifier.classify`."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = nn.Identity()
        self.classifier = nn.Linear(num_features, num_classes, bias=False)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """None."""
        return iter(())

    def forward(self, pooled: Tensor) -> Tensor:
        with torch.autocast(pooled.device.type, enabled=False):
            return self.classifier(pooled.float())


class Head(nn.Module):
    """What the optimizer sees of a learner, with nothing before the classifier."""

    def __init__(self, num_features: int, num_classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.model = Pooled(num_features, num_classes)
        self.objective = Objective(Context(num_classes, num_features, crop=224, epochs=1))

    def head_parameters(self):  # type: ignore[no-untyped-def]
        """The classifier's."""
        return self.model.classifier.parameters()


def main() -> None:
    """Measure and compare with the floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=50_030)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    asked = parser.parse_args()
    print(header(("torch",)))
    here = place(Machine())
    stage = Stage(precision=asked.precision, batch_size=asked.batch)
    images = torch.randn(asked.batch, asked.features, device=here.device)
    labels = torch.arange(asked.batch, device=here.device) % asked.classes
    before = peak(here.device)
    head = Head(asked.features, asked.classes, precision(here.device, stage.precision)).to(here.device)
    optimizer = Optimizer(head, stage, steps_per_epoch=100)  # type: ignore[arg-type]
    for step in range(asked.steps):
        with autocast(here.device, head.dtype):
            (loss,) = head.objective(head.model, TrainBatch(images, labels, labels, epoch=0, step=0, seed=0)).values()
        optimizer.backward(loss)
        optimizer.update(step)
        del loss
    if optimizer.first_bad_step() is not None:
        raise SystemExit("the loss was not finite")
    measured = peak(here.device) - before
    floor = 3 * 4 * asked.features * asked.classes
    buffer = 4 * asked.batch * asked.classes
    print(f"{here.device.type}, {asked.precision}, B={asked.batch}, H={asked.features}, K={asked.classes:,}")
    print(f"  floor {floor / 1e6:,.0f} MB, a buffer of logits {buffer / 1e6:,.0f} MB")
    over = (measured - floor) / buffer
    print(f"  peak {measured / 1e6:,.0f} MB: the floor and {over:.2f} buffers (bar: at most 2)")


def peak(device: torch.device) -> int:
    """The most bytes so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    main()
