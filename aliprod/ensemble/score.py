"""Top-1 errors of a member, an ensemble or a submission, against labels."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from aliprod.inference.metrics import mean_class_error
from aliprod.inference.probabilities import Probabilities

_ROWS_PER_BLOCK = 1024


def score(labels: pa.Int64Array, predicted: npt.NDArray[np.int64]) -> dict[str, float | int] | None:
    """Count the errors of predicted class ids.

    Args:
        labels: (N,) class ids, null where unknown: left out. predicted: (N,) class ids.
    Returns:
        top1_error (mean over classes), top1_error_per_image, images, classes; None without any label.
    """
    known = labels.is_valid().to_numpy(zero_copy_only=False)
    if not known.any():
        return None
    truth, guess = labels.drop_null().to_numpy(), predicted[known]
    classes, rows = np.unique(np.concatenate([truth, guess]), return_inverse=True)
    places, guessed = torch.from_numpy(rows).split(len(truth))
    return {
        "top1_error": float(mean_class_error(places, guessed, len(classes))),
        "top1_error_per_image": float(np.mean(truth != guess)),
        "images": len(truth),
        "classes": len(np.unique(truth)),
    }


def top1_error(labels: pa.Int64Array, predicted: npt.NDArray[np.int64]) -> float | None:
    """Top-1 error, mean over classes, 0 to 1; None without any label."""
    found = score(labels, predicted)
    return None if found is None else found["top1_error"]


def predicted_classes(member: Probabilities) -> npt.NDArray[np.int64]:
    """Class ids (N,) of each row's highest probability, ties to the first class; a few rows in memory at once."""
    order = np.argsort(member.classes)
    blocks = [
        member.rows(low, min(low + _ROWS_PER_BLOCK, len(member)))[:, order].argmax(axis=1)
        for low in range(0, len(member), _ROWS_PER_BLOCK)
    ]
    return member.classes[order][np.concatenate(blocks)] if blocks else np.empty(0, np.int64)


def aligned(ids: pa.StringArray, others: pa.StringArray, labels: pa.Int64Array) -> pa.Int64Array:
    """The labels of ``others`` in the order of ``ids``, null where an id is not among them."""
    return labels.take(pc.index_in(ids, value_set=others))


def as_labels(labels: Sequence[int] | npt.NDArray[np.int64], classes: npt.NDArray[np.int64]) -> pa.Int64Array:
    """Turn rows of a class list into class ids, null where negative."""
    rows = np.asarray(labels, dtype=np.int64)
    return pa.array(classes[np.maximum(rows, 0)], pa.int64(), mask=rows < 0)
