"""Tables that a stage has, and what an objective needs. Defaults are the seed's or the choices of its field."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # of plans, stages and backbones: they become paths


class Frozen(BaseModel):
    """A table of a plan. What a setting means stands in its Field or, where that is long, in a string below it, which
    docs/site/reference.py reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PerClass(Frozen):
    """The balanced view: at most this many images of each class, chosen by seed."""

    per_class: int = Field(ge=1, description="at most this many images of each class, the same every epoch")


class LearningRate(Frozen):
    """Learning rates are used as written, never rescaled with the batch."""

    backbone: float = Field(0.01, gt=0, le=100, description="of the backbone's weights")
    heads: float = Field(0.1, gt=0, le=100, description="of the classifier and the objective's own layers")
    schedule: Literal["steps", "cosine", "one_cycle"] = "steps"
    """after the warm-up: drops at milestones, or half a cosine down to zero at the last step; one_cycle warms up along
    half a cosine, too, usually for three tenths of the epochs"""
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of warm-up, linear; may be a fraction")
    warmup_steps: int | None = Field(None, ge=1, description="the same in steps, in place of warmup_epochs")
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field((), strict=False)
    """epochs (from 0) at whose start lr is multiplied by gamma; steps only"""
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone")


class OptimizerRecipe(Frozen):
    """How the weights move; weight decay on weights only, not on norm parameters, biases and position embeddings."""

    name: Literal["sgd", "adamw", "lamb", "lion", "muon"] = "sgd"
    """SGD without Nesterov, or AdamW, LAMB, Lion, Muon (AdamW for the heads and what is no matrix)"""
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and muon")
    betas: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=2, max_length=2)] | None = Field(
        None, strict=False
    )
    """of all but sgd; without it the optimizer's own"""
    weight_decay: float = Field(1e-4, ge=0)
    """on weights; none on norm parameters and biases; of all but sgd 0.05 where it is not said"""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """factor of the learning rate from layer to layer, from the heads down; without it 1"""
    clip_norm: float | None = Field(5.0, gt=0, description="largest norm of the gradient")
    sharpness: float | None = Field(None, gt=0, le=10)
    """radius of SAM: the gradient is that of weights moved so far uphill; two passes a step"""

    @model_validator(mode="before")
    @classmethod
    def _decay_of_its_own(cls, said: Any) -> Any:
        table = said if isinstance(said, dict) else {}
        return {"weight_decay": 0.05} | table if table.get("name", "sgd") != "sgd" else said


class ObjectiveRecipe(BaseModel):
    """A file of objectives/ (or a module of the user's) and its options, checked against its signature."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = Field(description="a file of objectives/, or a module of your own: package.module")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


@dataclass(frozen=True)
class Needs:
    """What the loader, the network and the scoring of an epoch must give an objective (`aliprod.objectives`)."""

    group: int = 1  # images of one class that stand together in a batch
    second: bool = False  # ``Batch.second``: a second batch, from the reversed sampler (the rare classes often)
    teacher: bool = False  # ``Batch.teacher``: the teachers' probabilities of each image. The plan names the teachers
    tree: bool = False  # the product tree, which then is part of the job's key
    branches: int = 1  # copies of the backbone's last block, side by side, whose features the classifier sees in a row
    unit_weights: bool = False  # length 1 of the classifier's rows, at inference too
    scale: float = 0.0  # length of features, at inference too; 0: their own
    centres: int = 1  # rows of the classifier that each class has; the one nearest to an image counts
    maps: bool = False  # a square map of features, or patch tokens that make one
    pixels: bool = False  # the images themselves, which cached features cannot stand for
    distorts: bool = False  # training images are unlike those of inference: norm statistics are also scored taken anew


class PseudoLabels(Frozen):
    """Test images that a stage also trains on, as what other jobs together take them for."""

    by: tuple[str, ...] = Field(strict=False, min_length=1)
    """jobs, each BACKBONE/STAGE, whose ten-crop probabilities are averaged"""
    threshold: float = Field(0.9, gt=0, le=1, description="least probability of the predicted class")
    per_class: int = Field(30, ge=1, description="at most this many images of a class, the surest")
    weight: float = Field(0.5, gt=0, le=1, description="of such an image in the loss; a labelled one has 1")


class Neighbours(Frozen):
    """Training images that vote on a picture's class, in place of a classifier (k-NN): nothing is trained."""

    k: int = Field(20, ge=1, description="of them, those whose features are most like the picture's")
    temperature: float = Field(0.07, gt=0, description="a vote counts exp(cosine / temperature)")


class Soup(Frozen):
    """Weights that are a mean of other stages' (model soup, Wortsman et al. 2022): nothing is trained."""

    of: tuple[str, ...] = Field(strict=False, min_length=2, description="stages of the same backbone")
    greedy: bool = False
    """add them from the best on, and keep one only if the error on val does not rise"""
