"""recipe: a job is light data, and work that trains nothing has a machine of its own."""

import pickle
import subprocess
import sys
from pathlib import Path

from aliprod.plan.schema import Cluster
from aliprod.recipe import Inputs, Machine, Stage, TrainingJob, without_training


def test_a_job_is_known_without_importing_torch() -> None:
    code = "import sys, aliprod.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_job_arrives_on_a_worker_as_it_was_sent(tmp_path: Path) -> None:
    inputs = Inputs(soup=(tmp_path / "a", tmp_path / "b"), kept=tmp_path / "kept")
    sent = TrainingJob("net/soup", "0123", "test_resnet", Stage(), tmp_path, inputs, Cluster(cpus_per_worker=3))
    assert pickle.loads(pickle.dumps(sent)) == sent


def test_nothing_is_compiled_and_kernels_are_exact_where_nothing_is_trained() -> None:
    stated = Machine(cpus_per_worker=3, loader_processes=2, exact=False, compile=True, save_seconds=5.0)
    assert without_training(stated) == Machine(cpus_per_worker=3, loader_processes=2, save_seconds=5.0)
