"""Weights on disk: safetensors, a configuration and the class list. No pickle.

A weights folder holds ``model.safetensors``, ``config.json`` (network, input, where the weights come from) and
``classes.json`` (class id and name of each row of the classifier): all that predicting needs.
"""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from aliprod.errors import Refused, did_you_mean
from aliprod.models.classifier import Bank, Classifier, branched
from aliprod.recipe import Inputs, Needs
from aliprod.store import commit

MODEL, CONFIG, CLASSES = "model.safetensors", "config.json", "classes.json"
NEEDS = ("branches", "unit_weights", "scale", "centres")  # of an objective, that its weights say


@dataclass(frozen=True)
class Config:
    """What predicting with weights takes, beside the weights: images are squared to ``resize``, views of ``crop`` are
    cut from that; mean and std are of pixels in 0 to 1. ``kind``: as in training/candidates.py."""

    network: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize: int
    crop: int
    job: str = ""
    key: str = ""
    epoch: int = -1
    top1_error: float | None = None
    kind: str = "raw"
    branches: int = 1
    unit_weights: bool = False
    scale: float = 0.0
    centres: int = 1


@dataclass(frozen=True)
class Classes:
    """Class id and name of each row of the classifier."""

    ids: tuple[int, ...]
    names: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """What each class is called, in one line: its name, else its id."""
        named = zip(self.ids, self.names or ("",) * len(self.ids), strict=True)
        return tuple(" ".join(name.split()) or str(number) for number, name in named)


def save(folder: Path, tensors: Mapping[str, Tensor], config: Config, classes: Classes) -> None:
    """Write a weights folder (into a folder that `aliprod.store.commit.write` hands out)."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / MODEL)
    (folder / CONFIG).write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")
    (folder / CLASSES).write_text(json.dumps(asdict(classes), ensure_ascii=False), encoding="utf-8")


def load(folder: Path) -> tuple[Classifier, Config, Classes]:
    """The classifier of a weights folder, in eval mode. Refused: it is no weights folder, or one that is damaged."""
    config, classes = describe(folder)
    tensors = read(folder)
    needs = Needs(**{name: getattr(config, name) for name in NEEDS})
    bank = len(tensors.get("classifier.labels", ()))
    model = Classifier(config.network, len(classes.ids), needs, crop=config.crop, bank=bank)
    _fill(model, model.state_dict(), tensors, folder / MODEL)
    return model.eval(), config, classes


def describe(folder: Path) -> tuple[Config, Classes]:
    """The configuration and classes of a weights folder, without its weights. Refused: it is no weights folder, or one
    that is damaged."""
    commit.fetch(folder, CONFIG, CLASSES)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        classes = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
        config |= {"mean": tuple(config["mean"]), "std": tuple(config["std"])}
        return Config(**config), Classes(tuple(classes["ids"]), tuple(classes["names"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        holds = f"A weights folder holds {MODEL}, {CONFIG} and {CLASSES}"
        advice = f"{holds}, as in STORAGE/jobs/BACKBONE/STAGE/KEY/weights."
        raise Refused(f"is no weights folder ({type(error).__name__}: {error}).", folder, advice) from error


def load_inputs(model: Classifier, inputs: Inputs, class_ids: Sequence[int]) -> None:
    """Load the weights that a job begins with, where it has any. Refused: as `load_parent` and `load_pretrained`."""
    if inputs.start is not None:
        load_parent(model, inputs.start, class_ids)
    elif inputs.pretrained is not None:
        load_pretrained(model, inputs.pretrained)


def load_parent(model: Classifier, folder: Path, class_ids: Sequence[int]) -> None:
    """Load a parent's backbone and head into its child. Refused: the folder is damaged, or of another network or class
    list."""
    config, classes = describe(folder)
    if classes.ids != tuple(class_ids):
        what, advice = "was trained on another class list than this catalogue's.", "Train its parent on this catalogue."
        raise Refused(what, folder, advice)
    tensors = read(folder)
    if config.unit_weights and not model.unit_weights:
        tensors["classifier.weight"] = functional.normalize(tensors["classifier.weight"], dim=1)
    if config.centres == 1 < model.centres:  # the others of each class are drawn: alike they would stay alike
        centres = model.classifier.weight.detach().clone().unflatten(0, (-1, model.centres))
        centres[:, 0] = tensors["classifier.weight"]
        tensors["classifier.weight"] = centres.flatten(0, 1)
    tensors = _resized(tensors, model)
    if config.branches == 1 < len(model.branches):
        tensors = branched(tensors, model)
    own = _but_classifier(model) if isinstance(model.classifier, Bank) else model.state_dict()
    _fill(model, own, tensors, folder / MODEL)


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a weights folder. Refused: the folder is damaged."""
    commit.fetch(folder)
    if (folder / commit.MANIFEST).exists() and (damaged := commit.verify(folder)):
        raise Refused("does not hold the bytes that its manifest says.", folder / damaged[0], "Restore or delete it.")
    try:
        return load_file(folder / MODEL)
    except (OSError, SafetensorError) as error:
        raise Refused(f"cannot be loaded: {error}", folder / MODEL) from error


def fetch_pretrained(network: str, folder: Path) -> None:
    """Bring timm's ImageNet weights of a network into a committed folder, through timm's own hub path. Refused: timm
    knows no weights for this network, or they cannot be had from here."""
    if commit.read(folder) is not None:
        return
    config = timm.get_pretrained_cfg(network)
    if config is None or not config.has_weights:
        near = did_you_mean(network, timm.list_pretrained(f"*{network.split('.')[0].split('_')[-1]}*"))
        advice = f"{near} Or set pretrained = false, or a safetensors file of your own.".strip()
        raise Refused(f"timm {timm.__version__} has no pretrained weights for {network}.", network, advice)
    try:
        backbone = timm.create_model(network, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        advice = "Without internet, put its safetensors file where every node reads it and set pretrained = "
        advice += f'"PATH" in the plan: a file, or a folder with {network}.safetensors.'
        what = f"its ImageNet weights cannot be fetched: {str(error).splitlines()[0]}"
        raise Refused(what, network, advice) from error
    tensors = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    commit.write(folder, lambda new: save_file(tensors, new / f"{network}.safetensors"), {"network": network})


def load_pretrained(model: Classifier, file: Path) -> None:
    """Load a backbone's weights; the classifier stays as initialised. A classifier in the file is left out. Refused:
    missing, damaged, or of another network."""
    commit.fetch(file.parent)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        advice = 'Set pretrained = "PATH" to a safetensors file of this network, or to a folder of NETWORK.safetensors.'
        raise Refused(f"holds no pretrained weights for {model.network} ({error}).", file, advice) from error
    own = _but_classifier(model)
    counters = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}
    tensors = _resized({f"backbone.{name}": tensor for name, tensor in tensors.items()}, model)
    if model.branches:
        tensors = branched(tensors, model)
    _fill(model, own, counters | tensors, file)  # weights from before PyTorch 0.4.1 have no counters


def _but_classifier(model: Classifier) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier.")}


def _resized(tensors: dict[str, Tensor], model: Classifier) -> dict[str, Tensor]:
    """Tensors whose position embeddings, where they are of another crop, are interpolated as timm does it."""
    own, prefix = model.state_dict(), "backbone."
    if all(name not in own or own[name].shape == tensor.shape for name, tensor in tensors.items()):
        return tensors
    resize = getattr(sys.modules[type(model.backbone).__module__], "checkpoint_filter_fn", None)
    if resize is None:
        return tensors
    theirs = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch's, of how timm interpolates
        return tensors | {f"{prefix}{name}": tensor for name, tensor in resize(theirs, model.backbone).items()}


def _fill(model: Classifier, own: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path) -> None:
    """Load what is found for a model's ``own`` tensors, all or none of them."""
    wrong = [name for name, tensor in own.items() if name not in found or found[name].shape != tensor.shape]
    if wrong:
        what = f"is not of {model.network}: {len(wrong)} of its {len(own)} tensors are missing or of another shape, "
        advice = "Give weights of this network, with as many classes, centres and branches"
        raise Refused(f"{what}the first {wrong[0]}.", file, f"{advice}; of some, also of the same crop.")
    model.load_state_dict({name: found[name] for name in own}, strict=False)
