"""Learning rates are searched for on a real Ray, and nothing of the plan changes by it."""

import json
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
