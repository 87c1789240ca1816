"""Fitting a TorchTrainer with its controller in the calling process: imported by the launcher, never by the driver.

Ray Train starts a process for the controller of each trainer, and four more beside it; each imports what the worker
imports, or waits for that. Here the controller runs in the launcher, which has imported Ray Train once for all jobs.
"""

import asyncio
from typing import Any

from ray.train import FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from aliprod.build.target import Site, Target
from aliprod.cluster.worker import train_rank
from aliprod.training.watchdog import longest


class LightTrainer(TorchTrainer):
    """A TorchTrainer whose controller runs in the actor that calls `fit`.

    It overrides what ``fit`` calls in Ray 2.60; the range of versions in pyproject.toml and a test of these names keep
    it true.
    """

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        policy = _FixedSize(self.scaling_config)  # type: ignore[arg-type]  # mypy sees the trainer of Train V1
        controller = TrainController(**arguments | {"scaling_policy": policy})
        asyncio.run(controller.run())
        return controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        """Without the processes for Ray Data, which is not used, and for placement groups, which the launcher frees."""
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # likewise
        return [one for one in callbacks if not isinstance(one, DatasetsCallback | PlacementGroupCleanerCallback)]


class _FixedSize(FixedScalingPolicy):
    """As many workers as asked for. Ray's own policy also registers them with an actor that shares a cluster between
    Ray Train and Ray Data; a placement group that waits makes a cluster grow without it."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Register nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing is registered."""


def fit(target: Target, site: Site, ranks: int) -> str:
    """Train a job; why it failed, or an empty text."""
    cluster, gpu = site.cluster, target.resources.gpus > 0
    per_worker = {"CPU": target.resources.cpus} | ({"GPU": 1} if gpu else {})
    trainer = LightTrainer(
        train_rank,  # type: ignore[arg-type]  # Ray 2.60 passes on what it returns, its types do not say so
        train_loop_config={"target": target, "site": site},
        torch_config=TorchConfig("nccl" if gpu else "gloo", timeout_s=int(longest(cluster.watchdog_seconds))),
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=gpu, resources_per_worker=per_worker),
        run_config=RunConfig(
            name=f"{target.name.replace('/', '.')}-{str(target.key)[:12]}",  # Ray resumes a name: the key is in it
            storage_path=str(site.storage / "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    try:
        return str(trainer.fit().return_value or "")  # type: ignore[attr-defined]
    except TrainingFailedError as error:
        return _cause(error)


def _cause(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    first = next(iter(failures.values()))
    return f"{type(first).__name__}: {first}" if str(first) else type(first).__name__
