"""A step is a mean over its shares, taken by one fixed binary tree: the same bytes on any number of ranks.

A share is a micro-batch with norm statistics and random numbers of its own. Gradients, norm statistics and losses of
the shares are the leaves, in order. A rank sums its block of leaves, whose root is a node of the tree; the levels above
run over the ranks. The idea is EasyScale's (Li et al., SC'23): its "EasyScaleThreads" are the shares.

Between ranks a sum is a reduce-scatter made of an all-to-all, whose slices are added in the order of the tree, and an
all-gather: what a ring sends. On CPUs the ranks send each other the slices one by one, to the same effect.
`torch.distributed.all_reduce` adds in an order that depends on the ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Losses = dict[str, Tensor]  # scalar parts by name
T = TypeVar("T")
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.14

_NOTHING = -0.0  # the one number that, added to any other, leaves all of its bits: 0.0 makes 0.0 of -0.0
_BUCKET = 8 * 2**20 // 4  # float32 values that are sent together; two such are received into beside the gradients
_FIRST_BUCKET = 2**20 // 4  # of the gradients that are ready first, as DDP does


class ShareMean:
    """Takes the mean of the shares of a step: of gradients, norm statistics and loss parts.

    Args:
        module: whose buffers each share begins with as they are, and ends with as its own.
        trained: parameters whose gradients count.
        shares: of a step; a power of two where they are added by the tree. world_size: ranks, each with as many.
        sent: ``tree``, or what all-reduce adds up, as DDP does: quicker by a little, but the bytes depend on the ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Iterable[nn.Parameter],
        shares: int,
        world_size: int = 1,
        sent: Literal["tree", "float32", "bfloat16"] = "tree",
    ) -> None:
        self.shares, self.world_size, self.sent = shares, world_size, sent
        self.buffers = list(module.buffers())
        self.statistics = [buffer for buffer in self.buffers if buffer.dtype is torch.float32]
        depth = max(1, (shares // world_size - 1).bit_length())
        self.buckets = [_Bucket(some, depth, world_size) for some in _dealt(list(trained))] if shares > 1 else []
        self._number, self._last, self._done = 0, False, 0
        self._received, self._directly = list[Tensor](), False
        if self.buckets and world_size > 1 and sent == "tree":
            largest = max((bucket.sums[0] for bucket in self.buckets), key=len)
            self._received = [torch.empty_like(largest) for _ in range(2)]
            # gloo's collectives copy more than they send, and what it sends directly is on the CPU
            self._directly = dist.get_backend() == "gloo" and largest.device.type == "cpu"
        for bucket in self.buckets if world_size > 1 else ():
            for place, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._ready, bucket, place))

    def of(self, step: Iterable[T], backward: Callable[[T], Losses]) -> tuple[Losses, list[Losses]]:
        """Work through this rank's shares of a step; gradients and norm statistics are then the means of all shares.

        ``backward`` is forward and backward of a share, which adds to the gradients a ``shares``-th of its own. Returns
        the mean loss parts of the step, and those of each of this rank's shares, detached.
        """
        if self.shares == 1:
            losses = [backward(share) for share in step]
            return losses[0], losses
        count = self.shares // self.world_size
        before = [buffer.clone() for buffer in self.buffers] if count > 1 else []
        leaves, losses, self._done = list[Tensor](), list[Losses](), 0
        for number, share in enumerate(step):
            if number and before:
                torch._foreach_copy_(self.buffers, before)
            self._number, self._last = number, number == count - 1
            for bucket in self.buckets:
                bucket.open(number)
            losses.append(backward(share))
            leaf = torch.cat([part.flatten() for part in (*self.statistics, *losses[-1].values())])
            for _ in range(_levels(number)):
                leaf = leaves.pop() + leaf
            leaves.append(leaf)
            if not self._last or self.world_size == 1:
                for bucket in self.buckets:
                    bucket.close(number)
        return self._finish(leaves[0], losses[0]), losses

    def _ready(self, bucket: "_Bucket", place: int, _: Tensor) -> None:
        """Take a gradient, and count those of the last share; buckets are sent in order, since all ranks must send in
        the same."""
        bucket.take(place, self._number)
        if self._last:
            bucket.awaited -= 1
            while self._done < len(self.buckets) and not self.buckets[self._done].awaited:
                self._advance()

    @torch.no_grad()
    def _advance(self) -> None:
        """Send the next bucket, spread the sums of the one before, be done with the one before that: two are on their
        way at a time, while the backward pass goes on."""
        number, self._done = self._done, self._done + 1
        if 0 <= number - 2 < len(self.buckets):
            bucket = self.buckets[number - 2]
            bucket.wait()
            if self.sent == "bfloat16":
                bucket.sums[0].copy_(bucket.sent)
        if number < len(self.buckets):
            self._send(self.buckets[number], number)
        if 0 <= number - 1 < len(self.buckets) and self.sent == "tree":
            self._spread(self.buckets[number - 1], number - 1)

    def _send(self, bucket: "_Bucket", number: int) -> None:
        bucket.close(self._number)
        if self.sent != "tree":
            bucket.sent = bucket.sums[0].bfloat16() if self.sent == "bfloat16" else bucket.sums[0]
            bucket.works = [dist.all_reduce(bucket.sent, async_op=True)]
        elif self._directly:
            mine, theirs = (flat.chunk(self.world_size) for flat in (bucket.sums[0], self._slices(bucket, number)))
            bucket.works = _exchange(mine, theirs, tag=2 * number)
        else:
            bucket.works = [dist.all_to_all_single(self._slices(bucket, number), bucket.sums[0], async_op=True)]

    def _spread(self, bucket: "_Bucket", number: int) -> None:
        """Add up this rank's slices of all ranks' sums, and give the others the result."""
        bucket.wait()
        rows = list(self._slices(bucket, number).chunk(self.world_size))
        if self._directly:
            rank, slices = dist.get_rank(), bucket.sums[0].chunk(self.world_size)
            rows[rank] = slices[rank]
            _added(rows, into=rank)
            bucket.works = _exchange([slices[rank]] * self.world_size, slices, tag=2 * number + 1)
        else:
            bucket.works = [_all_gather(bucket.sums[0], _added(rows), async_op=True)]

    def _slices(self, bucket: "_Bucket", number: int) -> Tensor:
        """Room for a slice of each rank's sum; the bucket two before has had it."""
        return self._received[number % 2][: len(bucket.sums[0])]

    @torch.no_grad()
    def _finish(self, leaf: Tensor, names: Losses) -> Losses:
        if self.world_size > 1:
            while self._done < len(self.buckets) + 2:  # with parameters that the loss does not depend on
                self._advance()
            if self.sent == "tree":
                rows = leaf.new_empty(self.world_size, len(leaf))
                _all_gather(rows.flatten(), leaf)
                leaf = _added(list(rows))
            else:
                dist.all_reduce(leaf)
        sizes = [buffer.numel() for buffer in self.statistics]
        *means, losses = (leaf / self.shares).split([*sizes, len(names)])
        if self.statistics:
            torch._foreach_copy_(
                self.statistics, [mean.view_as(b) for mean, b in zip(means, self.statistics, strict=True)]
            )
        return dict(zip(names, losses.unbind(), strict=True))


class _Bucket:
    """Gradients of some parameters, one behind the other in memory.

    Attributes:
        sums: (size,) each: the nodes of the tree that are open at a time, the leftmost first.
        sent: what is added up by all-reduce. works: what it is on its way with.
        awaited: gradients of the last share that are not there yet.
        moved: gradients that begin a node are moved there by `take`, of several ranks, whose hooks call it; of one rank
            they are added to what leaves their bits.
    """

    def __init__(self, parameters: list[nn.Parameter], depth: int, world_size: int) -> None:
        self.parameters, self.awaited, self.moved = parameters, len(parameters), world_size > 1
        size = sum(parameter.numel() for parameter in parameters)
        size += -size % world_size
        self.sums = [parameters[0].new_zeros(size, requires_grad=False) for _ in range(depth)]
        self.views = [_views(flat, parameters) for flat in self.sums]
        self.sent = self.sums[0]
        self.works = list[Any]()

    def wait(self) -> None:
        """Wait until it is no longer on its way."""
        for work in self.works:
            work.wait()

    def open(self, number: int) -> None:
        """Have the gradients of share ``number`` of this rank added to its node: each second one begins one."""
        place = (number >> 1).bit_count()
        self.awaited = len(self.parameters)
        if number % 2 == 0 and self.moved:
            for parameter in self.parameters:
                parameter.grad = None
            return
        if number % 2 == 0:
            self.sums[place].fill_(_NOTHING)
        self._point(place)

    @torch.no_grad()
    def take(self, place: int, number: int) -> None:
        """Move a gradient of share ``number`` to its node, where it begins one."""
        parameter, view = self.parameters[place], self.views[(number >> 1).bit_count()][place]
        if parameter.grad is not None and parameter.grad is not view:
            view.copy_(parameter.grad)
            parameter.grad = view

    def close(self, number: int) -> None:
        """Add up the nodes that are complete with share ``number``; of the last one, the gradients are the sum."""
        place = (number >> 1).bit_count()
        for parameter, view in zip(self.parameters, self.views[place], strict=True) if self.moved else ():
            if parameter.grad is None:  # the loss does not depend on it
                view.fill_(_NOTHING)
        for _ in range(_levels(number) - 1):
            self.sums[place - 1].add_(self.sums[place])
            place -= 1
        if place == 0:
            self._point(0)

    def _point(self, place: int) -> None:
        for parameter, view in zip(self.parameters, self.views[place], strict=True):
            parameter.grad = view


def _levels(number: int) -> int:
    """How many levels of the tree are complete with leaf ``number``: ones at the end of its binary form."""
    return (~number & number + 1).bit_length() - 1


def _added(rows: list[Tensor], into: int = 0) -> Tensor:
    """The sum of rows by the tree, as many as a power of two; written into one of them, and the others are lost."""
    while len(rows) > 1:
        pairs = zip(rows[0::2], rows[1::2], strict=True)
        rows = [b.add_(a) if into == 2 * place + 1 else a.add_(b) for place, (a, b) in enumerate(pairs)]
        into //= 2
    return rows[0]


def _exchange(mine: Sequence[Tensor], theirs: Sequence[Tensor], tag: int) -> list[Any]:
    """Send each other rank what is its, and receive from each."""
    others = [rank for rank in range(len(mine)) if rank != dist.get_rank()]
    received = [dist.irecv(theirs[rank], rank, tag=tag) for rank in others]
    return [*received, *(dist.isend(mine[rank], rank, tag=tag) for rank in others)]


def _dealt(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in buckets, in about the order in which a backward pass reaches them."""
    some, size, most = list[nn.Parameter](), 0, _FIRST_BUCKET
    for parameter in reversed(parameters):
        some.append(parameter)
        size += parameter.numel()
        if size >= most:
            yield some
            some, size, most = [], 0, _BUCKET
    if some:
        yield some


def _views(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Pieces of ``flat`` that lie as the parameters do, whatever the order of their dimensions."""
    sizes = [parameter.numel() for parameter in parameters]
    pieces = flat[: sum(sizes)].split(sizes)
    return [piece.as_strided(p.size(), p.stride()) for piece, p in zip(pieces, parameters, strict=True)]
