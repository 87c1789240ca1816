"""Which checkpoint of each member the ensemble takes: what its alias in MLflow marks, else its best."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from aliprod.build.graph import best
from aliprod.errors import Unreachable
from aliprod.plan.open import Opened
from aliprod.store import commit
from aliprod.store.layout import WEIGHTS
from aliprod.store.lineage import MEMBERS, members
from aliprod.tracking.registry import Choice, Registry


def choose(opened: Opened, registry: Registry, complete: bool) -> tuple[dict[str, Choice], str]:
    """Read the version that the alias ``member`` of each member marks.

    While MLflow is away the choice last seen counts, at first the best.

    Args:
        opened: whose members are all trained.
        complete: MLflow has all that this run has to send; otherwise it counts as away.
    Returns:
        A choice for each member, and what a person should know about it, or ''.
    Raises:
        Refused: a model has no such alias, or it marks a version that aliprod did not write.
    """
    names, file = opened.plan.ensemble.members, opened.folder / MEMBERS
    try:
        if not complete:
            raise Unreachable("it lacks what this run has yet to send.")
        choices, note = registry.members(names), ""
    except Unreachable as error:
        seen = {name: Choice(**choice) for name, choice in members(opened.folder).items()}
        same = {n: choice for n, choice in seen.items() if n in names and choice.key == opened.jobs[n].key}
        choices = {name: _best(opened, name, registry.name(name)) for name in names} | same
        note = f"MLflow is away ({error.what}) The choice of checkpoints last seen counts, else each job's best."
    commit.write_file(file, json.dumps({name: asdict(choice) for name, choice in choices.items()}, indent=1))
    others = [name for name, choice in choices.items() if choice.key != opened.jobs[name].key]
    if others:
        note = f"{note} Chosen from another state of the plan: {', '.join(others)}.".strip()
    return choices, note


def origin(opened: Opened, choices: Mapping[str, Choice], key: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What a submission was made of, as `aliprod trace` shows it.

    Args:
        key: of the ensemble. result: top1_error and split.
    """
    plan, catalogue = opened.plan, opened.read_catalogue()
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


def _best(opened: Opened, name: str, model: str) -> Choice:
    """The best checkpoint of a finished job, as the storage path has it."""
    found, record = best(opened, name), opened.record(name) or {}
    if found is None:
        raise ValueError(f"{name} is not trained, {WEIGHTS} are missing")
    return Choice(model, None, found.key, found.sha256, int(record.get("best_epoch", -1)), "")
