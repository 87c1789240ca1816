"""A backbone's passes as CUDA graphs: recorded once, then replayed.

Launched one by one from Python, the kernels of 32 images take longer to launch than to compute: on an H200 a share of a
ResNet-50 takes 23.6 ms, replayed 9.8 (benchmarks/RESULTS.md). The kernels are the same, and so are the bytes.
"""

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

_WARM_UP = 3  # passes before the recording, in which libraries choose and allocate


def replay_passes(backbone: nn.Module) -> None:
    """Have a backbone on a GPU replay its forward and backward pass in training, from the first batch on.

    Evaluation, a batch of another shape, and a second pass before the first has gone backward (BBN) run as ever, and
    so does a backbone that cannot be recorded.
    """
    backbone.forward_features = _Passes(backbone)  # type: ignore[assignment]


class _Passes:
    """The method `forward_features` of a backbone: `_Recording` where there is one that fits, else the class's own."""

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone, self.launch = backbone, cast(Callable[[Tensor], Tensor], backbone.forward_features)
        self.recording: _Recording | None = None
        self.refused, self.under_way = False, False

    def __call__(self, images: Tensor) -> Tensor:
        if self.refused or self.under_way or not (self.backbone.training and torch.is_grad_enabled()):
            return self.launch(images)
        if self.recording is None:
            self._record(images)
        if self.recording is None or images.shape != self.recording.images.shape:
            return self.launch(images)
        self.under_way = True
        features: Tensor = _Replay.apply(self.recording, images, *self.recording.parameters)
        features.register_hook(self._went_back)
        return features

    def _record(self, images: Tensor) -> None:
        """Record with these images' shape; norm statistics and random numbers are then as if nothing had been done."""
        buffers, draws = list(self.backbone.buffers()), torch.cuda.default_generators[images.device.index]
        kept, state = [buffer.clone() for buffer in buffers], draws.clone_state()
        try:
            self.recording = _Recording(self.launch, images, [p for p in self.backbone.parameters() if p.requires_grad])
        except RuntimeError as error:
            self.refused = True
            log.warning("The passes of %s cannot be recorded: %s", type(self.backbone).__name__, error)
            draws.graphsafe_set_state(state)  # the other one still waits for the end of a recording
        draws.set_state(state.get_state())
        if kept:
            torch._foreach_copy_(buffers, kept)

    def _went_back(self, _: Tensor) -> None:
        self.under_way = False


class _Recording:
    """Both passes for one shape. All tensors here are the graphs' own memory, filled and read by each replay."""

    def __init__(self, launch: Callable[[Tensor], Tensor], images: Tensor, parameters: list[nn.Parameter]) -> None:
        self.images, self.parameters = images.clone(), parameters
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        precision = torch.get_autocast_dtype("cuda")
        # its cache would hand kernels a copy of the weights that no replay renews
        with torch.autocast("cuda", precision, torch.is_autocast_enabled("cuda"), cache_enabled=False):
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    features = launch(self.images)
                    if not isinstance(features, Tensor):
                        raise RuntimeError(f"it makes a {type(features).__name__}, not one tensor")
                    self._gradients(features, torch.zeros_like(features))
            torch.cuda.current_stream().wait_stream(stream)
            # other threads, such as the one that pins the next batch, may go on meanwhile
            with torch.cuda.graph(self.forward, pool, stream, "thread_local"):
                features = launch(self.images)
            self.gradient = torch.zeros_like(features)
            with torch.cuda.graph(self.backward, pool, stream, "thread_local"):
                self.gradients = self._gradients(features, self.gradient)
            self.features = features.detach()  # not its history, which would tie each gradient to this stream

    def _gradients(self, features: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(features, self.parameters, gradient, allow_unused=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, images: Tensor, *_: Tensor) -> Tensor:
        ctx.recording = recording
        recording.images.copy_(images)
        recording.forward.replay()
        features: Tensor = recording.features.detach()
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        recording = ctx.recording
        recording.gradient.copy_(gradient)
        recording.backward.replay()
        return None, None, *(None if one is None else one.detach() for one in recording.gradients)
