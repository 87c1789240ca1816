"""Settings are searched for on a real Ray, killed and gone on with, and nothing of the plan changes by it."""

import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest

from aliprod.plan.load import load

JOB = "efficientnet/full"
SETS = [
    f'overrides."{JOB}"={{ lr = {{ backbone = 1e-6, heads = 1e-6 }}, epochs = 4 }}',  # it learns nothing
    "tune.search={ lr.heads = { low = 0.01, high = 0.1, log = true }, lr.backbone = [0.02, 0.05] }",
    *("tune.trials=3", "tune.epochs=4", "tune.per_class=8", "tune.finalists=1", "tune.seeds=2", "tune.grace_period=4"),
]
Searched = tuple[Path, list[str], dict[str, Any], str]


def flags(storage: Path) -> list[str]:
    return ["--storage", str(storage), *(word for one in SETS for word in ("--set", one)), "--json"]


@pytest.fixture(scope="module")
def searched(cluster: Any, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A search that was killed when the first trial had ended: its storage, that trial, the answer, what was told."""
    storage = tmp_path_factory.mktemp("tune")

    def ended() -> list[str]:
        logs = [json.loads(log.read_text()) for log in (storage / "tune").glob("*.json")]
        return [one["stage"] for log in logs for one in log if one["ended"]]

    process = cluster.start("tune", plan, JOB, *flags(storage))
    cluster.until(ended, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = ended()
    process = cluster.aliprod("tune", plan, JOB, *flags(storage))
    assert process.returncode == 0, process.stderr
    return storage, before, json.loads(process.stdout.splitlines()[-1]), process.stderr


def test_a_search_that_was_killed_goes_on_behind_what_had_ended(searched: Searched) -> None:
    _, before, found, told = searched
    seeds = 2 * (1 + len(found["finalists"])) if found["finalists"] else 0
    assert len(before) < 3
    assert told.count("lr.backbone") == 3 + seeds - len(before)


def test_the_plans_own_settings_and_others_of_what_is_said_are_tried(searched: Searched) -> None:
    _, _, found, _ = searched
    assert len(found["trials"]) == 3
    assert found["own"] in found["trials"]
    assert found["own"]["settings"] == {"lr.heads": 1e-6, "lr.backbone": 1e-6}
    others = [trial["settings"] for trial in found["trials"] if trial != found["own"]]
    assert all(0.01 <= one["lr.heads"] <= 0.1 and one["lr.backbone"] in (0.02, 0.05) for one in others)
    errors = [trial["errors"][-1] for trial in found["trials"]]
    assert errors == sorted(errors)
    assert all(len(trial["errors"]) == 4 for trial in found["trials"])
    assert found["hours"] > 0


def test_the_best_is_trained_again_with_other_seeds_and_its_gain_decides(searched: Searched, plan: Path) -> None:
    storage, _, found, _ = searched
    [finalist] = found["finalists"]
    assert finalist["settings"] == found["trials"][0]["settings"]
    assert len(finalist["errors"]) == 2
    [log] = (storage / "tune").iterdir()
    again = [trial for trial in json.loads(log.read_text()) if trial["seed"]]
    assert sorted(trial["seed"] for trial in again) == [1, 1, 2, 2]
    low, high = finalist["interval"]
    assert low <= finalist["gain"] <= high
    assert (low > 0) == (found["set"] is not None)
    if found["set"] is not None:
        rates, stage = finalist["settings"], load(plan, [*SETS, found["set"]]).stage(JOB)
        assert (stage.lr.heads, stage.lr.backbone) == (rates["lr.heads"], rates["lr.backbone"])


class Trap:
    """What reads it as a pickle writes a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = str(sprung)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.sprung, "w")


def test_a_search_reads_no_pickle_of_the_storage_path_and_trains_what_is_lacking_with_the_same_result(
    cluster: Any, searched: Searched, plan: Path, tmp_path: Path
) -> None:
    storage, _, before, _ = searched
    [log] = (storage / "tune").iterdir()
    kept, sprung = json.loads(log.read_text()), tmp_path / "sprung"
    log.write_text(json.dumps(kept[:-1]))
    for place in (storage / "ray" / f"tune.{log.stem}", storage / "tune" / log.stem):  # where Ray's state could be
        place.mkdir(parents=True)
        for name in ("tuner.pkl", "trainable.pkl", "experiment_state-2026-01-01_00-00-00.json", "searcher-state.pkl"):
            (place / name).write_bytes(pickle.dumps(Trap(sprung)))
    again = cluster.aliprod("tune", plan, JOB, *flags(storage))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("lr.backbone") == 1
    assert {**json.loads(again.stdout.splitlines()[-1]), "hours": 0} == {**before, "hours": 0}
    after = json.loads(log.read_text())
    assert [{**one, "seconds": 0} for one in after] == [{**one, "seconds": 0} for one in kept]
    assert not sprung.exists()


def test_a_search_leaves_no_job_behind(searched: Searched) -> None:
    storage, *_ = searched
    assert not (storage / "jobs").exists()


@pytest.mark.parametrize(
    ("job", "status", "said"),
    [
        ("efficientnet/ful", 2, "Did you mean efficientnet/full?"),
        ("resnet/dcl", 1, "resnet/full, which it starts from, is not trained yet"),
    ],
)
def test_a_job_that_cannot_be_searched_for_is_refused_before_anything_starts(
    cluster: Any, plan: Path, tmp_path: Path, job: str, status: int, said: str
) -> None:
    process = cluster.aliprod("tune", plan, job, "--storage", tmp_path)
    assert process.returncode == status
    assert said in process.stderr
