"""A job becomes a TorchTrainer, inside a named actor without CPUs of its own."""

from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aliprod.orchestration.worker import Rank, train_rank
from aliprod.plan.schema import Cluster
from aliprod.training.training_job import TrainingJob
from aliprod.training.watchdog import longest


def launch(job: TrainingJob, catalogue: Path, cluster: Cluster, gpu: bool, ray_storage: Path) -> Any:
    """Start a job; the reference resolves to why it failed, or to an empty text.

    The dashboard lists the job's actor under the job's name; as a task it would be lost among the thousands by which
    Ray Train polls its workers. It runs on this node: the trainer's controller follows its caller, and on another
    node would die with that node even where its ranks are elsewhere.
    """
    context = ray.get_runtime_context()
    actor: Any = ray.remote(num_cpus=0, max_restarts=0)(Job).options(
        name=job.name,
        namespace=context.get_job_id(),  # another driver may have a job of this name
        scheduling_strategy=NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False),
        runtime_env={"env_vars": environment(cluster)},
    )
    return actor.remote().fit.options(name=job.name).remote(job, catalogue, cluster, gpu, ray_storage)


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables that Ray Train reads where ``fit`` is called and in its workers."""
    return {
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # else the dashboard has no Train tab
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(cluster.poll_seconds),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


class Job:
    """What a job is in the Ray dashboard."""

    def fit(self, job: TrainingJob, catalogue: Path, cluster: Cluster, gpu: bool, ray_storage: Path) -> str:
        """Train; why it failed, or an empty text."""
        per_worker = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if gpu else {})
        trainer = TorchTrainer(
            train_rank,  # type: ignore[arg-type]  # Ray 2.60 passes on what it returns, its types do not say so
            train_loop_config={"rank": Rank(job, catalogue)},
            torch_config=TorchConfig("nccl" if gpu else "gloo", timeout_s=int(longest(cluster.watchdog_seconds))),
            scaling_config=ScalingConfig(num_workers=cluster.workers, use_gpu=gpu, resources_per_worker=per_worker),
            run_config=RunConfig(
                name=f"{job.name.replace('/', '.')}-{job.key[:12]}",  # Ray resumes a name: the key keeps it unique
                storage_path=str(ray_storage),
                failure_config=FailureConfig(max_failures=cluster.max_failures),
            ),
        )
        for _ in range(cluster.max_failures + 1):
            try:
                return str(trainer.fit().return_value or "")  # type: ignore[attr-defined]
            except TrainingFailedError as error:
                return _cause(error)
            except ray.exceptions.RayError as error:  # its controller died: the same name goes on
                lost = f"{type(error).__name__}: {error}"
        return lost


def _cause(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    first = next(iter(failures.values()))
    return f"{type(first).__name__}: {first}" if str(first) else type(first).__name__
