"""Jobs come parents first; a key changes with what changes a result, and with nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from aliprod.errors import Refused
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load

ROOT = Path(__file__).resolve().parents[2]
SEED = ROOT / "jobs" / "aliproducts.toml"
PRINT = "0" * 64


def keys(*sets: str, fingerprint: str | None = PRINT) -> dict[str, str | None]:
    return {name: job.key for name, job in jobs_of(load(SEED, sets), fingerprint).items()}


def changed(*sets: str) -> set[str]:
    before, after = keys(), keys(*sets)
    return {name for name in before if before[name] != after[name]}


def test_the_seeds_keys_are_the_ones_that_results_are_kept_under() -> None:
    """A change here makes everybody train again: raise RECIPE_VERSION or undo it."""
    assert keys() == json.loads((ROOT / "tests" / "plan" / "keys.json").read_text())


def test_parents_come_before_children_and_members_are_the_plans() -> None:
    plan = load(SEED)
    found = jobs_of(plan, PRINT)
    for place, job in enumerate(found.values()):
        assert all(list(found).index(parent) < place for parent in job.parents)
    assert {name for name, job in found.items() if job.member} == set(plan.ensemble.members)
    assert found["resnet50/dcl"].parents == ("resnet50/balanced",)
    assert found["resnet50/full"].parents == ()


def test_the_seed_takes_a_probe_as_its_floor_and_keeps_its_keys() -> None:
    floor = 'jobs.resnet50=["probe", "full", "balanced", "dcl", "lio", "accuracy"]'
    assert f"--set '{floor}'" in SEED.read_text(encoding="utf-8")
    found = jobs_of(load(SEED, [floor]), PRINT)
    assert [job.name for job in found.values() if job.is_floor] == ["resnet50/probe"]
    assert {name: job.key for name, job in found.items() if not job.is_floor} == keys()


def test_no_two_jobs_share_a_key() -> None:
    assert len(set(keys().values())) == 16


def test_one_stage_changes_its_jobs_and_their_descendants_only() -> None:
    assert changed("stages.dcl.epochs=4") == {"resnet50/dcl", "seresnext50/dcl"}
    balanced = {name for name in keys() if not name.endswith("/full")}
    assert changed("stages.balanced.lr.heads=0.5") == balanced
    assert changed('overrides."resnet50/balanced".ema=0.9') == {
        name for name in balanced if name.startswith("resnet50/")
    }


@pytest.mark.parametrize(
    "flag",
    [
        "name=other",
        "cluster.ranks=1",
        "cluster.cpus_per_worker=4",
        "cluster.storage=elsewhere",
        "catalogue.path=elsewhere",
        'ensemble.members=["resnet50/dcl"]',
        "ensemble.views=center",
        "stages.dcl.objective.beta=1",  # the default, written out, and as a whole number
        "stages.dcl.lr.schedule=steps",
        "stages.full.seed=0",
        "stages.unused={epochs=3}",
    ],
)
def test_what_changes_no_result_changes_no_key(flag: str) -> None:
    assert changed(flag) == set()


@pytest.mark.parametrize(
    "flag", ["seed=1", "defaults.crop=192", "defaults.ema=0.999", "defaults.optimizer.momentum=0.8"]
)
def test_what_changes_every_result_changes_every_key(flag: str) -> None:
    assert changed(flag) == set(keys())  # through their parents also the stages that state another crop


def test_ranks_are_part_of_a_key_where_they_are_what_a_step_falls_into() -> None:
    assert keys("defaults.shares=4") == keys("defaults.shares=4", "cluster.ranks=2") != keys()
    two, four = (keys("defaults.shares='ranks'", f"cluster.ranks={ranks}") for ranks in (2, 4))
    assert not set(two.values()) & set(four.values())


def test_a_network_changes_the_jobs_of_its_backbone() -> None:
    assert changed("backbones.resnet50=resnet50.a1_in1k") == {name for name in keys() if name.startswith("resnet50/")}


def test_another_catalogue_changes_every_key_and_none_gives_none() -> None:
    assert not set(keys().values()) & set(keys(fingerprint="1" * 64).values())
    assert set(keys(fingerprint=None).values()) == {None}


def test_a_backbones_and_a_stages_name_are_no_part_of_a_key(load_text: Any, small: str) -> None:
    plain = jobs_of(load_text(small), PRINT)
    renamed = small.replace("resnet =", "trunk =").replace("resnet/", "trunk/").replace("full", "base")
    other = jobs_of(load_text(renamed), PRINT)
    assert plain["resnet/dcl"].key == other["trunk/dcl"].key


def test_local_weights_count_by_content_not_by_path(tmp_path: Path) -> None:
    for folder, content in (("a", b"weights"), ("b", b"weights"), ("c", b"others")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "resnet50.tv_in1k.safetensors").write_bytes(content)

    def key(pretrained: Path) -> str | None:
        return keys(f"overrides.'resnet50/full'.pretrained='{pretrained}'")["resnet50/full"]

    assert key(tmp_path / "a") == key(tmp_path / "b") == key(tmp_path / "b" / "resnet50.tv_in1k.safetensors")
    assert len({key(tmp_path / "a"), key(tmp_path / "c"), keys()["resnet50/full"]}) == 3


def test_local_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match=r"resnet50\.tv_in1k\.safetensors: pretrained weights cannot be read: No such file"
    ):
        keys(f"stages.full.pretrained='{tmp_path}'")


def test_a_job_is_told_the_weights_file_of_its_network(tmp_path: Path) -> None:
    found = jobs_of(load(SEED, [f"stages.full.pretrained='{tmp_path}'"]), None)
    assert found["resnet50/full"].stage.pretrained == str(tmp_path / "resnet50.tv_in1k.safetensors")


def test_a_setting_that_came_later_changes_a_key_only_where_it_says_something() -> None:
    assert not changed("defaults.gradients='float32'") | changed("defaults.augment='cpu'")
    facts = jobs_of(load(SEED, ["defaults.shares=1"]), PRINT)["resnet50/full"].facts or {}
    assert "shares" not in facts["stage"], "nor in the keys of plans that are older than it"
    assert changed("defaults.shares=2") == changed("defaults.shares='ranks'", "cluster.ranks=2") == set(keys())
    assert changed("defaults.augment='device'") == set(keys())


# Edges beside start

MORE = """
[stages.student]
start = "full"
objective = "distillation"
teachers = ["net-b3/dcl", "resnet/dcl"]

[stages.labelled]
start = "full"
pseudo_labels = { by = ["net-b3/dcl"] }

[stages.mean]
soup = { of = ["full", "dcl"] }

[jobs]
resnet = ["dcl", "full", "student", "labelled", "mean"]
"""


def more(small: str) -> str:
    return small.replace("[jobs]\n", MORE).replace('resnet = ["dcl", "full"]\n', "")


def changed_in_small(load_text: Any, text: str, *sets: str) -> set[str]:
    before, after = jobs_of(load_text(text), PRINT), jobs_of(load_text(text, sets), PRINT)
    return {name for name in before if before[name].key != after[name].key}


def test_jobs_wait_for_all_that_they_learn_from(load_text: Any, small: str) -> None:
    found = jobs_of(load_text(more(small)), PRINT)
    assert found["resnet/student"].parents == ("resnet/full", "net-b3/dcl", "resnet/dcl")
    assert found["resnet/labelled"].parents == ("resnet/full", "net-b3/dcl")
    assert (found["resnet/mean"].parents, found["resnet/mean"].start) == (("resnet/full", "resnet/dcl"), None)
    assert found["resnet/mean"].soup == ("resnet/full", "resnet/dcl")
    for place, job in enumerate(found.values()):
        assert all(list(found).index(parent) < place for parent in job.parents)


def test_a_key_changes_with_those_that_a_job_learns_from(load_text: Any, small: str) -> None:
    text = more(small)
    taught = {"resnet/student", "resnet/labelled"}
    assert changed_in_small(load_text, text, 'overrides."net-b3/dcl".epochs=5') == {"net-b3/dcl", *taught}
    assert changed_in_small(load_text, text, 'overrides."resnet/dcl".epochs=5') == {
        "resnet/dcl",
        "resnet/student",
        "resnet/mean",
    }
    assert changed_in_small(load_text, text, 'stages.student.teachers=["net-b3/dcl"]') == {"resnet/student"}
    assert changed_in_small(load_text, text, 'stages.labelled.pseudo_labels.by=["resnet/dcl"]') == {"resnet/labelled"}
    assert changed_in_small(load_text, text, "stages.labelled.pseudo_labels.threshold=0.8") == {"resnet/labelled"}
    assert changed_in_small(load_text, text, "stages.mean.soup.greedy=true") == {"resnet/mean"}


def test_the_names_of_those_that_a_job_learns_from_are_no_part_of_its_key(load_text: Any, small: str) -> None:
    plain = jobs_of(load_text(more(small)), PRINT)
    renamed = more(small).replace("net-b3", "other").replace("dcl]", "cut]").replace('"dcl"', '"cut"')
    renamed = renamed.replace("/dcl", "/cut").replace('name = "cut"', 'name = "dcl"')
    found = jobs_of(load_text(renamed), PRINT)
    assert found["resnet/student"].parents == ("resnet/full", "other/cut", "resnet/cut")
    for name in ("student", "labelled", "mean"):
        assert found[f"resnet/{name}"].key == plain[f"resnet/{name}"].key


def test_the_ablation_shares_the_trainings_that_it_starts_from_with_the_seeds_plan() -> None:
    ablation = {name: job.key for name, job in jobs_of(load(ROOT / "jobs" / "ablation.toml"), PRINT).items()}
    assert {name for name, key in ablation.items() if key in keys().values()} == {
        "resnet50/full",
        "resnet50/balanced",
        "resnet50/accuracy",
        "efficientnet-b3/full",
        "efficientnet-b3/balanced",
    }
    shared = keys()
    assert all(
        shared[name] == key for name, key in ablation.items() if name in shared and name != "efficientnet-b3/dcl"
    )
    assert len(set(ablation.values())) == len(ablation)


def test_the_product_tree_is_part_of_the_keys_of_those_alone_that_learn_from_it() -> None:
    plan = load(ROOT / "jobs" / "ablation.toml")
    one, other = (jobs_of(plan, PRINT, tree) for tree in ("1" * 64, "2" * 64))
    assert {name for name in one if one[name].key != other[name].key} == {"resnet50/hierarchy"}
