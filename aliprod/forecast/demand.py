"""What the unfinished rest of a plan takes of disks and GPUs, job by job, without torch.

Left out: ids, metrics, hashes, heads of objectives, copies of a backbone's last block (BBN): a per cent of most plans.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from aliprod.build.graph import TINY, targets
from aliprod.build.target import Target, lacking
from aliprod.catalogue import shards
from aliprod.catalogue.catalogue import Catalogue
from aliprod.forecast.rates import UNKNOWN, Estimates
from aliprod.forecast.simulate import STARTING_SECONDS
from aliprod.plan import networks
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.recipe.options import needs

_MOMENTS = {"sgd": 1, "adamw": 2, "lamb": 2, "lion": 1, "muon": 1}  # that an optimizer keeps of each weight
_NOBODY_KNOWS = networks.Network(UNKNOWN, UNKNOWN, ())


@dataclass(frozen=True)
class Demand:
    """NaN: a network that is not in the list, a rate that nobody has measured. Of jobs; under "" the whole plan's."""

    todo: Mapping[str, Target]  # what is to be made
    kept: Mapping[str, float]  # bytes that stay in the storage folder
    resume: Mapping[str, float]  # bytes of a job's two checkpoints, while it trains
    cache: int  # bytes of a prepared catalogue on the own disk of each machine
    gpu_hours: Mapping[str, float]  # with the fewest ranks; where jobs run on CPUs, hours of ranks

    @property
    def kinds(self) -> dict[str, int]:
        """How many targets of each kind are to be made."""
        counts = Counter(target.kind.replace("_", " ") for target in self.todo.values())
        return dict(sorted(counts.items()))

    @property
    def total(self) -> dict[str, float | None]:
        """What `plan --json` says of the whole plan."""
        kept, resume, hours = self.kept.values(), max(self.resume.values(), default=0), self.gpu_hours.values()
        disk = {"bytes": known(sum(kept)), "checkpoint_bytes": known(resume), "cache_bytes": self.cache}
        return {**disk, "gpu_hours": known(sum(hours))}


def known(number: float) -> float | None:
    """None of NaN, which JSON has not."""
    return None if math.isnan(number) else number


def demand(opened: Opened) -> Demand:
    """Count what a run would make. Refused: there is no catalogue."""
    catalogue, todo = opened.read_catalogue(), lacking(targets(opened, gpu=True), opened.places.storage)
    estimates, resume = Estimates(opened), dict[str, float]()
    kept, hours = defaultdict[str, float](float), defaultdict[str, float](float)
    for target in todo.values():
        name, seconds = target.job.name if target.job else "", estimates.known(target, target.floor)
        if target.kind == "training":
            resume[name], seconds = 2 * _state(target.owner, catalogue), seconds + STARTING_SECONDS
        kept[name] += _bytes(target, opened)
        hours[name] += seconds * target.floor * target.resources.gpus / 3600
    splits = shards.manifest(catalogue.root).record.shards.values() if catalogue.prepared else ()
    return Demand(todo, kept, resume, sum(size for split in splits for _, size in split), hours)


def _bytes(target: Target, opened: Opened) -> float:
    """What a target leaves in the storage folder, MLflow's copy of weights included where that is there."""
    catalogue = opened.read_catalogue()
    seen, classes = target.cost.seen, catalogue.num_classes
    match target.kind:
        case "training":
            both = target.owner.stage.epochs > 1 and len(catalogue.val) > 0  # the best and the last
            return (1 + both) * (2 if opened.places.artifacts else 1) * sum(_weights(target.owner, catalogue))
        case "pretrained":
            return 1000 * (networks.facts(str((target.facts or {})["network"])) or _NOBODY_KNOWS).kilobytes
        case "prediction":
            return 2 * seen * classes
        case "soft_labels":  # an int32 and a float16 of 64 classes: aliprod.data.training_set
            return 6 * seen * min(64, classes)
        case "features":
            return 2 * seen * (networks.facts(target.owner.network) or _NOBODY_KNOWS).features
        case "ensemble":
            return 4 * target.needs["members"][0].cost.seen * classes
        case kind if kind in TINY:
            return 0
    raise ValueError(f"nobody says how many bytes a {target.kind} takes")


def _state(job: Job, catalogue: Catalogue) -> float:
    """A resume checkpoint: the weights, the best so far, their average, and what the optimizer keeps."""
    backbone, head = _weights(job, catalogue)
    trained = backbone + head if job.stage.trains == "all" else head
    weights = (2 + (job.stage.ema is not None)) * (backbone + head)
    return weights + _MOMENTS[job.stage.optimizer.name] * trained if job.stage.is_trained else 0


def _weights(job: Job, catalogue: Catalogue) -> tuple[float, float]:
    """Bytes of a job's backbone, and of its classifier."""
    found = networks.facts(job.network) or _NOBODY_KNOWS
    asked = needs(job.stage.objective.name, job.stage.objective.options)
    head = 4 * asked.branches * asked.centres * catalogue.num_classes
    head = 2 * len(catalogue.train) if job.stage.neighbours else head
    return 1000 * found.kilobytes, found.features * head
