"""A submission, or a folder of probabilities, against labels."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aliprod.catalogue.annotations import rows, utf8
from aliprod.catalogue.identity import class_number
from aliprod.ensemble.add import read_predictions
from aliprod.ensemble.score import aligned, predicted_classes, score
from aliprod.errors import Refused, listing
from aliprod.inference.probabilities import STEM, open_store


def evaluate(predictions: Path, labels: Path) -> dict[str, float | int]:
    """Errors of predictions on all images that have a label; predictions of others are left out.

    Args:
        predictions: submission.csv (id, predicted), an ensemble's folder or a member's probabilities.
        labels: test_labels.json of a catalogue, or a CSV with the columns id and class_id.
    Returns:
        top1_error (mean over classes), top1_error_per_image, images, classes.
    Raises:
        Refused: neither can be read, they have no image in common, or a labelled image has no prediction.
    """
    ids, predicted = _predictions(predictions)
    known_ids, known = _labels(labels)
    found = score(aligned(ids, known_ids, known), predicted)
    if found is None:
        raise Refused(
            f"no image of {predictions} has a label in it.", labels, "Ids are matched as they are, ending included."
        )
    missing = known_ids.filter(pc.invert(pc.is_in(known_ids, value_set=ids)))
    if len(missing):
        what = f"has no prediction of {len(missing):,} of the {len(known_ids):,} images of {labels}: "
        what += f"{listing(missing.to_pylist(), 3)}."
        raise Refused(what, predictions, "Every labelled image counts. Add the missing lines, or drop their labels.")
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
    numbers: dict[str, int] = {}
    for line, name, written in _lines(path, column):
        number = class_number(written)
        if number is None:
            raise Refused(f'{column} "{written}" is no class id.', f"{path}, line {line}")
        if name in numbers:
            raise Refused(f"has the image {name} twice.", f"{path}, line {line}", "Keep one line for each image.")
        numbers[name] = number
    return pa.array(numbers.keys(), pa.string()), np.array(list(numbers.values()), np.int64)


def _lines(path: Path, column: str) -> Iterator[tuple[int, str, str]]:
    """Number, id and ``column`` of each line."""
    lines = csv.DictReader(io.StringIO(utf8(path), newline=""), restval="", strict=True)
    try:
        if not {"id", column} <= set(lines.fieldnames or ()):
            header = listing(lines.fieldnames or ["empty"])
            raise Refused(f"has no columns id and {column}.", path, f"Its first line is {header}.")
        for row in lines:
            yield lines.line_num, row["id"], row[column]
    except csv.Error as error:
        raise Refused(
            f"is not CSV: {error}.", f"{path}, line {lines.reader.line_num}", "Quote it as RFC 4180 says."
        ) from error
