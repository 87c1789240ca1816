"""Top-1 errors of a model on the validation images, exact over ranks: each image once."""

import numpy as np
import torch
import torch.distributed as dist

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import Feed
from aliprod.inference.metrics import mean_class_error
from aliprod.inference.predict import predict
from aliprod.models.classifier import Classifier
from aliprod.recipe import Stage
from aliprod.store.epochs import TOP1


def top1_errors(model: Classifier, catalogue: Catalogue, stage: Stage, feed: Feed) -> dict[str, float]:
    """Mean over classes and over images of the centre crop's top-1 error; empty without validation images."""
    if not len(catalogue.val):
        return {}
    was_training = model.training
    model.eval()
    predicted = np.zeros(len(catalogue.val), dtype=np.int64)
    for rows, probabilities in predict(model, catalogue.val, stage.resize, stage.crop, "center", feed):
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
