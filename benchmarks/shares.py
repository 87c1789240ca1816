"""What a step of shares costs beside plain DDP: the same batch on the same ranks, sides in turn, step by step.

Both sides are the same network, images, loss, clipping and SGD; one wraps it in DistributedDataParallel, the other
takes the mean of as many shares as there are ranks by the tree of `aliprod.training.shares`. A step lasts until the
slowest rank has ended it. Then each side runs in processes of its own, for its peak memory.

    python benchmarks/shares.py [--ranks 2] [--network resnet50] [--images 32] [--side 64] [--rounds 60]
    python benchmarks/shares.py --shares 1 2 4 8 --images 128     one rank: what more shares of one batch cost
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ratio import Side, header, median_interval, ratios, show
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from aliprod.recipe import Machine
from aliprod.training.learner import place
from aliprod.training.shares import ShareMean

CLASSES = 1000
WARM_UP = 3
Step = Callable[[], object]


def main() -> None:
    """Compare with DDP on several ranks, or numbers of shares on one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shares", type=int, nargs="+", default=[])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--images", type=int, default=32, help="of a share; with --shares of the step")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    print(header(("torch", "timm")))
    if asked.shares:
        compare_shares(asked)
        return
    what = f"{asked.network}, {asked.ranks} ranks, {asked.images} images of {asked.side} pixels a share"
    sides = spawn(asked, ("shares", "DDP"), asked.rounds)
    ours, ddp = Side("shares", sides["shares"]), Side("DDP", sides["DDP"])
    show(what, ours, ddp, "ms", 1000)
    found = ratios(ours, ddp)
    low, high = median_interval(found)
    print(f"median of the rounds: ratio {median(found):.3f}, 95 % within {low:.3f} to {high:.3f}")
    peaks = {name: spawn(asked, (name,), 3)["peak"][0] for name in ("shares", "DDP")}
    gradients = sum(p.numel() for p in timm.create_model(asked.network, num_classes=CLASSES).parameters()) * 4
    more = (peaks["shares"] - peaks["DDP"]) / gradients
    print(
        f"peak of a rank: {peaks['shares'] / 2**20:.0f} MiB, DDP {peaks['DDP'] / 2**20:.0f} MiB: {more:+.2f} gradients"
    )


def compare_shares(asked: argparse.Namespace) -> None:
    """One rank and one batch, in more and more shares."""
    place(Machine())
    images, labels = batch(asked, asked.images)
    steps = {str(count): of_shares(asked, images, labels, count) for count in asked.shares}
    taken = timed(steps, asked.rounds)
    first = Side("1 share", taken[str(asked.shares[0])])
    for count in asked.shares[1:]:
        show(
            f"{asked.network}, {asked.images} images in {count} shares",
            Side(f"{count} shares", taken[str(count)]),
            first,
        )


def spawn(asked: argparse.Namespace, names: tuple[str, ...], rounds: int) -> dict[str, tuple[float, ...]]:
    """Run the sides in as many processes as there are ranks; seconds of each step, and the peak of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (asked, names, rounds, folder), nprocs=asked.ranks)
        return dict(torch.load(Path(folder) / "taken", weights_only=False))


def work(rank: int, asked: argparse.Namespace, names: tuple[str, ...], rounds: int, folder: str) -> None:
    """One rank."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=asked.ranks)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    place(Machine())
    images, labels = batch(asked, asked.images)
    make = {"shares": by_tree, "DDP": by_ddp}
    taken: dict[str, Any] = timed({name: make[name](asked, images, labels) for name in names}, rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    taken["peak"] = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak,)
    if rank == 0:
        torch.save(taken, Path(folder) / "taken")
    dist.destroy_process_group()


def timed(steps: dict[str, Step], rounds: int) -> dict[str, tuple[float, ...]]:
    """Seconds of each side's steps, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        for name, step in list(steps.items())[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            step()
            meet()
            if number >= WARM_UP:
                taken[name].append(time.perf_counter() - began)
    return {name: tuple(seconds) for name, seconds in taken.items()}


def meet() -> None:
    """Wait for the device, and for the other ranks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def batch(asked: argparse.Namespace, count: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a share of this rank."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    images = torch.randn(count, 3, asked.side, asked.side, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


def network(asked: argparse.Namespace) -> tuple[nn.Module, Callable[[], None]]:
    """A network, and what updates it: clipping and SGD."""
    torch.manual_seed(0)
    model = timm.create_model(asked.network, num_classes=CLASSES)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 5.0, foreach=True)
        sgd.step()
        sgd.zero_grad()

    return model, update


def by_ddp(asked: argparse.Namespace, images: Tensor, labels: Tensor) -> Step:
    """Gradients averaged by DistributedDataParallel."""
    model, update = network(asked)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step() -> None:
        cross_entropy(wrapped(images), labels).backward()
        update()

    return step


def by_tree(asked: argparse.Namespace, images: Tensor, labels: Tensor) -> Step:
    """A share a rank."""
    model, update = network(asked)
    mean = ShareMean(model, model.parameters(), asked.ranks, asked.ranks)
    return lambda: (mean.of([(images, labels)], backward_of(model, asked.ranks)), update())


def of_shares(asked: argparse.Namespace, images: Tensor, labels: Tensor, count: int) -> Step:
    """One rank that works through all shares."""
    model, update = network(asked)
    mean = ShareMean(model, model.parameters(), count)

    def shares() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(images.chunk(count), labels.chunk(count), strict=True)

    return lambda: (mean.of(shares(), backward_of(model, count)), update())


def backward_of(model: nn.Module, shares: int) -> Callable[[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Forward and backward of a share."""

    def backward(share: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = share
        loss = cross_entropy(model(images), labels)
        (loss / shares).backward()
        return {"class": loss.detach()}

    return backward


if __name__ == "__main__":
    main()
