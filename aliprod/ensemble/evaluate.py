"""A submission, or a folder of probabilities, against labels."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa

from aliprod.data.annotations import rows, utf8
from aliprod.data.identity import class_number
from aliprod.ensemble.add import read_predictions
from aliprod.ensemble.score import aligned, predicted_classes, score
from aliprod.errors import Refused
from aliprod.inference.probabilities import STEM, open_store


def evaluate(predictions: Path, labels: Path) -> dict[str, float | int]:
    """Errors of predictions; images without a label are left out.

    Args:
        predictions: submission.csv (id, predicted), an ensemble's folder or a member's probabilities.
        labels: test_labels.json of a catalogue, or a CSV with the columns id and class_id.
    Returns:
        top1_error (mean over classes), top1_error_per_image, images, classes.
    Raises:
        Refused: neither can be read, or they have no image in common.
    """
    ids, predicted = _predictions(predictions)
    known_ids, known = _labels(labels)
    found = score(aligned(ids, known_ids, known), predicted)
    if found is None:
        raise Refused(
            f"no image of {predictions} has a label in it.", labels, "Ids are matched as they are, ending included."
        )
    return found


def _predictions(path: Path) -> tuple[pa.StringArray, np.ndarray]:
    if not path.exists():
        raise Refused("there is no such file or folder.", path)
    if path.is_dir() and (path / "predictions.parquet").exists():
        ensemble = read_predictions(path)
        return ensemble.ids, ensemble.predicted.numpy()
    if path.is_dir():
        if not (path / f"{STEM}-00000.npy").exists():
            raise Refused(
                "holds neither an ensemble nor probabilities.", path, "Give PLAN/ensemble or a member's store."
            )
        store = open_store(path)
        return store.ids, predicted_classes(store)
    return _csv(path, "predicted")


def _labels(path: Path) -> tuple[pa.StringArray, pa.Int64Array]:
    if path.suffix != ".json":
        ids, numbers = _csv(path, "class_id")
        return ids, pa.array(numbers, pa.int64())
    names: list[str] = []
    class_ids: list[int] = []
    for row in rows(path):
        if isinstance(row, dict) and (number := class_number(row.get("class_id", row.get("category_id")))) is not None:
            names.append(str(row.get("image_id", row.get("id"))))
            class_ids.append(number)
    return pa.array(names, pa.string()), pa.array(class_ids, pa.int64())


def _csv(path: Path, column: str) -> tuple[pa.StringArray, np.ndarray]:
    lines = csv.DictReader(utf8(path).splitlines())
    if not {"id", column} <= set(lines.fieldnames or ()):
        raise Refused(
            f"has no columns id and {column}.", path, f"Its first line is {','.join(lines.fieldnames or ['empty'])}."
        )
    ids, numbers = [], []
    for line in lines:
        number = class_number(line[column])
        if number is None:
            raise Refused(f'{column} "{line[column]}" is no class id.', f"{path}, line {lines.line_num}")
        ids.append(line["id"])
        numbers.append(number)
    return pa.array(ids, pa.string()), np.asarray(numbers, dtype=np.int64)
