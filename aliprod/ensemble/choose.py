"""Members chosen and weighted by the log loss of what they give the true classes (methods.md, Combining)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aliprod.ensemble.calibrate import Floats
from aliprod.inference.metrics import mean_class_error

ROUNDS = 50  # of greedy selection: the most that the weights sum up to
WHOLE = 100  # that fitted weights sum up to: whole numbers add up exactly
_STEPS = 500


def greedy(probabilities: Tensor, labels: Tensor, rounds: int, score: str = "nll") -> tuple[Tensor, Tensor]:
    """Select members greedily: each round adds the one, anew or once more, with which the mean scores best.

    Scores are compared at 12 decimals, ties go to the lowest member; the best round is the first minimum of the
    scores, and the weights are how often each member was picked until then (`weights`). Caruana et al. 2004, section 2.

    Args:
        probabilities: (M, N, K) of M members. labels: (N,) int64, rows below 0 (unknown) are left out.
        score: "nll", mean of -log p at the label, or "error", mean over classes of the top-1 error.
    Returns:
        picks (rounds,) int64, scores (rounds,) float64 of the mean of all picks so far.
    """
    if score not in ("nll", "error"):
        raise ValueError(f'score must be "nll" or "error", not {score!r}')
    known = labels >= 0
    members, labels = probabilities[:, known], labels[known]
    if score == "nll":  # only the label's column counts
        members = members.gather(2, labels.expand(len(members), -1)[:, :, None])
    # A stored 0 may have been half the smallest float16, and has no logarithm.
    smallest = 2.0**-25 if members.dtype == torch.float16 else torch.finfo(members.dtype).tiny
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
    return [int(count) for count in torch.bincount(picks[:best], minlength=members)]


def fitted(combine: Literal["greedy", "weights"], own: Floats) -> tuple[int, ...]:
    """Whole weights of members by the probabilities (M, N) that they give the true classes.

    The mixture of members gives a true class the mixture of these, so that no others are needed.
    """
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
    """Members of a weight above 0, each next one that with which the weighted mean has the lowest log loss.

    own (M, N): probabilities of the true classes, above 0.
    """
    left, order = [member for member, weight in enumerate(weights) if weight], list[int]()
    total, mass = np.zeros(own.shape[1]), 0
    while left:
        tried = [-np.log((total + weights[m] * own[m]) / (mass + weights[m])).sum() for m in left]
        best = left.pop(int(np.argmin(tried)))
        order.append(best)
        total, mass = total + weights[best] * own[best], mass + weights[best]
    return order
