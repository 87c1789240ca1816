"""How members are combined: a weight and a temperature each, fitted on labelled images, a fold held out in turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from aliprod.data.selection import order
from aliprod.ensemble.add import MatchedMembers, Places, match
from aliprod.ensemble.calibrate import TEMPERATURES, Floats, losses
from aliprod.ensemble.choose import fitted
from aliprod.inference.probabilities import FLOOR, Probabilities, check

FOLDS = 5
_ROWS = 64  # at a time: 8 MB of counts, 6 MB of probabilities at 50,030 classes


@dataclass(frozen=True)
class Combination:
    """Whole weights of members, and their temperatures; none: as they are."""

    weights: tuple[int, ...]
    temperatures: tuple[float, ...] = ()


def fit(members: Sequence[Probabilities], combine: Literal["greedy", "weights"], seed: int) -> list[Combination]:
    """Fit temperatures, then weights, by the log loss of the true classes; beside one number an image, a temperature
    and a member, a few rows are in memory at once.

    Returns:
        FOLDS combinations, each fitted without the images of a fold (`folds`), and one of all.
    Raises:
        Failed: members that do not match, a row that is no distribution.
    """
    ensemble = match(members)
    known, columns = labelled(ensemble)
    held = folds(len(known), seed)
    kept = [*(held != fold for fold in range(FOLDS)), np.ones(len(known), bool)]
    temperatures, own = np.empty((len(kept), len(members))), np.empty((len(kept), len(members), len(known)))
    for number in range(len(members)):
        found = np.concatenate(list(_losses(ensemble, number, known, columns)))
        for fold, rows in enumerate(kept):
            best = int(found[rows].mean(axis=0).argmin())
            temperatures[fold, number], own[fold, number] = TEMPERATURES[best], np.exp(-found[:, best])
    return [
        Combination(fitted(combine, own[fold][:, rows]), tuple(temperatures[fold].tolist()))
        for fold, rows in enumerate(kept)
    ]


def labelled(ensemble: MatchedMembers) -> tuple[Places, Places]:
    """The places (n,) of the images whose class the members know, and the columns of these classes."""
    labels = ensemble.labels.fill_null(-1).to_numpy()
    columns = np.minimum(np.searchsorted(ensemble.classes, labels), len(ensemble.classes) - 1)
    known = np.flatnonzero(ensemble.classes[columns] == labels)
    return known, columns[known]


def folds(count: int, seed: int) -> Places:
    """The fold of each of ``count`` images, equally many in each: a function of the seed."""
    return order(count, seed, 0) % FOLDS


def own_probabilities(ensemble: MatchedMembers, places: Places, columns: Places) -> Floats:
    """What each member gives the classes in these columns at these places: (M, n), above 0."""
    found = np.empty((len(ensemble.members), len(places)))
    for number, own in enumerate(found):
        for at, rows in _blocks(ensemble, number, places):
            own[at] = rows.numpy()[np.arange(len(rows)), columns[at]]
    return found.clip(FLOOR)


def _blocks(ensemble: MatchedMembers, number: int, places: Places) -> Iterator[tuple[slice, Tensor]]:
    """A member's rows of these places, a few at a time, and which they are."""
    for low in range(0, len(places), _ROWS):
        at = slice(low, min(low + _ROWS, len(places)))
        yield at, ensemble.part(number, places[at])


def _losses(ensemble: MatchedMembers, number: int, places: Places, columns: Places) -> Iterator[Floats]:
    """`calibrate.losses` of a member's rows of these places. Failed: a row is no distribution."""
    member, rows = ensemble.members[number], ensemble.rows[number]
    for at, part in _blocks(ensemble, number, places):
        check(part, ensemble.ids.take(places[at]), rows[places[at]].tolist(), member.name, member.split)
        yield losses(part.numpy(), columns[at])
