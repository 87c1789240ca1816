"""The tasks of a run: what each does, needs and takes. The driver starts them, the forecast counts what they cost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from aliprod.catalogue.catalogue import Catalogue
from aliprod.orchestration.scheduler import Share
from aliprod.plan.graph import Job
from aliprod.plan.schema import Cluster

Kind = Literal["train", "predict", "soft_labels", "pseudo_labels", "hashes"]


@dataclass(frozen=True)
class Step:
    """A task, but for how it is started.

    Attributes:
        job: whose training it is, whose weights predict, or for whom an input is made.
        of: the split that is predicted; the teacher whose soft labels are made.
        needs, share: as of `aliprod.orchestration.scheduler.Task`.
    """

    name: str
    kind: Kind
    job: str
    needs: tuple[str, ...]
    share: Share
    of: str = ""


@dataclass(frozen=True)
class Splits:
    """Which images are predicted: ``main`` makes the submission, ``scored`` (where labels are known) the errors."""

    main: str
    scored: str | None

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(split for split in (self.main, self.scored) if split))


def splits(catalogue: Catalogue, score: Literal["auto", "val"] = "auto") -> Splits:
    """Test, and val where the labels of test are not known, or val is asked for; val alone where there is no test."""
    labelled = len(catalogue.test) and catalogue.test_labels is not None and score == "auto"
    scored = "test" if labelled else ("val" if len(catalogue.val) else None)
    return Splits("test" if len(catalogue.test) else "val", scored)


def training(jobs: Mapping[str, Job], todo: Sequence[str], which: Splits, cluster: Cluster, gpu: bool) -> list[Step]:
    """What is unfinished, in the order of ``todo``, each member's predictions behind it: needs before who needs them.

    Args:
        todo: unfinished jobs, the longest remaining path first.
        gpu: whether a rank takes one.
    """
    found: dict[str, Step] = {}
    for name in todo:
        for step in _leading_to(jobs[name], cluster, gpu):
            found.setdefault(step.name, step)
        if jobs[name].member:
            for split in which.all:
                step = prediction(name, split, cluster, gpu)
                found.setdefault(step.name, step)
    return list(found.values())


def prediction(job: str, split: str, cluster: Cluster, gpu: bool) -> Step:
    """A split, predicted with the best weights of a job, once it is trained."""
    return Step(f"{job} {split}", "predict", job, (job,), one(cluster, gpu), split)


def ranks(cluster: Cluster, gpu: bool) -> Share:
    """Of a training: all its ranks together."""
    return Share(cluster.workers * cluster.cpus_per_worker, cluster.workers if gpu else 0)


def one(cluster: Cluster, gpu: bool) -> Share:
    """Of a task that runs a network."""
    return Share(cluster.cpus_per_worker, 1 if gpu else 0)


def store_name(sha256: str, split: str, views: str) -> str:
    """The folder of what weights predict on a split, below ``probabilities`` of their job."""
    return f"{sha256[:16]}-{split}" + ("" if views == "ten_crop" else f"-{views}")


def _leading_to(job: Job, cluster: Cluster, gpu: bool) -> Iterator[Step]:
    """What a job learns from, and the job. Its inputs need tasks ``LABELLER test``."""
    stage, made = job.stage, list[Step]()
    for teacher in stage.teachers:
        name = f"{job.name} soft labels of {teacher}"
        made.append(Step(name, "soft_labels", job.name, (teacher,), one(cluster, gpu), teacher))
    if stage.pseudo_labels is not None:
        labellers = stage.pseudo_labels.by
        yield from (prediction(labeller, "test", cluster, gpu) for labeller in labellers)
        needs = tuple(f"{labeller} test" for labeller in labellers)
        made.append(Step(f"{job.name} pseudo labels", "pseudo_labels", job.name, needs, Share(1, 0)))
    if stage.duplicates != "keep":
        made.append(Step(f"{job.name} hashes", "hashes", job.name, (), one(cluster, gpu=False)))
    yield from made
    yield Step(job.name, "train", job.name, (*job.parents, *(step.name for step in made)), ranks(cluster, gpu))
