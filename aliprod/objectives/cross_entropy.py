"""Cross entropy, with label smoothing as an option: what base training and the balanced finetune minimise."""

from torch import Tensor, nn
from torch.nn import functional

from aliprod.objectives import Batch, Context, Model, Reduction, mean_over, precise, reduced, require


def loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0, reduction: Reduction = "mean") -> Tensor:
    """(1 - s) nll_t + s/K sum_k nll_k, with ``smoothing`` s in 0 to 1 (Szegedy et al. 2016, section 7)."""
    values = functional.cross_entropy(precise(logits), labels, reduction="none", label_smoothing=smoothing)
    return reduced(values, reduction)


class Objective(nn.Module):
    """Cross entropy of the classifier's logits."""

    def __init__(self, context: Context, *, smoothing: float = 0.0) -> None:  # noqa: ARG002
        super().__init__()
        require(0 <= smoothing < 1, f"smoothing = {smoothing} is not in 0 to 1.", "0.1 is usual, 0 is none.")
        self.smoothing = smoothing

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        values = loss(model(batch.images), batch.labels, self.smoothing, reduction="none")
        return {"cross_entropy": mean_over(values, batch)}
