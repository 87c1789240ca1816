"""The graph: all that a plan makes, whatever its methods, each target behind those it needs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aliprod.build.costs import cost_of
from aliprod.build.graph import Chosen, best, targets
from aliprod.build.schedule import Change
from aliprod.build.state import RunState, told
from aliprod.build.target import Resources, Target, lacking
from aliprod.catalogue import sources
from aliprod.cli.watch import doing
from aliprod.errors import Refused
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.plan.places import resolve
from aliprod.recipe import ObjectiveRecipe
from aliprod.store import commit
from aliprod.store.resumable import shards
from aliprod.synth.synth import synthesise

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "jobs").glob("*.toml"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogues") / "photos"
    synthesise(folder, classes=2, images=20, seed=0)
    return folder


def opened(path: Path, photos: Path, storage: Path, *sets: str) -> Opened:
    catalogue, plan = sources.read(photos), load(path, sets)
    jobs = jobs_of(plan, catalogue.fingerprint, catalogue.tree_fingerprint)
    return Opened(plan, "", resolve(plan, storage, None, None), catalogue, jobs)


def finish(plan: Opened, name: str, weights: bytes = b"best", kind: str = "weights") -> None:
    """Commit weights, as a job's training would."""
    commit.write(
        plan.job_folder(name) / kind,
        lambda new: commit.write_file(new / "model.safetensors", weights),
        {"best_epoch": 0},
    )


def missing(plan: Opened, **chosen: Chosen) -> dict[str, Target]:
    return lacking(targets(plan, True, chosen), plan.places.storage)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_needs_come_first_and_every_job_and_prediction_is_there(path: Path, photos: Path, tmp_path: Path) -> None:
    plan = opened(path, photos, tmp_path)
    found = targets(plan, gpu=True)
    places = {name: place for place, name in enumerate(found)}
    assert all(places[need.name] < places[name] for name, target in found.items() for need in target.needed())
    assert {name for name, target in found.items() if target.kind == "training"} == set(plan.jobs)
    members = {f"{name} {split}" for name in plan.plan.ensemble.members for split in ("test",)}
    assert {name for name, target in found.items() if target.kind == "prediction"} >= members
    for name, job in plan.jobs.items():
        assert found[name].key == job.key, "a training is kept under its job's key"


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_facts_are_plain_json_and_no_two_targets_share_a_key(path: Path, photos: Path, tmp_path: Path) -> None:
    plan = opened(path, photos, tmp_path)
    for name in plan.jobs:
        finish(plan, name, name.encode())
    found = targets(plan, gpu=True)
    for target in found.values():
        assert json.loads(json.dumps(target.facts)) == target.facts
    assert len({target.key for target in found.values()}) == len(found)
    assert len({target.place for target in found.values()}) == len(found)


def test_a_rank_takes_a_gpu_and_a_job_may_have_as_many_as_shares_or_as_is_said(photos: Path, tmp_path: Path) -> None:
    sets = ["cluster.cpus_per_worker=3", "defaults.shares=4", "stages.dcl.shares='ranks'"]
    ranks = "'resnet50/dcl' = 3, 'seresnext50/dcl' = 3, 'resnet50/full' = 2, seresnext50 = [2, 64]"
    sets += [f"cluster.ranks={{ {ranks} }}"]
    found = targets(opened(PLANS[1], photos, tmp_path, *sets, "stages.dcl.batch_size=6"), True)
    kinds = [target for target in found.values() if target.kind in ("training", "prediction")]
    assert {target.resources for target in kinds} == {Resources(3, 1)}
    names = ("resnet50/full", "resnet50/balanced", "resnet50/dcl", "seresnext50/full", "seresnext50/dcl")
    assert [found[name].world_sizes for name in names] == [(2,), (1, 2, 4), (3,), (2, 4), (3,)]


def test_a_prediction_may_have_as_many_parts_as_shards() -> None:
    assert [shards(rows, 50_030) for rows in (1, 2560, 2561, 250_000)] == [1, 1, 2, 98]


SHOP = """\
format = 1
name = "shop"
catalogue = { path = "photos" }
backbones = { net = "test_resnet.r160_in1k" }
[stages]
full = { epochs = 2 }
taught = { start = "full", objective = "distillation", teachers = ["net/full"], duplicates = "drop" }
labelled = { start = "full", pseudo_labels = { by = ["net/full"] } }
[jobs]
net = ["full", "taught", "labelled"]
[ensemble]
members = ["net/labelled"]
score = "val"
"""


@pytest.fixture
def shop(tmp_path: Path, photos: Path) -> Opened:
    (tmp_path / "plan.toml").write_text(SHOP)
    return opened(tmp_path / "plan.toml", photos, tmp_path / "runs")


def test_what_a_job_learns_from_is_made_before_it(shop: Opened) -> None:
    found = targets(shop, gpu=False)
    roles: dict[str, Any] = {role: [t.kind for t in needs] for role, needs in found["net/taught"].needs.items()}
    assert roles == {"start": ["training"], "teachers": ["soft_labels"], "kept": ["kept_rows"]}
    assert [t.kind for t in found["net/labelled"].needs["pseudo_labels"]] == ["pseudo_labels"]
    [labels] = found["net/labelled"].needs["pseudo_labels"]
    assert [need.name for need in labels.needed()] == ["net/full test"]


def test_whatever_is_made_is_shown_while_it_is_made(shop: Opened) -> None:
    found, state = targets(shop, gpu=False), RunState(shop)
    for name, target in found.items():
        for _ in state.apply(target, Change(name, "started", nodes=("a",))):
            pass
    shown = [(row.task.name, row.what) for row in doing(shop, told(shop), None, 0.0)]
    assert sorted(shown) == sorted((name, target.kind.replace("_", " ")) for name, target in found.items())
    assert {what for _, what in shown} >= {"hashes", "soft labels", "pseudo labels", "prediction", "ensemble"}


def test_only_what_is_missing_is_made_and_only_what_is_needed_for_it(shop: Opened) -> None:
    everything = missing(shop)
    assert {"hashes", "net/taught kept rows", "net/full test", "net/labelled val", "ensemble"} <= set(everything)
    finish(shop, "net/full")
    finish(shop, "net/taught")
    rest = missing(shop)
    assert set(everything) - set(rest) >= {"net/full", "net/taught", "hashes", "net/taught kept rows"}
    finish(shop, "net/labelled")
    kinds = [target.kind for target in missing(shop).values()]
    assert kinds == ["prediction"] * 2 + ["ensemble"] * 2 + ["comparison"], "no labels, no test of full"


def test_fitted_weights_need_val_and_are_part_of_the_key_of_an_ensemble_alone(photos: Path, tmp_path: Path) -> None:
    path = ROOT / "jobs" / "quickstart.toml"
    plans = {how: opened(path, photos, tmp_path, f'ensemble.combine="{how}"') for how in ("sum", "greedy", "weights")}
    for name in plans["sum"].jobs:
        finish(plans["sum"], name, name.encode())
    found = {how: targets(plan, gpu=False) for how, plan in plans.items()}
    members = plans["sum"].plan.ensemble.members
    assert set(found["greedy"]) - set(found["sum"]) == {"weights", *(f"{name} val" for name in members)}
    for name, target in found["sum"].items():
        same = [graph[name].key == target.key for graph in found.values()]
        assert same == [True, *[target.kind not in ("ensemble", "comparison")] * 2], name
    assert len({graph["ensemble"].key for graph in found.values()}) == 3
    assert "weights" not in (found["sum"]["ensemble"].facts or {})


def test_a_member_is_predicted_right_behind_its_training(photos: Path, tmp_path: Path) -> None:
    """Not when all others are trained: what a cluster has idle, predicts."""
    plan = opened(ROOT / "jobs" / "aliproducts.toml", photos, tmp_path)
    names = [name for name, target in missing(plan).items() if target.kind != "ensemble"]
    for member in plan.plan.ensemble.members:
        assert names[names.index(member) + 1] == f"{member} test"


def test_what_follows_a_training_is_known_when_that_is_there(shop: Opened) -> None:
    before = targets(shop, gpu=False)
    assert (before["net/labelled test"].key, before["net/labelled test"].place) == (None, None)
    assert before["ensemble of val"].key is None
    finish(shop, "net/labelled")
    after = targets(shop, gpu=False)
    key, sha256 = shop.jobs["net/labelled"].key, best(shop, "net/labelled").sha256  # type: ignore[union-attr]
    assert after["net/labelled test"].place == f"jobs/net/labelled/{key}/probabilities/{sha256[:16]}-test"
    assert after["ensemble of val"].place == "shop/ensemble-val"
    assert after["ensemble"].place == "shop/ensemble"


def test_a_chosen_checkpoint_is_another_ensemble(shop: Opened) -> None:
    for name in shop.jobs:
        finish(shop, name)
    finish(shop, "net/labelled", b"last", "last")
    key = str(shop.jobs["net/labelled"].key)
    last = Chosen(key, commit.digests(shop.job_folder("net/labelled") / "last")["model.safetensors"])
    by_best, by_last = targets(shop, False), targets(shop, False, {"net/labelled": last})
    assert by_best["ensemble"].key != by_last["ensemble"].key
    [weights] = by_last["ensemble"].needs["members"][0].needs["weights"]
    assert weights.place == f"jobs/net/labelled/{key}/last"
    assert weights.record(shop.places.storage) is not None
    elsewhere = targets(shop, False, {"net/labelled": Chosen("a" * 64, "b" * 64)})
    [weights] = elsewhere["ensemble"].needs["members"][0].needs["weights"]
    assert weights.place == f"shop/chosen/{'b' * 16}", "MLflow alone has it"
    assert weights.record(shop.places.storage) is None


def test_what_a_chosen_checkpoint_has_predicted_of_these_images_is_not_predicted_again(shop: Opened) -> None:
    for name in shop.jobs:
        finish(shop, name)
    chosen, storage = Chosen("a" * 64, "b" * 64), shop.places.storage

    def predicted() -> Target:
        return targets(shop, False, {"net/labelled": chosen})["ensemble"].needs["members"][0]

    apart, facts = predicted().folder(storage), predicted().facts
    plain = apart.with_name(apart.name.rpartition("-")[0])
    assert plain.name == f"{'b' * 16}-test"
    commit.write(plain, lambda new: None, {"catalogue": "another"})
    assert predicted().folder(storage) == apart, "of other images"
    commit.remove(plain)
    commit.write(plain, lambda new: None, dict(facts or {}))
    assert predicted().folder(storage) == plain
    assert predicted().record(storage) is not None


def test_a_batch_that_no_group_fits_in_is_refused_by_its_job(shop: Opened) -> None:
    job = shop.jobs["net/labelled"]
    lio = ObjectiveRecipe.model_validate({"name": "lio", "positives": 300})
    with pytest.raises(Refused, match="in groups of 301 of one class") as refused:
        cost_of(replace(job, stage=job.stage.model_copy(update={"objective": lio})), shop.read_catalogue(), 0)
    assert refused.value.where == "net/labelled"


def test_an_ensemble_is_made_again_when_its_key_changes(shop: Opened) -> None:
    for name in shop.jobs:
        finish(shop, name)
    target = targets(shop, False)["ensemble"]
    commit.write(target.folder(shop.places.storage), lambda new: None, {"target": target.key})
    assert target.record(shop.places.storage) is not None
    other = targets(shop, False, {"net/labelled": Chosen("a" * 64, "b" * 64)})["ensemble"]
    assert other.record(shop.places.storage) is None
