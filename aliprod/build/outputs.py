"""What comes of the trained members, as targets: predictions, the ensemble and its submission."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aliprod.build.target import Cost, Made, Resources, Site, Target, powers_of_two
from aliprod.catalogue.catalogue import Catalogue, Images, Integers
from aliprod.errors import Failed
from aliprod.plan.jobs import Job
from aliprod.recipe import Views
from aliprod.store.layout import job_place
from aliprod.store.resumable import shards


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


def checkpoint(job: Job, key: str, sha256: str, place: str) -> Target:
    """Weights that a person has chosen, of a job or of an earlier state of it.

    Args:
        key: of the job that trained them. place: where they lie, or are to be brought from MLflow.
    """
    facts = {"kind": "checkpoint", "key": key, "weights": sha256}
    return Target("checkpoint", f"{job.name} {sha256[:12]}", facts, place, _brought, job=job)


def prediction(
    weights: Target, sha256: str | None, split: str, views: Views, catalogue: Catalogue, resources: Resources
) -> Target:
    """Probabilities of the images of a split.

    Args:
        weights: a training, or a chosen checkpoint. sha256: of its model.safetensors; None before it is there.
    """
    job, facts, place = weights.owner, None, None
    if sha256 is not None:
        key = weights.facts["key"] if weights.kind == "checkpoint" and weights.facts else str(job.key)
        facts = {"job": job.name, "key": key, "weights": sha256, "split": split, "views": views}
        facts |= {"catalogue": catalogue.fingerprint}
        store = f"{sha256[:16]}-{split}" + ("" if views == "ten_crop" else f"-{views}")
        if key != job.key:  # the same weights may have predicted the images of another catalogue
            store += f"-{catalogue.fingerprint[:8]}"
        place = f"{job_place(job.name, key)}/probabilities/{store}"
    return Target(
        "prediction",
        f"{weights.name} {split}",
        facts,
        place,
        _predict,
        {"weights": (weights,)},
        Cost(job, seen=len(getattr(catalogue, split)), views=views),
        resources,
        world_sizes=powers_of_two(shards(len(getattr(catalogue, split)), catalogue.num_classes)),
        job=job,
    )


def ensemble(plan: str, split: str, predictions: Sequence[Target], main: bool) -> Target:
    """The sum of the members' probabilities of a split, what it predicts, and its errors.

    Args:
        plan: its name. main: whether it is what people open.
    """
    facts: dict[str, Any] | None = None
    if all(prediction.facts for prediction in predictions):
        members = {prediction.owner.name: dict(prediction.facts or {}) for prediction in predictions}
        facts = {"kind": "ensemble", "split": split, "members": members}
    return Target(
        "ensemble",
        "ensemble" if main else f"ensemble of {split}",
        facts,
        f"{plan}/ensemble" if main else f"{plan}/ensemble-{split}",
        _sum,
        {"members": tuple(predictions)},
        goal=True,
        latest=True,
    )


def scores(folder: Path) -> dict[str, Any]:
    """Top-1 errors of a committed ensemble: of ``ensemble``, and of each of the ``members`` by job."""
    return dict(json.loads((folder / "scores.json").read_text(encoding="utf-8")))


def _brought(target: Target, _: Site) -> Made:
    raise Failed("is not in the storage path, and MLflow did not bring it.", target.name, "Choose another version.")


def _predict(target: Target, site: Site) -> Made:
    import torch
    from torch import Tensor

    from aliprod.inference import probabilities
    from aliprod.inference.predict import predicted, ready

    torch.set_num_threads(site.cluster.threads)
    record = dict(target.facts or {})
    catalogue, split = site.read(), record["split"]
    [weights] = target.needs["weights"]
    model = ready(weights.folder(site.storage), site.cluster.loader_processes)
    images: Images = getattr(catalogue, split)
    known = catalogue.test_labels if split == "test" else images.labels

    def blocks(rows: Integers) -> Iterator[Tensor]:
        yield from predicted(model, images.take(rows), record["views"])

    labels = None if known is None else probabilities.as_labels(known, catalogue.classes)
    folder, ids = target.folder(site.storage), model.classes.ids
    probabilities.write(folder, images.ids, ids, blocks, labels, record, part=site.part)
    return ()


def _sum(target: Target, site: Site) -> Made:
    from aliprod.ensemble.add import write_ensemble
    from aliprod.inference.probabilities import open_store

    facts = target.facts or {}
    stores = [open_store(need.folder(site.storage)) for need in target.needs["members"]]
    record = {"target": target.key, "split": facts["split"]}
    write_ensemble(target.folder(site.storage), stores, record=record)
    return ()
