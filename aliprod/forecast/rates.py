"""How fast a plan's work goes: what its jobs have reported, else what `aliprod benchmark` has measured.

Never a count of operations: measured training throughput of these backbones differs by five at equal GMACs
(timm's published training benchmarks).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, get_args

from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.recipe import NO_COST, LearningRate, Part, Stage, Views
from aliprod.recipe.options import needs
from aliprod.store import commit, epochs
from aliprod.store.keys import key_of

FILE = "benchmark.json"
FORWARD = 3  # times as fast as training, about, where nobody has measured it

# The cost of a step depends on none of these. What is not listed stays in a digest: a setting too many there costs a
# second measurement, one too few a wrong forecast. Rates so low that no measurement diverges.
_SAME_COST: dict[str, Any] = {name: Stage.model_fields[name].default for name in NO_COST} | {
    "lr": LearningRate(backbone=1e-6, heads=1e-6)
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


def pieces(opened: Opened, part: Part) -> Iterator[Piece]:
    """The distinct work of a plan's jobs, finished or not; the predictions too, where whole trainings are asked for."""
    trained = [job for job in opened.jobs.values() if job.stage.is_trained]
    yield from _distinct(opened, part, trained)
    if part == "train":
        yield from _distinct(opened, "center", opened.jobs.values())
        if opened.plan.ensemble.views != "center":
            predicting = predictors(opened)
            jobs = (job for job in opened.jobs.values() if job.name in predicting)
            yield from _distinct(opened, opened.plan.ensemble.views, jobs)


def predictors(opened: Opened) -> set[str]:
    """Names of the jobs that predict whole splits: members, those who label test images, and floors."""
    labellers = (name for job in opened.jobs.values() for name in job.labellers)
    floors = (job.name for job in opened.jobs.values() if job.is_floor)
    return {*opened.plan.ensemble.members, *labellers, *floors}


def branches(job: Job) -> int:
    """Of the network that a job's objective trains, each of which predicts."""
    return needs(job.stage.objective.name).branches


def keep(opened: Opened, piece: Piece, measured: Mapping[str, Any]) -> None:
    """Keep what a piece was measured at, in place of what was known of it.

    Args:
        measured: JSON: ``images_per_second`` of one rank, ``device``, and whatever else a person may want to know.
    """
    known = _known(opened)
    known[piece.digest] = {"part": piece.part, "jobs": piece.jobs, **measured}
    commit.write_file(opened.folder / FILE, json.dumps(known, indent=1))


class Rates:
    """The rates that are known of a plan's work."""

    def __init__(self, opened: Opened) -> None:
        self._opened, self._known = opened, _known(opened)
        self._reported = {name: rate for name, job in opened.jobs.items() if (rate := _reported(opened, job))}
        self._alike = {_digest(opened, "train", opened.jobs[name]): rate for name, rate in self._reported.items()}

    def training(self, job: Job) -> Rate | None:
        """Find what the job itself has reported, else one of the plan with the same digest, else the benchmark."""
        if job.name in self._reported:
            return self._reported[job.name]
        return self._alike.get(_digest(self._opened, "train", job)) or self._measured(job, "train")

    def predicting(self, job: Job, views: Views) -> Rate | None:
        """The benchmark; of the centre view, else, what training says, whose steps go forward and back."""
        looks = job.stage.is_trained and job.stage.features == "computed"
        rate, trained = self._measured(job, views), self.training(job) if looks else None
        if rate is None and views == "center" and trained is not None:
            return replace(trained, images_per_second=FORWARD * trained.images_per_second)
        return rate

    def _measured(self, job: Job, part: Part | Views) -> Rate | None:
        """The benchmark alone."""
        entry = self._known.get(_digest(self._opened, part, job))
        return None if entry is None else Rate(entry["images_per_second"], 1, entry["device"], "benchmark")


def _distinct(opened: Opened, part: Part | Views, jobs: Iterable[Job]) -> Iterator[Piece]:
    by_digest: dict[str, list[Job]] = {}
    for job in jobs:
        by_digest.setdefault(_digest(opened, part, job), []).append(job)
    for digest, same in by_digest.items():
        yield Piece(part, digest, same[0], tuple(job.name for job in same))


def _digest(opened: Opened, part: Part | Views, job: Job) -> str:
    cluster = opened.plan.cluster
    facts: dict[str, Any] = {
        "part": part,
        "network": job.network,
        "classes": opened.read_catalogue().num_classes,
        "threads": cluster.threads,
        "loader_processes": cluster.loader_processes,
    }
    if part in get_args(Views):
        facts |= {"resize": job.stage.test_view[0], "crop": job.stage.test_view[1], "branches": branches(job)}
    else:
        stage = bare(job.stage).model_dump(mode="json")
        facts |= {"stage": stage, "compile": cluster.compile, "exact": cluster.exact}
    return key_of(facts)


def _reported(opened: Opened, job: Job) -> Rate | None:
    """What a job says of itself: the median of its epochs, since the first one warms up and a disturbed one is slow;
    before the first has ended, its pace."""
    lines = [line for line in opened.metrics(job.name) if line.get("speed/images_per_second")]
    pace = epochs.pace(opened.job_folder(job.name)) if job.key and not lines else None
    if pace is not None:
        return Rate(pace["images_per_second"], pace["ranks"], pace["device"], job.name)
    if not lines:
        return None
    return Rate(
        images_per_second=median(line["speed/images_per_second"] for line in lines),
        ranks=int(lines[-1].get("speed/ranks", 1)),
        device=lines[-1].get("device", "an unknown device"),
        source=job.name,
    )


def _known(opened: Opened) -> dict[str, Any]:
    try:
        known = json.loads((opened.folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
