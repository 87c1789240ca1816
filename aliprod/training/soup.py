"""Model soup (Wortsman et al., ICML 2022): weights that are a mean of others with one parent. Free at inference."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.training_set import TrainingSet
from aliprod.models import weights
from aliprod.recipe import Stage
from aliprod.training.candidates import Candidate, restated
from aliprod.training.checkpoint import Snapshot, TrainingState
from aliprod.training.learner import Learner, place, set_up
from aliprod.training.loop import EpochEnd, Progress
from aliprod.training.validate import top1_errors

_Scored = Callable[[Sequence[Path]], tuple[Candidate, dict[str, float]]]


def blended(
    stage: Stage,
    network: str,
    catalogue: Catalogue,
    data: TrainingSet,
    ingredients: Sequence[Path],
    threads: int,
    loader_processes: int,
) -> Iterator[Progress]:
    """Yield one Progress: the mean of the ingredients' weights, norm statistics taken anew on the stage's images.

    Greedy: from the best ingredient on, each next one is kept only if the error on val does not rise (section 2,
    recipe 1 of the paper); without val all are.

    Args:
        data: the stage's images.
        ingredients: weights folders of one network.
    Raises:
        Refused: weights that do not fit.
    """
    where = place(threads)
    learner, feed, batches = set_up(stage, network, catalogue, data, where, loader_processes)

    def scored(folders: Sequence[Path]) -> tuple[Candidate, dict[str, float]]:
        _load_mean(learner, folders, catalogue.classes.tolist())
        tensors = restated(learner, batches, 0)
        errors = top1_errors(learner.model, catalogue, stage, feed, learner.dtype)
        return Candidate(0, "soup", errors.get("val/top1_error"), tensors), errors

    if stage.soup is not None and stage.soup.greedy and len(catalogue.val):
        best, errors, kept = _greedy(sorted(ingredients, key=_error), scored)
    else:
        (best, errors), kept = scored(ingredients), len(ingredients)
    state = TrainingState(epoch=stage.epochs, best_epoch=0, best_error=best.top1_error, best_kind=best.kind)
    yield Progress(state, errors | {"soup/ingredients": float(kept)}, _nothing, where, EpochEnd(best, best))


def _greedy(ordered: Sequence[Path], scored: _Scored) -> tuple[Candidate, dict[str, float], int]:
    kept = [ordered[0]]
    best, errors = scored(kept)
    for folder in ordered[1:]:
        candidate, found = scored([*kept, folder])
        if (candidate.top1_error or 0.0) <= (best.top1_error or 0.0):
            best, errors, kept = candidate, found, [*kept, folder]
    return best, errors, len(kept)


def _load_mean(learner: Learner, folders: Sequence[Path], class_ids: Sequence[int]) -> None:
    """Load the mean of the weights, summed in float64; whole numbers (counters) are the last one's."""
    sums: dict[str, Tensor] = {}
    for folder in folders:
        weights.load_parent(learner.model, folder, class_ids)
        for name, tensor in learner.model.state_dict().items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + tensor.cpu().double()
    means = {name: total / len(folders) for name, total in sums.items()}
    learner.model.load_state_dict(learner.model.state_dict() | means)


def _error(folder: Path) -> float:
    error = weights.describe(folder)[0].top1_error
    return 1.0 if error is None else error


def _nothing() -> Snapshot:
    """A soup is made in one go: there is no state in between to be kept."""
    return Snapshot({}, "{}")
