"""What other settings gain on a stage's own, told by trainings of each with the same seeds."""

from dataclasses import dataclass

import numpy as np

from aliprod.ensemble.add import Places
from aliprod.ensemble.calibrate import Floats
from aliprod.ensemble.compare import drawn_errors

_DRAWS_OF_SEEDS = 10  # for each draw of images


@dataclass(frozen=True)
class Gain:
    """Of settings: their top-1 errors on val, means over classes, 0 to 1, one a seed; the mean error of the stage's own
    less theirs; an interval that has the true one in 95 % of searches, and so have those beside it."""

    errors: tuple[float, ...]
    gain: float
    interval: tuple[float, float]


def gains(wrong: Floats, truth: Places, seed: int) -> list[Gain]:
    """Compare settings with the first of them.

    The spread of a gain has two sources, which are added. Images: a paired bootstrap of the errors' means over seeds
    (Efron and Tibshirani 1993, chapter 13). Seeds: Student's t with the residual variance of errors by settings and
    seeds (randomised blocks; Fisher 1935, chapter IV), so all settings share one estimate, as in Dunnett 1955. What an
    image owes to the seed is in both: the interval is rather too wide. It is Bonferroni's: each of k others misses in
    5 % / k.

    Args:
        wrong: (A, S, n) for A settings, S > 1 seeds, n images: 1 where an image is taken for another class, else 0.
        truth: (n,) classes.
    Returns:
        For each of the settings behind the first.
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
