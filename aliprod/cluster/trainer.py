"""Fitting a TorchTrainer with its controller in the calling process: imported by the launcher, never by the driver.

Ray Train starts a process for the controller of each trainer, and four more beside it; each imports what the worker
imports, or waits for that. Here the controller runs in the launcher, which has imported Ray Train once for all jobs.
"""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2._internal.logging import LoggingManager
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.result import Result
from ray.train.v2.torch.torch_trainer import TorchTrainer

from aliprod.build.schedule import Outcome
from aliprod.build.target import Site
from aliprod.cluster import session
from aliprod.cluster.launch import Start, train_rank

_making = threading.Lock()
# For each training Ray Train starts an actor in which its ranks wait for each other when they report. They report
# nothing.
_no_actor = SimpleNamespace(remote=lambda **_: "none")
worker_group.SynchronizationActor = SimpleNamespace(options=lambda **_: _no_actor)  # type: ignore[assignment,attr-defined]
state._shutdown_sync_actor = lambda _: None  # type: ignore[assignment]


def _stay_configured(context: TrainRunContext) -> None:
    """Configure Ray Train's log for the first controller of a process alone: that of another takes away the handlers
    that the first may be opening a file for, and they wait for each other's locks for ever."""


class LightTrainer(TorchTrainer):
    """A TorchTrainer whose controller runs in the actor that calls `fit`.

    It overrides what ``fit`` calls in Ray 2.60; the range of versions in pyproject.toml and a test of these names keep
    it true.
    """

    given_up: Callable[[], bool]  # whether what fails is not to be tried again

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        arguments["scaling_policy"] = _FixedSize(self.scaling_config)  # type: ignore[arg-type]  # mypy sees Train V1's
        failures: Any = self.run_config.failure_config
        arguments["failure_policy"] = _OnItsNodes(failures, self.given_up)
        with _making:
            controller = TrainController(**arguments)
            LoggingManager.configure_controller_logger = _stay_configured  # type: ignore[method-assign]
        asyncio.run(controller.run())
        return controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        """Without the processes for Ray Data, which is not used, and for placement groups, which the launcher frees."""
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if not isinstance(one, DatasetsCallback | PlacementGroupCleanerCallback)]


class _FixedSize(FixedScalingPolicy):
    """As many workers as asked for. Ray's own policy also registers them with an actor that shares a cluster between
    Ray Train and Ray Data; a placement group that waits makes a cluster grow without it."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Register nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing is registered."""


class _OnItsNodes(DefaultFailurePolicy):
    """Whatever fails is tried again, as often as the plan says, on the same nodes, for as long as they are there and
    nobody wants the job to stop."""

    def __init__(self, config: FailureConfig, given_up: Callable[[], bool]) -> None:
        super().__init__(config)
        self.given_up = given_up

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        decision = super().make_decision(training_failed_error)
        return FailureDecision.RAISE if self.given_up() else decision


def fit(start: Start, site: Site, launcher: Any, stopped: Callable[[], bool]) -> Outcome:
    """Train a job, each rank on its node. It is paused where one of these goes.

    Args:
        launcher: whom rank 0 asks whether to stop. stopped: the same, here.
    """
    target, cluster, gpu = start.target, site.cluster, start.target.resources.gpus > 0
    trainer = LightTrainer(
        train_rank,
        train_loop_config={"target": target, "site": site, "launcher": launcher, "number": start.number},
        torch_config=TorchConfig("nccl" if gpu else "gloo", timeout_s=int(cluster.longest_seconds)),
        scaling_config=ScalingConfig(
            num_workers=len(start.nodes),
            use_gpu=gpu,
            resources_per_worker={"CPU": target.resources.cpus} | ({"GPU": target.resources.gpus} if gpu else {}),
            label_selector=[{"ray.io/node-id": node} for node in start.nodes],
        ),
        run_config=RunConfig(
            name=f"{target.name.replace('/', '.')}-{str(target.key)[:12]}",  # Ray resumes a name: the key is in it
            storage_path=str(site.storage / "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    trainer.given_up = lambda: stopped() or not {node.name for node in session.nodes()}.issuperset(start.nodes)
    try:
        outcome: Outcome = trainer.fit().return_value  # type: ignore[attr-defined]
    except TrainingFailedError as error:
        return Outcome("paused") if trainer.given_up() else Outcome("failed", _cause(error))
    return outcome


def _cause(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    first = next(iter(failures.values()))
    return f"{type(first).__name__}: {first}" if str(first) else type(first).__name__
