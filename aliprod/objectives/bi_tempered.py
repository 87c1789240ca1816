"""Bi-tempered logistic loss (Amid et al. 2019): a bounded loss on a heavy-tailed softmax."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aliprod.errors import Refused
from aliprod.objectives import Batch, Context, Model, Reduction, mean_over, precise, reduced, require

NEWTON_STEPS = 8  # sums within 1e-14 of 1 at 2 to 50,030 classes, t2 of 1.0001 to 8; 5 do on near-normal logits


def probabilities(logits: Tensor, t2: float, iterations: int | None = None) -> Tensor:
    """The tempered softmax p = exp_t2(z - lambda), (B, K), with lambda such that the sum is 1 (equation 5).

    ``t2``: 1 is the softmax, above 1 the tail is heavier. ``iterations``: None solves for lambda by Newton; a number
    takes that many fixed-point steps (Algorithm 1). Refused: t2 is below 1, or above what the dtype can hold: 8.0 at
    50,030 classes in float32.
    """
    return _log_probabilities(precise(logits), t2, iterations).exp()


def loss(
    logits: Tensor,
    labels: Tensor,
    t1: float,
    t2: float,
    smoothing: float = 0.0,
    iterations: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """sum_k y (log_t1 y - log_t1 p) - (y^(2-t1) - p^(2-t1)) / (2-t1), equation 8.

    Args:
        t1: at most 1. t2: at least 1. smoothing: share of the target that the other K-1 classes have.
        iterations: as in `probabilities`. The gradient is the formula's at these probabilities, not that of the
            iterations; it has no second derivative.
    Raises:
        Refused: t1 above 1, or t2 as in `probabilities`.
    """
    if t1 > 1:
        raise Refused(f"t1 = {t1} is above 1.", advice="0.8 is usual, 1 is not bounded.")
    values: Tensor = _Loss.apply(precise(logits), labels, t1, t2, smoothing, iterations)
    return reduced(values, reduction)


class _Loss(torch.autograd.Function):
    """Keeps the log-probabilities alone; targets are two numbers, never a (B, K) array."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, t1: float, t2: float, smoothing: float, iterations: int | None
    ) -> Tensor:
        log_p = _log_probabilities(logits, t2, iterations)
        num_classes = logits.shape[1]
        hit, other = 1 - smoothing, smoothing / max(num_classes - 1, 1)  # 1 - K/(K-1) s + s/(K-1), and s/(K-1)
        ctx.save_for_backward(log_p, labels)
        ctx.settings = t1, t2, hit, other
        tempered = _tempered(log_p, t1)
        cross = (hit - other) * tempered.gather(1, labels[:, None])[:, 0]
        if other:
            cross = cross + other * tempered.sum(dim=1)
        power = 2 - t1
        entropy = _entropy(hit, t1) + (num_classes - 1) * _entropy(other, t1)
        return entropy - cross + (power * log_p).exp().sum(dim=1) / power

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """delta - e sum(delta), with delta = (p - y) p^(t2-t1) and e = p^t2 / sum p^t2."""
        log_p, labels = ctx.saved_tensors
        t1, t2, hit, other = ctx.settings
        delta = log_p.exp() - other
        delta.scatter_add_(1, labels[:, None], delta.new_full((len(labels), 1), other - hit))
        delta *= ((t2 - t1) * log_p).exp()
        escort = (t2 * log_p).softmax(dim=1)
        delta -= escort * delta.sum(dim=1, keepdim=True)
        return delta * grad[:, None], None, None, None, None, None


def _log_probabilities(logits: Tensor, t2: float, iterations: int | None) -> Tensor:
    """log p, exact where p underflows."""
    if t2 < 1:
        raise Refused(f"t2 = {t2} is below 1.", advice="1.2 is usual, 1 is the softmax.")
    below = logits - logits.amax(dim=1, keepdim=True)  # a = z - max z
    if t2 == 1:  # not log_softmax: on a CPU, 50,030 equal logits leave its sum 2.6e-5 off in float32
        return below - below.logsumexp(dim=1, keepdim=True)
    _check_t2(t2, logits.shape[1], logits.dtype)
    shift = _newton(below, t2) if iterations is None else _fixed_point(below, t2, iterations)
    return _log_exp_t(below - shift, t2)


def _check_t2(t2: float, num_classes: int, dtype: torch.dtype) -> None:
    most = -math.log(torch.finfo(dtype).tiny) / math.log(max(num_classes, 2))
    if t2 > most:  # K^-t2, the slope at equal logits, would underflow
        what = f"t2 = {t2} is too large for {num_classes:,} classes in {dtype}."
        raise Refused(what, advice=f"At most {math.floor(10 * most) / 10}; 1.2 is usual.")


def _newton(below: Tensor, t2: float) -> Tensor:
    """lambda - max z, (B, 1), from 0 upwards: S^(1-t2) is concave in lambda, so no step overshoots. So many steps, as
    asking the device whether it has converged would wait for it."""
    shift = torch.zeros_like(below[:, :1])
    for _ in range(NEWTON_STEPS):
        log_p = _log_exp_t(below - shift, t2)
        log_sum = log_p.exp().sum(dim=1, keepdim=True).log()  # of 1 to K terms in 0 to 1: cannot overflow
        log_slope = (t2 * log_p).exp().sum(dim=1, keepdim=True).log()  # D, as b^(-t2/(t2-1)) = p^t2
        gap = -torch.expm1((1 - t2) * log_sum) / (t2 - 1)
        shift = shift + gap * (t2 * log_sum - log_slope).exp()
    return shift


def _fixed_point(below: Tensor, t2: float, iterations: int) -> Tensor:
    """lambda - max z, (B, 1), by Algorithm 1 of the paper."""
    scaled = below
    for _ in range(iterations):
        scaled = below * ((1 - t2) * _log_exp_t(scaled, t2).logsumexp(dim=1, keepdim=True)).exp()
    return -_tempered(-_log_exp_t(scaled, t2).logsumexp(dim=1, keepdim=True), t2)


def _log_exp_t(values: Tensor, t: float) -> Tensor:
    """log exp_t(u) = log(1 + (1-t) u) / (1-t), for t > 1."""
    return torch.log1p((1 - t) * values) / (1 - t)


def _tempered(log_p: Tensor, t: float) -> Tensor:
    """log_t p = (p^(1-t) - 1) / (1-t), from log p."""
    return log_p if t == 1 else torch.expm1((1 - t) * log_p) / (1 - t)


def _entropy(y: float, t: float) -> float:
    """y log_t y - y^(2-t)/(2-t), 0 at 0."""
    if y == 0:
        return 0.0
    log_t = math.log(y) if t == 1 else (math.pow(y, 1 - t) - 1) / (1 - t)
    return y * log_t - math.pow(y, 2 - t) / (2 - t)


class Objective(nn.Module):
    """Bi-tempered loss of the classifier's logits, iterated to the limit."""

    def __init__(self, context: Context, *, t1: float = 0.8, t2: float = 1.2, smoothing: float = 0.0) -> None:
        super().__init__()
        require(t1 <= 1 <= t2, f"t1 = {t1}, t2 = {t2} do not enclose 1.", "t1 = 0.8 and t2 = 1.2 are usual.")
        _check_t2(t2, context.num_classes, torch.float32)
        require(0 <= smoothing < 1, f"smoothing = {smoothing} is not in 0 to 1.", "0.1 is usual, 0 is none.")
        self.t1, self.t2, self.smoothing = t1, t2, smoothing

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        values = loss(model(batch.images), batch.labels, self.t1, self.t2, self.smoothing, reduction="none")
        return {"bi_tempered": mean_over(values, batch)}
