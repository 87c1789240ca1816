"""How many steps an epoch has: counted from the images of each class, with numpy alone."""

from dataclasses import dataclass

import numpy as np

from aliprod.catalogue.catalogue import Integers
from aliprod.errors import Refused


@dataclass(frozen=True)
class EpochSize:
    """An epoch in batches of groups, each group so many images of one class.

    Attributes:
        groups_per_batch: over all shares.
        steps: whole batches only, since a partial one disturbs the norm layers. Where the images make no whole batch,
            all of them are the only one.
    """

    groups_per_batch: int
    steps: int


def epoch_size(class_counts: Integers, batch_size: int, group: int = 1, shares: int = 1) -> EpochSize:
    """The size of an epoch of images with these counts; the same in every epoch.

    Args:
        class_counts: (K,) training images of each class; a class fills its last group up with images that it has.
        batch_size: images, over all shares of a step.
    Raises:
        Refused: a batch cannot be dealt to the shares in equal parts of whole groups, or there are too few images.
    """
    groups, whole = int((-(-np.asarray(class_counts) // group)).sum()), batch_size // group
    if whole < 1 or whole % shares:
        raise Refused(
            f"batch_size = {batch_size} cannot be dealt to {shares} shares in groups of {group} of one class.",
            advice=f"Make it a multiple of {group * shares}.",
        )
    if groups < shares:
        raise Refused(f"{groups * group} training images are too few for {shares} shares.", advice="Ask for fewer.")
    groups_per_batch = min(whole, groups - groups % shares)
    return EpochSize(groups_per_batch, groups // groups_per_batch)
