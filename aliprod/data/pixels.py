"""The bytes of a picture become pixels or a Pillow image, whichever the decoder makes.

To turn one into the other costs a large picture a tenth of its decoding: whoever needs it does so, of a crop.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aliprod.catalogue.decode import baseline_jpeg, content_of, decode

try:
    import simplejpeg  # the extra `fast`
except ImportError:
    simplejpeg = None

Picture = Tensor | Image.Image  # (H, W, 3) uint8, or RGB: the same pixels


def picture_of(source: Path | bytes) -> Picture:
    """A picture as `decode` shows it, pixel for pixel and refusal for refusal; faster with the extra ``fast``.

    Raises:
        Unreadable: as `decode`.
    """
    content = content_of(source)
    if simplejpeg and baseline_jpeg(content):
        try:
            return torch.from_numpy(simplejpeg.decode_jpeg(content))
        except ValueError:
            pass  # it is damaged, and Pillow judges how much
    return decode(content)


def cropped(picture: Picture, top: int, left: int, height: int, width: int) -> Picture:
    """A part of a picture, on the side it is on; of pixels a view."""
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + width, top + height))
    return picture[top : top + height, left : left + width]


def as_pixels(picture: Picture) -> Tensor:
    """(H, W, 3) uint8."""
    return torch.from_numpy(np.array(picture)) if isinstance(picture, Image.Image) else picture


def as_image(picture: Picture) -> Image.Image:
    """The same as an RGB image."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture.numpy())
