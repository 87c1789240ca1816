"""The speed of this machine, of which a forecast is made: of loader, step, the training of both, and predictions."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import Feed, TrainBatch
from aliprod.data.training_set import LARGEST, Features, SoftLabels, TrainingSet, training_set
from aliprod.inference.predict import BATCH, precision, predict
from aliprod.models.classifier import Classifier, check_network, normalisation
from aliprod.recipe import DEFAULT_MACHINE, Machine, Part, Stage, Views, without_training
from aliprod.recipe.options import needs
from aliprod.training import loop
from aliprod.training.learner import Place, Setup, place, set_up
from aliprod.training.optimizer import Optimizer

_STARVED = 0.1  # from this share of waiting on, the loader limits


def measure(
    part: Part, stage: Stage, network: str, catalogue: Catalogue, steps: int, machine: Machine = DEFAULT_MACHINE
) -> dict[str, Any]:
    """Measure a part over ``steps`` steps; as many before them are not counted. Refused: there is no such network.

    A catalogue that has fewer images shows them again and again. Nothing is validated, nothing is kept. Teachers
    and cached features are made up: real ones would cost the same. The stage has no filter of duplicates and no pseudo
    labels, whose images nobody knows yet.

    Returns:
        Plain JSON: ``part``, ``steps``, ``device``, ``images_per_second``; ``memory_bytes``, the most so far, of the
        GPU where there is one, else of the process; ``data_wait_share``, of the time, spent waiting for pictures, 0 to
        1; ``limited_by``, what to make faster: "loader" or "step".
    """
    _forget_peak_memory()
    rows = np.resize(np.random.default_rng(stage.seed).permutation(len(catalogue.train)), 2 * steps * stage.batch_size)
    catalogue = replace(catalogue, train=catalogue.train.take(rows), val=catalogue.val.take(rows[:0]))
    data = _taught(training_set(catalogue, stage), stage, catalogue.num_classes)
    if stage.features == "cached":
        places = np.zeros(len(data.images), np.int64)
        shard = np.zeros((1, check_network(network, network, stage.crop).pooled), np.float16)
        data = replace(data, features=Features((shard,), places))
    setup = set_up(stage, network, catalogue, machine.model_copy(update={"save_every_steps": steps}), data)
    if part == "train":
        due = (event for event in loop.steps(setup) if isinstance(event, loop.Progress))
        halves = [_spent(next(due).metrics, number * steps * stage.batch_size) for number in (1, 2)]
        seconds, waited = (after - before for before, after in zip(*halves, strict=True))
    else:
        shares, count = setup.batches.epoch(0), len(setup.batches.mine)
        if part == "step":
            ends: Iterator[object] = _steps(setup, list(islice(shares, count)), 2 * steps)
        else:
            ends = islice(shares, count - 1, None, count)
        seconds = _second_half(ends, steps, setup.feed.device)
        waited = seconds if part == "loader" else 0.0
    share = waited / seconds
    found = {"part": part, "steps": steps, **_speed(setup.learner.place, steps * stage.batch_size, seconds)}
    return found | {"data_wait_share": share, "limited_by": "loader" if share >= _STARVED else "step"}


def measure_prediction(
    stage: Stage, network: str, views: Views, catalogue: Catalogue, batches: int, machine: Machine = DEFAULT_MACHINE
) -> dict[str, Any]:
    """Measure the prediction of training images, over so many batches after those that fill the loader. Plain JSON:
    ``images`` that were counted, each once, however many views it has; ``device``, ``images_per_second`` and
    ``memory_bytes`` as of `measure`."""
    here, processes = place(without_training(machine)), machine.loader_processes
    _forget_peak_memory()
    asked, (resize, crop) = needs(stage.objective.name, stage.objective.options), stage.test_view
    model = Classifier(network, catalogue.num_classes, asked, crop=crop).eval()
    model = model.to(here.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    feed = Feed(here.device, *normalisation(network), processes=processes, dtype=precision(here.device))
    before = 1 + 2 * processes  # a process reads two batches ahead
    images = catalogue.train.take(np.resize(np.arange(len(catalogue.train)), (before + batches) * BATCH[views]))
    blocks = predict(model, images, resize, crop, views, feed)
    deque(islice(blocks, before), maxlen=0)
    began = time.perf_counter()
    deque(blocks, maxlen=0)  # each has been copied to the CPU: nothing is under way
    counted = batches * BATCH[views]
    return {"images": counted, **_speed(here, counted, time.perf_counter() - began)}


def _speed(where: Place, images: int, seconds: float) -> dict[str, Any]:
    memory, device = loop.peak_memory_bytes(), where.environment()["device"]
    return {"device": device, "images_per_second": images / seconds, "memory_bytes": memory}


def _forget_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _taught(data: TrainingSet, stage: Stage, num_classes: int) -> TrainingSet:
    """With soft labels of as many teachers as the stage has, where its objective learns from them."""
    if not needs(stage.objective.name).teacher:
        return data
    places = np.arange(len(data.images))
    classes = np.tile(np.arange(min(LARGEST, num_classes), dtype=np.int32), (len(places), 1))
    store = classes, np.full(classes.shape, 0.5 / classes.shape[1], np.float16)
    teachers = max(1, len(stage.teachers))
    return replace(data, teacher=SoftLabels(num_classes, (store,) * teachers, (places,) * teachers))


def _spent(metrics: dict[str, float], images: int) -> tuple[float, float]:
    """Seconds since the epoch began, and seconds of them spent waiting."""
    seconds = images / metrics["speed/images_per_second"]
    return seconds, seconds * metrics["speed/data_wait_share"]


def _steps(setup: Setup, step: list[TrainBatch], count: int) -> Iterator[int]:
    """Forward, backward and update, again and again with one step's shares on the device."""
    learner = setup.learner
    optimizer, mean = Optimizer(learner, learner.stage, count), setup.share_mean(learner.trained())
    learner.train()
    for number in range(count):
        loop.gradients(learner, optimizer, mean, step)
        optimizer.update(number)
        yield number


def _second_half(ends: Iterator[object], steps: int, device: torch.device) -> float:
    """Seconds of the steps after the first ``steps``."""
    stamps = []
    for _ in range(2):
        for _ in range(steps):
            next(ends)  # it raises where there are fewer
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stamps.append(time.perf_counter())
    return stamps[1] - stamps[0]
