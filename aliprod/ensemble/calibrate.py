"""Calibration: one temperature for all logits, and the expected calibration error (methods.md, Extras)."""

import math

import torch
from torch import Tensor

STEPS = 60
LARGEST = 20.0  # of |log T|: where no temperature is best (all right, all wrong), the search ends here


def temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """The T that minimises the mean negative log likelihood of softmax(logits / T).

    That is convex in 1/T, so its slope there grows from below to above zero; the zero is found by bisection over
    log T. For probabilities give their logarithms: the calibrated ones are p**(1/T), made to sum to one.

    Args:
        logits: (N, K); -inf is a probability of zero. labels: (N,) int64, rows below 0 (unknown) are left out.
    Returns:
        T, () float64; e**20 or e**-20 where a higher or lower one is always better.
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


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error of the top-1 confidence: mean of |accuracy - confidence| over bins (lo, hi] of equal
    width, each weighted by its images.

    Probabilities (N, K) and labels (N,), below 0 unknown -> () float64 in 0 to 1; NaN without images.
    """
    known = labels >= 0
    predicted = probabilities[known].argmax(dim=1, keepdim=True)  # ties to the first, as in the submission
    confidence = probabilities[known].double().gather(1, predicted)[:, 0]
    gap = (predicted[:, 0] == labels[known]).double() - confidence
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=gap.device)
    places = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    return torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add(0, places, gap).abs().sum() / len(gap)
