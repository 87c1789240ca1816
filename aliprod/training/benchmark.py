"""What limits training on this machine: the loader alone, the step alone, or what both make together."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from aliprod.data.catalogue import Catalogue
from aliprod.data.loader import Batch, Feed, TrainBatches
from aliprod.data.training_set import training_set
from aliprod.models.recogniser import normalisation
from aliprod.recipe import Stage
from aliprod.training.learner import Learner, place
from aliprod.training.loop import peak_memory_bytes, train
from aliprod.training.optimizer import Optimizer

Part = Literal["loader", "step", "train"]
_STARVED = 0.1  # from this share of waiting on, the loader limits


@dataclass(frozen=True)
class Measured:
    """What a part does.

    Attributes:
        data_wait_share: of the time, spent waiting for pictures; 0 to 1.
        memory_bytes: the most so far: of the GPU where there is one, else of the process.
        limited_by: what to make faster.
    """

    part: Part
    device: str
    steps: int
    images_per_second: float
    data_wait_share: float
    memory_bytes: int
    limited_by: Literal["loader", "step"]


def measure(
    part: Part,
    stage: Stage,
    network: str,
    catalogue: Catalogue,
    steps: int,
    threads: int = 1,
    loader_processes: int = 0,
) -> Measured:
    """Measure a part over ``steps`` steps; as many before them are not counted.

    A catalogue that has fewer images shows them again and again. Nothing is validated, nothing is kept.

    Raises:
        Refused: there is no such network.
    """
    rows = np.resize(np.random.default_rng(stage.seed).permutation(len(catalogue.train)), 2 * steps * stage.batch_size)
    catalogue = replace(catalogue, train=catalogue.train.take(rows), val=catalogue.val.take(rows[:0]))
    here = place(threads)
    if part == "train":
        progress = train(
            stage,
            network,
            catalogue,
            save_every_steps=steps,
            threads=threads,
            loader_processes=loader_processes,
        )
        halves = [_spent(next(progress).metrics, number * steps * stage.batch_size) for number in (1, 2)]
        seconds, waited = (after - before for before, after in zip(*halves, strict=True))
    else:
        feed = Feed(here.device, *normalisation(network), processes=loader_processes)
        batches = TrainBatches(training_set(catalogue, stage), stage, feed).epoch(0)
        if part == "step":
            batches = _steps(Learner(stage, network, catalogue, here), next(batches), 2 * steps)
        seconds = _second_half(batches, steps, here.device)
        waited = seconds if part == "loader" else 0.0
    share = waited / seconds
    return Measured(
        part=part,
        device=torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "cpu",
        steps=steps,
        images_per_second=steps * stage.batch_size / seconds,
        data_wait_share=share,
        memory_bytes=peak_memory_bytes(),
        limited_by="loader" if share >= _STARVED else "step",
    )


def _spent(metrics: dict[str, float], images: int) -> tuple[float, float]:
    """Seconds since the epoch began, and those of them that were waited."""
    seconds = images / metrics["speed/images_per_second"]
    return seconds, seconds * metrics["speed/data_wait_share"]


def _steps(learner: Learner, batch: Batch, count: int) -> Iterator[Batch]:
    """Forward, backward and update, again and again with one batch on the device."""
    optimizer = Optimizer(learner, learner.stage, count)
    learner.train()
    for step in range(count):
        optimizer.step(torch.stack(list(learner(batch).values())).sum(), step)
        yield batch


def _second_half(ends: Iterator[Batch], steps: int, device: torch.device) -> float:
    """Seconds of the steps after the first ``steps``."""
    stamps = []
    for _ in range(2):
        for _ in range(steps):
            next(ends)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stamps.append(time.perf_counter())
    return stamps[1] - stamps[0]
