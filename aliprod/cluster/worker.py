"""One rank of a training inside a TorchTrainer: it iterates what makes the target, and reports each epoch to Ray."""

import threading
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions

from aliprod.build.schedule import Outcome
from aliprod.build.target import Site, Target
from aliprod.errors import NonFiniteLoss, Refused
from aliprod.store import lease

_ASK_SECONDS = 0.5


def train_rank(config: dict[str, Any]) -> Outcome:
    """Train on this rank.

    A checkpoint is what the storage path has committed; Ray is given numbers only, once an epoch, since its
    report is a barrier. What an exact replay would repeat is returned, not raised: Ray would try it again.
    """
    import ray.train  # here: it takes a second, and only the worker needs it

    target: Target = config["target"]
    stop = threading.Event()
    site: Site = replace(config["site"], stop=stop.is_set)
    if lease.is_lost(site.storage, str(target.key), site.driver):
        return Outcome("failed", "another driver has taken it over.")
    lease.follow(site.storage, str(target.key), site.driver)
    if ray.train.get_context().get_world_rank() == 0:
        threading.Thread(target=_listen, args=(config["launcher"], config["number"], stop), daemon=True).start()
    try:
        for metrics in target.make(target, site):
            ray.train.report(dict(metrics))
    except (NonFiniteLoss, Refused) as error:
        return Outcome("failed", str(error))
    return Outcome("paused" if stop.is_set() and target.record(site.storage) is None else "done")


def _listen(launcher: Any, number: int, stop: threading.Event) -> None:
    """Ask the launcher until it says that this job is to stop. The first question tells that it has begun."""
    try:
        while not ray.get(launcher.is_to_stop.remote(number)):
            stop.wait(_ASK_SECONDS)
    except ray.exceptions.RayError:
        return  # the launcher is gone, and this process goes with it
    stop.set()
