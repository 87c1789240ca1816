"""The bytes of a picture become pixels as training takes them: (H, W, 3), of which a crop is a view."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aliprod.data.decode import baseline_jpeg, content_of, decode

try:
    import simplejpeg  # the extra `fast`
except ImportError:
    simplejpeg = None

Picture = Tensor | Image.Image  # (H, W, 3) uint8, or RGB: the same pixels


def pixels_of(source: Path | bytes) -> Tensor:
    """A picture as `decode` shows it, pixel for pixel and refusal for refusal; faster with the extra ``fast``.

    Returns:
        (H, W, 3) uint8.
    Raises:
        Unreadable: as `decode`.
    """
    content = content_of(source)
    if simplejpeg and baseline_jpeg(content):
        try:
            return torch.from_numpy(simplejpeg.decode_jpeg(content))
        except ValueError:
            pass  # it is damaged, and Pillow judges how much
    return as_pixels(decode(content))


def as_pixels(picture: Picture) -> Tensor:
    """(H, W, 3) uint8."""
    return torch.from_numpy(np.array(picture)) if isinstance(picture, Image.Image) else picture


def as_image(picture: Picture) -> Image.Image:
    """The same as an RGB image."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture.numpy())
