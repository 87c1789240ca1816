"""The search for a job's settings: short trainings on few images, side by side on the cluster, by Ray Tune.

What has ended lies in STORAGE/tune as JSON. Ray's own state of an experiment is pickles: it gets a folder that is
thrown away, and is never restored.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from aliprod.build.graph import targets
from aliprod.build.making import inputs_of
from aliprod.build.preflight import make_first, prepare
from aliprod.build.room import slots, uses_gpu, with_cpus
from aliprod.build.target import Resources, Site, Target
from aliprod.catalogue.catalogue import Integers
from aliprod.cluster import session
from aliprod.cluster.trials import Log, Trial, drawn_stages, finalists, is_spent, judged, search_of, short, trial_of
from aliprod.ensemble.compare import Gain
from aliprod.errors import Failed, NonFiniteLoss, Refused, did_you_mean
from aliprod.plan.open import Opened, Request
from aliprod.plan.schema import Plan, Tune
from aliprod.recipe import Stage
from aliprod.store.layout import TUNE

if TYPE_CHECKING:
    from aliprod.training.candidates import Candidate
    from aliprod.training.learner import Setup


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        own: with the plan's own settings.
        trials: all that have ended, the best first; those that were stopped behind the others.
        epochs: of a trial that was not stopped.
        finalists: those that were better than the plan's own, and what each gained when it was trained again.
        override: the job's table of overrides with the best settings; None: nothing beat the plan's own.
        left: trials that were not begun, since the hours were spent.
        failed: why others came to no end; the same command tries them again.
    """

    job: str
    own: Trial
    trials: tuple[Trial, ...]
    epochs: int
    finalists: tuple[tuple[Trial, Gain], ...]
    override: dict[str, Any] | None
    left: int
    failed: tuple[str, ...]
    hours: float


def search(request: Request, name: str, report: Callable[[Trial], None]) -> Found:
    """Search for settings of one job of a plan; a search that was broken off goes on.

    Args:
        report: called with each trial that has ended.
    Raises:
        Refused: no such job, one that cannot be searched for, settings that it cannot have, or no val images.
        Failed: its parent is not trained yet, its features are not there, or a trial that the answer needs came to no
            end.
        Unreachable: the cluster, or the storage path.
        KeyboardInterrupt: it was told to stop.
    """
    opened = prepare(request)
    _check_searchable(opened, name)
    drawn = drawn_stages(opened.plan, name)
    target = targets(opened, gpu=False)[name]
    site = Site.of(opened)
    make_first(opened, [t for t in target.needed() if t.first and t.record(site.storage) is None], site)
    if any(need.record(site.storage) is None for need in target.needs.get("features", ())):
        raise Failed(
            "its cached features are not there yet.", name, 'Run the plan first, or say features = "computed".'
        )
    labels = opened.read_catalogue().val.labels
    file = site.storage / TUNE / f"{name.replace('/', '.')}-{str(target.key)[:12]}.json"
    log = Log(file, len(labels), report)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # it prints tables whatever ``verbose`` says
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # told to stop, it says how to restore its own state
    try:
        session.join(opened.places.address)
        site = replace(site, cluster=with_cpus(site.cluster, session.machines(site.cluster)))
        bench = _Bench(target, site, opened.plan.tune, search_of(opened.plan, name), log)
        return _found(opened.plan, bench, drawn, labels)
    finally:
        ray.shutdown()


def _found(plan: Plan, bench: "_Bench", drawn: dict[Stage, dict[str, Any]], labels: Integers) -> Found:
    """Try stages, and the best of them again with other seeds."""
    name, recipe, stages = bench.target.name, plan.tune, [short(stage, plan.tune) for stage in drawn]
    trials, failed = bench.train(stages, halving=True)
    if not trials[0].ended:
        raise _no_end("the plan's own settings", name, failed)
    best = finalists(trials, stages[0].epochs, recipe.finalists)
    again = list[Trial]()
    if best:
        seeds = [stages[0].seed + number for number in range(1, recipe.seeds + 1)]
        seeded = [stages[place].model_copy(update={"seed": seed}) for place in (0, *best) for seed in seeds]
        again, said = bench.train(seeded, halving=False)
        if not all(trial.ended for trial in again):
            raise _no_end("a finalist", name, said)
    found = judged(again, labels, recipe.seeds, stages[0].seed) if best else []
    better = [(gain.gain, place) for place, gain in zip(best, found, strict=True) if gain.interval[0] > 0]
    settings = list(drawn.values())[max(better)[1]] if better else None
    ended = [trial for trial in trials if trial.ended]
    return Found(
        job=name,
        own=trials[0],
        trials=tuple(sorted(ended, key=lambda trial: (trial.diverged, -len(trial.errors), trial.top1_error))),
        epochs=stages[0].epochs,
        finalists=tuple((trials[place], gain) for place, gain in zip(best, found, strict=True)),
        override=None if settings is None else plan.with_settings(name, settings).overrides[name],
        left=len(trials) - len(ended) - len(failed),
        failed=tuple(failed),
        hours=sum(trial.seconds for trial in (*trials, *again)) / 3600,
    )


def _no_end(what: str, job: str, said: Sequence[str]) -> Failed:
    return Failed(f"{what} came to no end: {next(iter(said), 'it was interrupted')}", job, "The same command goes on.")


def _check_searchable(opened: Opened, name: str) -> None:
    jobs, where = opened.jobs, f"plan {opened.plan.name}"
    if name not in jobs:
        raise Refused(f'has no job "{name}".', where, did_you_mean(name, jobs) or f"It has {', '.join(jobs)}.")
    job = jobs[name]
    if not job.stage.is_trained or job.labellers or job.stage.teachers or job.stage.duplicates != "keep":
        raise Refused("learns from other jobs, or trains nothing: its settings are not searched for.", name)
    catalogue = opened.read_catalogue()
    if not len(catalogue.val):
        raise Refused("has no val images to tell settings apart.", catalogue.root, "Hold some back.")
    if job.start and opened.record(job.start) is None:
        what = f"{job.start}, which it starts from, is not trained yet."
        raise Failed(what, name, "Run the plan, or search it first.")


@dataclass(frozen=True)
class _Bench:
    """Where stages of a job are tried."""

    target: Target
    site: Site
    recipe: Tune
    search: dict[str, Any]
    log: Log

    def train(self, stages: Sequence[Stage], halving: bool) -> tuple[list[Trial], list[str]]:
        """Train stages that no trial of the log has trained to its end.

        Args:
            halving: stop bad trials, and begin none once the hours are spent; else keep what is taken for what.
        Returns:
            A trial for each stage, ended or not, and what those said that came to no end.
        Raises:
            KeyboardInterrupt: it was told to stop.
        """
        cluster, machines = self.site.cluster, session.machines(self.site.cluster)
        wanted = [trial_of(stage, self.search) for stage in stages]
        listed = _Listed(wanted, self.log, self.recipe if halving else self.recipe.model_copy(update={"hours": None}))
        rank, said = Resources(cluster.threads, int(uses_gpu(cluster, machines))), list[str]()
        if not listed.is_over():
            work = partial(_try, stages=list(stages), target=self.target, site=self.site, looks=not halving)
            room = sum(slots(node.resources, rank) for node in machines)
            with tempfile.TemporaryDirectory(prefix="aliprod-tune-") as folder:
                grid = tune.Tuner(
                    tune.with_resources(work, {"CPU": float(rank.cpus), "GPU": float(rank.gpus)}),
                    tune_config=tune.TuneConfig(
                        search_alg=listed,
                        scheduler=_Halving(listed, stages[0].epochs) if halving else None,
                        num_samples=len(stages),
                        max_concurrent_trials=max(1, min(room, cluster.max_parallel_jobs or room)),
                    ),
                    run_config=tune.RunConfig(storage_path=folder, verbose=0),
                ).fit()
            said = [session.last_line(error) for error in grid.errors]
            if not listed.is_over() or listed.broken_off() > len(said):
                raise KeyboardInterrupt  # Ray has taken it for its own
        return list(map(self.log.of, wanted)), said


class _Listed(Searcher):
    """Suggests trials in their order, and keeps what comes of them.

    Args:
        wanted: the first has the plan's own settings.
    """

    def __init__(self, wanted: Sequence[Trial], log: Log, recipe: Tune) -> None:
        super().__init__(metric="top1_error", mode="min")
        self.wanted, self.log, self.recipe = wanted, log, recipe
        self.before = list(map(log.of, wanted))
        self.left = [number for number, trial in enumerate(self.before) if not trial.ended]
        self.numbers = dict[str, int]()
        self.stopped = set[int]()

    def is_over(self) -> bool:
        """Whether no other trial begins: all have, or what is left of the hours is for the finalists."""
        return not self.left or is_spent(list(map(self.log.of, self.wanted)), self.recipe)

    def broken_off(self) -> int:
        """How many have begun and not ended."""
        return sum(not self.log.of(self.wanted[number]).ended for number in self.numbers.values())

    def suggest(self, trial_id: str) -> Any:
        if self.is_over():
            return Searcher.FINISHED
        self.numbers[trial_id] = self.left.pop(0)
        return {"number": self.numbers[trial_id]}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: all that a search goes on from is in the log."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._keep(trial_id, result, ended=False)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if not error and result and "errors" in result:
            last = result["diverged"] or result["last"] or self.numbers[trial_id] in self.stopped
            self._keep(trial_id, result, ended=last)  # else it is an interrupt that ended it

    def _keep(self, trial_id: str, result: dict[str, Any], ended: bool) -> None:
        number = self.numbers[trial_id]
        trial = replace(
            self.wanted[number],
            errors=tuple(result["errors"]),
            seconds=self.before[number].seconds + result["time_total_s"],
            ended=ended,
            diverged=result["diverged"],
            wrong=tuple(result["wrong"]),
        )
        self.log.keep(trial)


class _Halving(ASHAScheduler):
    """ASHA (Li et al., MLSys 2020), which is told of the trials that ended before, and never stops the plan's own
    settings, with which all are compared."""

    def __init__(self, listed: _Listed, epochs: int) -> None:
        recipe = listed.recipe
        grace, factor = min(epochs, recipe.grace_period), recipe.reduction_factor
        super().__init__("training_iteration", "top1_error", "min", epochs, grace, factor)
        self.listed = listed
        nobody: Any = None
        for trial in (one for one in listed.before if one.ended):
            stand_in: Any = SimpleNamespace(trial_id=trial.stage)
            self.on_trial_add(nobody, stand_in)
            for epoch, error in enumerate([*trial.errors, *([1.0] if trial.diverged else [])], 1):
                super().on_trial_result(nobody, stand_in, {"training_iteration": epoch, "top1_error": error})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if trial.config["number"] == 0:
            return self.CONTINUE
        if decision == self.STOP:
            self.listed.stopped.add(trial.config["number"])
        return decision


def _try(drawn: dict[str, Any], stages: Sequence[Stage], target: Target, site: Site, looks: bool) -> None:
    """Train a stage and report its errors behind each epoch, and where the loss diverged."""
    from aliprod.data.training_set import training_set
    from aliprod.training.learner import set_up
    from aliprod.training.loop import Progress, steps

    stage, catalogue, inputs = stages[drawn["number"]], site.read(), inputs_of(target, site)
    setup = set_up(stage, target.owner.network, catalogue, site.cluster, training_set(catalogue, stage, inputs))
    said: dict[str, Any] = {"errors": [], "wrong": [], "diverged": False, "last": False}
    try:
        for event in steps(setup, inputs):
            if isinstance(event, Progress) and event.last is not None:
                best = event.state.best or event.last
                said["errors"] = [*said["errors"], best.top1_error]
                said["last"] = event.state.epoch == stage.epochs
                said["wrong"] = _wrong(setup, best) if looks and said["last"] else []
                tune.report({"top1_error": best.top1_error, **said})
    except NonFiniteLoss:
        tune.report({"top1_error": 1.0, **said, "diverged": True})


def _wrong(setup: "Setup", best: "Candidate") -> list[int]:
    """Rows of val that weights take for another class, as it is scored."""
    setup.learner.model.load_state_dict(best.tensors)
    setup.learner.model.eval()
    looked = [(rows, probabilities.argmax(dim=1).numpy()) for rows, probabilities in setup.of_val()]
    return [int(row) for rows, guesses in looked for row in rows[guesses != setup.catalogue.val.labels[rows]]]
