"""What comes of the trained members, as targets: predictions, the ensemble and its submission."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aliprod.build.target import Cost, Made, Resources, Site, Target, powers_of_two
from aliprod.catalogue.catalogue import Catalogue, Images, Integers
from aliprod.errors import Failed, Refused
from aliprod.plan.jobs import Job
from aliprod.plan.schema import Plan
from aliprod.recipe import Views
from aliprod.store import commit
from aliprod.store.layout import job_place
from aliprod.store.resumable import shards

if TYPE_CHECKING:
    from aliprod.ensemble.choose import Combination
    from aliprod.inference.probabilities import Probabilities

LEAST_VAL = 5  # images: one in each fold
FITTED, COMPARISON = "weights.json", "comparison.json"


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


def weights(plan: Plan, catalogue: Catalogue, predictions: Sequence[Target]) -> Target:
    """Weights and temperatures of the members, fitted on their predictions of val.

    Raises:
        Refused: val has too few images.
    """
    combine = plan.ensemble.combine
    if (count := len(catalogue.val)) < LEAST_VAL:
        what = f'combine = "{combine}" is fitted on val, which has {count} images, not the {LEAST_VAL} that it takes.'
        advice = 'Say combine = "sum", or hold images back: [catalogue] val = 0.1.'
        raise Refused(what, f"plan {plan.name}, [ensemble]", advice)
    facts = _of_members({"kind": "weights", "combine": combine, "seed": plan.seed}, predictions)
    needs = {"members": tuple(predictions)}
    return Target("weights", "weights", facts, f"{plan.name}/weights", _fit, needs, latest=True)


def ensemble(plan: str, split: str, predictions: Sequence[Target], main: bool, fitted: Target | None = None) -> Target:
    """The sum of the members' probabilities of a split, what it predicts, and its errors.

    Args:
        plan: its name. main: whether it is what people open. fitted: `weights`; None: all alike.
    """
    facts = _of_members({"kind": "ensemble", "split": split}, predictions)
    if facts is not None and fitted is not None:
        facts |= {"weights": fitted.key}
    return Target(
        "ensemble",
        "ensemble" if main else f"ensemble of {split}",
        facts,
        f"{plan}/ensemble" if main else f"{plan}/ensemble-{split}",
        _sum,
        {"members": tuple(predictions), "weights": (fitted,) if fitted else ()},
        goal=True,
        latest=True,
    )


def comparison(plan: Plan, of: Target, floors: Sequence[Target]) -> Target:
    """What an ensemble, of labelled images, is worth: `aliprod.ensemble.compare`, and its best member.

    Args:
        floors: predictions of the same images that it is to beat.
    """
    asked = {"seed": plan.seed, "views": plan.ensemble.views, "combine": plan.ensemble.combine}
    facts: dict[str, Any] | None = None
    if of.facts is not None:
        facts = {"kind": "comparison", "ensemble": of.key, "split": of.facts["split"], **asked}
        facts = _of_members(facts, floors, "floors") if floors else facts
    needs = {"ensemble": (of,), "floors": tuple(floors)}
    return Target("comparison", "comparison", facts, f"{plan.name}/comparison", _compare, needs, goal=True, latest=True)


def compared(storage: Path, graph: Mapping[str, Target]) -> dict[str, Any] | None:
    """What `comparison` found; None where no labels are known."""
    found = graph.get("comparison")
    return None if found is None else _read(found.folder(storage) / COMPARISON)


def _read(file: Path) -> Any:
    commit.fetch(file.parent)
    return json.loads(file.read_text(encoding="utf-8"))


def _of_members(facts: dict[str, Any], predictions: Sequence[Target], role: str = "members") -> dict[str, Any] | None:
    """The facts with those of each member; None while one is not known."""
    if not all(prediction.facts for prediction in predictions):
        return None
    return facts | {role: {prediction.owner.name: dict(prediction.facts or {}) for prediction in predictions}}


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
    known = catalogue.labels(split)

    def blocks(rows: Integers) -> Iterator[Tensor]:
        yield from predicted(model, images.take(rows), record["views"])

    labels = None if known is None else probabilities.as_labels(known, catalogue.classes)
    folder, ids = target.folder(site.storage), model.classes.ids
    probabilities.write(folder, images.ids, ids, blocks, labels, record, part=site.part)
    return ()


def _fit(target: Target, site: Site) -> Made:
    from aliprod.ensemble.choose import fit

    facts = target.facts or {}
    found = json.dumps([asdict(one) for one in fit(_members(target, site), facts["combine"], facts["seed"])], indent=1)
    _keep(target, site, FITTED, found)
    return ()


def _sum(target: Target, site: Site) -> Made:
    from aliprod.ensemble.add import write_ensemble

    record, members = {"target": target.key, "split": (target.facts or {})["split"]}, _members(target, site)
    fitted = _combinations(target, site)[-1]
    write_ensemble(target.folder(site.storage), members, fitted.weights, record, temperatures=fitted.temperatures)
    return ()


def _compare(target: Target, site: Site) -> Made:
    from aliprod.ensemble.compare import compare
    from aliprod.models.weights import describe

    [summed], facts = target.needs["ensemble"], target.facts or {}
    combinations = _combinations(summed, site)
    if facts["split"] != "val":
        combinations = combinations[-1:]
    found = compare(_members(summed, site), combinations, facts["seed"], _members(target, site, "floors"))
    errors, by = {name: one["top1_error"] for name, one in found["members"].items()}, (facts["split"], facts["views"])
    if facts["split"] != "val":  # what a training says of val, of the centre crop
        weights = {need.owner.name: need.needs["weights"][0] for need in summed.needs["members"]}
        known = {name: describe(one.folder(site.storage))[0].top1_error for name, one in weights.items()}
        errors, by = (errors, by) if None in known.values() else (known, ("val", "center"))
    best = {"member": min(errors, key=errors.__getitem__), "split": by[0], "views": by[1]}
    told = {key: facts[key] for key in ("split", "views", "combine")} | {"best": best} | found
    _keep(target, site, COMPARISON, json.dumps(told, indent=1))
    return ()


def _members(target: Target, site: Site, role: str = "members") -> "list[Probabilities]":
    from aliprod.inference.probabilities import open_store

    return [open_store(need.folder(site.storage)) for need in target.needs[role]]


def _combinations(target: Target, site: Site) -> "list[Combination]":
    """Those of an ensemble: fitted without each fold in turn, and on all; the plain sum alone where none is fitted."""
    from aliprod.ensemble.choose import Combination

    for fitted in target.needs["weights"]:
        found = _read(fitted.folder(site.storage) / FITTED)
        return [Combination(tuple(one["weights"]), tuple(one["temperatures"])) for one in found]
    return [Combination((1,) * len(target.needs["members"]))]


def _keep(target: Target, site: Site, file: str, text: str) -> None:
    """Commit a target that is one file, in place of what it was."""
    record = {"target": target.key}

    def fill(new: Path) -> None:
        (new / file).write_text(text, encoding="utf-8")

    commit.replace(target.folder(site.storage), fill, record)
