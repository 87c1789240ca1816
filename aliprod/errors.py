"""What went wrong, where, and what to do about it.

Every error a user can cause or cure is one of these; the front doors print it and exit with its status.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from aliprod.shown import escaped, lines


class AliprodError(Exception):
    """An error with a cure. Printed as ``where: what`` and, indented below, the advice.

    Args:
        what: one sentence, what is wrong.
        where: file, line or job that it concerns; may be empty.
        advice: what to do, one or more sentences; may be empty.
    """

    status = 1

    def __init__(self, what: str, where: str | Path = "", advice: str = "") -> None:
        super().__init__(what, str(where), advice)  # all three, so that it survives pickling
        self.what, self.where, self.advice = what, str(where), advice

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return lines(escaped(head) + "".join(f"\n  {line}" for line in self.advice.split("\n") if line))


class Refused(AliprodError):
    """The input is wrong: nothing was started."""

    status = 2


class Unreachable(AliprodError):
    """The cluster, the storage path or, at the start, MLflow cannot be reached."""

    status = 3


class Failed(AliprodError):
    """Something went wrong while running."""

    @classmethod
    def printed(cls, text: str) -> "Failed":
        """What has failed elsewhere, by what was printed of it there; it prints the same."""
        what, *advice = text.split("\n  ")
        return cls(what, advice="\n".join(advice))


class StorageFull(Failed):
    """No room, no right to write, or the storage path is gone; finished work is intact."""


class NonFiniteLoss(Failed):
    """The loss is NaN or infinite; the weights are as they were before it."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of ``names`` that is nearest to a misspelt one, or '' where none is near."""
    return next(iter(get_close_matches(name, list(names), n=1, cutoff=0.5)), "")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """'Did you mean X?' with the nearest of ``names``, or '' where none is near."""
    near = nearest(name, names)
    return f"Did you mean {near}?" if near else ""


def near_file(path: Path, pattern: str = "*") -> str:
    """'Did you mean X?' with the name beside a path that is nearest to its own, or ''."""
    beside = (found.name for found in islice(path.parent.glob(pattern), 100))
    return did_you_mean(path.name, (name for name in beside if name != path.name))


def listing(names: Iterable[str], most: int = 12) -> str:
    """``a, b, c, ...``: at most ``most`` of the names."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
