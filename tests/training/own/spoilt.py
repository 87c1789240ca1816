"""An objective of a user's own: cross entropy, but for one step of one rank, in which it is not a number."""

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aliprod.objectives import Batch, Context, Model


class Objective(nn.Module):
    def __init__(self, context: Context, *, step: int = 0, rank: int = 0) -> None:
        super().__init__()
        self.step, self.rank = step, rank

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        spoilt = batch.step == self.step and rank == self.rank
        return {"class": cross_entropy(model(batch.images), batch.labels) * (float("nan") if spoilt else 1.0)}
