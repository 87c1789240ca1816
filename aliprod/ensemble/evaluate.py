"""The errors of a submission, or of a folder of probabilities, against labels."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aliprod.catalogue import tables
from aliprod.catalogue.annotations import class_number, rows
from aliprod.ensemble.guesses import read_predictions
from aliprod.errors import Refused, listing
from aliprod.inference.metrics import score
from aliprod.inference.probabilities import STEM, open_store
from aliprod.store import commit
from aliprod.store.layout import PREDICTIONS


def evaluate(predictions: Path, labels: Path) -> dict[str, float | int]:
    """Errors of predictions on all images that have a label; predictions of others are left out.

    ``predictions``: submission.csv, an ensemble's folder or a member's probabilities. ``labels``: test_labels.json of a
    catalogue, or a table with the columns id and class_id. Refused: either cannot be read, no image is in both, or a
    labelled image has no prediction.
    """
    ids, predicted = _predictions(predictions)
    known_ids, known = _labels(labels)
    found = score(known.take(pc.index_in(ids, value_set=known_ids)), predicted)
    if found is None:
        advice = "Ids are matched as they are, ending included."
        raise Refused(f"no image of {predictions} has a label in it.", labels, advice)
    missing = known_ids.filter(pc.invert(pc.is_in(known_ids, value_set=ids)))
    if len(missing):
        what = f"has no prediction of {len(missing):,} of the {len(known_ids):,} images of {labels}: "
        what += f"{listing(missing.to_pylist(), 3)}."
        raise Refused(what, predictions, "Every labelled image counts. Add the missing lines, or drop their labels.")
    return found


def fitted_on_these(predictions: Path) -> bool:
    """Whether it is an ensemble whose weights and temperatures were fitted on the images that it predicts: its error
    there is lower than on others."""
    record = commit.read(predictions) or {} if predictions.is_dir() else {}
    return record.get("split") == "val" and any("temperature" in one for one in record.get("members", ()))


def _predictions(path: Path) -> tuple[pa.StringArray, np.ndarray]:
    advice = "Give submission.csv, PLAN/ensemble or a member's store."
    if not path.exists():
        raise Refused("there is no such file or folder.", path, advice)
    if not path.is_dir():
        return _csv(path, "predicted")
    if (path / PREDICTIONS).exists():
        return read_predictions(path)
    if not (path / f"{STEM}-00000.npy").exists():
        raise Refused("holds neither an ensemble nor probabilities.", path, advice)
    store = open_store(path)
    return store.ids, store.predicted()


def _labels(path: Path) -> tuple[pa.StringArray, pa.Int64Array]:
    if path.suffix != ".json":
        ids, numbers = _csv(path, "class_id")
        return ids, pa.array(numbers, pa.int64())
    said = [row for row in rows(path) if isinstance(row, dict)]
    names = pa.array([str(row.get("image_id", row.get("id"))) for row in said], pa.string())
    known = pa.array([class_number(row.get("class_id", row.get("category_id"))) for row in said], pa.int64())
    return names.filter(known.is_valid()), known.drop_null()


def _csv(path: Path, column: str) -> tuple[pa.StringArray, np.ndarray]:
    """The images of a table with the columns id and ``column``, and the class id of each."""
    _, header = next(tables.cells_of(path, None), (0, ()))
    if not {"id", column} <= set(header):
        raise Refused(f"has no columns id and {column}.", path, f"Its first line is {listing(header or ['empty'])}.")
    numbers: dict[str, int] = {}
    for line, (name, said) in tables.cells_of(path, ["id", column]):
        where, number = f"{path}, line {line}", class_number(said)
        if number is None:
            raise Refused(f'{column} "{said}" is no class id.', where, "Class ids are whole numbers from 0.")
        if name in numbers:
            raise Refused(f"has the image {name} twice.", where, "Keep one line for each image.")
        numbers[name] = number
    return pa.array(numbers.keys(), pa.string()), np.array(list(numbers.values()), np.int64)
