"""One rank of a target inside a TorchTrainer: it iterates what makes the target, and reports each epoch to Ray."""

from typing import Any

from aliprod.build.target import Site, Target
from aliprod.errors import NonFiniteLoss, Refused
from aliprod.store import lease


def train_rank(config: dict[str, Any]) -> str:
    """Train on this rank.

    A checkpoint is what the storage path has committed; Ray is given numbers only, once an epoch, since its
    report is a barrier. What an exact replay would repeat is returned, not raised: Ray would try it again.

    Returns:
        Why the job failed for good; empty where it finished.
    """
    import ray.train  # here: it takes a second, and only the worker needs it

    target: Target = config["target"]
    site: Site = config["site"]
    if lease.is_lost(site.storage, str(target.key), site.driver):
        return "another driver has taken it over."
    lease.follow(site.storage, str(target.key), site.driver)
    try:
        for metrics in target.make(target, site):
            ray.train.report(dict(metrics))
    except (NonFiniteLoss, Refused) as error:
        return str(error)
    return ""
