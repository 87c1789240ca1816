"""The search for a job's learning rates: short trainings on few images, side by side on the cluster, by Ray Tune.

What has ended lies in STORAGE/tune as JSON. Ray's own state of an experiment is pickles: it gets a folder that is
thrown away, and is never restored.
"""

import json
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from pydantic import TypeAdapter
from ray import tune

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
from aliprod.store import commit
from aliprod.store.epochs import TOP1
from aliprod.store.keys import key_of
from aliprod.store.layout import TUNE


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
        Failed: its parent is not trained yet, its features are not there, or no trial came to its end.
        Unreachable: the cluster, or the storage path.
    """
    opened = prepare(request)
    _check_searchable(opened, name)
    target = targets(opened, gpu=False)[name]
    site = Site.of(opened)
    make_first(opened, [t for t in target.needed() if t.first and t.record(site.storage) is None], site)
    if any(need.record(site.storage) is None for need in target.needs.get("features", ())):
        raise Failed(
            "its cached features are not there yet.", name, 'Run the plan first, or say features = "computed".'
        )
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # it prints tables whatever ``verbose`` says
    try:
        session.join(opened.places.address)
        site = replace(site, cluster=with_cpus(site.cluster, session.machines(site.cluster)))
        trials, first = _tried(target, site, opened.plan.tune, report)
    finally:
        ray.shutdown()
    rates = _rates(target.owner.stage)
    own = next((trial for trial in trials if (trial.backbone, trial.heads) == rates), None)
    if own is None:
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
    if not job.stage.is_trained or job.labellers or job.stage.teachers or job.stage.duplicates != "keep":
        raise Refused("learns from other jobs, or trains nothing: its rates are not searched for.", name)
    catalogue = opened.read_catalogue()
    if not len(catalogue.val):
        raise Refused("has no val images to tell learning rates apart.", catalogue.root, "Hold some back.")
    if job.start and opened.record(job.start) is None:
        what = f"{job.start}, which it starts from, is not trained yet."
        raise Failed(what, name, "Run the plan, or search it first.")


def _tried(target: Target, site: Site, recipe: Tune, report: Callable[[Trial], None]) -> tuple[list[Trial], str]:
    """All trials that came to their end, now or before, and what the first of the others said, or ''."""
    job, cluster = target.owner, site.cluster
    digest = key_of([job.key, recipe.model_dump(mode="json")])
    log = _Log(site.storage / TUNE / f"{job.name.replace('/', '.')}-{digest[:12]}.json", report)
    wanted = pairs(_rates(job.stage), recipe, job.stage.seed)
    log.trials += [trial for trial in log.read() if (trial.backbone, trial.heads) in wanted]
    done = {(trial.backbone, trial.heads) for trial in log.trials}
    if not (left := [pair for pair in wanted if pair not in done]):
        return log.trials, ""
    resources = {"CPU": float(cluster.threads), "GPU": 1.0 if uses_gpu(cluster, session.machines(cluster)) else 0.0}
    work = partial(_try, target=target, site=site, stage=short(job.stage, recipe))
    with tempfile.TemporaryDirectory(prefix="aliprod-tune-") as folder:
        grid = tune.Tuner(
            tune.with_resources(work, resources),
            param_space={"rates": tune.grid_search(left)},
            tune_config=tune.TuneConfig(max_concurrent_trials=cluster.max_parallel_jobs),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[log]),
        ).fit()
    return log.trials, next((str(error).strip().splitlines()[-1] for error in grid.errors), "")


def pairs(own: tuple[float, float], recipe: Tune, seed: int) -> list[tuple[float, float]]:
    """The learning rates to be tried, of backbone and heads: the stage's own, then log-uniform ones around them."""
    draw = random.Random(seed)
    around = ([rate * recipe.span ** draw.uniform(-1, 1) for rate in own] for _ in range(recipe.trials - 1))
    return [own, *((backbone, heads) for backbone, heads in around)]


@dataclass
class _Log(tune.Callback):
    """The trials that have ended, in a file that is written anew after each."""

    file: Path
    report: Callable[[Trial], None]
    trials: list[Trial] = field(default_factory=list)

    def read(self) -> list[Trial]:
        """What an earlier search has left; nothing where that is no such file."""
        try:
            return TypeAdapter(list[Trial]).validate_json(self.file.read_bytes())
        except (OSError, ValueError):
            return []

    def on_trial_complete(self, *_: Any, **info: Any) -> None:
        backbone, heads = info["trial"].config["rates"]
        trial = Trial(backbone, heads, (info["trial"].last_result or {}).get("top1_error"))
        self.trials.append(trial)
        commit.write_file(self.file, json.dumps([asdict(one) for one in self.trials], indent=1))
        self.report(trial)


def _try(drawn: dict[str, Any], target: Target, site: Site, stage: Stage) -> None:
    """Train with these rates; an error an epoch, and none where the loss diverged."""
    from aliprod.training.loop import train

    backbone, heads = drawn["rates"]
    stage = stage.model_copy(update={"lr": stage.lr.model_copy(update={"backbone": backbone, "heads": heads})})
    catalogue, inputs = site.read(), inputs_of(target, site)
    try:
        for progress in train(stage, target.owner.network, catalogue, inputs, site.cluster):
            if progress.last is not None:
                tune.report({"top1_error": progress.metrics[TOP1]})
    except NonFiniteLoss:
        tune.report({"top1_error": None})


def _rates(stage: Stage) -> tuple[float, float]:
    return stage.lr.backbone, stage.lr.heads
