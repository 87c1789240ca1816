"""What an ensemble is worth: against its best member, without each member, and of the fewest that do as well; and
what other settings gain on a stage's own.

Every error has an interval of 95 %, every difference too: the same draws of images, with replacement, for both sides
(paired bootstrap; Efron and Tibshirani 1993, chapter 13), the mean over the classes that a draw has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from aliprod.ensemble.add import MatchedMembers, Places, match
from aliprod.ensemble.calibrate import Floats
from aliprod.ensemble.choose import FOLDS, Combination, folds, forward, labelled, own_probabilities
from aliprod.inference.metrics import score
from aliprod.inference.probabilities import Probabilities

DRAWS = 1000
_DRAWS_OF_SEEDS = 10  # for each draw of images
_ENTRIES = 2**19  # probabilities of a member at a time: 4 MB in float64, 150 MB with all that is made of eleven


def compare(
    members: Sequence[Probabilities],
    combinations: Sequence[Combination],
    seed: int,
    floors: Sequence[Probabilities] = (),
) -> dict[str, Any]:
    """Compare an ensemble with its members, its parts and the plain sum, on the images that have a label.

    Args:
        combinations: one, or, where they were fitted on these very images, those of `choose.fit`: each image is then
            predicted by what was fitted without it.
        floors: of the same images, that the ensemble is to beat.
    Returns:
        Plain JSON: ``images``, ``ensemble``, ``members`` and ``floors`` by name, ``sum``, ``smallest``; errors are
        means over classes, a ``gain`` is another's error less the ensemble's: above 0, the ensemble is better.
        ``disagreement``: of each two members in their order, the share of images that they predict differently.
    Raises:
        Failed: members that do not match, a row that is no distribution.
    """
    ensemble = match(members)
    known, columns = labelled(ensemble)
    own, held, count = own_probabilities(ensemble, known, columns), folds(len(known), seed), len(members)
    combined = np.empty((1 + 2 * count, len(known)), np.int64)
    for fold in range(FOLDS):
        rows, chosen = held == fold, combinations[fold if len(combinations) > 1 else -1]
        weightings = _weightings(chosen.weights, forward(own[:, ~rows], chosen.weights))
        combined[:, rows] = _predicted(replace(ensemble, temperatures=chosen.temperatures), weightings, known[rows])
    last = combinations[-1]
    plain = _predicted(ensemble, np.concatenate([np.ones((1, count)), np.eye(count)]), known)
    ids = ensemble.ids.take(pa.array(known))
    floored = [floor.predicted()[pc.index_in(ids, value_set=floor.ids).to_numpy()] for floor in floors]
    below = [np.searchsorted(ensemble.classes, predicted)[None] for predicted in floored]
    told, spread = _told(np.concatenate([combined, plain, *below]), columns, seed)
    whole, without, first, plainly, alone = 0, 1, 1 + count, 1 + 2 * count, 2 + 2 * count  # where each kind begins
    order, error = forward(own, last.weights), [one["top1_error"] for one in told]
    fewest = next(n for n in range(len(order)) if error[first + n] <= error[whole] + spread or n == len(order) - 1)
    return {
        "images": len(known),
        "ensemble": told[whole],
        "members": {
            member.name: {
                **told[alone + number],
                "weight": last.weights[number],
                "temperature": last.temperatures[number] if last.temperatures else None,
                "left_out": told[without + number] if sum(map(bool, last.weights)) > 1 else None,
            }
            for number, member in enumerate(members)
        },
        "floors": {floor.name: told[alone + count + number] for number, floor in enumerate(floors)},
        "sum": told[plainly],
        "smallest": {
            **told[first + fewest],
            "members": [members[number].name for number in order[: fewest + 1]],
            "standard_error": spread,
        },
        "disagreement": [(plain[1:] != one).mean(axis=1).tolist() for one in plain[1:]],
    }


def _weightings(weights: Sequence[int], order: Sequence[int]) -> Floats:
    """(1 + 2 M, M): the whole, without each member in turn, the first 1, 2, ... of an order, which may be shorter."""
    every = np.arange(len(weights))
    first = np.array([np.isin(every, order[:number]) for number in range(1, len(every) + 1)])
    kept: Floats = np.concatenate([np.ones((1, len(every))), 1 - np.eye(len(every)), first]) * np.array(weights)
    return kept


def _predicted(ensemble: MatchedMembers, weightings: Floats, places: Places) -> Places:
    """The columns (W, n) that weighted sums of the members predict at these places, ties to the first."""
    found, step = np.empty((len(weightings), len(places)), np.int64), max(1, _ENTRIES // len(ensemble.classes))
    by = torch.from_numpy(weightings)
    for low in range(0, len(places), step):
        some = places[low : low + step]
        parts = [ensemble.part(number, some).float().flatten() for number in range(len(ensemble.members))]
        sums = (by @ torch.stack(parts).double()).view(len(by), len(some), -1)  # exact: multiples of 2**-24
        found[:, low : low + step] = sums.numpy().argmax(axis=2)
    return found


def _told(guesses: Places, truth: Places, seed: int) -> tuple[list[dict[str, Any]], float]:
    """What is told of each of several predictions (P, n) of the same images, of which the first is the ensemble's, and
    the standard error of that one's error."""
    errors = [float((score(pa.array(truth), guess) or {"top1_error": np.nan})["top1_error"]) for guess in guesses]
    drawn = drawn_errors((guesses != truth).astype(np.float64), truth, seed).T
    found: list[dict[str, Any]] = [
        {"top1_error": error, "interval": _interval(own)} for error, own in zip(errors, drawn, strict=True)
    ]
    for one, own in zip(found[1:], drawn[1:], strict=True):
        one |= {"gain": one["top1_error"] - errors[0], "gain_interval": _interval(own - drawn[0])}
    return found, float(drawn[0].std())


def drawn_errors(wrong: Floats, truth: Places, seed: int) -> Floats:
    """Errors (DRAWS, P), means over classes, of as many draws of the images, the same for each row of ``wrong`` (P, n):
    1 where an image is taken for another class, 0 where it is not, or a mean of such."""
    classes, rows = np.unique(truth, return_inverse=True)
    generator, drawn = np.random.Generator(np.random.PCG64(seed)), np.empty((DRAWS, len(wrong)))
    for draw in drawn:
        times = np.bincount(generator.integers(len(truth), size=len(truth)), minlength=len(truth))
        images = np.bincount(rows, times, len(classes))
        draw[:] = wrong @ (times / images.clip(1)[rows]) / np.count_nonzero(images)
    return drawn


def _interval(drawn: Floats) -> list[float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [float(low), float(high)]


@dataclass(frozen=True)
class Gain:
    """Of settings: their top-1 errors on val, means over classes, 0 to 1, one a seed; the mean error of the stage's own
    less theirs; an interval that has the true one in 95 % of searches, and so have those beside it."""

    errors: tuple[float, ...]
    gain: float
    interval: tuple[float, float]


def gains(wrong: Floats, truth: Places, seed: int) -> list[Gain]:
    """Compare settings with the first of them: each of those behind it.

    The spread of a gain has two sources, which are added. Images: a paired bootstrap of the errors' means over seeds
    (Efron and Tibshirani 1993, chapter 13). Seeds: Student's t with the residual variance of errors by settings and
    seeds (randomised blocks; Fisher 1935, chapter IV), so all settings share one estimate, as in Dunnett 1955. What an
    image owes to the seed is in both: the interval is rather too wide. It is Bonferroni's: each of k others misses in
    5 % / k.

    ``wrong``: (A, S, n) for A settings, S > 1 seeds, n images: 1 where an image is taken for another class, else 0.
    ``truth``: (n,) classes.
    """
    arms, seeds, _ = wrong.shape
    _, rows, images = np.unique(truth, return_inverse=True, return_counts=True)
    errors = wrong @ (1 / (images[rows] * len(images)))  # (A, S)
    residual = errors - errors.mean(axis=1, keepdims=True) - errors.mean(axis=0) + errors.mean()
    degrees = (arms - 1) * (seeds - 1)
    deviation = np.sqrt(2 * (residual**2).sum() / degrees / seeds)  # of a difference of two means
    drawn = np.tile(drawn_errors(wrong.mean(axis=1), truth, seed), (_DRAWS_OF_SEEDS, 1))
    t = np.random.Generator(np.random.PCG64(seed)).standard_t(degrees, size=(len(drawn), 1))
    drawn = drawn[:, :1] - drawn[:, 1:] + deviation * t
    tail = 2.5 / (arms - 1)
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    gained = errors[0].mean() - errors[1:].mean(axis=1)
    return [
        Gain(tuple(map(float, theirs)), float(gain), (float(one), float(other)))
        for theirs, gain, one, other in zip(errors[1:], gained, low, high, strict=True)
    ]
