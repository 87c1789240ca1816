"""steps: what a run does, whatever its methods, each task behind those it needs."""

from pathlib import Path

import pytest

from aliprod.orchestration import steps
from aliprod.orchestration.scheduler import Share
from aliprod.orchestration.steps import Splits, Step
from aliprod.plan import graph
from aliprod.plan.load import load
from aliprod.plan.schema import Plan

PLANS = sorted((Path(__file__).parents[2] / "jobs").glob("*.toml"))
WHICH = Splits("test", "val")


def steps_of(plan: Plan) -> dict[str, Step]:
    jobs = graph.jobs(plan, None)
    todo = graph.order_by_remaining_work(jobs)
    found = steps.training(jobs, todo, WHICH, plan.cluster, gpu=True)
    assert len({step.name for step in found}) == len(found)
    return {step.name: step for step in found}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_needs_come_before_those_that_need_them_and_every_job_and_prediction_is_there(path: Path) -> None:
    plan = load(path)
    found = steps_of(plan)
    places = {name: place for place, name in enumerate(found)}
    assert all(places[need] < places[name] for name, step in found.items() for need in step.needs)
    assert {step.job for step in found.values() if step.kind == "train"} == set(plan.job_names())
    predicted = {(step.job, step.of) for step in found.values() if step.kind == "predict"}
    assert predicted >= {(name, split) for name in plan.ensemble.members for split in ("test", "val")}


def test_a_job_takes_a_gpu_a_rank_and_a_prediction_one() -> None:
    plan = load(PLANS[0], ["cluster.workers=4", "cluster.cpus_per_worker=3"])
    shares = {(step.kind, step.share) for step in steps_of(plan).values() if step.kind in ("train", "predict")}
    assert shares == {("train", Share(12, 4)), ("predict", Share(3, 1))}
