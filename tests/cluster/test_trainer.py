import subprocess
import sys

from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from aliprod.cluster.trainer import LightTrainer


def test_ray_calls_what_the_trainer_overrides() -> None:
    overridden = {name for name in vars(LightTrainer) if not name.startswith("__")}
    assert overridden <= set(vars(DataParallelTrainer))
    assert overridden <= set(DataParallelTrainer.fit.__code__.co_names)


def test_a_controller_configures_its_log_by_what_is_kept_from_doing_it_twice() -> None:
    assert {"LoggingManager", "configure_controller_logger"} <= set(TrainController.__init__.__code__.co_names)


def test_ray_train_starts_and_ends_no_actor_for_reports_where_it_would() -> None:
    assert "SynchronizationActor" in worker_group.WorkerGroup._start_impl.__code__.co_names
    assert worker_group.SynchronizationActor.options(label_selector={}).remote(timeout_s=None) == "none"
    assert "_shutdown_sync_actor" in state.WorkerGroupState.shutdown.__code__.co_names
    state._shutdown_sync_actor("none")


def test_the_launcher_imports_nothing_of_what_only_a_worker_needs() -> None:
    code = "import sys, aliprod.cluster.trainer; print({'timm', 'torchvision'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "set()"
