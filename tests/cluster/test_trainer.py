import subprocess
import sys

from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from aliprod.cluster.trainer import LightTrainer


def test_ray_calls_what_the_trainer_overrides() -> None:
    overridden = {name for name in vars(LightTrainer) if not name.startswith("__")}
    assert overridden <= set(vars(DataParallelTrainer))
    assert overridden <= set(DataParallelTrainer.fit.__code__.co_names)


def test_a_controller_configures_its_log_by_what_is_kept_from_doing_it_twice() -> None:
    assert {"LoggingManager", "configure_controller_logger"} <= set(TrainController.__init__.__code__.co_names)


def test_the_launcher_imports_nothing_of_what_only_a_worker_needs() -> None:
    code = "import sys, aliprod.cluster.trainer; print({'timm', 'torch', 'torchvision'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "set()"
