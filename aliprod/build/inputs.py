"""What is made for a training, as targets: pretrained weights, hashes, kept rows, soft labels, pseudo labels."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from aliprod.build.target import Cost, Made, Resources, Site, Target, powers_of_two
from aliprod.catalogue.catalogue import Catalogue, Integers
from aliprod.errors import Refused
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.recipe import PerClass, Stage
from aliprod.store.keys import key_of
from aliprod.store.layout import KEPT, job_place
from aliprod.store.resumable import SHARD_ROWS, ResumableRows

UNKNOWN = Cost(known=False)


def pretrained(network: str) -> Target:
    """A network's ImageNet weights, which cannot always be had: fetched before anything is started."""
    facts = {"kind": "pretrained", "network": network}
    place = f"pretrained/{network}"
    return Target("pretrained", f"{network} weights", facts, place, _fetch, cost=UNKNOWN, first=True)


def hashes(catalogue: Catalogue, resources: Resources) -> Target:
    """The hashes of all training images, once for a catalogue."""
    facts = {"kind": "hashes", "catalogue": catalogue.fingerprint}
    place = f"hashes/{catalogue.fingerprint}"
    return Target("hashes", "hashes", facts, place, _hash, cost=UNKNOWN, resources=Resources(resources.cpus, 0))


def kept_rows(job: Job, hashed: Target, start: Target | None, resources: Resources) -> Target:
    """The training images that a job's filter of duplicates leaves, judged by the weights that it starts from."""
    needs = {"hashes": (hashed,)} | ({"start": (start,)} if start else {})
    return Target(
        "kept_rows",
        f"{job.name} kept rows",
        {"kind": "kept_rows", "job": job.key},
        f"{job_place(job.name, str(job.key))}/{KEPT}",
        _filter,
        needs,
        resources=resources,
        job=job,
    )


def soft_labels(job: Job, teacher: Target, catalogue: Catalogue, resources: Resources) -> Target:
    """A teacher's soft labels of the images of a job; shared by jobs of the same images."""
    images = _images(job.stage)
    facts = {"kind": "soft_labels", "teacher": teacher.key, "images": images}
    count = int(images_of(job.stage, catalogue).sum())
    return Target(
        "soft_labels",
        f"{teacher.name} soft labels of {'all images' if images == 'all' else key_of(images)[:8]}",
        facts,
        f"{job_place(teacher.name, str(teacher.key))}/soft_labels/{key_of(facts)[:16]}",
        _teach,
        {"teacher": (teacher,)},
        Cost(teacher.job, seen=count),
        resources,
        world_sizes=powers_of_two(-(-count // SHARD_ROWS)),
        job=job,
    )


def pseudo_labels(job: Job, predictions: Sequence[Target]) -> Target:
    """Labels of test images, by what other jobs predict."""
    return Target(
        "pseudo_labels",
        f"{job.name} pseudo labels",
        {"kind": "pseudo_labels", "job": job.key},
        f"{job_place(job.name, str(job.key))}/pseudo_labels",
        _label,
        {"predictions": tuple(predictions)},
        job=job,
    )


def _images(stage: Stage) -> Any:
    """Which training images a teacher looks at; a filter of duplicates may choose any of them."""
    if stage.duplicates != "keep" or stage.images == "all":
        return "all"
    return {"images": stage.images.model_dump(), "seed": stage.seed}


def _fetch(target: Target, site: Site) -> Made:
    from aliprod.models.weights import fetch_pretrained

    fetch_pretrained(target.name.removesuffix(" weights"), target.folder(site.storage))
    return ()


def _hash(target: Target, site: Site) -> Made:
    from aliprod.data.duplicates import write_hashes

    processes = site.cluster.threads
    images = site.read().train
    write_hashes(target.folder(site.storage), images, processes if processes > 1 else 0)
    return ()


def _filter(target: Target, site: Site) -> Made:
    from aliprod.inference.deduplicate import write_kept_rows

    [hashed], start = target.needs["hashes"], target.needs.get("start")
    parent = start[0].folder(site.storage) if start else None
    rule, processes = target.owner.stage.duplicates, site.cluster.loader_processes
    if rule == "keep":
        raise ValueError(f"{target.owner.name} filters no duplicates")
    catalogue, folder = site.read(), target.folder(site.storage)
    write_kept_rows(folder, rule, catalogue, hashed.folder(site.storage), parent, processes)
    return ()


def _teach(target: Target, site: Site) -> Made:
    import torch
    from torch import Tensor

    from aliprod.data.training_set import base_rows, write_soft_labels
    from aliprod.inference.predict import predicted, ready

    torch.set_num_threads(site.cluster.threads)
    [teacher] = target.needs["teacher"]
    catalogue, stage = site.read(), target.owner.stage
    images = catalogue.train if _images(stage) == "all" else catalogue.train.take(base_rows(catalogue, stage))
    model = ready(teacher.folder(site.storage), site.cluster.loader_processes)

    def blocks(missing: Integers) -> Iterator[Tensor]:
        yield from predicted(model, images.take(missing), "center")

    record, classes = {"job": teacher.name, "key": teacher.key}, np.asarray(model.classes.ids)
    rows = ResumableRows(target.folder(site.storage), images.ids, classes, record, SHARD_ROWS)
    write_soft_labels(rows, blocks, site.part)
    return ()


def _label(target: Target, site: Site) -> Made:
    from aliprod.data.training_set import write_pseudo_labels
    from aliprod.ensemble.add import confident
    from aliprod.inference import probabilities

    recipe = target.owner.stage.pseudo_labels
    if recipe is None:
        raise ValueError(f"{target.owner.name} takes no pseudo labels")
    predictions = target.needs["predictions"]
    opened = [probabilities.open_store(need.folder(site.storage)) for need in predictions]
    labels = confident(opened, recipe.threshold, recipe.per_class)
    record = {"labellers": {need.job.name: need.job.key for need in predictions if need.job}}
    write_pseudo_labels(target.folder(site.storage), *labels, record)
    return ()


def check_labellers(opened: Opened) -> None:
    """Refuse what would score a model on the very images that it was given labels of.

    Raises:
        Refused: there are no test images, or the plan's errors would be those on test.
    """
    asked = [job.name for job in opened.jobs.values() if job.labellers]
    if not asked:
        return
    catalogue, where = opened.read_catalogue(), f"plan {opened.plan.name}, {asked[0]}"
    if not len(catalogue.test):
        raise Refused("takes pseudo labels of test images, of which there are none.", where, "Leave pseudo_labels out.")
    if catalogue.test_labels is not None and opened.plan.ensemble.score == "auto":
        what = "trains on test images, by their pseudo labels, and the plan's errors would be those on test."
        raise Refused(what, where, 'Say score = "val" in [ensemble].')


def images_of(stage: Stage, catalogue: Catalogue) -> Integers:
    """Images of each class that a stage trains on, at most; pseudo-labelled ones stand behind."""
    counts = catalogue.class_counts
    if isinstance(stage.images, PerClass):
        counts = np.minimum(counts, stage.images.per_class)
    if stage.pseudo_labels is None:
        return counts
    return np.append(counts, min(len(catalogue.test), stage.pseudo_labels.per_class * catalogue.num_classes))
