"""Ray tasks at the end of a plan: predict a member's probabilities, and add the members up."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue, Images, Integers
from aliprod.ensemble.add import submission, write_ensemble
from aliprod.ensemble.score import aligned, as_labels, predicted_classes, top1_error
from aliprod.inference import probabilities
from aliprod.inference.predict import Views, predicted, ready
from aliprod.orchestration import remote
from aliprod.orchestration.scheduler import Share
from aliprod.orchestration.steps import Splits
from aliprod.store import commit

_SCORES = "scores.json"


@dataclass(frozen=True)
class Prediction:
    """A member's probabilities on a split: from which weights, where to.

    Attributes:
        sha256: of the weights.
        weights, folder: of the weights and of the store.
    """

    job: str
    key: str
    sha256: str
    weights: Path
    split: str
    views: Views
    folder: Path


def start_prediction(prediction: Prediction, catalogue: Path, share: Share, processes: int) -> Any:
    """Start predicting; the task is named after the job and the split. Resolves to why it failed, or ''.

    Args:
        processes: that read images.
    """
    name, out = f"{prediction.job} {prediction.split}", prediction.folder
    return remote.start(name, share, out, _predict, prediction, catalogue, share.cpus, processes)


def start_sum(members: Mapping[str, Mapping[str, Path]], which: Splits, folder: Path, key: str) -> Any:
    """Start the final task: add the members up, write ensemble, submission and scores. Resolves like a prediction.

    Args:
        members: job -> split -> store.
        folder: the plan's.
        key: of the ensemble, kept beside its scores.
    """
    stores = {name: dict(stores) for name, stores in members.items()}
    return remote.start("ensemble", Share(1, 0), None, _sum, stores, which, folder, key)


def is_done(folder: Path, key: str) -> bool:
    """Whether a plan's folder holds the ensemble of this key, whole."""
    return scores(folder).get("key") == key and commit.read(folder / "ensemble") is not None


def scores(folder: Path) -> dict[str, Any]:
    """Top-1 errors (mean over classes) of the members and the ensemble that a plan's folder holds; {} before."""
    try:
        return dict(json.loads((folder / _SCORES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _predict(prediction: Prediction, catalogue_path: Path, threads: int, processes: int) -> None:
    torch.set_num_threads(threads)
    catalogue = sources.read(catalogue_path)
    member, views = ready(prediction.weights, processes), prediction.views
    images: Images = getattr(catalogue, prediction.split)

    def blocks(rows: Integers) -> Iterator[Tensor]:
        yield from predicted(member, images.take(rows), views)

    record = {
        "job": prediction.job,
        "key": prediction.key,
        "weights": prediction.sha256,
        "split": prediction.split,
        "views": views,
        "catalogue": catalogue.fingerprint,
    }
    labels = _labels(catalogue, prediction.split)
    probabilities.write(prediction.folder, images.ids, member.classes.ids, blocks, labels, record)


def _labels(catalogue: Catalogue, split: str) -> pa.Int64Array | None:
    """Class ids of a split, null where unknown; None where the catalogue says nothing."""
    labels = catalogue.test_labels if split == "test" else getattr(catalogue, split).labels
    return None if labels is None else as_labels(labels, catalogue.classes)


def _sum(members: dict[str, dict[str, Path]], which: Splits, folder: Path, key: str) -> None:
    """Scores are written last: where they name the key, all else is there."""
    found: dict[str, Any] = {"key": key, "members": dict.fromkeys(members), "ensemble": None}
    for split in which.all:
        stores = [probabilities.open_store(stores[split]) for stores in members.values()]
        target = folder / ("ensemble" if split == which.main else f"ensemble-{split}")
        predictions = write_ensemble(target, stores, record={"split": split, "jobs": list(members)})
        if split == "test":
            commit.write_file(folder / "submission.csv", submission(predictions.ids, predictions.predicted))
        if split == which.scored:
            labels = aligned(predictions.ids, stores[0].ids, stores[0].labels)
            found["ensemble"] = top1_error(labels, predictions.predicted.numpy())
            found["members"] = {
                name: top1_error(store.labels, predicted_classes(store))
                for name, store in zip(members, stores, strict=True)
            }
    commit.write_file(folder / _SCORES, json.dumps(found, indent=1))
