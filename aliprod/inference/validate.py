"""Top-1 errors of a model on the validation images, exact over ranks: each image once."""

from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import Feed
from aliprod.inference.metrics import mean_class_error
from aliprod.inference.predict import BATCH, predict
from aliprod.models.classifier import Classifier
from aliprod.recipe import Stage
from aliprod.store.epochs import TOP1


def nothing() -> None:
    """Do nothing."""


def top1_errors(
    model: Classifier, catalogue: Catalogue, stage: Stage, feed: Feed, between: Callable[[], None] = nothing
) -> dict[str, float]:
    """Mean over classes and over images of the centre crop's top-1 error; empty without validation images.

    Args:
        between: called as often on each rank, before each block of images.
    """
    if not len(catalogue.val):
        return {}
    was_training = model.training
    model.eval()
    predicted = np.zeros(len(catalogue.val), dtype=np.int64)
    blocks = predict(model, catalogue.val, stage.resize, stage.crop, "center", feed)
    for _ in range(0, len(catalogue.val), BATCH["center"] * feed.world_size):
        between()
        for rows, probabilities in islice(blocks, 1):  # the last may be another rank's
            predicted[rows] = probabilities.argmax(dim=1).numpy()
    model.train(was_training)
    everywhere = torch.from_numpy(predicted).to(feed.device)
    if feed.world_size > 1:
        dist.all_reduce(everywhere)  # each rank filled its own rows, the others are zero
    labels = torch.from_numpy(catalogue.val.labels)
    error = mean_class_error(labels, everywhere.cpu(), catalogue.num_classes)
    return {
        TOP1: float(error),
        "val/top1_error_per_image": float((labels != everywhere.cpu()).double().mean()),
    }
