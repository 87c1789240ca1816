"""Which checkpoint of each member the ensemble takes, and where its weights and probabilities lie."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aliprod.errors import Refused, Unreachable
from aliprod.models.weights import MODEL
from aliprod.orchestration.gather import Prediction
from aliprod.orchestration.prepare import Prepared
from aliprod.orchestration.steps import Splits, store_name
from aliprod.plan.places import Places
from aliprod.plan.schema import Plan
from aliprod.store import commit
from aliprod.tracking.registry import Choice, Registry

_FILE = "members.json"


def choose(prepared: Prepared, registry: Registry, complete: bool) -> tuple[dict[str, Choice], str]:
    """The version that the alias ``member`` marks; while MLflow is away the choice last seen, at first the best.

    Args:
        complete: MLflow has all that this run has to tell; otherwise it counts as away.
    Returns:
        A choice for each member, and what a person should know about it, or ''.
    Raises:
        Refused: a model has no such alias, or it marks a version that aliprod did not write.
    """
    names, file = prepared.plan.ensemble.members, prepared.folder / _FILE
    try:
        if not complete:
            raise Unreachable("it lacks what this run has yet to tell.")
        choices, note = registry.members(names), ""
    except Unreachable as error:
        best = {name: best_of(prepared, name, registry.name(name)) for name in names}
        seen = {n: c for n, c in _last_seen(file).items() if n in names and c.key == prepared.jobs[n].key}
        choices = best | seen
        note = f"MLflow is away ({error.what}) The choice of checkpoints last seen counts, else each job's best."
    commit.write_file(file, json.dumps({name: asdict(choice) for name, choice in choices.items()}, indent=1))
    others = [name for name, choice in choices.items() if choice.key != prepared.jobs[name].key]
    if others:
        note = f"{note} Chosen from another state of the plan: {', '.join(others)}.".strip()
    return choices, note


def chosen_weights(plan: Plan, places: Places) -> list[Path]:
    """Weights folders of the checkpoints that a plan's ensemble was last made of.

    Raises:
        Refused: there is no ensemble yet.
    """
    folder = places.of(plan)
    choices = _last_seen(folder / _FILE)
    found = [_weights(folder, places.storage / "jobs" / name / choice.key, choice) for name, choice in choices.items()]
    if not found or any(commit.read(weights) is None for weights in found):
        raise Refused("has no ensemble in this storage path yet.", f"plan {plan.name}", "Run the plan first.")
    return found


def best_of(prepared: Prepared, name: str, model: str = "") -> Choice:
    """The best checkpoint of a finished job, as the storage path has it."""
    folder = prepared.job_folder(name) / "weights"
    record = commit.read(folder) or {}
    key = str(prepared.jobs[name].key)
    return Choice(model, None, key, commit.file_digest(folder, MODEL), int(record.get("best_epoch", -1)), "")


def prediction(prepared: Prepared, name: str, choice: Choice, split: str) -> Prediction:
    """What a choice has predicted, or is to predict, on a split."""
    job, views = prepared.jobs[name], prepared.plan.ensemble.views
    folder = prepared.places.storage / "jobs" / job.backbone / job.stage_name / (choice.key or str(job.key))
    store = store_name(choice.sha256, split, views)
    if choice.key != job.key:  # the same weights may have predicted the images of another catalogue
        store += f"-{prepared.catalogue.fingerprint[:8]}"
    weights = _weights(prepared.folder, folder, choice)
    return Prediction(name, choice.key, choice.sha256, weights, split, views, folder / "probabilities" / store)


def ensemble_key(prepared: Prepared, choices: Mapping[str, Choice], which: Splits) -> str:
    """sha256 of what an ensemble hangs on: its members' bytes, their views, the images."""
    facts = {
        "members": {name: choice.sha256 for name, choice in choices.items()},
        "views": prepared.plan.ensemble.views,
        "splits": which.all,
        "catalogue": prepared.catalogue.fingerprint,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def origin(prepared: Prepared, choices: Mapping[str, Choice], key: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What a submission was made of, as `aliprod trace` tells it.

    Args:
        key: of the ensemble. result: top1_error and split.
    """
    plan, catalogue = prepared.plan, prepared.catalogue
    return {
        "members": {
            name: {"version": choice.version, "epoch": choice.epoch, "weights": choice.sha256, "key": choice.key}
            for name, choice in choices.items()
        },
        "plan": {"name": plan.name, "sha256": plan.digest, "settings": plan.model_dump(mode="json")},
        "catalogue": {"path": str(catalogue.root), "fingerprint": catalogue.fingerprint},
        "ensemble": key,
        "top1_error": result["top1_error"],
        "split": result["split"],
    }


def _weights(plan_folder: Path, job_folder: Path, choice: Choice) -> Path:
    """Where the weights of a choice lie, or, where they are in MLflow alone, where they are to be brought."""
    for kind in ("weights", "last"):
        there = job_folder / kind
        if commit.read(there) is not None and commit.file_digest(there, MODEL) == choice.sha256:
            return there
    return plan_folder / "chosen" / choice.sha256[:16]


def _last_seen(file: Path) -> dict[str, Choice]:
    try:
        return {name: Choice(**choice) for name, choice in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
