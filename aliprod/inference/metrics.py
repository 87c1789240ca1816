"""Top-1 error per image and per class, and top-k error: the metrics of a classifier."""

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor


def class_errors(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Top-1 error of each class: (num_classes,) float64 in 0 to 1, NaN for a class without images.

    Args:
        labels: (N,) int64, rows of the class list; images with a label below 0 (unknown) are left out. ValueError: one
            is not below num_classes.
        predicted: (N,) int64; anything but the label is an error, a number outside the class list too.
    """
    known = labels >= 0
    labels, predicted = labels[known], predicted[known]
    if len(labels) and int(labels.max()) >= num_classes:
        raise ValueError(f"label {int(labels.max())} is outside a list of {num_classes} classes")
    images = torch.bincount(labels, minlength=num_classes).double()
    wrong = torch.bincount(labels[predicted != labels], minlength=num_classes).double()
    return wrong / images  # 0/0 is NaN


def mean_class_error(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Mean of `class_errors` over the classes that have images: the metric of AliProducts, () float64 in 0 to 1; NaN
    where no image has a label."""
    return class_errors(labels, predicted, num_classes).nanmean()


def top_k_error(labels: Tensor, scores: Tensor, k: int) -> Tensor:
    """Share of images whose label (N,) is not among the k highest scores (N, K); ties go to the first class, and a NaN
    at the label is an error. () float64; images with a label below 0 are left out, NaN where there are no others."""
    known = labels >= 0
    labels, scores = labels[known, None], scores[known]
    own = scores.gather(1, labels)
    later = torch.arange(scores.shape[1], device=scores.device) >= labels
    behind = (scores < own) | ((scores == own) & later)  # the label itself is among them, unless it is NaN
    rank = scores.shape[1] - behind.sum(dim=1)  # from 0
    return (rank >= k).double().mean()


def score(labels: pa.Int64Array, predicted: NDArray[np.int64]) -> dict[str, float | int] | None:
    """Errors of predicted class ids (N,): top1_error (mean over classes), top1_error_per_image, images, classes. Labels
    (N,) that are null (unknown) are left out; None where all are."""
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
