"""One rank of a training inside a TorchTrainer: it iterates what makes the target, and reports each epoch to Ray."""

import os
import threading
from contextlib import AbstractContextManager
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


def join_ranks(address: str, port: int, backend: str, timeout_s: int) -> None:
    """Become a rank of a process group, as Ray's TorchConfig does it from the launcher."""
    import ray.train
    from ray.train.torch import config

    me = ray.train.get_context()
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, me.get_world_rank(), me.get_world_size(), "env://", timeout_s)


def leave_ranks() -> None:
    """Undo `join_ranks`, where there are others."""
    import ray.train
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=ray.train.get_context().get_world_size() > 1)


def on_its_device() -> AbstractContextManager[None]:
    """Where a rank trains: its GPU is torch's current device."""
    from ray.train.torch.config import TorchConfigContextManager

    return TorchConfigContextManager()


def _listen(launcher: Any, number: int, stop: threading.Event) -> None:
    """Ask the launcher until it says that this job is to stop. The first question tells that it has begun."""
    try:
        while not ray.get(launcher.is_to_stop.remote(number)):
            stop.wait(_ASK_SECONDS)
    except ray.exceptions.RayError:
        return  # the launcher is gone, and this process goes with it
    stop.set()
