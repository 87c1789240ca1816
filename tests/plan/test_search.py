"""What [tune.search] may say, what is drawn from it, and that the answer is a line for the plan."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aliprod.errors import Refused
from aliprod.plan.checks import stage_with
from aliprod.plan.load import load
from aliprod.plan.source import toml_of
from aliprod.recipe import Stage
from aliprod.recipe.search import Range, draws

JOB = "net-b3/dcl"
SEARCH = """
[tune.search]
lr.backbone = { low = 1e-4, high = 0.1, log = true }
lr.warmup_epochs = { low = 0, high = 4 }
drop_rate = { low = 0.0, high = 0.5 }
batch_size = { low = 64, high = 512, log = true }
augmentation = [["random_crop", "flip"], ["resize", "cutout"]]
optimizer.name = ["sgd", "lamb"]
objective.name = ["dcl", "cross_entropy"]
objective.smoothing = [0.0, 0.1]
objective.swap = ["pair", "classes"]
"""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("lr.backbon = [0.1]", "tune.search.lr has no setting backbon.|Did you mean backbone?"),
        ("backbone = [0.1]", "tune.search has no setting backbone.|Did you mean lr.backbone?|A stage may say"),
        ("drop_rate = { low = 0, high = 1 }", "tune.search.drop_rate = 1 must be less than 1"),
        ("batch_size = [64, 0]", "tune.search.batch_size = 0 must be at least 1"),
        ("batch_size = { low = 64.0, high = 128 }", "tune.search.batch_size = 64.0 must be a whole number"),
        ("batch_size = 64", "tune.search.batch_size = 64 must be a list of 1 to 100 choices, or a range"),
        ("batch_size = []", "tune.search.batch_size = [] must be a list of 1 to 100 choices, or a range"),
        ("batch_size = { low = 64 }", "tune.search.batch_size lacks high"),
        ("batch_size = { low = 64, high = 64 }", "tune.search.batch_size: low must be below high"),
        ("lr.heads = { low = 0, high = 1, log = true }", "tune.search.lr.heads: the logarithm needs a low above 0"),
        (
            "lr.heads = { low = 0.1, high = 1, logs = true }",
            "tune.search.lr.heads has no setting logs.|Did you mean log?",
        ),
        ('optimizer.name = ["sgd", "adamm"]', 'tune.search.optimizer.name = "adamm" must be|Did you mean adamw?'),
        ('objective.name = ["dlc"]', 'tune.search.objective: there is no objective "dlc".|Did you mean dcl?'),
        ('objective = ["dcl", { name = "dcl", part = 7 }]', "dcl has no option part.|Did you mean parts?"),
        ("objective.part = [7]", "dcl has no option part.|Did you mean parts?"),
        ("objective.gamma = [7]\nobjective.name = ['focal']", ""),
        ("epochs = [1, 2]", "tune.search.epochs is not searched for: those of a trial are tune.epochs"),
        ('images = ["all"]', "tune.search.images is not searched for: those of a trial are tune.per_class"),
        ("seed = { low = 1, high = 9 }", "tune.search.seed is not searched for: finalists are trained with tune.seeds"),
        ('start = ["full"]', "tune.search.start is not searched for"),
        ("soup.of = [['full', 'dcl']]", "tune.search.soup.of is not searched for"),
    ],
)
def test_what_no_stage_can_have_is_refused_with_line_key_and_nearest_name(
    load_text: Any, small: str, tmp_path: Path, line: str, says: str
) -> None:
    text = f"{small}\n[tune.search]\n{line}\n"
    if not says:
        load_text(text)
        return
    with pytest.raises(Refused) as caught:
        load_text(text)
    number = 1 + text.split("\n").index(line.split("\n")[0])
    assert f"{tmp_path / 'plan.toml'}, line {number}: " in str(caught.value)
    for words in says.split("|"):
        assert words in str(caught.value)


def test_a_search_that_is_no_table_is_refused(load_text: Any, small: str) -> None:
    with pytest.raises(Refused, match=r"tune.search = 4 must be a table"):
        load_text(small, ["tune.search=4"])


def drawn(plan: Any, count: int = 12, seed: int = 0) -> dict[Stage, dict[str, Any]]:
    return draws(plan.tune.search, seed, count, partial(stage_with, plan, JOB))


def test_draws_are_the_plans_own_first_then_others_the_same_each_time_within_what_is_said(
    load_text: Any, small: str
) -> None:
    plan = load_text(small + SEARCH)
    found = drawn(plan)
    assert next(iter(found)) == plan.stage(JOB)
    assert next(iter(found.values())) == {}
    assert list(drawn(plan).items()) == list(found.items())
    assert list(drawn(plan, 5).items()) == list(found.items())[:5], "more of them begin with the same"
    others = list(found)[1:]
    assert len(others) == 11, "no two are the same"
    for stage in others:
        assert 1e-4 <= stage.lr.backbone <= 0.1
        assert stage.lr.heads == 0.25, "what is not searched stays"
        assert 64 <= stage.batch_size <= 512
        assert stage.batch_size % 2 == 0, "what cannot be dealt to two shares is drawn again"
        assert stage.lr.warmup_epochs in range(5)
        assert "parts" in stage.objective.options or stage.objective.name != "dcl"
        assert "smoothing" in stage.objective.options or stage.objective.name != "cross_entropy"
    assert {stage.optimizer.name for stage in others} == {"sgd", "lamb"}
    assert {stage.objective.name for stage in others} == {"dcl", "cross_entropy"}
    assert {stage.optimizer.momentum for stage in others if stage.optimizer.name == "sgd"} == {0.8}


def test_what_is_found_makes_the_same_stage_as_a_flag_and_as_a_table_of_the_plan(load_text: Any, small: str) -> None:
    plan = load_text(small + SEARCH)
    for stage, settings in drawn(plan).items():
        override = plan.with_settings(JOB, settings).overrides[JOB]
        flagged = load_text(small, [f'overrides."{JOB}"={toml_of(override)}'])
        table = "\n".join(f"{name} = {toml_of(value)}" for name, value in override.items())
        before, after = small.split('[overrides."net-b3/dcl"]\nepochs = 4\nlr = { heads = 0.25 }\n')
        pasted = load_text(f'{before}[overrides."{JOB}"]\n{table}\n{after}')
        for job in plan.job_names():
            expected = stage if job == JOB else load_text(small).stage(job)
            assert flagged.stage(job) == pasted.stage(job) == expected


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ("crop = [64, 65]", r"no stage with crop = 65 is possible: crop = 65 is larger than resize = 64"),
        ('optimizer.name = ["sgd", "lion"]\noptimizer.momentum = [0.5]', r'no stage with optimizer.name = "lion" is'),
        ("batch_size = { low = 1, high = 2 }\nshares = [4, 8]", r"no stage is possible: .* cannot be dealt to"),
    ],
)
def test_a_search_or_a_choice_that_no_draw_makes_a_stage_of_is_refused_with_the_reason(
    load_text: Any, small: str, search: str, says: str
) -> None:
    plan = load_text(f"{small}\n[tune.search]\n{search}\n", ["cluster.ranks=1"])
    with pytest.raises(ValueError, match=says):
        drawn(plan)


def test_where_there_are_no_more_stages_there_are_fewer_draws(load_text: Any, small: str) -> None:
    plan = load_text(f"{small}\n[tune.search]\nbatch_size = [64, 256]\ndrop_rate = [0.0, 0.1]\n")
    assert len(drawn(plan, 50)) == 4


@given(
    st.tuples(*[st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1e6))] * 2).filter(lambda ends: ends[0] != ends[1]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_a_number_of_a_range_is_within_it_and_whole_where_both_ends_are(
    ends: tuple[float, float], log: bool, seed: int
) -> None:
    low, high = sorted(ends)
    number = Range(low=low, high=high, log=log).draw(random.Random(seed))
    assert low <= number <= high
    assert isinstance(number, int) or not all(isinstance(end, int) for end in ends)


@pytest.mark.parametrize(("log", "middle"), [(True, 0.1), (False, 5.0)])
def test_a_range_is_even_in_its_scale(log: bool, middle: float) -> None:
    source = random.Random(0)
    below = sum(Range(low=0.001, high=10.0, log=log).draw(source) < middle for _ in range(4000))
    assert below == pytest.approx(2000, abs=130)  # four standard deviations


def test_the_seeds_plan_can_be_searched_for_every_setting_of_a_stage_at_once() -> None:
    sets = [f"tune.search.{line}" for line in SEARCH.strip().split("\n")[1:] if "swap" not in line]
    plan = load(Path(__file__).resolve().parents[2] / "jobs" / "aliproducts.toml", sets)
    assert len(draws(plan.tune.search, 0, 8, partial(stage_with, plan, "resnet50/balanced"))) == 8
