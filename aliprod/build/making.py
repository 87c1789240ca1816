"""How each target is made: plain functions of the target and its site, in any process, without Ray."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aliprod.build.target import Site, Target
from aliprod.catalogue.catalogue import Images
from aliprod.errors import Failed
from aliprod.recipe import Inputs, Stage, TrainingJob
from aliprod.store import commit
from aliprod.store.lineage import COMPARISON
from aliprod.store.resumable import SHARD_ROWS, ResumableRows

if TYPE_CHECKING:
    from aliprod.ensemble.choose import Combination
    from aliprod.inference.probabilities import Probabilities

_FITTED = "weights.json"


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


def train(target: Target, site: Site) -> None:
    """Train on this rank."""
    from aliprod.training.job import run

    job, folder = target.owner, target.folder(site.storage).parent
    inputs = inputs_of(target, site)
    work = TrainingJob(job.name, str(job.key), job.network, job.stage, folder, inputs, site.cluster)
    for _ in run(work, site.read(), site.stop):
        pass


def fetch(target: Target, site: Site) -> None:
    """A network's pretrained weights."""
    from aliprod.models.weights import fetch_pretrained

    fetch_pretrained((target.facts or {})["network"], target.folder(site.storage))


def bring(target: Target, _: Site) -> None:
    """A checkpoint of MLflow's: the driver has done so, before anything that needs it is made."""
    raise Failed("is not in the storage path, and MLflow did not bring it.", target.name, "Choose another version.")


def hash_images(target: Target, site: Site) -> None:
    """Hashes of the training images."""
    from aliprod.data.duplicates import write_hashes

    processes = site.cluster.threads
    write_hashes(target.folder(site.storage), site.read().train, processes if processes > 1 else 0)


def filter_rows(target: Target, site: Site) -> None:
    """The rows that a filter of duplicates leaves."""
    from aliprod.inference.deduplicate import write_kept_rows

    [hashed], start = target.needs["hashes"], [need.folder(site.storage) for need in target.needs["start"]]
    rule, processes = target.owner.stage.duplicates, site.cluster.loader_processes
    if rule == "keep":
        raise ValueError(f"{target.owner.name} filters no duplicates")
    catalogue, parent = site.read(), start[0] if start else None
    write_kept_rows(target.folder(site.storage), rule, catalogue, hashed.folder(site.storage), parent, processes)


def shown_to_teachers(stage: Stage) -> Any:
    """Which training images a teacher looks at, as facts; a filter of duplicates may choose any of them."""
    if stage.duplicates != "keep" or stage.images == "all":
        return "all"
    return {"images": stage.images.model_dump(), "seed": stage.seed}


def teach(target: Target, site: Site) -> None:
    """A teacher's soft labels."""
    import torch

    from aliprod.data.training_set import base_rows, write_soft_labels
    from aliprod.inference.predict import predicted, ready

    torch.set_num_threads(site.cluster.threads)
    [teacher] = target.needs["teacher"]
    catalogue, stage = site.read(), target.owner.stage
    all_of_them = shown_to_teachers(stage) == "all"
    images = catalogue.train if all_of_them else catalogue.train.take(base_rows(catalogue, stage))
    model = ready(teacher.folder(site.storage), site.cluster.loader_processes)
    record, classes = {"job": teacher.name, "key": teacher.key}, np.asarray(model.classes.ids)
    rows = ResumableRows(target.folder(site.storage), images.ids, classes, record, SHARD_ROWS)
    write_soft_labels(rows, lambda missing: predicted(model, images.take(missing), "center"), site.part)


def label(target: Target, site: Site) -> None:
    """Pseudo labels, of what others predict."""
    from aliprod.data.training_set import write_pseudo_labels
    from aliprod.ensemble.add import confident

    recipe = target.owner.stage.pseudo_labels
    if recipe is None:
        raise ValueError(f"{target.owner.name} takes no pseudo labels")
    labels = confident(_stores(target, site, "predictions"), recipe.threshold, recipe.per_class)
    record = {"labellers": {need.owner.name: need.owner.key for need in target.needs["predictions"]}}
    write_pseudo_labels(target.folder(site.storage), *labels, record)


def look(target: Target, site: Site) -> None:
    """Features of a split, by weights that a training begins with."""
    import torch

    from aliprod.data.loader import Feed
    from aliprod.data.training_set import write_features
    from aliprod.inference.predict import own_device, pooled, precision
    from aliprod.models import weights
    from aliprod.models.classifier import Classifier, normalisation

    torch.set_num_threads(site.cluster.threads)
    catalogue, job, record = site.read(), target.owner, dict(target.facts or {})
    stage, device = job.stage, own_device()
    images: Images = getattr(catalogue, record["split"])
    model = Classifier(job.network, catalogue.num_classes, crop=stage.crop)
    weights.load_inputs(model, inputs_of(target, site), catalogue.classes.tolist())
    model = model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    processes, dtype = site.cluster.loader_processes, precision(device, stage.precision)
    feed = Feed(device, *normalisation(job.network), processes=processes, dtype=dtype)
    folder, size = target.folder(site.storage), (stage.resize, stage.crop)
    write_features(folder, images, lambda rows: pooled(model, images.take(rows), *size, feed), record, site.part)


def predict(target: Target, site: Site) -> None:
    """Probabilities of a split."""
    import torch

    from aliprod.inference import probabilities
    from aliprod.inference.predict import predicted, ready

    torch.set_num_threads(site.cluster.threads)
    catalogue, record = site.read(), dict(target.facts or {})
    [weights] = target.needs["weights"]
    model = ready(weights.folder(site.storage), site.cluster.loader_processes)
    images: Images = getattr(catalogue, record["split"])
    known = catalogue.labels(record["split"])
    labels = None if known is None else probabilities.as_labels(known, catalogue.classes)
    folder, ids, views = target.folder(site.storage), model.classes.ids, record["views"]
    probabilities.write(
        folder, images.ids, ids, lambda rows: predicted(model, images.take(rows), views), labels, record, part=site.part
    )


def fit(target: Target, site: Site) -> None:
    """Weights and temperatures of the members."""
    from aliprod.ensemble import choose

    facts = target.facts or {}
    found = choose.fit(_stores(target, site), facts["combine"], facts["seed"])
    _keep(target, site, _FITTED, [asdict(one) for one in found])


def add_up(target: Target, site: Site) -> None:
    """The ensemble of a split."""
    from aliprod.ensemble.add import write_ensemble

    record, members = {"target": target.key, "split": (target.facts or {})["split"]}, _stores(target, site)
    fitted = _combinations(target, site)[-1]
    write_ensemble(target.folder(site.storage), members, fitted.weights, record, temperatures=fitted.temperatures)


def compare(target: Target, site: Site) -> None:
    """What an ensemble of labelled images is worth."""
    from aliprod.ensemble import compare as ensembles
    from aliprod.models.weights import describe

    [summed], facts = target.needs["ensemble"], target.facts or {}
    combinations = _combinations(summed, site)
    if facts["split"] != "val":
        combinations = combinations[-1:]
    found = ensembles.compare(_stores(summed, site), combinations, facts["seed"], _stores(target, site, "floors"))
    errors, by = {name: one["top1_error"] for name, one in found["members"].items()}, (facts["split"], facts["views"])
    if facts["split"] != "val":  # what a training says of val, of the centre crop
        weights = {need.owner.name: need.needs["weights"][0] for need in summed.needs["members"]}
        known = {name: describe(one.folder(site.storage))[0].top1_error for name, one in weights.items()}
        errors, by = (errors, by) if None in known.values() else (known, ("val", "center"))
    best = {"member": min(errors, key=errors.__getitem__), "split": by[0], "views": by[1]}
    _keep(target, site, COMPARISON, {key: facts[key] for key in ("split", "views", "combine")} | {"best": best} | found)


def _stores(target: Target, site: Site, role: str = "members") -> "list[Probabilities]":
    from aliprod.inference.probabilities import open_store

    return [open_store(need.folder(site.storage)) for need in target.needs[role]]


def _combinations(target: Target, site: Site) -> "list[Combination]":
    """Those of an ensemble: fitted without each fold in turn, and on all; the plain sum alone where none is fitted."""
    from aliprod.ensemble.choose import Combination

    for fitted in target.needs["weights"]:
        folder = fitted.folder(site.storage)
        commit.fetch(folder)
        found = json.loads((folder / _FITTED).read_text(encoding="utf-8"))
        return [Combination(tuple(one["weights"]), tuple(one["temperatures"])) for one in found]
    return [Combination((1,) * len(target.needs["members"]))]


def _keep(target: Target, site: Site, file: str, content: Any) -> None:
    """Commit a target that is one file of JSON, in place of what it was."""
    text = json.dumps(content, indent=1)

    def fill(new: Path) -> None:
        (new / file).write_text(text, encoding="utf-8")

    commit.replace(target.folder(site.storage), fill, {"target": target.key})
