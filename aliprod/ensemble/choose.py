"""Members chosen, weighted and tempered by the log loss of what they give the true classes of labelled images, a fold
held out in turn (methods.md, Combining)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aliprod.data.selection import order
from aliprod.ensemble.add import MatchedMembers, Places, match
from aliprod.ensemble.calibrate import TEMPERATURES, Floats, losses
from aliprod.inference.metrics import mean_class_error
from aliprod.inference.probabilities import FLOOR, Probabilities

ROUNDS = 50  # of greedy selection: the most that the weights sum up to
WHOLE = 100  # that fitted weights sum up to: whole numbers add up exactly
_STEPS = 500
FOLDS = 5
_ROWS = 64  # at a time: 8 MB of counts, 6 MB of probabilities at 50,030 classes


@dataclass(frozen=True)
class Combination:
    """Whole weights of members, and their temperatures; none: as they are."""

    weights: tuple[int, ...]
    temperatures: tuple[float, ...] = ()


def fit(members: Sequence[Probabilities], combine: Literal["greedy", "weights"], seed: int) -> list[Combination]:
    """Fit temperatures, then weights, by the log loss of the true classes; beside one number an image, a temperature
    and a member, a few rows are in memory at once.

    Returns FOLDS combinations, each fitted without the images of a fold (`folds`), and one of all. Failed: members that
    do not match, a row that is no distribution.
    """
    ensemble = match(members)
    known, columns = labelled(ensemble)
    held = folds(len(known), seed)
    kept = [*(held != fold for fold in range(FOLDS)), np.ones(len(known), bool)]
    temperatures, own = np.empty((len(kept), len(members))), np.empty((len(kept), len(members), len(known)))
    for number in range(len(members)):
        found = np.empty((len(known), len(TEMPERATURES)))
        for at, part in _blocks(ensemble, number, known):
            ensemble.check(number, part, known[at])
            found[at] = losses(part.numpy(), columns[at])
        for fold, rows in enumerate(kept):
            best = int(found[rows].mean(axis=0).argmin())
            temperatures[fold, number], own[fold, number] = TEMPERATURES[best], np.exp(-found[:, best])
    return [
        Combination(fitted(combine, own[fold][:, rows]), tuple(temperatures[fold].tolist()))
        for fold, rows in enumerate(kept)
    ]


def labelled(ensemble: MatchedMembers) -> tuple[Places, Places]:
    """The places (n,) of the images whose class the members know, and the columns of these classes."""
    labels = ensemble.labels.fill_null(-1).to_numpy()
    columns = np.minimum(np.searchsorted(ensemble.classes, labels), len(ensemble.classes) - 1)
    known = np.flatnonzero(ensemble.classes[columns] == labels)
    return known, columns[known]


def folds(count: int, seed: int) -> Places:
    """The fold of each of ``count`` images, equally many in each: a function of the seed."""
    return order(count, seed, 0) % FOLDS


def own_probabilities(ensemble: MatchedMembers, places: Places, columns: Places) -> Floats:
    """What each member gives the classes in these columns at these places: (M, n), above 0."""
    found = np.empty((len(ensemble.members), len(places)))
    for number, own in enumerate(found):
        for at, rows in _blocks(ensemble, number, places):
            own[at] = rows.numpy()[np.arange(len(rows)), columns[at]]
    return found.clip(FLOOR)


def _blocks(ensemble: MatchedMembers, number: int, places: Places) -> Iterator[tuple[slice, Tensor]]:
    """A member's rows of these places, a few at a time, and which they are."""
    for low in range(0, len(places), _ROWS):
        at = slice(low, min(low + _ROWS, len(places)))
        yield at, ensemble.part(number, places[at])


def greedy(probabilities: Tensor, labels: Tensor, rounds: int, score: str = "nll") -> tuple[Tensor, Tensor]:
    """Select members greedily: each round adds the one, anew or once more, with which the mean scores best.

    Scores are compared at 12 decimals, ties go to the lowest member; the best round is the first minimum of the
    scores, and the weights are how often each member was picked until then (`weights`). Caruana et al. 2004, section 2.

    Probabilities (M, N, K) and labels (N,) int64, rows below 0 (unknown) left out -> picks (rounds,) int64 and
    scores (rounds,) float64 of the mean of all picks so far: "nll", mean of -log p at the label, or "error", mean over
    classes of the top-1 error.
    """
    if score not in ("nll", "error"):
        raise ValueError(f'score must be "nll" or "error", not {score!r}')
    known = labels >= 0
    members, labels = probabilities[:, known], labels[known]
    if score == "nll":  # only the label's column counts
        members = members.gather(2, labels.expand(len(members), -1)[:, :, None])
    # A stored 0 may have been half the smallest float16, and has no logarithm.
    smallest = FLOOR if members.dtype == torch.float16 else torch.finfo(members.dtype).tiny
    total = torch.zeros(members.shape[1:], dtype=torch.float64, device=members.device)
    picks, scores = [], []
    for count in range(1, rounds + 1):
        means = ((total + member).div(count) for member in members)
        if score == "nll":
            tried = torch.stack([-mean.clamp_min(smallest).log().mean() for mean in means])
        else:
            tried = torch.stack([mean_class_error(labels, mean.argmax(dim=1), mean.shape[1]) for mean in means])
        tried = tried.round(decimals=12)
        pick = int(tried.argmin())  # the first of equals
        total += members[pick]
        picks.append(pick)
        scores.append(float(tried[pick]))
    return torch.tensor(picks, dtype=torch.int64), torch.tensor(scores, dtype=torch.float64)


def weights(picks: Tensor, scores: Tensor, members: int) -> list[int]:
    """Count how often each member was picked up to the first best round: the weights of `write_ensemble`."""
    best = int(scores.argmin()) + 1 if len(scores) else 0
    return torch.bincount(picks[:best], minlength=members).tolist()


def fitted(combine: Literal["greedy", "weights"], own: Floats) -> tuple[int, ...]:
    """Whole weights of members by the probabilities (M, N) that they give the true classes: the members' mixture gives
    a true class the mixture of these."""
    if combine == "greedy":
        labels = torch.zeros(own.shape[1], dtype=torch.int64)
        picks, scores = greedy(torch.from_numpy(own)[:, :, None], labels, ROUNDS)
        return tuple(weights(picks, scores, len(own)))
    scaled = (WHOLE * mixture(own)).round(9)
    whole = np.floor(scaled).astype(np.int64)
    whole[np.argsort(whole - scaled, kind="stable")[: WHOLE - whole.sum()]] += 1  # the largest remainders
    return tuple(whole.tolist())


def mixture(own: Floats) -> Floats:
    """The weights (M,) of the mixture of members with the lowest mean of -log p, on the simplex.

    own (M, N): probabilities, above 0, of the true classes. The loss is convex, and each step of EM lowers it: a weight
    becomes the mean of its member's share in the mixture.
    """
    shares: Floats = np.full(len(own), 1 / len(own))
    for _ in range(_STEPS):
        shares *= (own / (shares @ own)).mean(axis=1)
    shares /= shares.sum()
    return shares


def forward(own: Floats, weights: Sequence[int]) -> list[int]:
    """Members of a weight above 0, each next one that with which the weighted mean has the lowest log loss. own (M, N):
    probabilities of the true classes, above 0."""
    left, order = [member for member, weight in enumerate(weights) if weight], list[int]()
    total, mass = np.zeros(own.shape[1]), 0
    while left:
        tried = [-np.log((total + weights[m] * own[m]) / (mass + weights[m])).sum() for m in left]
        best = left.pop(int(np.argmin(tried)))
        order.append(best)
        total, mass = total + weights[best] * own[best], mass + weights[best]
    return order
