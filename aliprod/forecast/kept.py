"""The forecast of a plan as soon as a rate was known: what the report holds against the facts.

STORAGE/PLAN/forecast.json     kept until the plan says something else
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from aliprod.build.graph import targets
from aliprod.build.room import Node, check_room, uses_gpu, with_cpus
from aliprod.errors import AliprodError
from aliprod.forecast.clock import Span
from aliprod.forecast.seconds import Estimates
from aliprod.forecast.simulate import simulate
from aliprod.plan.open import Opened
from aliprod.store import commit

FILE = "forecast.json"
_MOST = 300  # jobs that are simulated: seconds


class Kept(NamedTuple):
    """The spans of each target of the whole plan; ``time``: when that was forecast, in seconds since the epoch."""

    time: float
    spans: Mapping[str, Sequence[Span]]


def keep(opened: Opened, nodes: Sequence[Node]) -> None:
    """Write down how the scheduler would make the whole plan on the nodes that a run has, by the rates known now.

    Nothing is written where none are, or an earlier forecast of the same plan is there.

    Raises:
        StorageFull: no room, no right to write, or the path is gone.
    """
    cluster = opened.plan.cluster
    if read(opened) is not None or len(opened.jobs) > _MOST:
        return
    estimates = Estimates(opened, beside=cluster.max_parallel_jobs != 1)
    if not estimates.paces:
        return
    graph = targets(opened.with_cluster(with_cpus(cluster, nodes)), uses_gpu(cluster, nodes))
    try:
        check_room(graph, nodes)
    except AliprodError:  # what is finished asked for more than this cluster has
        return
    spans = simulate(graph, estimates.seconds, nodes, cluster.max_parallel_jobs)
    commit.write_file(
        opened.folder / FILE, json.dumps({"plan": opened.plan.digest, "time": time.time(), "spans": spans})
    )


def read(opened: Opened) -> Kept | None:
    """What was forecast of the plan as it is; None where nothing was."""
    try:
        said = json.loads((opened.folder / FILE).read_text(encoding="utf-8"))
        spans = {name: [Span(*one) for one in own] for name, own in said["spans"].items()}
        return Kept(said["time"], spans) if said["plan"] == opened.plan.digest else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
