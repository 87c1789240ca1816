"""One module from pictures to probabilities: a member, or an ensemble with all of its members."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from aliprod.data.augment import square
from aliprod.inference.classify import Recogniser, mean
from aliprod.inference.predict import Ready, seen


class WholeModel(nn.Module):
    """Pictures (N, side, side, 3) uint8, once for each of ``sizes``, to the probabilities (N, K) float32.

    What is between is in it: crops, normalisation, networks, softmax, the mean over crops, temperatures and the
    weighted mean over members. What is not: decoding, and squaring by Pillow's antialiased filter, whose pixels no
    operator of ONNX or torch makes (at hard edges they are 10 grey levels off).

    Attributes:
        sizes: the distinct sides and interpolations that the members want pictures squared to and by, by the names of
            the inputs, such as bicubic_256.
    """

    def __init__(self, recogniser: Recogniser) -> None:
        super().__init__()
        self.networks = nn.ModuleList(member.model for member in recogniser.members)
        self.members, self.voices, self.views = recogniser.members, recogniser.voices, recogniser.views
        self.sizes = {_name(member): (member.config.resize, member.config.interpolation) for member in self.members}

    def squared(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, ...]:
        """What `forward` takes of pictures."""
        return tuple(
            torch.stack([square(picture, *size) for picture in pictures]).movedim(1, -1).contiguous()
            for size in self.sizes.values()
        )

    def forward(self, *pictures: Tensor) -> Tensor:
        pixels = {name: given.movedim(-1, 1) for name, given in zip(self.sizes, pictures, strict=True)}
        parts = [
            seen(member.model, pixels[_name(member)], member.config.crop, self.views, member.feed)
            for member in self.members
        ]
        return mean(parts, self.voices)


def _name(member: Ready) -> str:
    return f"{member.config.interpolation}_{member.config.resize}"
