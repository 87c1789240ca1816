"""Match members' rows by image id and columns by class id, never by position."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aliprod.errors import Failed

Places: TypeAlias = npt.NDArray[np.int64]


def submission_order(name: str) -> tuple[int, int, str, str]:
    """Sort key of image ids: stems that are all digits first, by that number; then the rest as strings."""
    stem = name.rsplit(".", 1)[0]
    if not (stem.isascii() and stem.isdigit()):
        return (1, 0, "", name)
    digits = stem.lstrip("0")
    return (0, len(digits), digits, name)  # as int() would order them, but of any length


def match_rows(names: Sequence[str], ids: Sequence[pa.StringArray]) -> tuple[pa.StringArray, list[Places]]:
    """The ids in the order of the submission, and where each member has them.

    Args:
        names: the members', for messages. ids: (N,) each, in any order.
    Raises:
        Failed: a member lacks an image, or has one twice.
    """
    for name, own in zip(names, ids, strict=True):
        if own is ids[0] or not own.equals(ids[0]):
            _same_images(name, own, names[0], ids[0])
    ordered = pa.array(sorted(ids[0].to_pylist(), key=submission_order), pa.string())
    first = _places(ordered, ids[0])
    return ordered, [first if own.equals(ids[0]) else _places(ordered, own) for own in ids]


def _places(ordered: pa.StringArray, own: pa.StringArray) -> Places:
    return np.asarray(pc.index_in(ordered, value_set=own), dtype=np.int64)


def _same_images(name: str, own: pa.StringArray, other_name: str, other: pa.StringArray) -> None:
    advice = (
        "Nothing was written. All members must have predicted one image set: delete the probabilities of the "
        "member that is wrong and submit jobs/ensemble.py."
    )
    twice = pc.filter(own.value_counts().field("values"), pc.greater(own.value_counts().field("counts"), 1))
    if len(twice):
        raise Failed(f"has more than one row for image {twice[0]}.", name, advice)
    for lacking, has, poor, rich in ((name, other_name, own, other), (other_name, name, other, own)):
        missing = rich.filter(pc.invert(pc.is_in(rich, value_set=poor)))
        if len(missing):
            what = f"has no probabilities of image {missing[0]}, which {has} has ({len(missing):,} such images)."
            raise Failed(what, lacking, advice)


def match_columns(names: Sequence[str], classes: Sequence[Places]) -> tuple[Places, list[Places]]:
    """The class ids, ascending, and where each member has them.

    Args:
        names: the members', for messages. classes: (K,) class ids each, in any order.
    Raises:
        Failed: a member has other classes.
    """
    order = np.argsort(classes[0])
    ordered = classes[0][order]
    orders = [order if np.array_equal(own, classes[0]) else np.argsort(own) for own in classes]
    for name, own, places in zip(names, classes, orders, strict=True):
        if np.array_equal(own[places], ordered) and (np.diff(ordered) > 0).all():
            continue
        other = np.setxor1d(own, ordered)
        example = f"class {other[0]} is in only one of them" if len(other) else "a class id occurs twice"
        raise Failed(
            f"has another class list ({len(own):,} classes) than {names[0]} ({len(ordered):,}): {example}.",
            name,
            "Nothing was written. All members must have been trained on one catalogue.",
        )
    return ordered, orders
