"""What a stage says, as frozen types: checked once, in the plan; training and inference read them.

Beside it a job (a stage of a network, with what it reads) and the machine that it is trained on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from aliprod.recipe.settings import PLAIN_NAME as PLAIN_NAME
from aliprod.recipe.settings import Frozen as Frozen
from aliprod.recipe.settings import LearningRate as LearningRate
from aliprod.recipe.settings import Needs as Needs
from aliprod.recipe.settings import Neighbours
from aliprod.recipe.settings import ObjectiveRecipe as ObjectiveRecipe
from aliprod.recipe.settings import OptimizerRecipe as OptimizerRecipe
from aliprod.recipe.settings import PerClass as PerClass
from aliprod.recipe.settings import PseudoLabels as PseudoLabels
from aliprod.recipe.settings import Soup as Soup

RECIPE_VERSION = 2  # part of every key: raise it when the same settings would give other results
ADDED = (  # since version 1: part of a key only where they say other than their default
    "shares", "gradients", "duplicates", "pseudo_labels", "sampler", "trains", "teachers", "soup", "resizing", "crops",
    "test_crop", "features", "neighbours", "augment", "norm_statistics",
)  # fmt: skip
ADDED_BELOW = {"optimizer": ("betas", "layer_decay", "sharpness"), "lr": ("warmup_steps",)}  # the same, of its tables

STATISTICS_BATCHES = 200  # that norm statistics are taken anew from, where an objective distorts images
TAKEN = ("start", "pretrained", "duplicates", "pseudo_labels")  # from other jobs or elsewhere, before the first step
NO_COST = (*TAKEN, "images", "sampler", "epochs", "seed", "crops", "test_crop")  # of a step
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


class Stage(Frozen):
    """A training recipe: which images, how they are shown, what is minimised, how, for how long."""

    start: str | None = Field(None, description="the stage of the same backbone whose weights it starts from")
    pretrained: bool | str = False
    """where there is no start: ImageNet weights (true), none (false), a safetensors file, or a folder that holds
    NETWORK.safetensors"""
    images: Annotated[Literal["all"] | PerClass, Field(union_mode="left_to_right")] = "all"
    """every training image, or the balanced view { per_class = 30 }"""
    duplicates: Literal["keep", "drop", "majority", "teacher"] = "keep"
    """the same picture under several labels: keep it as it is; drop all of them; keep the majority's; keep the label
    that the stage it starts from ranks highest. Under one label, one of them stays"""
    pseudo_labels: PseudoLabels | None = None
    """test images that are added: { by = ["resnet50/dcl"], threshold = 0.9 }"""
    sampler: Literal["shuffled", "class_balanced"] = "shuffled"
    """each image once an epoch, or every class equally often, with replacement"""
    trains: Literal["all", "classifier", "norms"] = "all"
    """all weights; the classifier alone, drawn anew: cRT, or a linear probe of pretrained weights; the classifier as it
    is and the norm layers: FixRes, for images of another size"""
    norm_statistics: Literal["batch", "frozen"] = "batch"
    """of batch norm while it trains: those of each batch; frozen: those of the weights that it starts from, which tens
    of images a batch, of few classes, would spoil"""
    features: Literal["computed", "cached"] = "computed"
    """cached: the frozen backbone looks at each image once, as inference does (centre crop), for all stages of the same
    weights, resize and crop; with trains = "classifier" or neighbours"""
    neighbours: Neighbours | None = None
    """no training: the most similar training images vote, { k = 20, temperature = 0.07 }"""
    teachers: tuple[str, ...] = Field((), strict=False)
    """jobs, each BACKBONE/STAGE, whose mean probabilities objective = distillation learns from"""
    soup: Soup | None = Field(None, description='no training: a mean of weights, { of = ["balanced", "dcl"] }')
    resize: int = Field(256, ge=8, le=4096, description="pixels: side of the square that is cropped from")
    crop: int = Field(224, ge=8, le=4096, description="pixels: side of what the network sees")
    crops: tuple[Annotated[int, Field(ge=8, le=4096)], ...] = Field((), strict=False)
    """sides of the crop as training goes on, as many epochs each, the last one crop: progressive sizes, of objectives
    that look at no places"""
    test_crop: int | None = Field(None, ge=8, le=4096)
    """pixels: crop of what is scored and predicted, resize in proportion; without it crop"""
    augmentation: tuple[Augmentation, ...] = Field(("random_resized_crop", "flip"), strict=False)
    """exactly one of random_resized_crop, random_crop, resize; beside it any of the others"""
    resizing: Literal["pillow", "torch"] = "pillow"
    """torch resizes in a quarter of the time, two grey levels apart at most; pillow leaves it the views in which
    AutoAugment makes no more of a level (posterize, solarize and equalize do, of single pixels)"""
    augment: Literal["cpu", "device"] = "cpu"
    """device: loaders decode and cut out, and a job's device does the rest, a batch at once; Pillow's bytes on any
    device; not with aug_mix"""
    scale: tuple[float, float] = Field((0.08, 1.0), strict=False)
    """least and largest share of the area, random_resized_crop only"""
    objective: Annotated[ObjectiveRecipe, BeforeValidator(_named)] = ObjectiveRecipe(name="cross_entropy")
    """what is minimised: a name, or { name = "dcl", parts = 7 } with options"""
    optimizer: OptimizerRecipe = Field(OptimizerRecipe(), description="how the weights move")
    lr: LearningRate = Field(LearningRate(), description="learning rates and their schedule")
    epochs: int = Field(1, ge=1, le=100_000, description="passes over the images of the stage")
    batch_size: int = Field(256, ge=1, description="images a step, over all devices of a job")
    shares: Annotated[int, Field(ge=1, le=256)] | Literal["ranks"] = 1
    """micro-batches of a step, each with norm statistics and random numbers of its own: a power of two, and the most
    ranks of a job, whose number changes no byte; ranks: one a rank, averaged as DDP does"""
    drop_rate: float = Field(0.0, ge=0, lt=1, description="dropout before the classifier")
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the backbone")
    zero_init_last: bool = False
    """zero the last norm scale of each residual block, where training starts from scratch"""
    ema: float | None = Field(None, gt=0, lt=1)
    """decay of the averaged weights, scored beside the raw; without it none"""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of the forward pass; auto: bfloat16 where the device has it"""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """what ranks send each other: bfloat16 halves the traffic, and rounds; with shares = "ranks" alone"""
    seed: int = Field(0, ge=0, description="of all randomness of the job; without it the plan's seed")

    @property
    def test_view(self) -> tuple[int, int]:
        """Resize and crop of what is scored and predicted."""
        crop = self.test_crop or self.crop
        return round(self.resize * crop / self.crop), crop

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every side of what the network sees, in training and in tests."""
        return tuple(dict.fromkeys([self.crop, *self.crops, self.test_view[1]]))

    def at(self, epoch: int) -> "Stage":
        """The stage as an epoch, from 0, sees it: with that epoch's crop, and resize in proportion."""
        if not self.crops:
            return self
        crop = self.crops[min(epoch, self.epochs - 1) * len(self.crops) // self.epochs]
        return self.model_copy(update={"crop": crop, "resize": round(self.resize * crop / self.crop)})

    @property
    def is_trained(self) -> bool:
        """Whether its weights are learned: not a mean of others', and not a bank of features."""
        return self.soup is None and self.neighbours is None

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        checks = (_odd_views, _odd_rates, _odd_optimizer, _odd_shares, _odd_sources, _odd_features)
        if wrong := [what for check in checks for what in check(self)]:
            raise ValueError("\n".join(wrong))
        return self


def _odd_views(stage: Stage) -> Iterator[str]:
    if stage.crop > stage.resize:
        yield f"crop = {stage.crop} is larger than resize = {stage.resize}: raise resize, or lower crop"
    if stage.crops and (stage.crops[-1] != stage.crop or len(stage.crops) > stage.epochs):
        yield f"crops = {list(stage.crops)}: the last is crop = {stage.crop}, and there is an epoch for each"
    if round(stage.resize * max(stage.crops, default=0) / stage.crop) > 4096 or stage.test_view[0] > 4096:
        yield f"resize = {stage.resize} grows in proportion with crops and test_crop to more than 4096"
    shapes = [a for a in stage.augmentation if a in CROPS]
    if len(shapes) != 1:
        yield f"augmentation needs exactly one of {', '.join(CROPS)}, not {', '.join(shapes) or 'none'}"
    if {"cutout", "random_erasing"} <= set(stage.augmentation):
        yield "augmentation erases with cutout or with random_erasing, not with both"
    if stage.augment == "device" and "aug_mix" in stage.augmentation:
        fit = "auto_augment, rand_augment and trivial_augment fit"
        yield f'aug_mix is made by loaders alone: leave augment = "device" out, or aug_mix; {fit}'
    if stage.augment == "device" and stage.resizing != "pillow":
        yield f'augment = "device" gives Pillow\'s pixels: leave resizing = "{stage.resizing}" out'
    if not 0 < stage.scale[0] <= stage.scale[1] <= 1:
        yield f"scale = {list(stage.scale)}: shares of the area, 0 < smallest <= largest <= 1"


def _odd_rates(stage: Stage) -> Iterator[str]:
    if stage.lr.schedule != "steps" and stage.lr.milestones:
        yield f'lr.milestones do nothing with schedule = "{stage.lr.schedule}": leave them out, or say "steps"'
    if stage.lr.schedule == "one_cycle" and not stage.lr.warmup_epochs and not stage.lr.warmup_steps:
        yield f"one_cycle needs lr.warmup_epochs, in which the rate rises: {0.3 * stage.epochs:g} is usual"
    if stage.lr.warmup_steps is not None and stage.lr.warmup_epochs:
        yield "lr.warmup_steps and lr.warmup_epochs say the same: leave one out"
    if stage.lr.warmup_epochs > stage.epochs:
        yield f"lr.warmup_epochs = {stage.lr.warmup_epochs:g} is longer than the stage: epochs = {stage.epochs}"


def _odd_optimizer(stage: Stage) -> Iterator[str]:
    recipe, fields = stage.optimizer, OptimizerRecipe.model_fields
    name = recipe.name
    for setting, kinds in (("momentum", ("sgd", "muon")), ("betas", ("adamw", "lamb", "lion", "muon"))):
        if getattr(recipe, setting) != fields[setting].default and name not in kinds:
            yield f"{name} has no {setting}: {', '.join(kinds)} have"
    moved = {"heads"} if stage.trains == "classifier" else {"backbone", "heads"}
    if name != "sgd" and not moved <= stage.lr.model_fields_set:
        what = f"the default rates are for sgd: with {name} say both"
        yield f"{what}, lr = {{ backbone = 1e-4, heads = 1e-3 }}"


def _odd_shares(stage: Stage) -> Iterator[str]:
    if stage.shares == "ranks":
        return
    if stage.shares.bit_count() != 1:
        yield f"shares = {stage.shares} is no power of two: 1, 2, 4, 8 ... are"
    elif stage.batch_size % stage.shares:
        what = f"batch_size = {stage.batch_size} cannot be dealt to {stage.shares} shares in equal parts"
        yield f"{what}: make it a multiple of {stage.shares}"
    if stage.gradients == "bfloat16":
        yield 'gradients = "bfloat16" rounds by rank: it needs shares = "ranks"'


def _odd_sources(stage: Stage) -> Iterator[str]:
    if stage.start is not None and "pretrained" in stage.model_fields_set and stage.pretrained:
        yield "a stage with start takes its parent's weights: leave pretrained out"
    fresh = stage.start is None and not stage.pretrained
    if fresh and stage.trains == "classifier":
        yield 'trains = "classifier" needs a backbone that has learned something: a start, or pretrained = true'
    if stage.start is None and stage.trains == "norms":
        yield 'trains = "norms" needs a classifier that has learned something: a start'
    if fresh and stage.norm_statistics == "frozen":
        yield 'norm_statistics = "frozen" needs weights that have some: a start, or pretrained = true'
    if stage.start is None and stage.duplicates == "teacher":
        yield 'duplicates = "teacher" needs a start: it is the teacher'
    if stage.soup is not None and (stage.start is not None or stage.epochs != 1 or stage.teachers):
        yield "a soup trains nothing: leave start, teachers and epochs out"
    if stage.teachers and stage.pseudo_labels is not None:
        yield "teachers have seen the training images alone: leave pseudo_labels or teachers out"


def _odd_features(stage: Stage) -> Iterator[str]:
    if stage.neighbours is not None and stage.features != "cached":
        yield 'neighbours are sought among cached features: say features = "cached"'
    if stage.neighbours is not None and (stage.soup is not None or stage.epochs != 1 or stage.teachers):
        yield "neighbours train nothing: leave soup, teachers and epochs out"
    if stage.features == "computed":
        return
    if stage.trains != "classifier" and stage.neighbours is None:
        yield 'cached features are those of a frozen backbone: say trains = "classifier"'
    if stage.crops or stage.test_crop:
        yield "cached features are of one size: leave crops and test_crop out"
    if stage.start is None and not stage.pretrained and stage.trains != "classifier":
        yield "cached features need a backbone that has learned something: a start, or pretrained = true"
    if stage.soup is not None:
        yield "a soup looks at no features: leave them out"
    if "augmentation" in stage.model_fields_set:
        yield "cached features are of one view of each image, that of inference: leave augmentation out"
    if stage.pseudo_labels is not None:
        yield "cached features are of training images alone: leave pseudo_labels out"


class Machine(Frozen):
    """How a rank of a job works, whatever it trains. None of it is part of a key."""

    cpus_per_worker: int | None = Field(None, ge=1, le=1024)
    """CPUs of a rank; also its number of threads. Without it what the nodes have for each GPU; 1 where there are
    none"""
    loader_processes: int = Field(0, ge=0, le=1024)
    """processes of a rank that read images; 0: the rank reads them itself"""
    save_every_steps: int | None = Field(None, ge=1)
    """steps between resume checkpoints; without it one an epoch"""
    save_seconds: float = Field(0.0, ge=0)
    """an epoch that ends sooner than this after the last checkpoint goes without one"""
    exact: bool = Field(True, description="kernels that give the same bytes each time; false may be faster on GPUs")
    compile: bool = False
    """compile the backbone (torch.compile): minutes at a job's start, then faster steps"""
    checkpointing: bool = False
    """compute activations again on the way back: less memory, a third more time, the same bytes"""
    watchdog_seconds: float = Field(1800.0, ge=1, le=86_400)
    """a step that takes longer is ended with all stacks in the log, and the job resumed; a start or a validation may
    take five times as long"""

    @property
    def threads(self) -> int:
        """1 where nobody has said or found out how many."""
        return self.cpus_per_worker or 1

    @property
    def longest_seconds(self) -> float:
        """The most that anything of a job may take: a start (compilation, loader processes) or a validation."""
        return 5 * self.watchdog_seconds


@dataclass(frozen=True)
class Inputs:
    """What a job reads beside the catalogue."""

    start: Path | None = None  # weights folder of the parent job
    pretrained: Path | None = None  # safetensors file of the backbone, in a stage without parent
    soup: tuple[Path, ...] = ()  # weights folders of the stages that it is a mean of
    teachers: tuple[Path, ...] = ()  # soft labels of its images, a folder a teacher
    pseudo_labels: Path | None = None  # folder of labels of test images
    kept: Path | None = None  # folder of the rows that are left where duplicates are filtered
    features: tuple[Path, ...] = ()  # folders of all training images' and, where there are any, of val's; (): computed


NO_INPUTS = Inputs()
DEFAULT_MACHINE = Machine()


def never() -> bool:
    """Whether to stop a job that nobody tells to."""
    return False


@dataclass(frozen=True)
class TrainingJob:
    """A stage of a network, with its inputs and the machine that it is trained on."""

    name: str
    key: str
    network: str  # timm's name
    stage: Stage
    folder: Path  # the job's, in the storage path
    inputs: Inputs = NO_INPUTS
    machine: Machine = DEFAULT_MACHINE


def without_training(machine: Machine) -> Machine:
    """The machine for work that trains nothing: exact kernels, nothing compiled."""
    return machine.model_copy(update={"exact": True, "compile": False})
