"""A folder for those who do not have aliprod: a model, its classes and its card, compared before it is there."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from aliprod.catalogue.decode import Unreadable, decode
from aliprod.errors import AliprodError, Failed, Refused
from aliprod.export import formats
from aliprod.export.card import card
from aliprod.export.recogniser import Recogniser
from aliprod.inference.predict import asked, files, loaded
from aliprod.recipe import Views
from aliprod.store import commit
from aliprod.store.layout import MODEL
from aliprod.store.lineage import Voice

COMPARED = 100  # pictures
MOST = 1e-4  # that a probability may differ by
_OTHERWISE = "Nothing was written. Another format may do: --format."
_AT_ONCE = 4  # 40 crops: the activations of large ones fit a laptop


def export(
    voices: Sequence[Voice],
    folder: Path,
    form: formats.Format,
    views: Views,
    images: Path | None = None,
    worth: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Commit an export of weights folders; it is there once it answers as aliprod does, on a CPU in float32.

    Args:
        images: a folder of pictures to compare on; None: random ones.
        worth: of an ensemble, `aliprod.store.lineage.comparison`.
    Returns:
        format, views, members, compared ("100 random pictures"), difference: the largest of two probabilities.
    Raises:
        Refused: the folder is there already, the format does not hold this, or there are no pictures.
        Failed: the format does not take this, or the probabilities differ by more than MOST; nothing is left.
    """
    if folder.exists():
        raise Refused("is there already.", folder, "Name a folder that is not.")
    members = loaded(voices, torch.device("cpu"))
    recogniser = Recogniser(members, voices, views).eval()
    formats.check(recogniser, form)
    pictures = list(islice(_random() if images is None else _readable(images), COMPARED))
    if not pictures:
        raise Refused("holds no picture.", str(images), "Leave --images out to compare on random ones.")
    told: dict[str, Any] = {
        "format": form,
        "views": views,
        "members": [_said(voice) | {"job": one.config.job} for voice, one in zip(voices, members, strict=True)],
        "compared": f"{len(pictures)} {'random pictures' if images is None else 'pictures'}",
    }

    def fill(staging: Path) -> None:
        try:
            told["difference"] = _difference(formats.write(staging, recogniser, form), recogniser, pictures)
        except (AliprodError, OSError):
            raise
        except Exception as error:  # of three libraries, which have no common one
            what = f"{form} does not take this model: {str(error).strip().splitlines()[0]}"
            raise Failed(what, folder, _OTHERWISE) from error
        if not told["difference"] <= MOST:  # NaN too
            what = f"its probabilities differ from aliprod's by up to {told['difference']:.1e}, more than {MOST:.0e}."
            raise Failed(what, folder, _OTHERWISE)
        (staging / "README.md").write_text(card(recogniser, told, worth), encoding="utf-8")

    commit.write(folder, fill, told)  # where `told` gets its difference before it is written
    return told


@torch.no_grad()
def _difference(answers: formats.Answers, recogniser: Recogniser, pictures: Sequence[Image.Image]) -> float:
    """The largest of two probabilities; NaN where one is."""
    blocks = (pictures[low : low + _AT_ONCE] for low in range(0, len(pictures), _AT_ONCE))
    ours = partial(asked, members=recogniser.members, voices=recogniser.voices, views=recogniser.views)
    return float(torch.stack([(answers(some) - ours(some)).abs().max() for some in blocks]).max())


def _said(voice: Voice) -> dict[str, Any]:
    """What the commit record of a weights folder says, and what its member counts."""
    return {
        "weight": voice.weight,
        "temperature": voice.temperature,
        "sha256": commit.sha256(voice.folder / MODEL),
        "trained": commit.read(voice.folder) or {},
    }


def _random() -> Iterable[Image.Image]:
    """Noise of 8 to 404 pixels a side: coarse to fine once it is squared."""
    generator = np.random.default_rng(0)
    for number in range(COMPARED):
        yield Image.fromarray(generator.integers(0, 256, (8 + 4 * number,) * 2 + (3,), dtype=np.uint8))


def _readable(folder: Path) -> Iterable[Image.Image]:
    """Pictures from all over a folder, without those that are none."""
    paths = files(folder)
    for path in paths[:: max(1, len(paths) // COMPARED)]:
        try:
            yield decode(path)
        except Unreadable:
            continue
