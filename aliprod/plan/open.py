"""A checked plan where it runs: its catalogue, its jobs and their keys."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.sources import Reading
from aliprod.errors import Refused
from aliprod.plan.jobs import Job, jobs_of
from aliprod.plan.places import Places, catalogue_path
from aliprod.plan.schema import Cluster, Plan
from aliprod.store import commit, epochs
from aliprod.store.layout import HELD_OUT, METRICS, WEIGHTS, job_place


@dataclass(frozen=True)
class Request:
    """A checked plan, the text of its file, and where it runs."""

    plan: Plan
    text: str
    places: Places

    @property
    def reading(self) -> Reading:
        """How the catalogue is read; what is held out of it is kept in the storage path, once for all nodes."""
        says = self.plan.catalogue
        links = Path(says.links) if says.links else None
        return Reading(dict(says.columns.items()), says.val, says.seed, links, self.places.storage / HELD_OUT)


@dataclass(frozen=True)
class Opened(Request):
    """A request with its jobs; without a catalogue where that is not there yet, and then without keys."""

    catalogue: Catalogue | None
    jobs: Mapping[str, Job]

    @property
    def folder(self) -> Path:
        """The plan's own, for what people open."""
        return self.places.of(self.plan)

    @property
    def note(self) -> str:
        """What a person should know about a catalogue that is not there; may be empty."""
        if self.catalogue is not None:
            return ""
        cure = "`run` would refuse" if self.plan.catalogue.path else "the first run renders it"
        path = catalogue_path(self.plan, self.places)
        return f"There is no catalogue at {path}, so the jobs have no keys: {cure}."

    def with_cluster(self, cluster: Cluster) -> "Opened":
        """The same with another [cluster]; no key depends on it."""
        return replace(self, plan=self.plan.model_copy(update={"cluster": cluster}))

    def read_catalogue(self) -> Catalogue:
        """The catalogue. Refused: it is not there."""
        if self.catalogue is None:
            raise Refused(self.note, self.plan.name)
        return self.catalogue

    def job_folder(self, name: str) -> Path:
        """Where a job keeps all it has. ValueError: it has no key, since its catalogue is not there."""
        if (key := self.jobs[name].key) is None:
            raise ValueError(f"{name} has no key: its catalogue is not there")
        return self.places.storage / job_place(name, key)

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a job's committed weights, the last thing that it writes; None where it is not finished."""
        return None if self.jobs[name].key is None else commit.read(self.job_folder(name) / WEIGHTS)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of a job's metrics.jsonl, one an epoch; none before it has begun."""
        return [] if self.jobs[name].key is None else epochs.read(self.job_folder(name) / METRICS)


def open_plan(request: Request) -> Opened:
    """Read a plan's catalogue, where it is there, and find its jobs. Refused: what is there is no catalogue."""
    path, plan = catalogue_path(request.plan, request.places), request.plan
    catalogue = sources.read(path, request.reading) if path.exists() else None
    prints = (catalogue.fingerprint, catalogue.tree_fingerprint) if catalogue else (None, "")
    return Opened(plan, request.text, request.places, catalogue, jobs_of(plan, *prints))
