"""What a plan may say, as frozen types; `reference` prints them as docs/plan.md.

What a stage may say is `aliprod.recipe.Stage`. A stage's table is partial: defaults, overrides and the plan's
seed are merged into it before it becomes one.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from aliprod.recipe import PLAIN_NAME, Frozen, Machine, ObjectiveRecipe, Stage, Views
from aliprod.recipe.options import complete, options
from aliprod.store.layout import OWN, key_of

Edge = tuple[str, ...]
EDGES: tuple[Edge, ...] = (("start",), ("soup", "of"), ("teachers",), ("pseudo_labels", "by"))  # what names jobs
_IDLE = {"start": "pretrained", "soup": "epochs", "neighbours": "epochs"}  # a default not meant for stages that say so
MOST_JOBS = 1_000
WHOLE = ("objective", "images", "soup", "neighbours")  # replaced as a whole; other tables merge key by key


def _plain(name: str) -> str:
    if not PLAIN_NAME.fullmatch(name):
        raise ValueError("it becomes a folder: letters, digits, dots, hyphens and underscores, at most 128")
    return name


def _free(name: str) -> str:
    if name.lower() in OWN:
        raise ValueError("a folder of the storage path has this name, which keeps what all plans share")
    return name


PlainName = Annotated[
    str, AfterValidator(_plain), WithJsonSchema({"type": "string", "pattern": f"^{PLAIN_NAME.pattern}$"})
]
OwnName = Annotated[PlainName, AfterValidator(_free)]
Text = Annotated[str, Field(min_length=1)]
MOST_RANKS = 4096
Ranks = Annotated[int, Field(ge=1, le=MOST_RANKS)]
FewestAndMost = Annotated[tuple[Ranks, Ranks], Field(strict=False)]
Settings = dict[str, Any]  # of a stage: some of what `Stage` may say


class Synth(Frozen):
    """A generated catalogue of rendered packages."""

    classes: int = Field(ge=2, le=1_000_000, description="classes")
    images: int = Field(ge=1, le=100_000_000, description="training images")
    seed: int = Field(0, ge=0, description="of the rendering")


class CatalogueSource(Frozen):
    """The annotated images: where they lie, or how to render them."""

    path: Text | None = None
    """a folder in any layout that docs/catalogues.md names, or a table, relative to the plan's file; or the URI of a
    prepared catalogue in a bucket (s3://, gs://, az://)"""
    synth: Synth | None = None
    """without a path: { classes, images, seed }, rendered in the storage folder at the first run"""
    columns: dict[Literal["path", "class", "split"], Text] = Field({})
    """of its tables, where they have other names: { path = "image", class = "label", split = "set" }"""
    val: float | None = Field(None, ge=0, le=0.5)
    """share of the images of each class that is held out where there is no val; without it 0.1 where there is no split
    at all, else nothing"""
    seed: int = Field(0, ge=0, description="of what is held out")
    links: Text | None = None
    """folder below which links and a table's absolute paths may lead too; relative as path is"""

    @model_validator(mode="after")
    def _one(self) -> "CatalogueSource":
        if self.path is None and self.synth is None:
            raise ValueError("a catalogue has a path, or synth = { classes, images, seed }")
        return self


class Ensemble(Frozen):
    """The members whose probabilities are added."""

    # sums of more float16 probabilities than 127 would not be exact in int32
    members: tuple[str, ...] = Field(strict=False, min_length=1, max_length=127)
    """jobs, each BACKBONE/STAGE"""
    score: Literal["auto", "val"] = "auto"
    """the images whose errors are reported: test where its labels are known, else val"""
    views: Views = "ten_crop"
    """of each test image: ten crops, or the centre alone"""
    combine: Literal["sum", "greedy", "weights"] = "sum"
    """sum: all members alike; greedy, weights: a weight and a temperature each, fitted on val"""


class Cluster(Machine):
    """Where and how the jobs run. None of it is part of a key: changing it trains nothing again."""

    storage: Text | None = None
    """folder that keeps all results, relative to the plan's file, or the URI of one in a bucket (s3://, gs://, az://);
    without it --storage, ALIPROD_STORAGE or `runs` in the current folder"""
    tracking_uri: Text | None = None
    """MLflow server; without it --tracking-uri, MLFLOW_TRACKING_URI or SQLite in the storage folder"""
    ranks: Literal["auto"] | Ranks | FewestAndMost | dict[str, Ranks | FewestAndMost] = "auto"
    """of a job, each one GPU, or cpus_per_worker CPUs where there are none: a number, the fewest and the most like
    [2, 8], or a table of these by job or backbone like { "resnet50/dcl" = 4 }; auto: as many as end the plan soonest,
    up to the shares of its stage"""
    max_parallel_jobs: int | None = Field(None, ge=1)
    """jobs side by side; without it as many as the cluster has room for"""
    max_failures: int = Field(3, ge=0, description="how often a job is resumed after it failed")
    use_gpu: Literal["auto"] | bool = Field("auto", description="auto: where the cluster has any")
    max_cpus: int | None = Field(None, ge=1, description="CPUs that a cluster that grows on demand can reach")
    max_gpus: int | None = Field(None, ge=1, description="GPUs that a cluster that grows on demand can reach")
    poll_seconds: float = Field(2.0, gt=0, le=60)
    """how often Ray Train looks after its workers; short jobs want 0.2"""

    def ranks_of(self, job: str) -> tuple[int, int]:
        """The fewest and the most ranks of a job: its own, else its backbone's."""
        by_job = self.ranks if isinstance(self.ranks, dict) else {"": self.ranks}
        said = next((by_job[name] for name in (job, job.partition("/")[0], "") if name in by_job), "auto")
        if isinstance(said, str):
            return 1, MOST_RANKS
        return (said, said) if isinstance(said, int) else said


class Tune(Frozen):
    """What `aliprod tune` tries. None of it is part of a key."""

    search: Settings = Field({})
    """settings of a stage, in tables as it has them, each with a list of choices or a range:
    `lr.backbone = { low = 1e-3, high = 0.1, log = true }`, `optimizer.name = ["sgd", "lamb"]`; whole numbers where both
    ends are. Without it the two learning rates, evenly in the logarithm"""
    span: float = Field(10.0, gt=1, le=1e6)
    """without search: from the stage's own rates over this to those times this"""
    trials: int = Field(8, ge=1, le=10_000, description="trainings; the first has the plan's own settings")
    epochs: int = Field(2, ge=1, le=1_000, description="of a trial, its schedule drawn together in proportion")
    per_class: int = Field(10, ge=1, description="training images a class of a trial, at most")
    grace_period: int = Field(1, ge=1)
    """epochs before a trial may be stopped for being worse than others; tune.epochs: none is"""
    reduction_factor: int = Field(3, ge=2, le=100)
    """one trial in so many goes on at each rung, which are as many times apart"""
    finalists: int = Field(3, ge=1, le=20)
    """trials better than the plan's own settings that are trained again, beside these"""
    seeds: int = Field(3, ge=2, le=100)
    """how often, with other seeds: what they gain is told by these alone"""
    hours: float | None = Field(None, gt=0)
    """of GPUs (without them of ranks), finalists included, after which no trial begins"""


class Plan(Frozen):
    """An ensemble and all that it is made of."""

    # Made by `aliprod.plan.load.load` alone, which checks what one table says about another.

    format: Literal[1] = Field(description="of this file: 1")
    name: OwnName = Field(description="of the plan: its folder, its MLflow experiment, its models' first name")
    seed: int = Field(0, ge=0, description="of every stage that states none")
    catalogue: CatalogueSource = Field(description="the images")
    backbones: dict[PlainName, Text] = Field(description="our name = timm's name, with the tag of its weights")
    defaults: Settings = Field({}, description="settings of every stage that does not say otherwise")
    stages: dict[PlainName, Settings] = Field(description="a table of settings each: [stages.NAME]")
    overrides: dict[str, Settings] = Field({})
    """settings of one backbone, [overrides.BACKBONE], or of one job, [overrides."BACKBONE/STAGE"]"""
    jobs: dict[PlainName, Annotated[tuple[str, ...], Field(strict=False, min_length=1)]] = Field(min_length=1)
    """backbone = the list of its stages"""
    ensemble: Ensemble = Field(description="what is added up")
    cluster: Cluster = Field(Cluster(), description="where it runs; no part of any key")
    tune: Tune = Field(Tune(), description="how settings of a stage are searched for; no part of any key")

    @model_validator(mode="after")
    def _of_bounded_size(self) -> "Plan":
        if (count := sum(map(len, self.jobs.values()))) > MOST_JOBS:
            what = f"{count:,} jobs; a plan has at most {MOST_JOBS:,}: make several plans, they share results"
            raise ValueError(what)
        return self

    @property
    def digest(self) -> str:
        """sha256 of all that it says of its results, overrides included."""
        own = self.catalogue.model_fields_set | {"path", "synth"}  # what was added later, and is not said, is left out
        of_catalogue = self.catalogue.model_dump(mode="json", include=own)
        out = {"combine"} if self.ensemble.combine == "sum" else None
        ensemble = self.ensemble.model_dump(mode="json", exclude=out)
        said = self.model_dump(mode="json", exclude={"cluster", "tune"})
        return key_of(said | {"catalogue": of_catalogue, "ensemble": ensemble})

    def stage(self, job: str) -> Stage:
        """The effective stage of a job: everything merged, the objective's options completed."""
        return effective(self.seed, self.defaults, self.layers(job).values())

    def layers(self, job: str) -> dict[tuple[str, str], Settings]:
        """The tables that say something about a job, by their keys, the weakest first; defaults apart."""
        backbone, _, name = job.partition("/")
        own = {("overrides", one): self.overrides[one] for one in (backbone, job) if one in self.overrides}
        return {("stages", name): self.stages[name], **own}

    def with_settings(self, job: str, settings: Settings) -> "Plan":
        """The same plan with other settings of one job. Options are of the objective that the job has, or is given:
        those that it knows."""
        if isinstance(given := settings.get("objective"), dict):
            said = self.said(job).get("objective", Stage().objective.name)
            own = {"name": said} if isinstance(said, str) else said
            whole = given if given.get("name", own["name"]) != own["name"] else own | given
            known = options(whole["name"])
            kept = {key: value for key, value in whole.items() if known is None or key in {"name", *known.model_fields}}
            settings = settings | {"objective": kept}
        own = merged(self.overrides.get(job, {}), settings)
        return self.model_copy(update={"overrides": self.overrides | {job: own}})

    def said(self, job: str) -> Settings:
        """All that is said of a job's stage, unchecked."""
        return merged(self.defaults, *self.layers(job).values())

    def edges(self, job: str) -> dict[Edge, tuple[str, ...]]:
        """The jobs that must be finished before a job begins, by the setting that names them. What is not of the right
        type is left out: this is also asked of plans that are being checked."""
        settings = self.said(job)
        found: dict[Edge, tuple[str, ...]] = {}
        for edge in EDGES:
            said: Any = settings
            for key in edge:
                said = said.get(key) if isinstance(said, dict) else None
            names = [said] if edge == ("start",) else said if isinstance(said, list | tuple) else []
            # these name stages of the same backbone
            own = f"{job.partition('/')[0]}/" if edge[0] in ("start", "soup") else ""
            found[edge] = tuple(own + to for to in names if isinstance(to, str))
        return found

    def parents(self, job: str) -> tuple[str, ...]:
        """All jobs that must be finished before a job begins, each once."""
        return tuple(dict.fromkeys(chain(*self.edges(job).values())))

    def job_names(self) -> Iterator[str]:
        """Names of all jobs, in the plan's order."""
        for backbone, stages in self.jobs.items():
            yield from (f"{backbone}/{name}" for name in stages)


def effective(seed: int, defaults: Settings, layers: Iterable[Settings]) -> Stage:
    """Merge tables of settings into a stage. pydantic.ValidationError: the settings do not go together."""
    own = merged(*layers)
    idle = {key for name, key in _IDLE.items() if name in own}
    if own.get("features") == "cached":
        idle.add("augmentation")
    defaults = {name: value for name, value in defaults.items() if name not in idle}
    stage = Stage.model_validate(merged({"seed": seed}, defaults, own))
    objective = ObjectiveRecipe(name=stage.objective.name, **complete(stage.objective.name, stage.objective.options))
    return stage.model_copy(update={"objective": objective})


def merged(*layers: Mapping[str, Any]) -> Settings:
    """Tables of settings, the later ones winning: lr and optimizer key by key, objective, images and another optimizer
    as a whole."""
    result: Settings = {}
    for key, value in chain(*(layer.items() for layer in layers)):
        old: Any = result.get(key)
        tables = isinstance(old, dict) and isinstance(value, dict) and key not in WHOLE
        before = old.get("name", "sgd") if tables else None  # what is said of one optimizer is not for another
        result[key] = old | value if tables and value.get("name", before) == before else value
    return result
