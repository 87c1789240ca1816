"""Weights that are not trained. Model soup (Wortsman et al., ICML 2022): a mean of others with one parent, free at
inference. A bank: features of the training images, whose nearest vote."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aliprod.models import weights
from aliprod.models.classifier import Bank
from aliprod.recipe import Inputs
from aliprod.store.epochs import TOP1
from aliprod.store.resumable import SHARD_ROWS
from aliprod.training.candidates import Candidate, copied, restated
from aliprod.training.checkpoint import Snapshot, TrainingState
from aliprod.training.learner import Setup
from aliprod.training.loop import Progress


def blended(setup: Setup, ingredients: Sequence[Path]) -> Iterator[Progress]:
    """Yield one Progress: the mean of the ingredients' weights, norm statistics taken anew on the stage's images.

    Greedy: from the best ingredient on, each next one is kept only if the error on val does not rise (section 2,
    recipe 1 of the paper); without val all are.

    Args:
        ingredients: weights folders of one network.
    Raises:
        Refused: weights that do not fit.
    """
    stage, kept = setup.learner.stage, list(ingredients)
    if stage.soup is not None and stage.soup.greedy and len(setup.catalogue.val):
        best, errors, kept = _greedy(setup, sorted(ingredients, key=_error))
    else:
        best, errors = _mean(setup, kept)
    metrics = errors | {"soup/ingredients": float(len(kept))}
    yield Progress(TrainingState(epoch=stage.epochs, best=best), metrics, _nothing, setup.learner.place, best)


def remembered(setup: Setup, inputs: Inputs) -> Iterator[Progress]:
    """Yield one Progress: the features of the stage's images, as a bank in place of a classifier.

    Refused: weights that do not fit.
    """
    model, stage, data = setup.learner.model, setup.learner.stage, setup.batches.data
    bank, features, recipe = model.classifier, data.features, stage.neighbours
    assert isinstance(bank, Bank) and features is not None and recipe is not None  # noqa: S101, PT018
    weights.load_inputs(model, inputs, setup.catalogue.classes.tolist())
    blocks = map(features.take, np.split(np.arange(len(features)), range(SHARD_ROWS, len(features), SHARD_ROWS)))
    bank.fill(blocks, torch.from_numpy(data.images.labels), recipe.k, recipe.temperature)
    errors = setup.top1_errors()
    best = Candidate(0, "raw", errors.get(TOP1), copied(model.state_dict()))
    yield Progress(TrainingState(epoch=stage.epochs, best=best), errors, _nothing, setup.learner.place, best)


def _greedy(setup: Setup, ordered: Sequence[Path]) -> tuple[Candidate, dict[str, float], list[Path]]:
    kept = [ordered[0]]
    best, errors = _mean(setup, kept)
    for folder in ordered[1:]:
        candidate, found = _mean(setup, [*kept, folder])
        if not best.beats(candidate):
            best, errors, kept = candidate, found, [*kept, folder]
    return best, errors, kept


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


def _nothing() -> Snapshot:
    """A soup is made in one go: there is no state in between to be kept."""
    return Snapshot({}, "{}")
