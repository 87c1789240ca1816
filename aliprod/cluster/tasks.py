"""A target becomes a Ray task, or a TorchTrainer where it has ranks."""

import time
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

from aliprod.build.target import Resources, Site, Target
from aliprod.cluster import session
from aliprod.cluster.launch import launch
from aliprod.errors import AliprodError

TICK_SECONDS = 0.2


class RayRunner:
    """Makes targets on the cluster.

    Args:
        launcher: of `aliprod.cluster.launch.start_launcher`, where anything has ranks.
        stopping: whether nothing more is to be started.
        current: a target as it is now that what it needs is made.
    """

    def __init__(
        self, site: Site, launcher: Any, stopping: Callable[[], bool], current: Callable[[Target], Target]
    ) -> None:
        self.site, self.launcher, self.stopping, self.current = site, launcher, stopping, current

    def capacity(self) -> Resources:
        """What may be asked for: what there is, or what the plan says the cluster can grow to."""
        return session.limit(self.site.cluster)

    def start(self, target: Target) -> Any:
        """Start to make a target; the reference resolves to why it failed, or ''."""
        target = self.current(target)
        if target.ranks:
            return launch(self.launcher, target)
        named: dict[str, Any] = {"name": target.name}
        options = _make.options(num_cpus=target.resources.cpus, num_gpus=target.resources.gpus, **named)
        return options.remote(target, self.site)

    def wait(self, handles: list[Any]) -> list[tuple[Any, str]]:
        """Wait a moment for any of the handles; each that ended, with why it failed or ''."""
        if not handles:
            time.sleep(TICK_SECONDS)
            return []
        done, _ = ray.wait(handles, num_returns=1, timeout=TICK_SECONDS)
        return [(handle, _failure(handle)) for handle in done]


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


def _failure(handle: Any) -> str:
    try:
        return str(ray.get(handle))
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
