"""Ranks end together: one that is told to stop tells the others, who all know of it at the same step."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class Stopped(Exception):
    """The ranks have agreed to stop."""


class StopVote:
    """Asks every rank at each step; the answer is that of the step before, so that no step waits for it.

    Args:
        stop: whether this rank is told to end.
    """

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None  # on the CPU: no GPU is waited for
        self._asked: tuple[torch.Tensor, Any] | None = None

    def is_for_stopping(self) -> bool:
        """Whether any rank was told to stop; every rank must ask equally often."""
        if self._group is None:
            return self.stop()
        before = self._asked
        told = torch.tensor([float(self.stop())])
        self._asked = told, dist.all_reduce(told, dist.ReduceOp.MAX, self._group, async_op=True)
        if before is None:
            return False
        answer, work = before
        work.wait()
        return bool(answer.item())

    def heed(self) -> None:
        """Ask, and raise `Stopped` where the answer is yes."""
        if self.is_for_stopping():
            raise Stopped
