"""How tables of settings become a stage."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aliprod.plan.schema import merged


def test_the_weakest_is_the_default_then_stage_backbone_and_job(load_text: Any, small: str) -> None:
    plan = load_text(small)
    assert plan.stage("resnet/full").lr.heads == 0.1  # defaults
    assert plan.stage("net-b3/full").lr.heads == 0.5  # override of the backbone
    assert plan.stage("net-b3/dcl").lr.heads == 0.25  # override of the job
    assert plan.stage("net-b3/dcl").lr.backbone == 0.001  # stage: tables are merged key by key
    assert plan.stage("net-b3/dcl").epochs == 4
    assert plan.stage("net-b3/dcl").optimizer.momentum == 0.8


def test_objective_and_images_are_replaced_as_a_whole(load_text: Any, small: str) -> None:
    stage = load_text(small).stage("resnet/dcl")
    assert stage.objective.name == "dcl"
    assert "smoothing" not in stage.objective.options


def test_a_stage_with_a_start_drops_pretrained_of_the_defaults_only(load_text: Any, small: str) -> None:
    plan = load_text(small)
    assert plan.stage("resnet/full").pretrained is True
    assert plan.stage("resnet/dcl").pretrained is False


def test_a_stage_has_the_plans_seed_unless_it_states_one(load_text: Any, small: str) -> None:
    plan = load_text(small)
    assert plan.stage("resnet/full").seed == 7
    assert plan.stage("resnet/dcl").seed == 3


tables = st.dictionaries(
    st.sampled_from(["lr", "objective", "epochs"]),
    st.integers() | st.dictionaries(st.sampled_from("ab"), st.integers()),
)


@given(tables, tables, tables)
def test_merging_in_two_steps_gives_the_same_and_changes_no_table(first: Any, second: Any, third: Any) -> None:
    copies = repr((first, second, third))
    assert merged(merged(first, second), merged(third)) == merged(first, second, third)
    assert repr((first, second, third)) == copies


@given(tables)
def test_the_last_word_wins(table: Any) -> None:
    assert merged(table, {"epochs": 3})["epochs"] == 3
    assert merged(table, {}) == table == merged({}, table)
