"""What the unfinished rest of a plan takes: bytes on disk and GPU-hours, job by job, without torch.

Left out: metrics, hashes, ids, heads of objectives, copies of a backbone's last block (BBN): a per cent in most plans.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from aliprod.build.graph import targets
from aliprod.build.target import Target, lacking
from aliprod.catalogue import shards
from aliprod.forecast.rates import branches
from aliprod.forecast.seconds import UNKNOWN, Estimates
from aliprod.forecast.simulate import STARTING_SECONDS
from aliprod.plan import networks
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened

_CHECKPOINTS = 2  # that a job keeps while it trains
_SOFT_LABELS = 64  # classes of an image that soft labels keep: an int32 and a float16 each
_MOMENTS = {"sgd": 1, "adamw": 2, "lamb": 2, "lion": 1, "muon": 1}  # that an optimizer keeps of each weight


@dataclass(frozen=True)
class Demand:
    """NaN is what nobody knows: a network that is not in the list, a rate that nobody has measured.

    Attributes:
        todo: what is to be made.
        kept: bytes that stay in the storage folder, by job; "": of the whole plan.
        resume: bytes of the checkpoints of a job while it trains.
        cache: bytes of a prepared catalogue on the own disk of each machine.
        gpu_hours: with the fewest ranks, by job; where jobs run on CPUs, hours of ranks.
    """

    todo: Mapping[str, Target]
    kept: Mapping[str, float]
    resume: Mapping[str, float]
    cache: int
    gpu_hours: Mapping[str, float]


def demand(opened: Opened) -> Demand:
    """Count what a run would make.

    Args:
        opened: with its catalogue.
    """
    todo = lacking(targets(opened, gpu=True), opened.places.storage)
    estimates, resume = Estimates(opened), dict[str, float]()
    kept, hours = defaultdict[str, float](float), defaultdict[str, float](float)
    for target in todo.values():
        owner = target.job.name if target.job else ""
        kept[owner] += _bytes(target, opened)
        trains = target.kind == "training"
        seconds = estimates.known(target, target.floor) + (STARTING_SECONDS if trains else 0)
        hours[owner] += seconds * target.floor * target.resources.gpus / 3600
        if trains:
            resume[owner] = _CHECKPOINTS * _state(target.owner, opened)
    catalogue, cache = opened.read_catalogue(), 0
    if catalogue.prepared:
        splits = shards.manifest(catalogue.root).record.shards.values()
        cache = sum(size for split in splits for _, size in split)
    return Demand(todo, kept, resume, cache, hours)


def _bytes(target: Target, opened: Opened) -> float:
    """What a target leaves in the storage folder, MLflow's copy of weights included where that is there."""
    catalogue, seen = opened.read_catalogue(), target.cost.seen
    match target.kind:
        case "training":
            both = target.owner.stage.epochs > 1 and len(catalogue.val) > 0  # best and last
            return (1 + both) * (2 if opened.places.artifacts else 1) * _weights(target.owner, opened)
        case "pretrained":
            return _backbone(str((target.facts or {})["network"]))
        case "prediction":
            return 2 * seen * catalogue.num_classes
        case "soft_labels":
            return 6 * seen * min(_SOFT_LABELS, catalogue.num_classes)
        case "ensemble":
            return 4 * target.needs["members"][0].cost.seen * catalogue.num_classes
    return 0


def _state(job: Job, opened: Opened) -> float:
    """A resume checkpoint: the weights, the best so far, their average, and the optimizer's."""
    stage, weights = job.stage, _weights(job, opened)
    if stage.soup:
        return 0
    trained = weights if stage.trains == "all" else weights - _backbone(job.network)
    return weights * (2 + (stage.ema is not None)) + trained * _MOMENTS[stage.optimizer.name]


def _weights(job: Job, opened: Opened) -> float:
    found = networks.facts(job.network)
    features = found.features if found else UNKNOWN
    return _backbone(job.network) + 4 * features * branches(job) * opened.read_catalogue().num_classes


def _backbone(network: str) -> float:
    found = networks.facts(network)
    return 1000 * found.kilobytes if found else UNKNOWN
