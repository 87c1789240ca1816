"""One module from pictures to probabilities, on disk in formats that others open; what writes one returns what asks the
file that it has written."""

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import floor, nextafter
from pathlib import Path
from typing import Any, Literal, TypeAlias

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config  # type: ignore[attr-defined]
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional

from aliprod.data.augment import square
from aliprod.errors import Refused
from aliprod.inference.classify import Recogniser, mean
from aliprod.inference.predict import Ready, seen_at_once
from aliprod.models.classifier import Bank, check_network

Format: TypeAlias = Literal["onnx", "torch", "timm"]
Answers: TypeAlias = Callable[[Sequence[Image.Image]], Tensor]  # pictures to probabilities (n, K)
ONNX, TORCH, CLASSES = "model.onnx", "model.pt2", "classes.txt"
_EXTRA = ("onnx", "onnxscript", "onnxruntime")


class WholeModel(nn.Module):
    """A member, or an ensemble with all of its members: pictures (N, side, side, 3) uint8, once for each of ``sizes``,
    to the probabilities (N, K) float32.

    What is between is in it: crops, normalisation, networks, softmax, the mean over crops, temperatures and the
    weighted mean over members. What is not: decoding, and squaring by Pillow's antialiased filter, whose pixels no
    operator of ONNX or torch makes (at hard edges they are 10 grey levels off). ``sizes``: the distinct sides and
    interpolations that the members want, by the names of the inputs, such as bicubic_256.
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
            seen_at_once(member.model, pixels[_name(member)], member.config.crop, self.views, member.feed)
            for member in self.members
        ]
        return mean(parts, self.voices)


def _name(member: Ready) -> str:
    return f"{member.config.interpolation}_{member.config.resize}"


def check(whole: WholeModel, form: Format) -> None:
    """Refused: what the format takes is not installed, or it cannot hold this."""
    if any(isinstance(member.model.classifier, Bank) for member in whole.members):
        what = "a member looks its answers up among training images (neighbours), which no format holds."
        raise Refused(what, "--to", "Take it out of the ensemble, or distil it into a network (docs/export.md).")
    if form == "onnx" and (missing := [name for name in _EXTRA if find_spec(name) is None]):
        what = f"the format onnx takes {', '.join(missing)}, which is not installed."
        raise Refused(what, "--to", "pip install 'aliprod[export]', or take the format torch.")
    if form != "timm":
        return
    either = "Take the format onnx or torch."
    if len(whole.members) > 1:
        what = f"timm has no ensembles, and this one has {len(whole.members)} members."
        raise Refused(what, "--to", f"{either} Or distil it into one network (docs/export.md).")
    if whole.views != "center":
        raise Refused("timm looks at the centre alone.", "--views", either)
    if whole.members[0].config.branches > 1:
        raise Refused("timm has no networks with branches (BBN).", "--to", either)


def write(folder: Path, whole: WholeModel, form: Format) -> Answers:
    """Write a model and its classes into a folder; return what asks the model. Refused: as `check`, or timm builds the
    network's classifier otherwise."""
    labels = "\n".join(whole.members[0].classes.labels) + "\n"
    (folder / CLASSES).write_text(labels, encoding="utf-8")
    with warnings.catch_warnings(action="ignore"):  # of torch and timm about themselves
        if form == "timm":
            return _timm(folder, whole.members[0], whole.voices[0].temperature or 1.0)
        return (_onnx if form == "onnx" else _torch)(folder, whole, labels)


def _onnx(folder: Path, whole: WholeModel, labels: str) -> Answers:
    import onnxruntime

    batch = ({0: "batch"},) * len(whole.sizes)
    program = torch.onnx.export(
        whole,
        _example(whole),
        input_names=list(whole.sizes),
        output_names=["probabilities"],
        dynamic_shapes=(batch,),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # noqa: S101  without dynamo it would be
    program.model.metadata_props["classes"] = labels
    for node in program.model.graph:
        node.metadata_props.clear()  # lines and paths of this machine
    program.save(folder / ONNX)
    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])

    def answers(pictures: Sequence[Image.Image]) -> Tensor:
        given = (tensor.numpy() for tensor in whole.squared(pictures))
        [found] = session.run(None, dict(zip(whole.sizes, given, strict=True)))
        return torch.from_numpy(found)

    return answers


@torch.no_grad()
def _torch(folder: Path, whole: WholeModel, labels: str) -> Answers:
    batch = ({0: torch.export.Dim("batch")},) * len(whole.sizes)
    program = torch.export.export(whole, _example(whole), dynamic_shapes=(batch,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines and paths of this machine
    torch.export.save(program, folder / TORCH, extra_files={CLASSES: labels})
    module = torch.export.load(folder / TORCH).module()
    return lambda pictures: module(*whole.squared(pictures))


def _example(whole: WholeModel) -> tuple[Tensor, ...]:
    return whole.squared([Image.new("RGB", (8, 8))] * 2)  # a batch of 1 would be taken for the only one


def _timm(folder: Path, member: Ready, temperature: float) -> Answers:
    save_for_hf(
        _in_timm(member, temperature),
        str(folder),
        model_config={"label_names": list(member.classes.labels)},
        model_args=dict(check_network(member.config.network, "", member.config.crop).options),
        safe_serialization=True,
    )
    model = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    view = create_transform(**resolve_model_data_config(model))

    @torch.inference_mode()
    def answers(pictures: Sequence[Image.Image]) -> Tensor:
        found: Tensor = model(torch.stack([view(picture) for picture in pictures])).softmax(dim=1)
        return found

    return answers


def _in_timm(member: Ready, temperature: float) -> nn.Module:
    """The network as timm builds it, with a bias of zero. Refused: its classifier is another than one linear layer."""
    config, rows = member.config, member.model.classifier.weight
    share = config.crop / config.resize
    if floor(config.crop / share) != config.resize:  # how timm goes back
        share = nextafter(share, 0)
    view = {"input_size": (3, config.crop, config.crop), "crop_pct": share, "crop_mode": "squash"}
    view |= {"mean": config.mean, "std": config.std, "interpolation": config.interpolation}
    options: dict[str, Any] = dict(check_network(config.network, "", config.crop).options)
    only = {"test_input_size": None, "test_crop_pct": None}  # no other for tests
    model: nn.Module = timm.create_model(
        config.network, num_classes=len(rows), pretrained_cfg_overlay=view | only, **options
    )
    missing, unexpected = model.load_state_dict(member.model.backbone.state_dict(), strict=False)
    head = model.get_classifier()  # type: ignore[operator]
    fits = isinstance(head, nn.Linear) and head.weight.shape == rows.shape
    if not fits or unexpected or len(missing) != len(head.state_dict()) or config.scale or config.centres > 1:
        what = f"timm's {config.network} has another classifier than one linear layer."
        raise Refused(what, "--to", "Take the format onnx or torch.")
    with torch.no_grad():
        head.weight.copy_((functional.normalize(rows, dim=1) if config.unit_weights else rows) / temperature)
        if head.bias is not None:
            head.bias.zero_()
    return model.eval()
