"""A folder for those who do not have aliprod: a model, its classes and its card (what it is, how to feed it, where it
comes from), compared before it is there."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import timm
import torch
from PIL import Image

from aliprod.catalogue.decode import Unreadable, decode
from aliprod.data.augment import square
from aliprod.errors import AliprodError, Failed, Refused
from aliprod.export import formats
from aliprod.inference.classify import Recogniser
from aliprod.inference.pictures import listed
from aliprod.recipe import VIEWS, Views
from aliprod.store import commit
from aliprod.store.layout import MODEL
from aliprod.store.lineage import Voice
from aliprod.version import VERSION

COMPARED = 100  # pictures
MOST = 1e-4  # that a probability may differ by
_OTHERWISE = "Nothing was written. Another format may do: --to."
_AT_ONCE = 4  # 40 crops: the activations of large ones fit a laptop


def export(
    voices: Sequence[Voice],
    folder: Path,
    form: formats.Format,
    views: Views,
    images: str | None = None,
    worth: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Commit an export of weights folders; it is there once it answers as aliprod does, on a CPU in float32.

    Args:
        images: what `listed` takes, to compare on; None: random ones.
        worth: of an ensemble, `aliprod.store.lineage.comparison`.
    Raises:
        Refused: the folder is there already, the format does not hold this, or there are no pictures.
        Failed: the format does not take this, or the probabilities differ by more than MOST; nothing is left.
    """
    if folder.exists():
        raise Refused("is there already.", folder, "Name a folder that is not.")
    recogniser = Recogniser.load(voices, views, device=torch.device("cpu"))
    whole = formats.WholeModel(recogniser).eval()
    formats.check(whole, form)
    pictures = list(islice(_random() if images is None else _readable(images), COMPARED))
    if not pictures:
        raise Refused("holds no picture.", str(images), "Leave --images out to compare on random ones.")
    told: dict[str, Any] = {
        "format": form,
        "views": views,
        "members": [_said(voice) | {"job": one.config.job} for voice, one in zip(voices, whole.members, strict=True)],
        "images": len(pictures),
        "compared": "random pictures" if images is None else "pictures",
    }

    def fill(staging: Path) -> None:
        try:
            told["largest_difference"] = _difference(formats.write(staging, whole, form), recogniser, pictures)
        except (AliprodError, OSError):
            raise
        except Exception as error:  # of three libraries, which have no common one
            what = f"{form} does not take this model: {str(error).strip().splitlines()[0]}"
            raise Failed(what, folder, _OTHERWISE) from error
        if not (apart := told["largest_difference"]) <= MOST:  # NaN too
            what = f"its probabilities differ from aliprod's by up to {apart:.1e}, more than {MOST:.0e}."
            raise Failed(what, folder, _OTHERWISE)
        (staging / "README.md").write_text(_card(whole, told, worth), encoding="utf-8")

    commit.write(folder, fill, told)  # where `told` gets its largest difference before it is written
    return {"path": str(folder), "bytes": sum(file.stat().st_size for file in folder.iterdir()), **told}


@torch.no_grad()
def _difference(answers: formats.Answers, recogniser: Recogniser, pictures: Sequence[Image.Image]) -> float:
    """The largest of two probabilities; NaN where one is."""
    differences = []
    for low in range(0, len(pictures), _AT_ONCE):
        some = pictures[low : low + _AT_ONCE]
        squared = [{size: square(picture, *size).numpy() for size in recogniser.sizes} for picture in some]
        differences.append((answers(some) - recogniser.probabilities(squared)).abs().max())
    return float(torch.stack(differences).max())


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


def _readable(images: str) -> Iterable[Image.Image]:
    """Pictures from all over a place, without those that are none."""
    found = listed([images])
    for picture in found[:: max(1, len(found) // COMPARED)]:
        with suppress(Unreadable):
            yield decode(picture.source())


def _card(whole: formats.WholeModel, told: Mapping[str, Any], worth: Mapping[str, Any] | None) -> str:
    """The model card, as the Hugging Face hub reads it: of what `export` returns, and of an ensemble, its worth."""
    source, strict = Path(__file__).with_name("card.md").read_text(encoding="utf-8"), jinja2.StrictUndefined
    card: jinja2.Template = jinja2.Template(source, trim_blocks=True, keep_trailing_newline=True, undefined=strict)
    return card.render(
        members=list(zip((member.config for member in whole.members), told["members"], strict=True)),
        classes=len(whole.members[0].classes.ids),
        sizes=whole.sizes,
        told=told,
        worth=worth,
        views=VIEWS,
        today=datetime.now(UTC).date(),
        versions=(VERSION, torch.__version__, timm.__version__),
    )
