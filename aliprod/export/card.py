"""The model card of an export, as the Hugging Face hub reads it: what it is, how to feed it, where it comes from."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import timm
import torch

from aliprod.export.whole import WholeModel
from aliprod.recipe import VIEWS
from aliprod.version import VERSION

_LIBRARY = {"onnx": "onnx", "torch": "pytorch", "timm": "timm"}
_OPEN = 'picture = PIL.ImageOps.exif_transpose(PIL.Image.open("picture.jpg")).convert("RGB")'
_LINES = {
    "onnx": """\
import numpy, onnxruntime, PIL.Image, PIL.ImageOps

{picture}
images = {{{images}}}
[probabilities] = onnxruntime.InferenceSession("model.onnx").run(None, images)""",
    "torch": """\
import numpy, torch, PIL.Image, PIL.ImageOps

{picture}
images = {{{images}}}
probabilities = torch.export.load("model.pt2").module()(*map(torch.from_numpy, images.values()))""",
    "timm": """\
import PIL.Image, PIL.ImageOps, timm

{picture}
model = timm.create_model("local-dir:.", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(picture)
probabilities = model(view[None]).softmax(dim=1)""",
}
_CARD = """\
---
library_name: {library}
pipeline_tag: image-classification
tags: [image-classification, aliprod, {library}]
metrics: [accuracy]
---
# {title}

Classifies images into {classes:,} classes, the lines of `classes.txt` in their order. {error}

```python
{lines}
```
`probabilities` is (pictures, classes). {inside} Transparent pictures are to be laid on white first.

Compared with aliprod's own probabilities on {compared}, float32 on a CPU, the largest difference was {difference:.1e}.

{members}

Exported on {today} by aliprod {aliprod}, torch {torch}, timm {timm}.
"""


def card(whole: WholeModel, told: Mapping[str, Any], worth: Mapping[str, Any] | None) -> str:
    """README.md of an export.

    Args:
        told: what `aliprod.export.folder.export` returns. worth: of an ensemble, what it was found to be worth.
    """
    count, first = len(whole.members), whole.members[0]
    form, views = told["format"], VIEWS[told["views"]]
    images = ", ".join(
        f'"{name}": numpy.array(picture.resize(({side}, {side}), PIL.Image.Resampling.{interpolation.upper()}))[None]'
        for name, (side, interpolation) in whole.sizes.items()
    )
    cut = "transform crops and normalises" if form == "timm" else f"model crops ({views}), normalises and averages"
    return _CARD.format(
        library=_LIBRARY[form],
        title=first.config.job or first.config.network if count == 1 else f"An ensemble of {count}",
        classes=len(first.classes.ids),
        error=_error(whole, worth),
        lines=_LINES[form].format(picture=_OPEN, images=images),
        inside=f"Squaring a picture, its ratio not kept, is Pillow's; the {cut}.",
        compared=f"{told['images']} {told['compared']}",
        difference=told["largest_difference"],
        members=_members(whole, told),
        today=datetime.now(UTC).date(),
        aliprod=VERSION,
        torch=torch.__version__,
        timm=timm.__version__,
    )


def _error(whole: WholeModel, worth: Mapping[str, Any] | None) -> str:
    """The top-1 error, and of what; nothing where it is not known."""
    if worth is not None:
        low, high = worth["ensemble"]["interval"]
        of = f"{worth['split']}, {VIEWS[worth['views']]}, {worth['images']:,} images"
        return (
            f"Top-1 error, mean over classes: {worth['ensemble']['top1_error']:.2%} ({low:.2%} to {high:.2%}) on {of}."
        )
    error = whole.members[0].config.top1_error
    if len(whole.members) > 1 or error is None:
        return ""
    return f"Top-1 error, mean over classes: {error:.2%} on val, centre crop."


def _members(whole: WholeModel, told: Mapping[str, Any]) -> str:
    """A table of what was trained."""
    rows = ["| job | network | counts | temperature | crop | objective | epoch | top-1 error on val | key | sha256 |"]
    rows.append("|---" * 10 + "|")
    for member, said in zip(whole.members, told["members"], strict=True):
        config, stage = member.config, said["trained"].get("stage", {})
        error = "" if config.top1_error is None else f"{config.top1_error:.2%}"
        cells = [config.job, config.network, f"{said['weight']:g}", said["temperature"] or "", config.crop]
        cells += [stage.get("objective", {}).get("name", ""), config.epoch + 1 if config.epoch >= 0 else "", error]
        rows.append("| " + " | ".join(map(str, [*cells, config.key[:16], said["sha256"][:16]])) + " |")
    return "\n".join(rows)
