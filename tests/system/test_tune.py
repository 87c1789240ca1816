"""Learning rates are searched for on a real Ray, and nothing of the plan changes by it."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from aliprod.plan.load import load

OWN = {"backbone": 0.02, "heads": 0.02}


@pytest.fixture(scope="module")
def searched(cluster: Any, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    storage = tmp_path_factory.mktemp("tune")
    flags = ("--storage", storage, "--set", "tune.trials=3", "--set", "tune.epochs=1", "--set", "tune.per_class=2")
    process = cluster.aliprod("tune", plan, "efficientnet/full", *flags, "--json")
    assert process.returncode == 0, process.stderr
    return storage, json.loads(process.stdout.splitlines()[-1]), process.stderr


def test_the_plans_own_rates_and_others_within_the_span_are_tried(
    searched: tuple[Path, dict[str, Any], str],
) -> None:
    _, found, told = searched
    errors = [trial["top1_error"] for trial in found["trials"]]
    assert len(errors) == 3
    assert errors == sorted(errors)
    assert found["best"] == found["trials"][0]
    assert found["own"] in found["trials"]
    assert {name: found["own"][name] for name in OWN} == OWN
    assert all(OWN[name] / 10 <= trial[name] <= OWN[name] * 10 for trial in found["trials"] for name in OWN)
    assert told.count("lr.backbone") == 3


def test_what_it_says_to_set_gives_that_job_the_best_rates_and_no_other(
    searched: tuple[Path, dict[str, Any], str], plan: Path
) -> None:
    _, found, _ = searched
    before, after = load(plan), load(plan, [found["set"]])
    for name in before.job_names():
        job = tuple(name.split("/"))
        if name == "efficientnet/full":
            rates = after.stage(*job).lr
            assert rates.backbone == pytest.approx(found["best"]["backbone"], rel=1e-2)
            assert rates.heads == pytest.approx(found["best"]["heads"], rel=1e-2)
        else:
            assert after.stage(*job) == before.stage(*job)


class Trap:
    """What reads it as a pickle writes a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = str(sprung)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.sprung, "w")


def test_a_search_goes_on_behind_what_was_tried_and_reads_no_pickle_of_the_storage_path(
    cluster: Any, searched: tuple[Path, dict[str, Any], str], plan: Path, tmp_path: Path
) -> None:
    storage, before, _ = searched
    [log] = (storage / "tune").iterdir()
    kept, sprung = json.loads(log.read_text()), tmp_path / "sprung"
    log.write_text(json.dumps(kept[:2]))
    for place in (storage / "ray" / f"tune.{log.stem}", storage / "tune" / log.stem):  # where Ray's state could be
        place.mkdir(parents=True)
        for name in ("tuner.pkl", "trainable.pkl", "experiment_state-2026-01-01_00-00-00.json", "searcher-state.pkl"):
            (place / name).write_bytes(pickle.dumps(Trap(sprung)))
    flags = ("--storage", storage, "--set", "tune.trials=3", "--set", "tune.epochs=1", "--set", "tune.per_class=2")
    again = cluster.aliprod("tune", plan, "efficientnet/full", *flags, "--json")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("lr.backbone") == 1
    assert json.loads(again.stdout.splitlines()[-1]) == before
    assert json.loads(log.read_text()) == kept
    assert not sprung.exists()


def test_a_search_leaves_no_job_behind(searched: tuple[Path, dict[str, Any], str]) -> None:
    storage, _, _ = searched
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
