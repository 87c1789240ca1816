"""Which checkpoint of each member the ensemble takes, and where its weights and probabilities lie."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aliprod import commit
from aliprod.errors import Unreachable
from aliprod.models.weights import MODEL
from aliprod.orchestration.gather import Prediction, Splits
from aliprod.orchestration.prepare import Prepared
from aliprod.tracking.registry import Choice, Registry


def choose(prepared: Prepared, registry: Registry) -> tuple[dict[str, Choice], str]:
    """The version that the alias ``member`` marks; while MLflow is away the choice last seen, at first the best.

    Returns:
        A choice for each member, and what a person should know about it, or ''.
    Raises:
        Refused: a model has no such alias, or it marks a version that aliprod did not write.
    """
    names, file = prepared.plan.ensemble.members, prepared.folder / "members.json"
    try:
        choices = registry.members(names)
    except Unreachable as error:
        seen = {name: Choice(**choice) for name, choice in _read(file).items() if name in names}
        best = {name: best_of(prepared, name, registry.name(name)) for name in names}
        return best | seen, f"MLflow is away ({error.what}) The choice of checkpoints last seen counts."
    commit.write_file(file, json.dumps({name: asdict(choice) for name, choice in choices.items()}, indent=1))
    others = [name for name, choice in choices.items() if choice.key != prepared.jobs[name].key]
    return choices, f"Chosen from another state of the plan: {', '.join(others)}." if others else ""


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
    store = f"{choice.sha256[:16]}-{split}" + ("" if views == "ten_crop" else f"-{views}")
    if choice.key != job.key:  # the same weights may have predicted the images of another catalogue
        store += f"-{prepared.catalogue.fingerprint[:8]}"
    weights = _weights(prepared, folder, choice)
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


def _weights(prepared: Prepared, folder: Path, choice: Choice) -> Path:
    """Where the weights of a choice lie, or, where they are in MLflow alone, where they are to be brought."""
    for kind in ("weights", "last"):
        if commit.read(folder / kind) is not None and commit.file_digest(folder / kind, MODEL) == choice.sha256:
            return folder / kind
    return prepared.folder / "chosen" / choice.sha256[:16]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
