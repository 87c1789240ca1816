"""Weights that an epoch ends with: raw or averaged, norm statistics as trained or taken anew. The best counts.

And weights that are not trained. Model soup (Wortsman et al., ICML 2022): a mean of others with one parent, free at
inference. A bank: features of the training images, whose nearest vote.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from aliprod.inference.predict import autocast
from aliprod.models import weights
from aliprod.models.classifier import Bank
from aliprod.randomness import seed_of
from aliprod.recipe import STATISTICS_BATCHES, Inputs
from aliprod.store.epochs import TOP1
from aliprod.store.resumable import SHARD_ROWS
from aliprod.training.ema import Average
from aliprod.training.learner import Setup
from aliprod.training.shares import Losses


@dataclass(frozen=True)
class Candidate:
    """Weights that an epoch ended with: ``kind`` "raw" or "averaged", with "_restated" where the norm statistics were
    taken anew. ``top1_error``: mean over the classes of val, 0 to 1; None without val."""

    epoch: int
    kind: str
    top1_error: float | None
    tensors: dict[str, Tensor]

    def beats(self, other: "Candidate | None") -> bool:
        """Whether its error is lower; without val the later one always wins."""
        if other is None or self.top1_error is None or other.top1_error is None:
            return True
        return self.top1_error < other.top1_error


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU that training does not change any more."""
    return {name: torch.clone(tensor.detach()).cpu() for name, tensor in tensors.items()}


def best_candidate(setup: Setup, average: Average | None, epoch: int) -> tuple[Candidate, dict[str, float]]:
    """Score each kind of weights after an epoch; the model is as before when it returns. The candidate with the lowest
    error (of equal ones the later kind), and the top-1 errors of all by name; of the raw weights, top-5 error and loss
    too."""
    model = setup.learner.model
    kept = copied(model.state_dict())
    candidates, errors = list[Candidate](), dict[str, float]()
    try:
        for kind, tensors in _kinds(setup, average, epoch, kept):
            model.load_state_dict(tensors)
            found = setup.top1_errors()
            others = {f"{name}_{kind}": value for name, value in found.items() if name.startswith(TOP1)}
            errors |= found if kind == "raw" else others
            candidates.append(Candidate(epoch, kind, found.get(TOP1), tensors))
    finally:
        model.load_state_dict(kept)
    return min(reversed(candidates), key=lambda one: one.top1_error or 0.0), errors


def _kinds(
    setup: Setup, average: Average | None, epoch: int, raw: dict[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    model = setup.learner.model
    sources = {"raw": raw} | ({} if average is None else {"averaged": copied(average.state(model))})
    for kind, tensors in sources.items():
        yield kind, tensors
        if setup.learner.needs.distorts and setup.share_mean().statistics:
            model.load_state_dict(tensors)
            yield f"{kind}_restated", restated(setup, epoch)


def restated(setup: Setup, epoch: int) -> dict[str, Tensor]:
    """A copy of the model's weights, its norm statistics taken anew from images as inference sees them.

    An objective that trains on distorted images (DCL) leaves statistics of a mixture that never comes again. Each share
    takes statistics of its own; the mean of them counts, as in a step. A network without any stays as it is.
    """
    learner, batches = setup.learner, setup.batches

    def images(share: int) -> Iterator[Tensor]:
        for batch in islice(batches.epoch(epoch, shares=(share,)), STATISTICS_BATCHES):
            setup.between()
            yield batch.images

    def take(share: int) -> Losses:
        torch.manual_seed(seed_of(learner.stage.seed, "statistics", epoch))  # stochastic depth draws
        # Norm layers that count their batches in Python break a graph apart, and each count would be compiled anew.
        eager = torch.compiler.set_stance("force_eager") if learner.place.machine.compile else nullcontext()
        with eager, autocast(learner.place.device, learner.dtype):
            update_bn(images(share), learner.model)
        return {}

    if (mean := setup.share_mean()).statistics:
        mean.of(batches.mine, take)
    return copied(learner.model.state_dict())


def blended(setup: Setup, ingredients: Sequence[Path]) -> tuple[Candidate, dict[str, float]]:
    """The mean of the ingredients' weights, norm statistics taken anew on the stage's images, and its errors.

    Greedy: from the best ingredient on, each next one is kept only if the error on val does not rise (section 2,
    recipe 1 of the paper); without val all are. Refused: weights folders that do not fit.
    """
    soup, kept, others = setup.learner.stage.soup, list(ingredients), list[Path]()
    if soup is not None and soup.greedy and len(setup.catalogue.val):
        first, *others = sorted(ingredients, key=_error)
        kept = [first]
    best, errors = _mean(setup, kept)
    for folder in others:
        candidate, found = _mean(setup, [*kept, folder])
        if not best.beats(candidate):
            best, errors, kept = candidate, found, [*kept, folder]
    return best, errors | {"soup/ingredients": float(len(kept))}


def remembered(setup: Setup, inputs: Inputs) -> tuple[Candidate, dict[str, float]]:
    """The features of the stage's images, as a bank in place of a classifier, and its errors. Refused: weights that do
    not fit."""
    model, stage, data = setup.learner.model, setup.learner.stage, setup.batches.data
    bank, features, recipe = model.classifier, data.features, stage.neighbours
    assert isinstance(bank, Bank) and features is not None and recipe is not None  # noqa: S101, PT018
    weights.load_inputs(model, inputs, setup.catalogue.classes.tolist())
    blocks = map(features.take, np.split(np.arange(len(features)), range(SHARD_ROWS, len(features), SHARD_ROWS)))
    bank.fill(blocks, torch.from_numpy(data.images.labels), recipe.k, recipe.temperature)
    errors = setup.top1_errors()
    return Candidate(0, "raw", errors.get(TOP1), copied(model.state_dict())), errors


def _mean(setup: Setup, folders: Sequence[Path]) -> tuple[Candidate, dict[str, float]]:
    """The mean of the weights, summed in float64, and its errors; whole numbers (counters) are the last one's."""
    model, sums = setup.learner.model, dict[str, Tensor]()
    for folder in folders:
        weights.load_parent(model, folder, setup.catalogue.classes.tolist())
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + tensor.cpu().double()
    model.load_state_dict(model.state_dict() | {name: total / len(folders) for name, total in sums.items()})
    tensors = restated(setup, 0)
    errors = setup.top1_errors()
    return Candidate(0, "soup", errors.get(TOP1), tensors), errors


def _error(folder: Path) -> float:
    error = weights.describe(folder)[0].top1_error
    return 1.0 if error is None else error
