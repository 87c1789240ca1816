"""A target becomes a Ray task, or a TorchTrainer where it has ranks."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions

from aliprod.build.room import Node
from aliprod.build.schedule import Outcome
from aliprod.build.target import Resources, Site, Target
from aliprod.cluster import session
from aliprod.cluster.launch import launch
from aliprod.errors import AliprodError
from aliprod.store.lease import Leases

TICK_SECONDS = 0.2
_RACED = "another driver was faster"


class RayRunner:
    """Makes targets on the cluster.

    Args:
        launcher: of `aliprod.cluster.launch.start_launcher`, where anything has ranks.
        stopping: whether nothing more is to be started.
        current: a target as it is now that what it needs is made.
        seconds: what a target takes at a world size.
        leases: of the driver, who holds one of each training that runs.
    """

    def __init__(
        self,
        site: Site,
        launcher: Any,
        stopping: Callable[[], bool],
        current: Callable[[Target], Target],
        seconds: Callable[[Target, int], float],
        leases: Leases,
    ) -> None:
        self.site, self.launcher, self.stopping, self.current, self.seconds = site, launcher, stopping, current, seconds
        self.leases, self.leased = leases, dict[Any, str]()

    def now(self) -> float:
        return time.monotonic()

    def nodes(self) -> Sequence[Node]:
        return session.nodes()

    def types(self) -> Sequence[Resources]:
        return session.types(self.site.cluster)

    def stop(self, handle: Any) -> None:
        """It ends when it is done."""

    def request(self, ranks: Sequence[Resources]) -> None:
        """A cluster that grows is asked by what is started."""

    def start(self, target: Target, nodes: Sequence[str]) -> Any:
        """Start to make a target; the reference resolves to why it failed, or ''."""
        target = self.current(target)
        if target.kind == "training":
            return self._train(target, str(target.key), len(nodes))
        named: dict[str, Any] = {"name": target.name}
        options = _make.options(num_cpus=target.resources.cpus, num_gpus=target.resources.gpus, **named)
        return options.remote(target, self.site)

    def elsewhere(self, target: Target) -> str:
        """Which other driver trains a target now; '' where none does."""
        return self.leases.holder(str(target.key)) if target.kind == "training" else ""

    def wait(self, handles: list[Any], patience: float) -> list[tuple[Any, Outcome]]:
        """Wait a moment for any of the handles; those that ended."""
        tick = min(patience, TICK_SECONDS)
        if not handles:
            time.sleep(tick)
            return []
        done, _ = ray.wait(handles, num_returns=1, timeout=tick)
        for handle in done:
            self.leases.release(self.leased.pop(handle, ""))
        return [(handle, _outcome(handle)) for handle in done]

    def _train(self, target: Target, key: str, ranks: int) -> Any:
        """Launch a training once its lease is ours. Another driver may have it by now, or may have finished it."""
        if self.leases.take(key):
            return ray.put(_RACED)
        made = target.record(self.site.storage) is not None
        handle = ray.put("") if made else launch(self.launcher, target, ranks)
        self.leased[handle] = key
        return handle


@ray.remote(max_retries=3)
def _make(target: Target, site: Site) -> str:
    if target.record(site.storage) is not None:
        return ""
    try:
        for _ in target.make(target, site):
            pass
    except AliprodError as error:
        return str(error)
    return ""


def _outcome(handle: Any) -> Outcome:
    try:
        failure = str(ray.get(handle))
    except ray.exceptions.RayError as error:
        failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
    if failure == _RACED:
        return Outcome("paused", failure)
    return Outcome("failed", failure) if failure else Outcome("done")
