"""Logit adjustment for long tails (Menon et al. 2020, equation 10)."""

from torch import Tensor, nn
from torch.nn import functional

from aliprod.objectives import Batch, Context, Model, Reduction, counts_of, mean_over, precise, reduced


def loss(logits: Tensor, labels: Tensor, counts: Tensor, tau: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    """Cross entropy of z + tau log prior; predict with z alone. 0 is cross entropy, 1 aims at the balanced error."""
    logits = precise(logits)
    adjusted = logits + tau * _log_prior(counts, logits)
    return reduced(functional.cross_entropy(adjusted, labels, reduction="none"), reduction)


def adjust(logits: Tensor, counts: Tensor, tau: float = 1.0) -> Tensor:
    """z - tau log prior, (B, K): the same correction, post hoc, for a model trained with cross entropy."""
    logits = precise(logits)
    return logits - tau * _log_prior(counts, logits)


def _log_prior(counts: Tensor, like: Tensor) -> Tensor:
    counts = counts.to(like).clamp_min(1)  # log 0 would forbid, or post hoc always predict, an empty class
    return (counts / counts.sum()).log()


class Objective(nn.Module):
    """Logit-adjusted cross entropy with the catalogue's class counts."""

    counts: Tensor

    def __init__(self, context: Context, *, tau: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("counts", counts_of(context, "logit_adjustment"), persistent=False)
        self.tau = tau

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        values = loss(model(batch.images), batch.labels, self.counts, self.tau, reduction="none")
        return {"logit_adjustment": mean_over(values, batch)}
