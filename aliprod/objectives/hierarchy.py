"""Hierarchical losses over a product tree: the right category counts even where the product is wrong."""

from typing import Literal

import torch
from torch import Tensor, nn

from aliprod.errors import Refused
from aliprod.objectives import Batch, Context, Model, Needs, Reduction, mean_over, precise, reduced, require


def level_probabilities(logits: Tensor, labels: Tensor, ancestor: Tensor) -> Tensor:
    """P_l, (L, B): what the softmax gives to all classes under the true class's ancestor at level l.

    ``ancestor``: (L, K) int64, node of each class per level, from the root's side; the last is the class itself.
    """
    return _level_log_probabilities(logits, labels, ancestor).exp()


def marginal_loss(
    logits: Tensor, labels: Tensor, ancestor: Tensor, beta: float, reduction: Reduction = "mean"
) -> Tensor:
    """nll of the class + beta * mean over the upper levels of -log P_l; ``ancestor`` as in `level_probabilities`."""
    nll = -_level_log_probabilities(logits, labels, ancestor)
    upper = nll[:-1].sum(dim=0) / max(len(nll) - 1, 1)
    return reduced(nll[-1] + beta * upper, reduction)


def win_loss(
    logits: Tensor, labels: Tensor, ancestor: Tensor, weights: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """1 - sum_l w_l P_l, after Wu, Tygert, LeCun 2017: the expected share of the path that is missed, in 0 to 1.

    ``ancestor``: (L, K), as in `level_probabilities`. ``weights``: (L,), sum 1.
    """
    levels = level_probabilities(logits, labels, ancestor)
    return reduced(1 - (weights.to(levels)[:, None] * levels).sum(dim=0), reduction)


def win_weights(levels: int) -> Tensor:
    """(L,) float64: halved from level to level, the last doubled so that the sum is 1."""
    weights = 0.5 ** torch.arange(1, levels + 1, dtype=torch.float64)
    weights[-1] *= 2
    return weights


def _level_log_probabilities(logits: Tensor, labels: Tensor, ancestor: Tensor) -> Tensor:
    log_p = precise(logits).log_softmax(dim=1)
    levels = []
    for nodes in ancestor[:-1]:  # summed as logarithms: an improbable subtree keeps its gradient
        elsewhere = nodes != nodes[labels][:, None]  # (B, K)
        levels.append(log_p.masked_fill(elsewhere, -torch.inf).logsumexp(dim=1))
    return torch.stack([*levels, log_p.gather(1, labels[:, None])[:, 0]])


class Objective(nn.Module):
    """``marginal`` (with beta) or ``win`` loss over the catalogue's product tree."""

    needs = Needs(tree=True)
    ancestor: Tensor
    weights: Tensor

    def __init__(self, context: Context, *, kind: Literal["marginal", "win"] = "marginal", beta: float = 0.5) -> None:
        super().__init__()
        if context.ancestor is None:
            raise Refused("hierarchy needs a product tree.", advice="Put product_tree.json beside train.json.")
        require(beta >= 0, f"beta = {beta} is negative.", "0.5 is the default, 0 is cross entropy.")
        self.kind, self.beta = kind, beta
        self.register_buffer("ancestor", context.ancestor, persistent=False)
        self.register_buffer("weights", win_weights(len(context.ancestor)), persistent=False)

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch.images)
        if self.kind == "win":
            values = win_loss(logits, batch.labels, self.ancestor, self.weights, reduction="none")
        else:
            values = marginal_loss(logits, batch.labels, self.ancestor, self.beta, reduction="none")
        return {"hierarchy": mean_over(values, batch)}
