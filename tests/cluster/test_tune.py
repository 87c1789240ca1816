"""A trial's stage: short, of few images, with the schedule of the long one drawn together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aliprod.cluster.tune import pairs, short
from aliprod.plan.schema import Tune
from aliprod.recipe import LearningRate, PerClass, Stage

EPOCHS = st.integers(1, 60)
MILESTONES = st.lists(st.integers(1, 60), max_size=4).map(lambda found: tuple(sorted(set(found))))


@given(EPOCHS, EPOCHS, MILESTONES, st.one_of(st.just("all"), st.integers(1, 50).map(lambda n: PerClass(per_class=n))))
def test_a_trial_is_no_longer_and_no_larger_than_its_stage_and_drops_its_rates_within_it(
    epochs: int, most: int, milestones: tuple[int, ...], images: object
) -> None:
    stage = Stage(epochs=epochs, images=images, lr=LearningRate(milestones=milestones, warmup_epochs=epochs / 2))
    trial = short(stage, Tune(epochs=most, per_class=10))
    assert trial.epochs == min(epochs, most)
    assert isinstance(trial.images, PerClass)
    assert trial.images.per_class == min(10, images.per_class if isinstance(images, PerClass) else 10)
    assert trial.lr.warmup_epochs == pytest.approx(trial.epochs / 2)
    assert all(0 < milestone < trial.epochs for milestone in trial.lr.milestones)
    assert list(trial.lr.milestones) == sorted(set(trial.lr.milestones))
    if most >= epochs:
        assert trial.lr.milestones == tuple(milestone for milestone in milestones if milestone < epochs)
    unlike = {"epochs", "images", "lr"}
    assert trial.model_dump(exclude=unlike) == stage.model_dump(exclude=unlike)
    assert (trial.lr.backbone, trial.lr.heads) == (stage.lr.backbone, stage.lr.heads)


def test_a_schedule_of_thirty_epochs_drops_at_the_same_shares_of_three() -> None:
    trial = short(Stage(epochs=30, lr=LearningRate(milestones=(10, 20, 29))), Tune(epochs=3))
    assert trial.lr.milestones == (1, 2)


@given(st.floats(1e-6, 10), st.floats(1e-6, 10), st.floats(1.1, 1e6), st.integers(0, 2**32))
def test_rates_are_drawn_around_the_stages_own_alike_each_time_and_more_trials_begin_with_the_same(
    backbone: float, heads: float, span: float, seed: int
) -> None:
    own, recipe = (backbone, heads), Tune(trials=6, span=span)
    found = pairs(own, recipe, seed)
    assert found[0] == own
    assert len(set(found)) == 6
    assert found[:3] == pairs(own, recipe.model_copy(update={"trials": 3}), seed)
    for pair in found:
        assert all(1 / span * 0.999 <= rate / mean <= span * 1.001 for rate, mean in zip(pair, own, strict=True))
