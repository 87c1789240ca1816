"""The driver: what `aliprod run` and a submitted job do. It makes the targets of a plan that are missing."""

import json
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import ray

from aliprod.build.events import LOST, Began, Ended, Event, Said
from aliprod.build.graph import Chosen, splits, targets
from aliprod.build.preflight import make_first, prepare
from aliprod.build.room import check_room, uses_gpu, with_cpus
from aliprod.build.schedule import execute
from aliprod.build.state import RunState, told
from aliprod.build.target import Site, Target, lacking
from aliprod.cluster import session
from aliprod.cluster.launch import start_launcher
from aliprod.cluster.session import Signals
from aliprod.cluster.tasks import RayRunner
from aliprod.errors import Failed, Unreachable, listing
from aliprod.forecast.rates import Estimates
from aliprod.forecast.simulate import keep
from aliprod.plan.open import Opened, Request
from aliprod.plan.places import catalogue_path
from aliprod.shown import redacted
from aliprod.store import commit, lineage, mirror
from aliprod.store.lease import Leases
from aliprod.tracking.registry import Choice, choose, origin
from aliprod.tracking.runs import EnsembleResult, JobProgress, PlanProgress, Status
from aliprod.tracking.sync import Tracking

_FLUSH_SECONDS = 60.0
_FRESH_SECONDS = 30.0  # between two looks at the rates that jobs tell
_HURRIED_SECONDS = 5.0  # of a run that was told to stop: it has ten to end in
_REFRESH_SECONDS = 2.0
_LOOK_SECONDS, _REMIND_SECONDS = 0.5, 60.0  # of a run that waits for another driver


def run(request: Request, whole: bool) -> Iterator[Event]:
    """Make all of a plan that is missing: trainings, predictions, the ensemble.

    Args:
        whole: False trains nothing, and makes the ensemble anew from the chosen checkpoints.
    Yields:
        Events; the last is `Ended`.
    Raises:
        Refused: the input is wrong, nothing was started. Unreachable: cluster, storage or, at the start, MLflow.
        Failed: the ensemble cannot be made, as a member is not trained yet, or another driver has taken over.
        KeyboardInterrupt: it was told to stop.
    """
    opened = yield from _opened(request)
    missing = [name for name in request.plan.ensemble.members if opened.record(name) is None]
    if missing and not whole:
        raise Failed(f"not trained yet: {', '.join(missing)}.", request.plan.name, "Run the plan first.")
    yield from _Run(opened, whole).events()


class _Run:
    """A run of a plan.

    Args:
        whole: jobs that are no members are trained too.
    """

    def __init__(self, opened: Opened, whole: bool) -> None:
        self.opened, self.whole, self.state = opened, whole, RunState(opened)
        self.site = Site.of(opened)
        self.signals, self.said = Signals(), list[str]()
        self.chosen: dict[str, Chosen] = {}
        self.result: EnsembleResult | None = None
        self.refreshed = 0.0

    def events(self) -> Iterator[Event]:
        """Make what is missing; the outcome ends up in result.json."""
        places, plan = self.opened.places, self.opened.plan
        self.signals.listen()
        with Leases(places.storage, f"plan {plan.name}") as self.leases:  # it watches other drivers from now on
            todo = self._missing(gpu=False)
            if todo:
                first = [target for target in todo.values() if target.first]
                yield Said(f"Checking {listing(plan.backbones.values())}{', fetching their weights' if first else ''}.")
                make_first(self.opened, first, self.site)
            self.site = replace(self.site, driver=self.leases.token)
            yield from self._alone(f"plan-{plan.name}")
            before = None if self.whole else told(self.opened)  # a whole run tries anew what has failed
            self.state = RunState(self.opened, before)  # as the driver before has left it
            yield Said(f"Opening MLflow: {redacted(places.tracking_uri)}.")
            yield from self._alone("mlflow")  # the first one migrates its database
            self.tracking = Tracking(places.tracking_uri, plan.name, places.artifacts, self.said.append)
            self.leases.release("mlflow")
            self.state.page = self.tracking.page
            yield from map(Said, (f"MLflow: {self.tracking.page}", f"MLflow, charts: {self.tracking.charts}"))
            try:
                if any(target.kind == "training" for target in self._missing(gpu=False).values()):
                    here = "Starting Ray here, without its dashboard."
                    yield Said(f"Joining Ray at {places.address}." if places.address else here)
                    self._join()  # first: where there is no cluster, MLflow is shown nothing
                yield from self._tracked()
            finally:
                ray.shutdown()

    def _alone(self, name: str) -> Iterator[Event]:
        """Take a lease. While another driver holds it, say who that is, once a minute."""
        said = -_REMIND_SECONDS
        while holder := self.leases.take(name):
            if time.monotonic() - said >= _REMIND_SECONDS:
                said = time.monotonic()
                yield Said(f"Waiting for {holder}, which is at work in {mirror.shown(self.opened.places.storage)}.")
            time.sleep(_LOOK_SECONDS)

    def _tracked(self) -> Iterator[Event]:
        status: Status = "FAILED"
        self._show()
        try:
            for event in self._rounds():
                yield event
                self._show()
                yield from _drained(self.said)
            if not self.state.jobs_in(*LOST):
                status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            ray.shutdown()  # what runs ends now, not after MLflow has been sent the rest
            unsent: list[str] = []
            if not self.leases.lost:  # else another driver shows it
                self._show(status)
                unsent = self.tracking.flush(_HURRIED_SECONDS if status == "KILLED" else _FLUSH_SECONDS)
        yield from _drained(self.said)
        yield from map(Said, [*unsent, f"MLflow: {self.tracking.page}"])
        yield Ended(json.loads((self.opened.folder / "result.json").read_text(encoding="utf-8")))

    def _rounds(self) -> Iterator[Event]:
        """Make what is missing, as the members are chosen now; again where somebody has chosen others meanwhile."""
        if not len(self.opened.read_catalogue().val):
            yield Said("There are no val images: the last checkpoint of each job is its member.")
        yield from self.state.reuse()
        choices: dict[str, Choice] = {}
        while True:
            self.leases.check()
            if all(self.opened.record(name) is not None for name in self.opened.plan.ensemble.members):
                yield from self.state.reuse("waiting")  # else MLflow would not be told of their weights
                self._show()
                choices, note = choose(self.opened, self.tracking.registry, not self.tracking.flush(_FLUSH_SECONDS))
                self.chosen = {name: Chosen(choice.key, choice.sha256) for name, choice in choices.items()}
                if note:
                    yield Said(note)
            before = set(self._missing(gpu=False))
            if not before:
                break
            yield from self._make(choices)
            if self.state.failure:
                raise Failed.printed(self.state.failure)
            if before == set(self._missing(gpu=False)):
                raise Failed(f"made, and not there: {listing(sorted(before))}.", mirror.shown(self.site.storage))
        graph = self._graph(gpu=False)
        if choices and not lacking(graph, self.opened.places.storage, _goals(graph, trainings=False)):
            self._finish(choices)
        outcome = {
            "plan": self.opened.plan.name,
            "trained": self.state.jobs_in("finished"),
            "reused": self.state.jobs_in("reused"),
            "failed": self.state.jobs_in("failed"),
            "not_run": self.state.jobs_in("not_run"),
            "ensemble": self.result.result if self.result else None,
        }
        self.leases.check()
        commit.write_file(self.opened.folder / "result.json", json.dumps(outcome, indent=1))

    def _make(self, choices: Mapping[str, Choice]) -> Iterator[Event]:
        """Make what is missing on the cluster."""
        self._join()
        settings = self.opened.plan.cluster
        machines = session.machines(settings)
        gpu = uses_gpu(settings, machines)
        self.site = replace(self.site, cluster=with_cpus(settings, machines))
        todo = self._missing(gpu)
        check_room(todo, machines)
        for target in todo.values():
            if target.kind == "checkpoint":
                self.tracking.registry.download(choices[target.owner.name], target.folder(self.site.storage))
        todo = {name: target for name, target in todo.items() if target.kind != "checkpoint"}
        kinds = Counter(target.kind.replace("_", " ") for target in todo.values())
        yield Said(f"To make: {', '.join(f'{kind} {count}' for kind, count in kinds.items())}.")
        launcher = start_launcher(self.site) if any(target.kind == "training" for target in todo.values()) else None
        seconds = Estimates(self.opened, _FRESH_SECONDS).seconds
        runner = RayRunner(
            self.site,
            launcher,
            lambda: self.signals.told,
            lambda target: self._graph(gpu).get(target.name, target),
            seconds,
            self.leases,
        )
        self.signals.gently = True
        for change in runner.as_begun(execute(todo, runner, settings.max_parallel_jobs)):
            self.leases.check()
            self.state.nodes = tuple(runner.there)
            self._refresh()
            yield from _drained(runner.refused)
            yield from self.state.reports()
            if change is not None:
                keep(self.opened, self.state.nodes)
                yield from self.state.apply(todo[change.name], change)
        self.signals.gently = False
        if self.signals.told:
            raise KeyboardInterrupt

    def _refresh(self) -> None:
        """Have here what running jobs have written to a bucket on other machines; every other second."""
        if time.monotonic() - self.refreshed >= _REFRESH_SECONDS:
            self.refreshed = time.monotonic()
            with suppress(Unreachable):  # it is for show
                commit.refresh(*(self.opened.job_folder(name) for name in self.state.jobs_in("running")))

    def _graph(self, gpu: bool) -> dict[str, Target]:
        lost, jobs = self.state.jobs_in(*LOST), self.opened.jobs.items()
        if not self.whole:  # nothing is trained
            lost += [name for name, job in jobs if job.is_floor and self.opened.record(name) is None]
        return targets(self.opened.with_cluster(self.site.cluster), gpu, self.chosen, lost)

    def _missing(self, gpu: bool) -> dict[str, Target]:
        """What is to be made now: nothing that needs what has failed, and an ensemble once its members are known."""
        graph, lost, out = self._graph(gpu), self.state.jobs_in(*LOST), set[str]()
        missing = lacking(graph, self.opened.places.storage, _goals(graph, self.whole))
        for name, target in missing.items():
            failed = target.job is not None and target.job.name in lost
            unknown = target.facts is None and target.latest
            if failed or unknown or any(need.name in out for need in target.needed()):
                out.add(name)
        return {name: target for name, target in missing.items() if name not in out}

    def _finish(self, choices: Mapping[str, Choice]) -> None:
        """Note what the ensemble is, and what its submission was made of."""
        opened, graph = self.opened, self._graph(gpu=False)
        which = splits(opened.read_catalogue(), opened.plan.ensemble.score)
        sums = {(t.facts or {})["split"]: t for t in graph.values() if t.kind == "ensemble"}
        key, folder = str(sums[which.main].key), sums[which.main].folder(self.site.storage)
        found = lineage.comparison(self.site.storage, opened.plan.name) if which.scored else None
        of = found["members"] if found else {name: {"top1_error": None} for name in choices}
        result = {
            "members": {n: {"top1_error": of[n]["top1_error"], "version": c.version} for n, c in choices.items()},
            "top1_error": found["ensemble"]["top1_error"] if found else None,
            "split": which.scored,
            "submission": mirror.shown(opened.folder / "submission.csv") if which.main == "test" else None,
            "probabilities": mirror.shown(folder),
            "comparison": found,
        }
        self.result = EnsembleResult(key, choices, result)
        if which.main == "test":
            commit.fetch(folder)
            submission = (folder / "submission.csv").read_bytes()
            commit.write_file(opened.folder / "submission.csv", submission)
            lineage.keep(opened.folder / "submission.csv", origin(opened, choices, key, result))

    def _join(self) -> None:
        """Join the cluster, when there is something to do on it."""
        if ray.is_initialized():
            return
        with self.signals.starting_others():
            session.join(self.opened.places.address)
        session.probe(self.opened.places.storage)

    def _show(self, status: Status = "RUNNING") -> None:
        """Have MLflow show the run as it is."""
        state, opened = self.state, self.opened
        jobs = tuple(
            JobProgress(job, opened.job_folder(name), state.states[name], state.reasons.get(name, ""))
            for name, job in opened.jobs.items()
        )
        plan = PlanProgress(
            opened.text, opened.plan.digest, status, state.table(), jobs, self.result, opened.read_catalogue()
        )
        self.tracking.show(plan)


def _drained(said: list[str]) -> Iterator[Event]:
    """What others have said meanwhile, each once."""
    while said:
        yield Said(said.pop(0))


def _goals(graph: Mapping[str, Target], trainings: bool) -> list[Target]:
    return [target for target in graph.values() if target.goal and (trainings or target.kind != "training")]


def _opened(request: Request) -> Generator[Event, None, Opened]:
    """Say what is run and where, then read the catalogue; return the plan with its jobs."""
    plan, places = request.plan, request.places
    if places.note:
        yield Said(places.note)
    path = catalogue_path(plan, places)
    yield Said(f"{'Reading' if path.exists() else 'Rendering'} the catalogue {mirror.shown(path)}.")
    opened = prepare(request)
    yield from map(Said, opened.read_catalogue().remarks)
    yield Began(opened)
    return opened
