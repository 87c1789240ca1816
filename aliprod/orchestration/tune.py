"""The search for a job's learning rates: short trainings on few images, side by side on the cluster, by Ray Tune."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from aliprod.catalogue import sources
from aliprod.errors import Failed, NonFiniteLoss, Refused, did_you_mean
from aliprod.orchestration import cluster
from aliprod.orchestration.prepare import Prepared, prepare, with_pretrained
from aliprod.plan.graph import Job
from aliprod.plan.open import Request
from aliprod.plan.schema import Tune
from aliprod.recipe import Machine, PerClass, Stage
from aliprod.store import commit
from aliprod.store.layout import WEIGHTS
from aliprod.training.loop import train
from aliprod.training.training_job import Inputs

_ERROR = "val/top1_error"


@dataclass(frozen=True)
class Trial:
    """Learning rates and the top-1 error on val that they led to, 0 to 1; ``top1_error`` None: the loss diverged."""

    backbone: float
    heads: float
    top1_error: float | None


@dataclass(frozen=True)
class Found:
    """The trials, the best first; of those with the same error the one nearest to the plan's own rates.

    Attributes:
        own: with the plan's own rates.
        images: of val, for the standard error of a trial's error.
    """

    job: str
    trials: tuple[Trial, ...]
    own: Trial
    images: int


@dataclass(frozen=True)
class _Work:
    """What a trial is given, beside its learning rates."""

    stage: Stage
    network: str
    catalogue: Path
    inputs: Inputs
    machine: Machine


def search(request: Request, name: str, tell: Callable[[Trial], None]) -> Found:
    """Try learning rates for one job of a plan; a search that was broken off goes on.

    Args:
        tell: called with each trial that has ended.
    Raises:
        Refused: no such job, one that cannot be searched for, or no val images.
        Failed: its parent is not trained yet, or no trial came to its end.
        Unreachable: the cluster, or the storage path.
    """
    prepared = prepare(request)
    job = _searchable(prepared, name)
    prepared = with_pretrained(prepared)
    settings, recipe = prepared.plan.cluster, prepared.plan.tune
    work = _Work(
        stage=short(job.stage, recipe),
        network=job.network,
        catalogue=prepared.catalogue.root,
        inputs=Inputs(
            start=prepared.job_folder(job.start) / WEIGHTS if job.start else None,
            pretrained=None if job.start else prepared.pretrained.get(job.network),
        ),
        machine=Machine(cpus_per_worker=settings.cpus_per_worker, loader_processes=settings.loader_processes),
    )
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # it prints tables whatever ``verbose`` says
    try:
        cluster.join(prepared.places.address)
        gpu = cluster.uses_gpu(settings)
        grid = _tuner(prepared, job, work, gpu, tell).fit()
    finally:
        ray.shutdown()
    results = [grid[number] for number in range(len(grid))]
    trials = [_trial_of(result.config, result.metrics) for result in results if result.error is None]
    own = next((trial for trial in trials if (trial.backbone, trial.heads) == _rates(job.stage)), None)
    if own is None:
        first = next((str(result.error).strip().splitlines()[-1] for result in results if result.error), "")
        raise Failed(f"its own learning rates could not be tried: {first}", name, "The same command goes on.")
    ordered = sorted(trials, key=lambda trial: (2.0 if trial.top1_error is None else trial.top1_error, trial != own))
    return Found(name, tuple(ordered), own, len(prepared.catalogue.val))


def short(stage: Stage, recipe: Tune) -> Stage:
    """A stage of few epochs and few images, with its schedule drawn together in proportion."""
    epochs = min(stage.epochs, recipe.epochs)
    shrink = epochs / stage.epochs
    milestones = {max(1, round(shrink * milestone)) for milestone in stage.lr.milestones}
    lr = {
        "warmup_epochs": shrink * stage.lr.warmup_epochs,
        "milestones": tuple(sorted(milestone for milestone in milestones if milestone < epochs)),
    }
    most = min(recipe.per_class, stage.images.per_class) if isinstance(stage.images, PerClass) else recipe.per_class
    return stage.model_copy(
        update={"epochs": epochs, "images": PerClass(per_class=most), "lr": stage.lr.model_copy(update=lr)}
    )


def _searchable(prepared: Prepared, name: str) -> Job:
    jobs, where = prepared.jobs, f"plan {prepared.plan.name}"
    if name not in jobs:
        raise Refused(f'has no job "{name}".', where, did_you_mean(name, jobs) or f"It has {', '.join(jobs)}.")
    job, stage = jobs[name], jobs[name].stage
    if job.soup or stage.teachers or stage.pseudo_labels or stage.duplicates != "keep":
        raise Refused("learns from other jobs, or trains nothing: its rates are not searched for.", name)
    if not len(prepared.catalogue.val):
        raise Refused("has no val images to tell learning rates apart.", prepared.catalogue.root, "Hold some back.")
    if job.start and commit.read(prepared.job_folder(job.start) / WEIGHTS) is None:
        raise Failed(
            f"{job.start}, which it starts from, is not trained yet.", name, "Run the plan, or search it first."
        )
    return job


def _tuner(prepared: Prepared, job: Job, work: _Work, gpu: bool, tell: Callable[[Trial], None]) -> tune.Tuner:
    settings, recipe = prepared.plan.cluster, prepared.plan.tune
    share = {"CPU": float(settings.cpus_per_worker), "GPU": 1.0 if gpu else 0.0}
    trainable = tune.with_resources(partial(_trial, work=work), share)
    backbone, heads = _rates(job.stage)
    space = {
        "backbone": tune.loguniform(backbone / recipe.span, backbone * recipe.span),
        "heads": tune.loguniform(heads / recipe.span, heads * recipe.span),
    }
    facts = json.dumps([job.key, recipe.model_dump(mode="json")], sort_keys=True)
    name = f"tune.{job.name.replace('/', '.')}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    folder = prepared.places.storage / "ray"
    if tune.Tuner.can_restore(str(folder / name)):
        return tune.Tuner.restore(
            str(folder / name), trainable, resume_unfinished=True, restart_errored=True, param_space=space
        )
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=recipe.trials,
            search_alg=BasicVariantGenerator(
                points_to_evaluate=[{"backbone": backbone, "heads": heads}],
                max_concurrent=settings.max_parallel_jobs or 0,  # 0: as many as there is room for
                random_state=job.stage.seed,
            ),
        ),
        run_config=tune.RunConfig(name=name, storage_path=str(folder), verbose=0, callbacks=[_Teller(tell)]),
    )


class _Teller(tune.Callback):
    def __init__(self, tell: Callable[[Trial], None]) -> None:
        self.tell = tell

    def on_trial_complete(self, *_: Any, **info: Any) -> None:
        self.tell(_trial_of(info["trial"].config, info["trial"].last_result))


def _trial(rates: dict[str, float], work: _Work) -> None:
    """Train with these rates; an error an epoch, and none where the loss diverged."""
    stage = work.stage.model_copy(update={"lr": work.stage.lr.model_copy(update=rates)})
    try:
        for progress in train(stage, work.network, sources.read(work.catalogue), work.inputs, work.machine):
            tune.report({"top1_error": progress.metrics[_ERROR]})
    except NonFiniteLoss:
        tune.report({"top1_error": None})


def _trial_of(rates: Mapping[str, float] | None, metrics: dict[str, Any] | None) -> Trial:
    rates = rates or {}
    return Trial(rates["backbone"], rates["heads"], (metrics or {}).get("top1_error"))


def _rates(stage: Stage) -> tuple[float, float]:
    return stage.lr.backbone, stage.lr.heads
