"""What the same training costs inside a Ray TorchTrainer, against bare: a step, an epoch, and what is paid beside.

Three processes iterate `aliprod.training.loop.train` on the same pictures: a worker of a TorchTrainer, a bare one, and
a second bare one that tells what the method itself is worth. All live at once and train in strict turns, a block of
steps at a time, in a new order each round; whoever waits sleeps on a socket. A block's cost is the CPU time of its
process (all threads, Ray's too) while it had the turn, and is compared with the other blocks of its round. The weights
must be equal to the bit. Ray is told once an epoch, as `aliprod.orchestration.worker` does, with the settings that
`aliprod.orchestration.launch` gives it.

What Ray burns by the second, whatever is trained, stands apart: in the worker while it waits for its turn, and in
Ray's other processes. Where a step takes long, its threads are charged to the step by the first figure.

    python benchmarks/in_trainer.py [--epochs 30] [--starts 2] [--seeds 0 1] [--real resnet50 --real-batch 16]
"""

import argparse
import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import psutil
from ratio import cpu, header, median_interval

BLOCK = 20  # steps of a turn
BLOCKS = 10  # of an epoch; the first is not counted as steps, since the end of the epoch before it is in it
BATCH = 8
TRAINER, BARE, AGAIN = "trainer", "bare", "bare again"
Blocks = Mapping[str, list[float]]


def main() -> None:
    """Compare over two sets of pictures."""
    import ray

    from aliprod.orchestration.launch import environment
    from aliprod.plan.schema import Cluster

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--starts", type=int, default=2, help="of new processes on each set of pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--real", default="resnet50")
    parser.add_argument("--real-batch", type=int, default=16)
    asked = parser.parse_args()
    print(header(("torch", "ray")), f"load {os.getloadavg()[0]:.1f}", sep=", ")
    real = real_seconds(asked.real, asked.real_batch)
    print(f"a real step ({asked.real}, {asked.real_batch} images of 224 pixels): {real * 1000:.0f} ms CPU")
    paths = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
    os.environ |= environment(Cluster())  # read where `fit` is called
    env = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment(Cluster())}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
    for seed in asked.seeds:
        with pictures(seed) as folder:
            for start in range(asked.starts):
                compare(folder, f"pictures of seed {seed}, start {start}", seed, asked.epochs, real)


@contextmanager
def pictures(seed: int) -> Iterator[Path]:
    """A folder with the photos of an epoch in it, gone afterwards."""
    from step import photos

    folder = Path(tempfile.mkdtemp(prefix="in-trainer-"))
    try:
        photos(folder / "photos", seed, BATCH * BLOCK * BLOCKS)
        yield folder
    finally:
        shutil.rmtree(folder)


def real_seconds(network: str, batch_size: int) -> float:
    """CPU of a step of a network of real size."""
    import torch
    from step import real_step

    torch.set_num_threads(1)
    return real_step(network, batch_size)


def compare(folder: Path, what: str, seed: int, epochs: int, real: float) -> None:
    """All sides in turn, from new processes on."""
    with Listener(family="AF_UNIX") as listener:
        config = {"photos": folder / "photos", "seed": seed, "epochs": epochs, "address": listener.address}
        bare_ones = [bare(config | {"side": side}) for side in (BARE, AGAIN)]
        fit = threading.Thread(target=in_trainer, args=(config | {"side": TRAINER}, folder / "ray", f"{time.time_ns()}"))
        fit.start()
        lines = {line.recv(): line for line in (listener.accept() for _ in range(3))}
        began, ray_began = time.perf_counter(), rest_of_ray()
        blocks = in_turns(lines, epochs * BLOCKS)
        rest = (rest_of_ray() - ray_began) / (time.perf_counter() - began)
        ends = {side: told(line) for side, line in lines.items()}
        fit.join()
        for process in bare_ones:
            process.join()
    if len({end["sha256"] for end in ends.values()}) != 1:
        sys.exit("no equal work: the weights differ")
    print(f"{what}: equal weights, {epochs} epochs of {BLOCKS} blocks of {BLOCK} steps")
    show_blocks(blocks, real)
    show_beside(ends, rest, real)


def in_turns(lines: Mapping[str, Connection], rounds: int) -> Blocks:
    """CPU seconds of each block of each side."""
    order, draw = list(lines), random.Random(0)
    blocks: dict[str, list[float]] = {side: [] for side in lines}
    for _ in range(rounds):
        draw.shuffle(order)
        for side in order:
            blocks[side].append(told(lines[side]))
    return blocks


def told(line: Connection) -> Any:
    """Give a side the turn; what it says at the turn's end."""
    line.send("go")
    return line.recv()


def show_blocks(blocks: Blocks, real: float) -> None:
    """Step and epoch, trainer and second bare side beside the bare one."""
    steps = {side: [took / BLOCK for n, took in enumerate(found) if n % BLOCKS] for side, found in blocks.items()}
    turns = range(1, len(blocks[BARE]) - BLOCKS + 1, BLOCKS)  # from after an epoch's first block into the next one's
    epochs = {side: [sum(found[n : n + BLOCKS]) for n in turns] for side, found in blocks.items()}
    for what, of_side in (("step", steps), ("epoch and its report", epochs)):
        print(f"  CPU of a {what}: bare {1000 * statistics.median(of_side[BARE]):.3f} ms")
        for side in (TRAINER, AGAIN):
            more = [1000 * (a - b) for a, b in zip(of_side[side], of_side[BARE], strict=True)]
            middle, (low, high) = statistics.median(more), median_interval(more)
            share = middle / 10 / (real if what == "step" else statistics.median(of_side[BARE]))
            of_what = "a real step" if what == "step" else "this small epoch"
            print(
                f"    {side}: {middle:+.3f} ms (median of {len(more)} pairs, 95 %: {low:+.3f} to {high:+.3f}), "
                f"{share:+.3f} % of {of_what}"
            )


def show_beside(ends: Mapping[str, dict[str, Any]], rest: float, real: float) -> None:
    """A report, and what burns by the second."""
    took, waited = (statistics.median(report[n] for report in ends[TRAINER]["reports"]) for n in (0, 1))
    print(
        f"  a report: {1000 * took:.1f} ms CPU, {waited:.2f} s of wall time; 1 % of an epoch of {100 * took:.1f} s CPU "
        f"and {100 * waited:.0f} s; of 100 real steps {took / real:.4f} % CPU, {waited / real:.2f} %"
    )
    idle = ", ".join(f"{side} {1000 * end['idle']:.2f}" for side, end in sorted(ends.items()))
    print(f"  CPU-ms in a second of waiting: {idle}; in Ray's other processes {1000 * rest:.1f}")


def rest_of_ray() -> float:
    """CPU seconds so far of Ray's processes but the training worker: raylet, GCS, agents, controller, idle workers."""
    spent = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if "ray" in title and "RayTrainWorker" not in title:
                times = process.cpu_times()
                spent += times.user + times.system
        except psutil.NoSuchProcess:  # ended between the two looks
            continue
    return spent


def in_trainer(config: dict[str, Any], storage: Path, name: str) -> None:
    """One rank inside a TorchTrainer, until it ends."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        trained,
        train_loop_config=config | {"report": True},
        torch_config=TorchConfig("gloo"),
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=name, storage_path=str(storage)),
    ).fit()


def bare(config: dict[str, Any]) -> Any:
    """The same in a process that has never heard of Ray."""
    process = multiprocessing.get_context("spawn").Process(target=trained, args=(config,))
    process.start()
    return process


class Turns:
    """One side's end of the line: it waits for its turn, and says after each block what that took."""

    def __init__(self, address: str, side: str) -> None:
        self.line = Client(address, family="AF_UNIX")
        self.steps, self.idle_cpu, self.idle_seconds = 0, 0.0, 0.0
        self.say(side)

    def after_step(self) -> None:
        """End the turn where a block is full."""
        self.steps += 1
        if self.steps % BLOCK == 0:
            self.say(cpu() - self.began)

    def say(self, what: object) -> None:
        """And wait for the next turn."""
        asleep, since = cpu(), time.perf_counter()
        self.line.send(what)
        self.line.recv()
        self.began = cpu()
        self.idle_cpu += self.began - asleep
        self.idle_seconds += time.perf_counter() - since


def trained(config: dict[str, Any]) -> None:
    """Train in turns; at the end the sha256 of the weights, the reports (CPU, wall) and CPU a second of waiting."""
    from step import NETWORK

    from aliprod.data import sources
    from aliprod.recipe import Stage
    from aliprod.training.loop import train

    logging.disable(logging.WARNING)
    catalogue = sources.read(config["photos"])
    stage = Stage(
        seed=config["seed"],
        resize=32,
        crop=32,
        batch_size=BATCH,
        epochs=config["epochs"],
        augmentation=("resize",),
        ema=0.99,
    )
    turns, reports = Turns(config["address"], config["side"]), list[Sequence[float]]()
    for progress in train(stage, NETWORK, catalogue, after_step=turns.after_step):
        if config.get("report"):
            import ray.train

            spent, began = cpu(), time.perf_counter()
            ray.train.report({"epoch": progress.state.epoch, **progress.metrics})
            reports.append((cpu() - spent, time.perf_counter() - began))
        assert progress.end is not None
        weights = progress.end.last.tensors
    digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
    turns.line.send({"sha256": digest, "reports": reports, "idle": turns.idle_cpu / turns.idle_seconds})


if __name__ == "__main__":
    main()
