"""A checked plan where it runs: its catalogue's fingerprint, its jobs and their keys."""

from dataclasses import dataclass

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue
from aliprod.plan import graph
from aliprod.plan.graph import Job
from aliprod.plan.places import Places, catalogue_path
from aliprod.plan.schema import Plan


@dataclass(frozen=True)
class Request:
    """A checked plan, the text of its file, and where it runs."""

    plan: Plan
    text: str
    places: Places


def open_jobs(request: Request) -> tuple[dict[str, Job], str]:
    """The jobs of a plan; without keys, and with a note that says so, where the catalogue is not there yet.

    Raises:
        Refused: what is there is no catalogue.
    """
    catalogue, note = open_catalogue(request)
    return jobs_of(request.plan, catalogue), note


def open_catalogue(request: Request) -> tuple[Catalogue | None, str]:
    """The catalogue of a plan; None, and a note that says what follows, where it is not there yet.

    Raises:
        Refused: what is there is no catalogue.
    """
    path = catalogue_path(request.plan, request.places)
    if path.exists():
        return sources.read(path), ""
    cure = "`run` would refuse" if request.plan.catalogue.path else "the first run renders it"
    return None, f"There is no catalogue at {path}, so the jobs have no keys: {cure}."


def jobs_of(plan: Plan, catalogue: Catalogue | None) -> dict[str, Job]:
    """The jobs of a plan on a catalogue; without keys where there is none."""
    if catalogue is None:
        return graph.jobs(plan, None)
    return graph.jobs(plan, catalogue.fingerprint, catalogue.tree_fingerprint)
