"""A hang ends: where a step takes too long, all stacks are printed and the process exits with status 1.

A thread of C (`faulthandler`) watches, so that code that never lets go of the interpreter is ended too, and a
collective whose other ranks are gone. Whoever started the process starts it again; the job goes on from its newest
checkpoint.
"""

import faulthandler

_PHASE = 5  # a start (compilation, loader processes, first step) or a validation may take so many times as long
_STDERR = 2  # the file itself: Python's own may have been replaced


def longest(seconds: float) -> float:
    """How long anything of a job may take, where a step may take ``seconds``."""
    return _PHASE * seconds


def watch(seconds: float) -> None:
    """Something begins that may take so long; until `faulthandler.cancel_dump_traceback_later`, or the next call."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)
