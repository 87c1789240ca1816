"""recipe: a job is light data, and work that trains nothing has a machine of its own."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from aliprod.plan.schema import Cluster, effective
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


RATES = {"backbone": 1e-4, "heads": 1e-3}


@pytest.mark.parametrize(
    ("optimizer", "lr", "says"),
    [
        ({"betas": [0.9, 0.99]}, {}, "sgd has no betas: adamw, lamb, lion, muon have"),
        ({"name": "adamw", "momentum": 0.8}, RATES, "adamw has no momentum: sgd, muon have"),
        ({"name": "lion"}, {"heads": 1e-3}, "the default rates are for sgd: with lion say both"),
        ({"name": "adam"}, RATES, "'sgd', 'adamw', 'lamb', 'lion' or 'muon'"),
        ({"name": "adamw", "betas": [0.9]}, RATES, "at least 2 items"),
    ],
)
def test_a_setting_that_an_optimizer_has_not_is_refused(optimizer: object, lr: object, says: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Stage.model_validate({"optimizer": optimizer, "lr": lr})
    assert says in str(raised.value)


def test_an_optimizer_has_a_weight_decay_of_its_own_unless_it_is_said() -> None:
    decays = [{}, {"name": "adamw"}, {"name": "muon", "weight_decay": 0.1}]
    stages = [Stage.model_validate({"optimizer": said, "lr": RATES}) for said in decays]
    assert [stage.optimizer.weight_decay for stage in stages] == [1e-4, 0.05, 0.1]


def test_what_is_said_of_one_optimizer_is_not_meant_for_another() -> None:
    defaults = {"optimizer": {"momentum": 0.8, "clip_norm": 1.0}, "lr": RATES}
    same = effective(0, defaults, [{"optimizer": {"weight_decay": 0.0}}]).optimizer
    assert (same.momentum, same.clip_norm, same.weight_decay) == (0.8, 1.0, 0.0)
    other = effective(0, defaults, [{"optimizer": {"name": "adamw"}}, {"optimizer": {"betas": [0.9, 0.95]}}]).optimizer
    assert (other.name, other.betas, other.clip_norm) == ("adamw", (0.9, 0.95), 5.0)
