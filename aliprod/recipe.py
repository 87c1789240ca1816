"""What a stage says, as frozen types.

The plan fills them (checked once, there); training and inference read them. Defaults are the seed's or the
choices of its field, stated beside each.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

RECIPE_VERSION = 1  # part of every key: raise it when the same settings would give other results

Augmentation = Literal["random_resized_crop", "random_crop", "resize", "rotation", "flip", "auto_augment", "cutout"]


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PerClass(Frozen):
    """The balanced view: at most this many images of each class, chosen by seed."""

    per_class: int = Field(ge=1)


class LearningRate(Frozen):
    """Learning rates are used as written, never rescaled with the batch.

    ``steps``: linear warm-up, then times ``gamma`` at each milestone epoch. ``cosine``: linear warm-up, then
    half a cosine down to zero at the last step.
    """

    backbone: float = Field(default=0.01, gt=0, le=100)
    heads: float = Field(default=0.1, gt=0, le=100)
    schedule: Literal["steps", "cosine"] = "steps"
    warmup_epochs: float = Field(default=0.0, ge=0)
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), strict=False)
    gamma: float = Field(default=0.1, gt=0, le=1)


class OptimizerRecipe(Frozen):
    """SGD without Nesterov; weight decay on weights only, not on norm parameters and biases."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    clip_norm: float | None = Field(default=5.0, gt=0)


class ObjectiveRecipe(BaseModel):
    """A file of objectives/ (or a module of the user's) and its options, checked against its signature."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class Stage(Frozen):
    """A training recipe: which images, how they are shown, what is minimised, how, for how long."""

    start: str | None = None
    pretrained: bool | str = False
    images: Annotated[Literal["all"] | PerClass, Field(union_mode="left_to_right")] = "all"
    resize: int = Field(default=256, ge=8, le=4096)
    crop: int = Field(default=224, ge=8, le=4096)
    augmentation: tuple[Augmentation, ...] = Field(default=("random_resized_crop", "flip"), strict=False)
    scale: tuple[float, float] = Field(default=(0.08, 1.0), strict=False)  # area share of random_resized_crop
    objective: Annotated[ObjectiveRecipe, BeforeValidator(_named)] = ObjectiveRecipe(name="cross_entropy")
    optimizer: OptimizerRecipe = OptimizerRecipe()
    lr: LearningRate = LearningRate()
    epochs: int = Field(default=1, ge=1, le=100_000)
    batch_size: int = Field(default=256, ge=1)  # images, over all devices of a job
    drop_rate: float | None = Field(default=None, ge=0, lt=1)  # None: the backbone's own
    drop_path_rate: float | None = Field(default=None, ge=0, lt=1)
    zero_init_last: bool = False  # zero the last norm scale of each residual block, where training starts from scratch
    ema: float | None = Field(default=None, gt=0, lt=1)  # decay of the averaged weights; None: no average
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where the device has it
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if self.crop > self.resize:
            raise ValueError(f"crop = {self.crop} is larger than resize = {self.resize}")
        shapes = [a for a in self.augmentation if a in ("random_resized_crop", "random_crop", "resize")]
        if len(shapes) != 1:
            raise ValueError("augmentation needs exactly one of random_resized_crop, random_crop, resize")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale is (smallest, largest) share of the area, 0 < smallest <= largest <= 1")
        if self.start is not None and "pretrained" in self.model_fields_set and self.pretrained:
            raise ValueError("a stage with start takes its parent's weights: leave pretrained out")
        return self


PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # of plans, stages and backbones: they become paths
