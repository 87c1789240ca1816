"""How fast a plan's work goes: what its jobs have told of themselves, else what `aliprod benchmark` has measured.

Never a count of operations: measured training throughput of these backbones differs by five at equal GMACs
(timm's published training benchmarks).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, get_args

from aliprod.inference.predict import Views
from aliprod.orchestration.prepare import Prepared
from aliprod.plan import ledger
from aliprod.plan.graph import Job
from aliprod.plan.options import needs
from aliprod.recipe import LearningRate, Stage
from aliprod.store import commit, epochs
from aliprod.training.speed import Part

FILE = "benchmark.json"

# A step's cost hangs on none of these. What is not listed stays in a digest: a setting too many there costs a second
# measurement, one too few a wrong forecast. Rates so low that no measurement diverges.
_SAME_COST: dict[str, Any] = {
    "start": None,
    "pretrained": False,
    "images": "all",
    "duplicates": "keep",
    "pseudo_labels": None,
    "sampler": "shuffled",
    "lr": LearningRate(backbone=1e-6, heads=1e-6),
    "epochs": 1,
    "seed": 0,
}


@dataclass(frozen=True)
class Rate:
    """Images a second, of all ranks together, and where that was seen.

    Attributes:
        source: a job's name, or "benchmark".
    """

    images_per_second: float
    ranks: int
    device: str
    source: str


@dataclass(frozen=True)
class Piece:
    """Work that several jobs share: measured once.

    Attributes:
        jobs: their names; ``job`` is the first of them.
    """

    part: Part | Views
    digest: str
    job: Job
    jobs: tuple[str, ...]


def bare(stage: Stage) -> Stage:
    """A stage without what does not change what a step of it costs: what is measured, and what a digest covers."""
    return stage.model_copy(update=_SAME_COST)


def pieces(prepared: Prepared, part: Part) -> Iterator[Piece]:
    """The distinct work of a plan's jobs, finished or not; the predictions too, where whole trainings are asked for."""
    trained = [job for job in prepared.jobs.values() if not job.soup]
    yield from _distinct(prepared, part, trained)
    if part == "train":
        yield from _distinct(prepared, "center", prepared.jobs.values())
        if prepared.plan.ensemble.views != "center":
            predicting = predictors(prepared)
            jobs = (job for job in prepared.jobs.values() if job.name in predicting)
            yield from _distinct(prepared, prepared.plan.ensemble.views, jobs)


def predictors(prepared: Prepared) -> set[str]:
    """Names of the jobs that predict whole splits: members, and those who label test images."""
    labels = (job.stage.pseudo_labels for job in prepared.jobs.values())
    return {*prepared.plan.ensemble.members, *(name for recipe in labels if recipe for name in recipe.by)}


def branches(job: Job) -> int:
    """Of the network that a job's objective trains, each of which predicts."""
    return needs(job.stage.objective.name).branches


def keep(prepared: Prepared, piece: Piece, measured: Mapping[str, Any]) -> None:
    """Keep what a piece was measured at, in place of what was known of it.

    Args:
        measured: JSON: ``images_per_second`` of one rank, ``device``, and whatever else a person may want to know.
    """
    known = _known(prepared)
    known[piece.digest] = {"part": piece.part, "jobs": piece.jobs, **measured}
    commit.write_file(prepared.folder / FILE, json.dumps(known, indent=1))


class Rates:
    """The rates that are known of a plan's work."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self._known = prepared, _known(prepared)
        self._told = {name: rate for name, job in prepared.jobs.items() if (rate := _told(prepared, job))}
        self._alike = {_digest(prepared, "train", prepared.jobs[name]): rate for name, rate in self._told.items()}

    def training(self, job: Job) -> Rate | None:
        """What the job itself has told, else one of the plan with the same digest, else the benchmark."""
        if job.name in self._told:
            return self._told[job.name]
        digest = _digest(self._prepared, "train", job)
        return self._alike.get(digest) or self._measured(digest)

    def predicting(self, job: Job, views: Views) -> Rate | None:
        """The benchmark; of the centre view, else, what training does: it is no slower to look at an image alone."""
        rate = self._measured(_digest(self._prepared, views, job))
        return self.training(job) if rate is None and views == "center" and not job.soup else rate

    def _measured(self, digest: str) -> Rate | None:
        entry = self._known.get(digest)
        return None if entry is None else Rate(entry["images_per_second"], 1, entry["device"], "benchmark")


def _distinct(prepared: Prepared, part: Part | Views, jobs: Iterable[Job]) -> Iterator[Piece]:
    by_digest: dict[str, list[Job]] = {}
    for job in jobs:
        by_digest.setdefault(_digest(prepared, part, job), []).append(job)
    for digest, same in by_digest.items():
        yield Piece(part, digest, same[0], tuple(job.name for job in same))


def _digest(prepared: Prepared, part: Part | Views, job: Job) -> str:
    cluster = prepared.plan.cluster
    facts: dict[str, Any] = {
        "part": part,
        "network": job.network,
        "classes": prepared.catalogue.num_classes,
        "threads": cluster.cpus_per_worker,
        "loader_processes": cluster.loader_processes,
    }
    if part in get_args(Views):
        facts |= {"resize": job.stage.resize, "crop": job.stage.crop, "branches": branches(job)}
    else:
        stage = bare(job.stage).model_dump(mode="json")
        facts |= {"stage": stage, "compile": cluster.compile, "exact": cluster.exact}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _told(prepared: Prepared, job: Job) -> Rate | None:
    """What a job's metrics say; the median, since the first epoch warms up and a disturbed one is slow."""
    folder = prepared.job_folder(job.name)
    lines = [line for line in epochs.read(folder / epochs.FILE) if line.get("speed/images_per_second")]
    if not lines:
        return None
    record = ledger.finished(prepared.places.storage, job)
    place = (record or {}).get("environment", {})
    return Rate(
        images_per_second=median(line["speed/images_per_second"] for line in lines),
        ranks=int(lines[-1].get("speed/ranks") or place.get("world_size") or prepared.plan.cluster.workers),
        device=lines[-1].get("device") or place.get("device") or "a device not told",
        source=job.name,
    )


def _known(prepared: Prepared) -> dict[str, Any]:
    try:
        known = json.loads((prepared.folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
