"""Calibration: one temperature for all logits, and the expected calibration error (methods.md, Combining)."""

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aliprod.inference.probabilities import FLOOR

Floats = NDArray[np.float64]
TEMPERATURES: Floats = 2.0 ** (np.arange(-16, 17) / 8)  # that are tried where probabilities are too many to be held
STEPS = 60
LARGEST = 20.0  # of |log T|: where no temperature is best (all right, all wrong), the search ends here


def temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """The T that minimises the mean negative log likelihood of softmax(logits / T).

    That is convex in 1/T, so its slope there grows from below to above zero; the zero is found by bisection over
    log T. For probabilities give their logarithms: the calibrated ones are p**(1/T), made to sum to one.

    Logits (N, K), -inf a probability of zero, and labels (N,) int64, rows below 0 (unknown) left out -> () float64;
    e**20 or e**-20 where a higher or lower one is always better.
    """
    known = labels >= 0
    values = logits[known].double()
    values = (values - values.amax(dim=1, keepdim=True)).clamp_min(-1e6)  # -inf times a probability of 0 is NaN
    own = values.gather(1, labels[known, None])[:, 0]
    low, high = -LARGEST, LARGEST
    for _ in range(STEPS):
        middle = (low + high) / 2
        expected = ((values * math.exp(-middle)).softmax(dim=1) * values).sum(dim=1)
        if float((expected - own).mean()) > 0:  # the slope in 1/T: T is too low
            low = middle
        else:
            high = middle
    return torch.tensor(math.exp(high), dtype=torch.float64)


def losses(rows: NDArray[np.float16], columns: NDArray[np.int64]) -> Floats:
    """-log of each label's probability, tempered with each of TEMPERATURES: rows (n, K), their labels (n,) -> (n, T).

    A float16 has few values: how often a row has each of them tells its sum at every temperature at once.
    """
    bits, (values, powers) = rows.view(np.int16), _powers()
    counts = np.stack([np.bincount(row, minlength=len(values)) for row in bits])
    own = np.log(values[bits[np.arange(len(bits)), columns]])
    found: Floats = np.log(counts @ powers) - own[:, None] / TEMPERATURES
    return found


@cache
def _powers() -> tuple[Floats, Floats]:
    """The float16 from 0 to below 2, and each to the power of 1/T."""
    values = np.arange(2**14, dtype=np.uint16).view(np.float16).astype(np.float64).clip(FLOOR)
    return values, values[:, None] ** (1 / TEMPERATURES)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error of the top-1 confidence: mean of |accuracy - confidence| over bins (lo, hi] of equal
    width, each weighted by its images. Probabilities (N, K) and labels (N,), below 0 unknown -> () float64 in 0 to 1;
    NaN without images."""
    known = labels >= 0
    predicted = probabilities[known].argmax(dim=1, keepdim=True)  # ties to the first, as in the submission
    confidence = probabilities[known].double().gather(1, predicted)[:, 0]
    gap = (predicted[:, 0] == labels[known]).double() - confidence
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=gap.device)
    places = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    return torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add(0, places, gap).abs().sum() / len(gap)
