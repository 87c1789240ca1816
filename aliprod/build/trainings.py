"""A job's training as a target, and the features that it may read. A soup, which trains nothing, is a training too."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aliprod.build.inputs import images_of
from aliprod.build.target import Cost, Made, Metrics, Resources, Site, Target, powers_of_two
from aliprod.catalogue.catalogue import Catalogue, Images, Integers
from aliprod.data.selection import epoch_size
from aliprod.plan.jobs import Job
from aliprod.plan.schema import Cluster
from aliprod.recipe import STATISTICS_BATCHES, Inputs, Stage, options
from aliprod.store.keys import key_of
from aliprod.store.layout import FEATURES, WEIGHTS, job_place, newest_step
from aliprod.store.resumable import SHARD_ROWS


def training(job: Job, needs: Mapping[str, Sequence[Target]], cost: Cost, cluster: Cluster, gpu: bool) -> Target:
    """The training of a job.

    Args:
        gpu: whether a rank takes one.
        needs: by role, the fields of `aliprod.recipe.Inputs`.
    """
    return Target(
        kind="training",
        name=job.name,
        facts=job.facts,
        place=None if job.key is None else f"{job_place(job.name, job.key)}/{WEIGHTS}",
        make=_train,
        needs={role: tuple(targets) for role, targets in needs.items() if targets},
        cost=cost,
        resources=Resources(cluster.threads, 1 if gpu else 0),
        world_sizes=world_sizes(job, cluster),
        job=job,
        goal=True,
    )


def world_sizes(job: Job, cluster: Cluster) -> tuple[int, ...]:
    """The numbers of ranks that a job may have: its shares can be dealt to each; one where nothing is trained."""
    fewest, most = cluster.ranks_of(job.name)
    if not job.stage.is_trained:
        return (1,)
    if job.stage.shares == "ranks":
        return (most,)
    return tuple(size for size in powers_of_two(job.stage.shares) if fewest <= size <= most)


def inputs_of(target: Target, site: Site) -> Inputs:
    """What a training reads beside the catalogue: the folders of what it needs."""
    job, storage = target.owner, site.storage
    folders: dict[str, Any] = {
        role: tuple(need.folder(storage) for need in needs) for role, needs in target.needs.items()
    }
    one = {role: paths[0] for role, paths in folders.items() if role not in ("soup", "teachers", "features")}
    if "pretrained" in one:
        one["pretrained"] /= f"{job.network}.safetensors"
    elif isinstance(job.stage.pretrained, str):
        one["pretrained"] = Path(job.stage.pretrained)
    return Inputs(**folders | one)


def features(
    job: Job, split: str, needs: Mapping[str, Sequence[Target]], catalogue: Catalogue, resources: Resources
) -> Target:
    """Features of a split, by the weights that a job begins with: shared by all jobs that begin with them.

    Args:
        needs: ``start`` or ``pretrained``, where the weights are made by this run.
    """
    known = dict(job.facts or {})
    shared = {"kind": "features", "start": known["parents"].get("start"), "pooling": known.get("pooling")}
    shared |= {name: known[name] for name in ("network", "catalogue")}
    shared |= {name: known["stage"][name] for name in ("pretrained", "resize", "crop", "precision")}
    digest, count = key_of(shared)[:16], len(getattr(catalogue, split))
    return Target(
        "features",
        f"{job.start or job.network} features of {split} {digest[:8]}",
        shared | {"split": split},
        f"{FEATURES}/{digest}/{split}",
        _look,
        {role: tuple(targets) for role, targets in needs.items() if targets},
        Cost(job, seen=count),
        resources,
        world_sizes=powers_of_two(-(-count // SHARD_ROWS)),
        job=job,
    )


def _look(target: Target, site: Site) -> Made:
    import torch
    from torch import Tensor

    from aliprod.data.loader import Feed
    from aliprod.data.training_set import write_features
    from aliprod.inference.predict import pooled, precision
    from aliprod.models import weights
    from aliprod.models.classifier import Classifier, normalisation

    torch.set_num_threads(site.cluster.threads)
    catalogue, job, record = site.read(), target.owner, dict(target.facts or {})
    images: Images = getattr(catalogue, record["split"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Classifier(job.network, catalogue.num_classes, crop=job.stage.crop)
    weights.load_inputs(model, inputs_of(target, site), catalogue.classes.tolist())
    model = model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    processes, dtype = site.cluster.loader_processes, precision(device, job.stage.precision)
    feed = Feed(device, *normalisation(job.network), processes=processes, dtype=dtype)

    def blocks(missing: Integers) -> Iterator[Tensor]:
        yield from pooled(model, images.take(missing), job.stage.resize, job.stage.crop, feed)

    write_features(target.folder(site.storage), images, blocks, record, site.part)
    return ()


def _train(target: Target, site: Site) -> Iterator[Metrics]:
    """Train on this rank; yield the metrics of each epoch."""
    from aliprod.recipe import TrainingJob
    from aliprod.training.job import run

    job, folder = target.owner, target.folder(site.storage).parent
    inputs = inputs_of(target, site)
    work = TrainingJob(job.name, str(job.key), job.network, job.stage, folder, inputs, site.cluster)
    for progress in run(work, site.read(), site.stop):
        if progress.last is not None:
            yield {"epoch": progress.state.epoch, **progress.metrics}


@dataclass(frozen=True)
class Epoch:
    """An epoch of a stage.

    Attributes:
        images: that it trains on as rates count them, steps times batch size.
        seen: images that pass forward alone behind it: each kind of weights on val, norm statistics.
        group: images of one class that stand together in a batch.
    """

    steps: int
    images: int
    seen: int
    group: int


def epoch_of(stage: Stage, catalogue: Catalogue) -> Epoch:
    """Count an epoch of a stage, as its training would.

    Raises:
        Refused: a batch cannot be dealt in groups of one class.
    """
    needs = options.needs(stage.objective.name, stage.objective.options)
    group, size = needs.group, epoch_size(images_of(stage, catalogue), stage.batch_size, needs.group)
    restated = min(STATISTICS_BATCHES, size.steps) * size.groups_per_batch * group
    if stage.features == "cached":
        steps = size.steps if stage.is_trained else 0
        return Epoch(steps, steps * stage.batch_size, 0, group)
    if stage.soup is not None:
        looks = len(stage.soup.of) if stage.soup.greedy and len(catalogue.val) else 1
        return Epoch(0, 0, looks * (restated + len(catalogue.val)), group)
    seen = len(catalogue.val) + (restated + len(catalogue.val) if needs.distorts else 0)
    return Epoch(size.steps, size.steps * stage.batch_size, seen * (1 if stage.ema is None else 2), group)


def cost_of(job: Job, catalogue: Catalogue, folder: Path) -> Cost:
    """What is left of a job's training, from the newest checkpoint in its folder on."""
    epoch, done = epoch_of(job.stage, catalogue), newest_step(folder) or 0
    steps = max(0, job.stage.epochs * epoch.steps - done)
    validations = job.stage.epochs - done // max(1, epoch.steps)
    return Cost(job, trained=steps * job.stage.batch_size, seen=validations * epoch.seen)
