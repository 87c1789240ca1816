"""What a stage says, as frozen types.

The plan fills them (checked once, there); training and inference read them. Defaults are the seed's or the
choices of its field, stated beside each.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

RECIPE_VERSION = 2  # part of every key: raise it when the same settings would give other results
ADDED = (  # since version 1: part of a key only where they say other than their default
    "shares", "gradients", "duplicates", "pseudo_labels", "sampler", "trains", "teachers", "soup", "resizing",
)  # fmt: skip
ADDED_BELOW = {"optimizer": ("betas", "layer_decay"), "lr": ("warmup_steps",)}  # the same, of its tables

STATISTICS_BATCHES = 200  # that norm statistics are taken anew from, where an objective distorts images
NO_COST = ("start", "pretrained", "images", "duplicates", "pseudo_labels", "sampler", "epochs", "seed")  # of a step
CROPS = ("random_resized_crop", "random_crop", "resize")
Augmentation = Literal[
    "random_resized_crop", "random_crop", "resize", "rotation", "flip", "color_jitter", "auto_augment", "rand_augment",
    "trivial_augment", "aug_mix", "cutout", "random_erasing",
]  # fmt: skip
Views = Literal["ten_crop", "center"]  # of test-time augmentation
VIEWS = {"ten_crop": "ten crops", "center": "centre crop"}  # the same for people
Part = Literal["loader", "step", "train"]  # of a training, that is measured


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PerClass(Frozen):
    """The balanced view: at most this many images of each class, chosen by seed."""

    per_class: int = Field(ge=1, description="at most this many images of each class, the same every epoch")


class LearningRate(Frozen):
    """Learning rates are used as written, never rescaled with the batch."""

    backbone: float = Field(0.01, gt=0, le=100, description="of the backbone's weights")
    heads: float = Field(0.1, gt=0, le=100, description="of the classifier and the objective's own layers")
    schedule: Literal["steps", "cosine", "one_cycle"] = Field(
        "steps",
        description="after the warm-up: drops at milestones, or half a cosine down to zero at the last step; one_cycle "
        "warms up along half a cosine, too, usually for three tenths of the epochs",
    )
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of warm-up, linear; may be a fraction")
    warmup_steps: int | None = Field(None, ge=1, description="the same in steps, in place of warmup_epochs")
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), strict=False, description="epochs (from 0) at whose start lr is multiplied by gamma; steps only"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone")


class OptimizerRecipe(Frozen):
    """How the weights move; weight decay on weights only, not on norm parameters, biases and position embeddings."""

    name: Literal["sgd", "adamw", "lamb", "lion", "muon"] = Field(
        "sgd",
        description="SGD without Nesterov, or AdamW, LAMB, Lion, Muon (AdamW for the heads and what is no matrix)",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and muon")
    betas: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=2, max_length=2)] | None = Field(
        None, strict=False, description="of all but sgd; without it the optimizer's own"
    )
    weight_decay: float = Field(
        1e-4,
        ge=0,
        description="on weights; none on norm parameters and biases; of all but sgd 0.05 where it is not said",
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="factor of the learning rate from layer to layer, from the heads down; without it 1",
    )
    clip_norm: float | None = Field(5.0, gt=0, description="largest norm of the gradient")

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
    """What the loader, the network and the scoring of an epoch must give an objective (`aliprod.objectives`).

    Args:
        group: images of one class that stand together in a batch.
        second: a second batch beside the first, from the reversed sampler (the rare classes often): ``Batch.second``.
        teacher: the teachers' probabilities of each image: ``Batch.teacher``. The plan names the teachers.
        tree: the product tree, which then is part of the job's key.
        branches: copies of the backbone's last block, side by side, whose features the classifier sees in a row.
        unit_weights, scale: lengths 1 and so many of the classifier's rows and of features, at inference too; 0: own.
        maps: a square map of features, or patch tokens that make one.
        distorts: training images are unlike those of inference: norm statistics are also scored taken anew.
    """

    group: int = 1
    second: bool = False
    teacher: bool = False
    tree: bool = False
    branches: int = 1
    unit_weights: bool = False
    scale: float = 0.0
    maps: bool = False
    distorts: bool = False


class PseudoLabels(Frozen):
    """Test images that a stage also trains on, as what other jobs together take them for (methods.md, 6.1)."""

    by: tuple[str, ...] = Field(
        strict=False, min_length=1, description="jobs, each BACKBONE/STAGE, whose ten-crop probabilities are averaged"
    )
    threshold: float = Field(0.9, gt=0, le=1, description="least probability of the predicted class")
    per_class: int = Field(30, ge=1, description="at most this many images of a class, the surest")
    weight: float = Field(0.5, gt=0, le=1, description="of such an image in the loss; a labelled one has 1")


class Soup(Frozen):
    """Weights that are a mean of other stages' (model soup, Wortsman et al. 2022): nothing is trained."""

    of: tuple[str, ...] = Field(strict=False, min_length=2, description="stages of the same backbone")
    greedy: bool = Field(
        False, description="add them from the best on, and keep one only if the error on val does not rise"
    )


class Stage(Frozen):
    """A training recipe: which images, how they are shown, what is minimised, how, for how long."""

    start: str | None = Field(None, description="the stage of the same backbone whose weights it starts from")
    pretrained: bool | str = Field(
        False,
        description="where there is no start: ImageNet weights (true), none (false), a safetensors file, or a folder "
        "that holds NETWORK.safetensors",
    )
    images: Annotated[Literal["all"] | PerClass, Field(union_mode="left_to_right")] = Field(
        "all", description="every training image, or the balanced view { per_class = 30 }"
    )
    duplicates: Literal["keep", "drop", "majority", "teacher"] = Field(
        "keep",
        description="the same picture under several labels: keep it as it is; drop all of them; keep the majority's; "
        "keep the label that the stage it starts from ranks highest. Under one label, one of them stays",
    )
    pseudo_labels: PseudoLabels | None = Field(
        None, description='test images that are added: { by = ["resnet50/dcl"], threshold = 0.9 }'
    )
    sampler: Literal["shuffled", "class_balanced"] = Field(
        "shuffled", description="each image once an epoch, or every class equally often, with replacement"
    )
    trains: Literal["all", "classifier"] = Field(
        "all",
        description="all weights, or the classifier alone, drawn anew: cRT, or a linear probe of pretrained weights",
    )
    teachers: tuple[str, ...] = Field(
        (),
        strict=False,
        description="jobs, each BACKBONE/STAGE, whose mean probabilities objective = distillation learns from",
    )
    soup: Soup | None = Field(None, description='no training: a mean of weights, { of = ["balanced", "dcl"] }')
    resize: int = Field(256, ge=8, le=4096, description="pixels: side of the square that is cropped from")
    crop: int = Field(224, ge=8, le=4096, description="pixels: side of what the network sees")
    augmentation: tuple[Augmentation, ...] = Field(
        ("random_resized_crop", "flip"),
        strict=False,
        description="exactly one of random_resized_crop, random_crop, resize; beside it any of the others",
    )
    resizing: Literal["pillow", "torch"] = Field(
        "pillow",
        description="torch resizes in a quarter of the time, two grey levels apart at most; pillow leaves it the views "
        "in which AutoAugment makes no more of a level (posterize, solarize and equalize do, of single pixels)",
    )
    scale: tuple[float, float] = Field(
        (0.08, 1.0), strict=False, description="least and largest share of the area, random_resized_crop only"
    )
    objective: Annotated[ObjectiveRecipe, BeforeValidator(_named)] = Field(
        ObjectiveRecipe(name="cross_entropy"),
        description='what is minimised: a name, or { name = "dcl", parts = 7 } with options',
    )
    optimizer: OptimizerRecipe = Field(OptimizerRecipe(), description="how the weights move")
    lr: LearningRate = Field(LearningRate(), description="learning rates and their schedule")
    epochs: int = Field(1, ge=1, le=100_000, description="passes over the images of the stage")
    batch_size: int = Field(256, ge=1, description="images a step, over all devices of a job")
    shares: Annotated[int, Field(ge=1, le=256)] | Literal["ranks"] = Field(
        1,
        description="micro-batches of a step, each with norm statistics and random numbers of its own: a power of two, "
        "and the most ranks of a job, whose number changes no byte; ranks: one a rank, averaged as DDP does",
    )
    drop_rate: float = Field(0.0, ge=0, lt=1, description="dropout before the classifier")
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the backbone")
    zero_init_last: bool = Field(
        False, description="zero the last norm scale of each residual block, where training starts from scratch"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the averaged weights, scored beside the raw; without it none"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the forward pass; auto: bfloat16 where the device has it"
    )
    gradients: Literal["float32", "bfloat16"] = Field(
        "float32",
        description='what ranks send each other: bfloat16 halves the traffic, and rounds; with shares = "ranks" alone',
    )
    seed: int = Field(0, ge=0, description="of all randomness of the job; without it the plan's seed")

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if wrong := [what for check in _CHECKS for what in check(self)]:
            raise ValueError("\n".join(wrong))
        return self


def _inconsistent_views(stage: Stage) -> Iterator[str]:
    if stage.crop > stage.resize:
        yield f"crop = {stage.crop} is larger than resize = {stage.resize}: raise resize, or lower crop"
    shapes = [a for a in stage.augmentation if a in CROPS]
    if len(shapes) != 1:
        yield f"augmentation needs exactly one of {', '.join(CROPS)}, not {', '.join(shapes) or 'none'}"
    if {"cutout", "random_erasing"} <= set(stage.augmentation):
        yield "augmentation erases with cutout or with random_erasing, not with both"
    if not 0 < stage.scale[0] <= stage.scale[1] <= 1:
        yield f"scale = {list(stage.scale)}: shares of the area, 0 < smallest <= largest <= 1"


def _inconsistent_rates(stage: Stage) -> Iterator[str]:
    if stage.lr.schedule != "steps" and stage.lr.milestones:
        yield f'lr.milestones do nothing with schedule = "{stage.lr.schedule}": leave them out, or say "steps"'
    if stage.lr.schedule == "one_cycle" and not stage.lr.warmup_epochs and not stage.lr.warmup_steps:
        yield f"one_cycle needs lr.warmup_epochs, in which the rate rises: {0.3 * stage.epochs:g} is usual"
    if stage.lr.warmup_steps is not None and stage.lr.warmup_epochs:
        yield "lr.warmup_steps and lr.warmup_epochs say the same: leave one out"
    if stage.lr.warmup_epochs > stage.epochs:
        yield f"lr.warmup_epochs = {stage.lr.warmup_epochs:g} is longer than the stage: epochs = {stage.epochs}"


def _inconsistent_optimizer(stage: Stage) -> Iterator[str]:
    recipe, fields = stage.optimizer, OptimizerRecipe.model_fields
    name = recipe.name
    for setting, kinds in (("momentum", ("sgd", "muon")), ("betas", ("adamw", "lamb", "lion", "muon"))):
        if getattr(recipe, setting) != fields[setting].default and name not in kinds:
            yield f"{name} has no {setting}: {', '.join(kinds)} have"
    if name != "sgd" and not {"backbone", "heads"} <= stage.lr.model_fields_set:
        what = f"the default rates are for sgd: with {name} say both"
        yield f"{what}, lr = {{ backbone = 1e-4, heads = 1e-3 }}"


def _inconsistent_shares(stage: Stage) -> Iterator[str]:
    if stage.shares == "ranks":
        return
    if stage.shares.bit_count() != 1:
        yield f"shares = {stage.shares} is no power of two: 1, 2, 4, 8 ... are"
    elif stage.batch_size % stage.shares:
        what = f"batch_size = {stage.batch_size} cannot be dealt to {stage.shares} shares in equal parts"
        yield f"{what}: make it a multiple of {stage.shares}"
    if stage.gradients == "bfloat16":
        yield 'gradients = "bfloat16" rounds by rank: it needs shares = "ranks"'


def _inconsistent_sources(stage: Stage) -> Iterator[str]:
    if stage.start is not None and "pretrained" in stage.model_fields_set and stage.pretrained:
        yield "a stage with start takes its parent's weights: leave pretrained out"
    if stage.start is None and not stage.pretrained and stage.trains == "classifier":
        yield 'trains = "classifier" needs a backbone that has learned something: a start, or pretrained = true'
    if stage.start is None and stage.duplicates == "teacher":
        yield 'duplicates = "teacher" needs a start: it is the teacher'
    if stage.soup is not None and (stage.start is not None or stage.epochs != 1 or stage.teachers):
        yield "a soup trains nothing: leave start, teachers and epochs out"
    if stage.teachers and stage.pseudo_labels is not None:
        yield "teachers have seen the training images alone: leave pseudo_labels or teachers out"


_CHECKS = (
    _inconsistent_views,
    _inconsistent_rates,
    _inconsistent_optimizer,
    _inconsistent_shares,
    _inconsistent_sources,
)


class Machine(Frozen):
    """How a rank of a job works, whatever it trains. None of it is part of a key."""

    cpus_per_worker: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPUs of a rank; also its number of threads. Without it what the nodes have for each GPU; 1 where "
        "there are none",
    )
    loader_processes: int = Field(
        0, ge=0, le=1024, description="processes of a rank that read images; 0: the rank reads them itself"
    )
    save_every_steps: int | None = Field(
        None, ge=1, description="steps between resume checkpoints; without it one an epoch"
    )
    save_seconds: float = Field(
        0.0, ge=0, description="an epoch that ends sooner than this after the last checkpoint goes without one"
    )
    exact: bool = Field(True, description="kernels that give the same bytes each time; false may be faster on GPUs")
    compile: bool = Field(
        False, description="compile the backbone (torch.compile): minutes at a job's start, then faster steps"
    )
    checkpointing: bool = Field(
        False,
        description="compute activations again on the way back: less memory, a third more time, the same bytes",
    )
    watchdog_seconds: float = Field(
        1800.0,
        ge=1,
        le=86_400,
        description="a step that takes longer is ended with all stacks in the log, and the job resumed; "
        "a start or a validation may take five times as long",
    )

    @property
    def threads(self) -> int:
        """CPUs of a rank; 1 where nobody has said or found out how many."""
        return self.cpus_per_worker or 1


PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # of plans, stages and backbones: they become paths


@dataclass(frozen=True)
class Inputs:
    """What a job reads beside the catalogue.

    Attributes:
        start: weights folder of the parent job.
        pretrained: safetensors file of the backbone, in a stage without parent.
        soup: weights folders of the stages that it is a mean of.
        teachers: soft labels of its images, a folder a teacher.
        pseudo_labels: folder of labels of test images.
        kept: folder of the rows that are left where duplicates are filtered.
    """

    start: Path | None = None
    pretrained: Path | None = None
    soup: tuple[Path, ...] = ()
    teachers: tuple[Path, ...] = ()
    pseudo_labels: Path | None = None
    kept: Path | None = None


NO_INPUTS = Inputs()
DEFAULT_MACHINE = Machine()


def never() -> bool:
    """No: nobody tells this job to stop."""
    return False


@dataclass(frozen=True)
class TrainingJob:
    """A stage of a network, with its inputs and the machine that it is trained on.

    Attributes:
        network: timm's name.
        folder: the job's, in the storage path.
    """

    name: str
    key: str
    network: str
    stage: Stage
    folder: Path
    inputs: Inputs = NO_INPUTS
    machine: Machine = DEFAULT_MACHINE


def without_training(machine: Machine) -> Machine:
    """The machine for work that trains nothing: exact kernels, nothing compiled."""
    return machine.model_copy(update={"exact": True, "compile": False})
