"""What the same training costs inside a Ray TorchTrainer, against bare: a step, an epoch, and what is paid beside.

Three processes iterate `aliprod.training.loop.steps` on the same pictures: a worker of a TorchTrainer, a bare one, and
a second bare one that tells what the method itself is worth. All live at once and train in strict turns, a block of
steps at a time, in a new order each round; whoever waits sleeps on a socket. A block is timed while its process has
the turn (CPU of the process with all threads, Ray's too; CPU of the thread that trains; wall) and compared with the
other blocks of its round. The weights must be equal to the bit. Ray Train has the settings that
`aliprod.cluster.launch` gives it, and is told nothing on the way. Two processes that do the same differ by where their
memory lies: a median is worth what it is over many starts.

Ray's threads and processes burn by the second, whatever is trained, so that the CPU of all threads a step grows with
the step's length. What they burn is measured in the worker while it waits for its turn, and told apart.

    python benchmarks/in_trainer.py [--epochs 6] [--starts 5] [--seeds 0 1] [--real resnet50 --real-batch 16]
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import psutil
from ratio import cpu, header, median_interval

BLOCK = 5  # steps of a turn
BLOCKS = 40  # of an epoch; in the first is also the end of the epoch before: it is told apart
BATCH = 8
TRAINER, BARE, AGAIN = "trainer", "bare", "bare again"
CLOCKS = {"CPU": cpu, "CPU of the training thread": time.thread_time, "wall time": time.perf_counter}
Blocks = Mapping[str, list[list[float]]]  # of each side, what each clock told of each block


def main() -> None:
    """Compare over two sets of pictures."""
    import ray

    from aliprod.cluster.launch import environment
    from aliprod.plan.schema import Cluster

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--starts", type=int, default=5, help="of new processes on each set of pictures")
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
    found = []
    for seed in asked.seeds:
        with pictures(seed) as folder:
            starts = (f"pictures of seed {seed}, start {start}" for start in range(asked.starts))
            found += [compare(folder, start, seed, asked.epochs, real) for start in starts]
    print(f"a step, medians of {len(found)} starts: median (lowest to highest)")
    for what in found[0]:
        medians = [start[what] for start in found]
        print(f"  {what}: {statistics.median(medians):+.3f} ms ({min(medians):+.3f} to {max(medians):+.3f})")


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


def compare(folder: Path, what: str, seed: int, epochs: int, real: float) -> dict[str, float]:
    """All sides in turn, from new processes on; the median differences of a step, in ms."""
    with Listener(family="AF_UNIX") as listener:
        config = {"photos": folder / "photos", "seed": seed, "epochs": epochs, "address": listener.address}
        bare_ones = [bare(config | {"side": side}) for side in (BARE, AGAIN)]
        fit = threading.Thread(
            target=in_trainer, args=(config | {"side": TRAINER}, folder / "ray", f"{time.time_ns()}")
        )
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
    show_beside(ends, rest, real)
    return show_blocks(blocks)


def in_turns(lines: Mapping[str, Connection], rounds: int) -> Blocks:
    """Seconds of each block of each side."""
    order, draw = list(lines), random.Random(0)
    blocks: dict[str, list[list[float]]] = {side: [] for side in lines}
    for _ in range(rounds):
        draw.shuffle(order)
        for side in order:
            blocks[side].append(told(lines[side]))
    return blocks


def told(line: Connection) -> Any:
    """Give a side the turn; what it says at the turn's end."""
    line.send("go")
    return line.recv()


def show_blocks(blocks: Blocks) -> dict[str, float]:
    """Step and epoch's end by each clock, trainer and second bare side beside the bare one."""
    found = dict[str, float]()
    for number, clock in enumerate(CLOCKS):
        took = {side: [block[number] for block in told] for side, told in blocks.items()}
        steps = {side: [seconds / BLOCK for n, seconds in enumerate(told) if n % BLOCKS] for side, told in took.items()}
        found |= show_more(f"{clock}, a step", steps)
        ends = {side: told[BLOCKS::BLOCKS] for side, told in took.items()}
        show_more(f"{clock}, the end of an epoch and the {BLOCK} steps after it", ends)
    return found


def show_more(what: str, seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The medians of paired differences, in ms."""
    print(f"  {what}: bare {1000 * statistics.median(seconds[BARE]):.3f} ms")
    found = dict[str, float]()
    for side in (TRAINER, AGAIN):
        more = [1000 * (a - b) for a, b in zip(seconds[side], seconds[BARE], strict=True)]
        middle, (low, high) = statistics.median(more), median_interval(more)
        share = middle / 10 / statistics.median(seconds[BARE])
        print(f"    {side}: {middle:+.3f} ms ({low:+.3f} to {high:+.3f} of {len(more)} pairs), {share:+.2f} %")
        found[f"{what}, {side}"] = middle
    return found


def show_beside(ends: Mapping[str, dict[str, Any]], rest: float, real: float) -> None:
    """What burns by the second, and in an epoch of real size."""
    idle = {side: 1000 * end["idle"] for side, end in ends.items()}
    told = ", ".join(f"{side} {idle[side]:.2f}" for side in (TRAINER, BARE, AGAIN))
    print(f"  CPU-ms in a second of waiting: {told}; in all other processes of Ray {1000 * rest:.1f}")
    burnt = (idle[TRAINER] - idle[BARE]) / 10
    print(f"  of an epoch of 100 real steps ({100 * real:.0f} s): the worker's threads of Ray {burnt:.2f} % of a core")


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
        train_loop_config=config,
        torch_config=TorchConfig("gloo"),
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=name, storage_path=str(storage)),
    ).fit()


def bare(config: dict[str, Any]) -> Any:
    """The same in a process that has never heard of Ray."""
    process = multiprocessing.get_context("spawn").Process(target=in_a_thread, args=(config,))
    process.start()
    return process


def in_a_thread(config: dict[str, Any]) -> None:
    """As in Ray's worker, whose main thread is Ray's: the C library gives the main thread a heap of another kind."""
    thread = threading.Thread(target=trained, args=(config,))
    thread.start()
    thread.join()


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
            self.say([clock() - began for clock, began in zip(CLOCKS.values(), self.began, strict=True)])

    def say(self, what: object) -> None:
        """And wait for the next turn."""
        asleep, since = cpu(), time.perf_counter()
        self.line.send(what)
        self.line.recv()
        self.idle_cpu += cpu() - asleep
        self.idle_seconds += time.perf_counter() - since
        self.began = [clock() for clock in CLOCKS.values()]


def trained(config: dict[str, Any]) -> None:
    """Train in turns; at the end the sha256 of the weights, and CPU a second of waiting."""
    from step import NETWORK

    from aliprod.catalogue import sources
    from aliprod.recipe import DEFAULT_MACHINE, Stage
    from aliprod.training.learner import set_up
    from aliprod.training.loop import Step, steps

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
    turns = Turns(config["address"], config["side"])
    for event in steps(set_up(stage, NETWORK, catalogue, DEFAULT_MACHINE)):
        if isinstance(event, Step):
            turns.after_step()
            continue
        assert event.last is not None
        weights = event.last.tensors
    digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
    turns.line.send({"sha256": digest, "idle": turns.idle_cpu / turns.idle_seconds})


if __name__ == "__main__":
    main()
