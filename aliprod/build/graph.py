"""The graph of a plan: all that it makes, from the catalogue to the submission."""

from collections.abc import Mapping
from functools import cache, partial
from typing import NamedTuple

from aliprod.build import inputs, outputs
from aliprod.build.target import Resources, Target
from aliprod.build.trainings import cost_of, features, training
from aliprod.plan.jobs import Job, order_by_remaining_work
from aliprod.plan.open import Opened
from aliprod.recipe import Views
from aliprod.store import commit
from aliprod.store.layout import MODEL, WEIGHTS
from aliprod.store.lineage import weights_folder


class Chosen(NamedTuple):
    """Weights that a member takes: the key of the job that trained them, and the sha256 of model.safetensors."""

    key: str
    sha256: str


def targets(opened: Opened, gpu: bool, chosen: Mapping[str, Chosen] | None = None) -> dict[str, Target]:
    """All targets of a plan by name, each behind its needs, those on the longest path of work first.

    Args:
        opened: with its catalogue.
        gpu: whether a rank takes one.
        chosen: the checkpoints of members, by job; of the others the best.
    """
    graph = _Graph(opened, gpu, chosen or {})
    for name in order_by_remaining_work(opened.jobs):
        graph.training(name)
        if opened.jobs[name].member:
            for split in graph.predicted:
                graph.member(name, split)
    for split in graph.splits.all:
        graph.ensemble(split)
    if graph.splits.scored:
        graph.comparison(graph.splits.scored)
    return graph.found


def best(opened: Opened, name: str) -> Chosen | None:
    """The best checkpoint of a job; None while it is not trained."""
    folder = opened.job_folder(name) / WEIGHTS
    if commit.read(folder) is None:
        return None
    return Chosen(str(opened.jobs[name].key), commit.file_digest(folder, MODEL))


class _Graph:
    """A graph on its way: each target once, behind its needs."""

    def __init__(self, opened: Opened, gpu: bool, chosen: Mapping[str, Chosen]) -> None:
        self.opened, self.gpu, self.chosen = opened, gpu, chosen
        self.found: dict[str, Target] = {}
        self.best = cache(partial(best, opened))  # it reads two manifests
        self.catalogue, self.cluster = opened.read_catalogue(), opened.plan.cluster
        self.splits = outputs.splits(self.catalogue, opened.plan.ensemble.score)
        self.fits = opened.plan.ensemble.combine != "sum"
        self.predicted = dict.fromkeys([*self.splits.all, *(["val"] if self.fits else [])])
        self.one = Resources(self.cluster.threads, 1 if gpu else 0)  # of what runs a network in one process

    def training(self, name: str) -> Target:
        if name in self.found:
            return self.found[name]
        job = self.opened.jobs[name]
        stage, start = job.stage, [self.training(job.start)] if job.start else []
        needs = {
            "start": start,
            "soup": [self.training(other) for other in job.soup],
            "teachers": [self._soft_labels(job, of) for of in stage.teachers],
            "pseudo_labels": [self._labels_by(job)] if job.labellers else [],
            "kept": [],
            "pretrained": [],
            "features": [],
        }
        if stage.duplicates != "keep":
            hashed = self._add(inputs.hashes(self.catalogue, self.one))
            needs["kept"] = [self._add(inputs.kept_rows(job, hashed, start[0] if start else None, self.one))]
        if stage.pretrained is True and not job.start and not job.soup:
            needs["pretrained"] = [self._add(inputs.pretrained(job.network))]
        if stage.features == "cached":
            begin = {role: needs[role] for role in ("start", "pretrained")}
            known = ("train", "val") if len(self.catalogue.val) else ("train",)
            needs["features"] = [self._add(features(job, split, begin, self.catalogue, self.one)) for split in known]
        cost = cost_of(job, self.catalogue, self.opened.job_folder(name))
        return self._add(training(job, needs, cost, self.cluster, self.gpu))

    def member(self, name: str, split: str) -> Target:
        """The prediction of a member's chosen checkpoint, else of its best."""
        chosen = self.chosen.get(name)
        if chosen is None or chosen == self.best(name):
            return self.prediction(name, split, self.opened.plan.ensemble.views)
        storage, plan = self.opened.places.storage, self.opened.plan
        place = weights_folder(storage, plan.name, name, *chosen).relative_to(storage).as_posix()
        weights = self._add(outputs.checkpoint(self.opened.jobs[name], *chosen, place))
        return self._predict(weights, chosen.sha256, split, self.opened.plan.ensemble.views)

    def prediction(self, name: str, split: str, views: Views) -> Target:
        found = self.best(name)
        return self._predict(self.training(name), found.sha256 if found else None, split, views)

    def ensemble(self, split: str) -> Target:
        plan, which = self.opened.plan, self.splits
        members = [self.member(name, split) for name in plan.ensemble.members]
        fitted = self._weights() if self.fits else None
        return self._add(outputs.ensemble(plan.name, split, members, split == which.main, fitted))

    def comparison(self, split: str) -> Target:
        plan, jobs = self.opened.plan, self.opened.jobs.values()
        floors = [self.prediction(job.name, split, plan.ensemble.views) for job in jobs if job.is_floor]
        return self._add(outputs.comparison(plan, self.ensemble(split), floors))

    def _weights(self) -> Target:
        plan = self.opened.plan
        return self._add(outputs.weights(plan, self.catalogue, [self.member(n, "val") for n in plan.ensemble.members]))

    def _soft_labels(self, job: Job, teacher: str) -> Target:
        return self._add(inputs.soft_labels(job, self.training(teacher), self.catalogue, self.one))

    def _labels_by(self, job: Job) -> Target:
        predictions = [self.prediction(name, "test", self.opened.plan.ensemble.views) for name in job.labellers]
        return self._add(inputs.pseudo_labels(job, predictions))

    def _predict(self, weights: Target, sha256: str | None, split: str, views: Views) -> Target:
        return self._add(outputs.prediction(weights, sha256, split, views, self.catalogue, self.one))

    def _add(self, target: Target) -> Target:
        return self.found.setdefault(target.name, target)
