"""What is minimised: one method a file, its pure functions on top, its class ``Objective`` at the end.

Logits are (B, K), labels (B,) int64, counts (K,) training images of each class. A loss is the mean over images, (),
or with ``reduction="none"`` one value an image, (B,).

The file's name is the objective's name in a plan; ``"my_package.margin"`` is a module of the user's own.
``Objective(context, *, options)`` is a module that owns the auxiliary heads it trains (initialised from torch's
global generator); its call ``objective(model, batch)`` returns named scalar parts, weighted, so that their
sum is the loss. Options are keyword-only with literal defaults. Every loss is computed in float32 (float64
stays float64), whatever the autocast dtype. At inference nothing of an objective remains.

What it needs beyond images and labels stands in the class body, ``needs = Needs(...)``, or where options change it in
``__init__``, of literals and arithmetic of options alone: a plan is checked without importing torch.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from aliprod.errors import Refused, did_you_mean, listing
from aliprod.recipe import Needs as Needs
from aliprod.recipe.options import names

Reduction = Literal["mean", "none"]


@dataclass(frozen=True)
class Context:
    """What an objective may know before the first batch."""

    num_classes: int
    num_features: int  # channels C of the backbone's feature map; 0 where it makes none
    crop: int  # side of the square training images, in pixels
    epochs: int
    class_counts: Tensor | None = None  # (K,) int64, training images of each class, where known
    ancestor: Tensor | None = None  # (L, K) int64, each class's node per level of the product tree, last the class
    side: int = 0  # of the feature map, in cells; 0: that of a stride of 32


class Model(Protocol):
    """Backbone and classifier, as an objective sees them."""

    @property
    def classifier(self) -> nn.Linear: ...  # weight (K, branches F), no bias
    def features(self, images: Tensor) -> Tensor: ...  # (B, 3, H, W) -> as the network makes them: a map, tokens
    def maps(self, features: Tensor) -> Tensor: ...  # features -> (B, branches C, S, S)
    def trunk(self, images: Tensor) -> Tensor: ...  # what `branch` takes; the features where there is one branch
    def branch(self, trunk: Tensor, number: int) -> Tensor: ...  # -> features of one branch
    def pool(self, features: Tensor) -> Tensor: ...  # features, of one branch or all -> (B, F), with dropout
    def classify(self, features: Tensor) -> Tensor: ...  # features -> (B, K)
    def __call__(self, images: Tensor) -> Tensor: ...  # (B, 3, H, W) -> (B, K)


class Batch(Protocol):
    """Images with labels, and where in the training they stand."""

    @property
    def images(self) -> Tensor: ...  # (B, 3, H, W) floating point, normalised
    @property
    def labels(self) -> Tensor: ...  # (B,) int64
    @property
    def weights(self) -> Tensor | None: ...  # (B,) float32, of each image's class loss; None: 1
    @property
    def second(self) -> "Batch | None": ...  # as many images, where they are needed
    @property
    def teacher(self) -> Tensor | None: ...  # (B, K) float32 probabilities, where they are needed
    @property
    def epoch(self) -> int: ...  # from 0
    @property
    def step(self) -> int: ...  # optimizer steps since the job began
    @property
    def seed(self) -> int: ...  # of this step and rank: all that an objective draws is drawn from it


def build(name: str, options: Mapping[str, Any], context: Context) -> nn.Module:
    """The objective that a plan names, whose options the plan has checked. Refused: no such objective, or an option
    that does not fit the context."""
    objective = find(name)
    bare = objective.__init__ is nn.Module.__init__  # a user's own that has nothing to set up
    return objective() if bare else objective(context, **options)


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """(B,) to their mean (), or as they are with ``"none"``."""
    if reduction not in ("mean", "none"):
        raise Refused(f'reduction = "{reduction}" is unknown.', advice='Say "mean" or "none".')
    return values.mean() if reduction == "mean" else values


def mean_over(values: Tensor, batch: Batch) -> Tensor:
    """(B,) losses to their mean (), each times its image's weight: pseudo-labelled images count less."""
    return values.mean() if batch.weights is None else (values * batch.weights.to(values)).mean()


def precise(values: Tensor) -> Tensor:
    """At least float32: half precision is widened, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def full_precision(values: Tensor) -> torch.autocast:
    """A context in which matrix products keep the precision of their arguments on ``values``' device."""
    return torch.autocast(values.device.type, enabled=False)


def counts_of(context: Context, name: str) -> Tensor:
    """(K,) int64, for the objective ``name``, which weighs classes by their images; refused where unknown."""
    if context.class_counts is None:
        raise Refused(f"{name} needs the classes' image counts.", advice="Give Context.class_counts.")
    return context.class_counts


def require(holds: bool, what: str, advice: str) -> None:
    """Refuse an option, before anything is trained, unless ``holds``."""
    if not holds:
        raise Refused(what, advice=advice)


def require_map(context: Context, name: str) -> None:
    """Refuse a network whose features have no places, which the objective ``name`` looks at."""
    advice = "Take a network with a feature map or patch tokens: docs/networks.md."
    require(context.num_features > 0, f"{name} looks at places, and this network makes no map of them.", advice)


def find(name: str) -> type[nn.Module]:
    """The class of an objective: a file of this package ("dcl"), or a user's importable module ("my_package.margin").
    Refused: there is none."""
    try:
        module = importlib.import_module(name if "." in name else f"{__name__}.{name}")
    except ImportError as error:
        advice = f"{did_you_mean(name, names())} There are: {listing(names(), 20)}."
        if "." in name:
            advice = "A module of your own must be importable (PYTHONPATH) by every worker."
        raise Refused(f"objective {name} cannot be imported: {error}.", advice=advice.strip()) from error
    if not hasattr(module, "Objective"):
        advice = "A plan can name files that have one; this one offers its functions only."
        raise Refused(f"objective {name} has no class Objective.", advice=advice)
    found: type[nn.Module] = module.Objective
    return found
