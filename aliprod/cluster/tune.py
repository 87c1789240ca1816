"""The search for a job's learning rates: short trainings on few images, side by side on the cluster, by Ray Tune."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from aliprod.build.graph import targets
from aliprod.build.preflight import make_first, prepare
from aliprod.build.room import uses_gpu, with_cpus
from aliprod.build.target import Site, Target
from aliprod.build.trainings import inputs_of
from aliprod.cluster import session
from aliprod.errors import Failed, NonFiniteLoss, Refused, did_you_mean
from aliprod.plan.open import Opened, Request
from aliprod.plan.schema import Tune
from aliprod.recipe import PerClass, Stage
from aliprod.store.epochs import TOP1
from aliprod.store.keys import key_of


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


def search(request: Request, name: str, report: Callable[[Trial], None]) -> Found:
    """Try learning rates for one job of a plan; a search that was broken off goes on.

    Args:
        report: called with each trial that has ended.
    Raises:
        Refused: no such job, one that cannot be searched for, or no val images.
        Failed: its parent is not trained yet, or no trial came to its end.
        Unreachable: the cluster, or the storage path.
    """
    opened = prepare(request)
    _check_searchable(opened, name)
    target = targets(opened, gpu=False)[name]
    site = Site.of(opened)
    make_first(opened, [t for t in target.needed() if t.first and t.record(site.storage) is None], site)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # it prints tables whatever ``verbose`` says
    try:
        session.join(opened.places.address)
        site = replace(site, cluster=with_cpus(site.cluster, session.machines(site.cluster)))
        grid = _tuner(target, site, opened.plan.tune, report).fit()
    finally:
        ray.shutdown()
    results = [grid[number] for number in range(len(grid))]
    trials = [_trial_of(result.config, result.metrics) for result in results if result.error is None]
    rates = _rates(target.owner.stage)
    own = next((trial for trial in trials if (trial.backbone, trial.heads) == rates), None)
    if own is None:
        first = next((str(result.error).strip().splitlines()[-1] for result in results if result.error), "")
        raise Failed(f"its own learning rates could not be tried: {first}", name, "The same command goes on.")
    ordered = sorted(trials, key=lambda trial: (2.0 if trial.top1_error is None else trial.top1_error, trial != own))
    return Found(name, tuple(ordered), own, len(opened.read_catalogue().val))


def short(stage: Stage, recipe: Tune) -> Stage:
    """A stage of few epochs and few images, with its schedule drawn together in proportion."""
    epochs = min(stage.epochs, recipe.epochs)
    shrink = epochs / stage.epochs
    milestones = {max(1, round(shrink * milestone)) for milestone in stage.lr.milestones}
    lr = {
        "warmup_epochs": shrink * stage.lr.warmup_epochs,
        "warmup_steps": None if stage.lr.warmup_steps is None else max(1, round(shrink * stage.lr.warmup_steps)),
        "milestones": tuple(sorted(milestone for milestone in milestones if milestone < epochs)),
    }
    most = min(recipe.per_class, stage.images.per_class) if isinstance(stage.images, PerClass) else recipe.per_class
    return stage.model_copy(
        update={"epochs": epochs, "images": PerClass(per_class=most), "lr": stage.lr.model_copy(update=lr)}
    )


def _check_searchable(opened: Opened, name: str) -> None:
    jobs, where = opened.jobs, f"plan {opened.plan.name}"
    if name not in jobs:
        raise Refused(f'has no job "{name}".', where, did_you_mean(name, jobs) or f"It has {', '.join(jobs)}.")
    job = jobs[name]
    if job.soup or job.labellers or job.stage.teachers or job.stage.duplicates != "keep":
        raise Refused("learns from other jobs, or trains nothing: its rates are not searched for.", name)
    catalogue = opened.read_catalogue()
    if not len(catalogue.val):
        raise Refused("has no val images to tell learning rates apart.", catalogue.root, "Hold some back.")
    if job.start and opened.record(job.start) is None:
        what = f"{job.start}, which it starts from, is not trained yet."
        raise Failed(what, name, "Run the plan, or search it first.")


def _tuner(target: Target, site: Site, recipe: Tune, report: Callable[[Trial], None]) -> tune.Tuner:
    job, cluster = target.owner, site.cluster
    resources = {"CPU": float(cluster.threads), "GPU": 1.0 if uses_gpu(cluster, session.machines(cluster)) else 0.0}
    work = partial(_try, target=target, site=site, stage=short(job.stage, recipe))
    trainable = tune.with_resources(work, resources)
    backbone, heads = _rates(job.stage)
    space = {
        "backbone": tune.loguniform(backbone / recipe.span, backbone * recipe.span),
        "heads": tune.loguniform(heads / recipe.span, heads * recipe.span),
    }
    digest = key_of([job.key, recipe.model_dump(mode="json")])
    name, folder = f"tune.{job.name.replace('/', '.')}-{digest[:12]}", site.storage / "ray"
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
                max_concurrent=cluster.max_parallel_jobs or 0,  # 0: as many as there is room for
                random_state=job.stage.seed,
            ),
        ),
        run_config=tune.RunConfig(name=name, storage_path=str(folder), verbose=0, callbacks=[_Reporter(report)]),
    )


class _Reporter(tune.Callback):
    def __init__(self, report: Callable[[Trial], None]) -> None:
        self.report = report

    def on_trial_complete(self, *_: Any, **info: Any) -> None:
        self.report(_trial_of(info["trial"].config, info["trial"].last_result))


def _try(rates: dict[str, float], target: Target, site: Site, stage: Stage) -> None:
    """Train with these rates; an error an epoch, and none where the loss diverged."""
    from aliprod.training.loop import train

    stage = stage.model_copy(update={"lr": stage.lr.model_copy(update=rates)})
    catalogue, inputs = site.read(), inputs_of(target, site)
    try:
        for progress in train(stage, target.owner.network, catalogue, inputs, site.cluster):
            if progress.last is not None:
                tune.report({"top1_error": progress.metrics[TOP1]})
    except NonFiniteLoss:
        tune.report({"top1_error": None})


def _trial_of(rates: Mapping[str, float] | None, metrics: dict[str, Any] | None) -> Trial:
    rates = rates or {}
    return Trial(rates["backbone"], rates["heads"], (metrics or {}).get("top1_error"))


def _rates(stage: Stage) -> tuple[float, float]:
    return stage.lr.backbone, stage.lr.heads
