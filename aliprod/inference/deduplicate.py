"""Filtering duplicates for a stage: near hashes, confirmed by the parent's embeddings, judged by the stage's rule.

Packs on white are alike to a hash, so a pair counts only where the parent's embeddings agree too;
without a parent the hash alone decides. Images that the rule drops are listed by id, each with the first of its group,
which may be dropped itself.
"""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional

from aliprod.catalogue.catalogue import Catalogue, Images
from aliprod.data import duplicates
from aliprod.data.augment import normalise
from aliprod.data.loader import squared_batches
from aliprod.inference.predict import ready
from aliprod.store import commit

log = logging.getLogger(__name__)
_HASH_BITS, _COSINE = 6, 0.95
_BATCH = 64


def write_kept_rows(
    folder: Path, rule: duplicates.Rule, catalogue: Catalogue, hashed: Path, start: Path | None, processes: int
) -> None:
    """Commit the rows of ``catalogue.train`` that stay, ascending, by the folders of its hashes and of the parent's
    weights."""
    images = catalogue.train
    groups = duplicates.hashed_groups(hashed, len(images), _HASH_BITS)
    belief = np.zeros(len(images))
    if start is not None:
        rows = np.flatnonzero(np.bincount(groups, minlength=len(images))[groups] > 1)
        embeddings, belief[rows] = _seen_by(start, images.take(rows), processes)
        groups[rows] = duplicates.confirmed(groups[rows], rows, embeddings, _COSINE)
    by_id = pc.sort_indices(images.ids).to_numpy()
    rank = np.argsort(by_id)  # whose id comes first stays, and names its group, whatever the file's order
    kept = duplicates.kept(groups, images.labels, rule, rank=rank, belief=belief)
    dropped = by_id[~np.isin(by_id, kept)]
    log.info("%d of %d training images are dropped as duplicates.", len(dropped), len(images))
    first = np.full(len(images), len(images))
    np.minimum.at(first, groups, rank)
    like = by_id[first[groups[dropped]]]
    listed = pa.table({"image_id": images.ids.take(pa.array(dropped)), "like": images.ids.take(pa.array(like))})

    def fill(staging: Path) -> None:
        np.save(staging / "kept.npy", kept)
        pq.write_table(listed, staging / "dropped.parquet")

    commit.write(folder, fill, {"kept": len(kept), "dropped": len(dropped), "rule": rule})


@torch.inference_mode()
def _seen_by(start: Path, images: Images, processes: int) -> tuple[Tensor, np.ndarray]:
    """The parent's view of images: embeddings (n, C) of unit length, and the probability (n,) of each label."""
    parent = ready(start, processes)
    model, feed = parent.model, parent.feed
    embeddings, belief = [torch.empty(0, model.classifier.in_features)], [torch.empty(0)]
    for rows, pixels in squared_batches(images, parent.config.crop, feed, _BATCH):
        features = model.features(normalise(pixels, feed.mean, feed.std).contiguous(memory_format=torch.channels_last))
        embeddings.append(functional.normalize(model.pool(features).float(), dim=1).cpu())
        labels = torch.from_numpy(images.labels[rows]).to(feed.device)
        belief.append(model.classify(features).float().softmax(dim=1).gather(1, labels[:, None])[:, 0].cpu())
    return torch.cat(embeddings), torch.cat(belief).double().numpy()
