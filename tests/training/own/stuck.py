"""An objective of a user's own: cross entropy that, at one step of one rank, never comes back, once."""

import ctypes
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aliprod.objectives import Batch, Context, Model


class Objective(nn.Module):
    def __init__(self, context: Context, *, step: int = 0, rank: int = 0, once: str = "") -> None:
        super().__init__()
        self.step, self.rank, self.once = step, rank, Path(once)

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        if batch.step == self.step and rank == self.rank and not self.once.exists():
            self.once.touch()
            ctypes.PyDLL(None).sleep(600)  # in C, and holding the interpreter
        return {"class": cross_entropy(model(batch.images), batch.labels)}
