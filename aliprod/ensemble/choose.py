"""Greedy selection of members, and their weights, on the validation set (Caruana et al. 2004; methods.md, Extras)."""

import torch
from torch import Tensor

from aliprod.inference.metrics import mean_class_error


def greedy(probabilities: Tensor, labels: Tensor, rounds: int, score: str = "nll") -> tuple[Tensor, Tensor]:
    """Select members greedily: each round adds the one, anew or once more, with which the mean scores best.

    Scores are compared at 12 decimals, ties go to the lowest member; the best round is the first minimum of the
    scores, and the weights are how often each member was picked until then (`weights`).

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
