"""What a search tries and how it judges, without a cluster: stages, stops, hours, the log, finalists, the answer."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search import Searcher

from aliprod.cluster.trials import Log, Trial, drawn_stages, finalists, is_spent, judged, short
from aliprod.cluster.tune import _Halving, _Listed
from aliprod.plan.load import load
from aliprod.plan.schema import Tune
from aliprod.recipe import LearningRate, PerClass, Stage

EPOCHS = st.integers(1, 60)
MILESTONES = st.lists(st.integers(1, 60), max_size=4).map(lambda found: tuple(sorted(set(found))))
ROOT = Path(__file__).resolve().parents[2]


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


def test_without_a_search_the_learning_rates_are_drawn_around_the_stages_own() -> None:
    plan = load(ROOT / "jobs" / "aliproducts.toml", ["tune.span=5.0"])
    own, *others = drawn_stages(plan, "resnet50/dcl")
    assert own == plan.stage("resnet50/dcl")
    assert len({(stage.lr.backbone, stage.lr.heads) for stage in others}) == plan.tune.trials - 1
    for stage in others:
        assert own.lr.backbone / 5 <= stage.lr.backbone <= own.lr.backbone * 5
        assert own.lr.heads / 5 <= stage.lr.heads <= own.lr.heads * 5
        assert stage.model_dump(exclude={"lr"}) == own.model_dump(exclude={"lr"})


def trials(count: int) -> list[Trial]:
    return [Trial(f"stage {number}", {"drop_rate": 0.1 * number}, 0) for number in range(count)]


def log(folder: Path, told: list[Trial] | None = None) -> Log:
    return Log(folder / "log.json", 10, (told if told is not None else []).append)


def result(*errors: float, last: bool = False, diverged: bool = False, seconds: float = 60.0) -> dict[str, Any]:
    said = {"errors": list(errors), "last": last, "diverged": diverged, "wrong": [], "time_total_s": seconds}
    return {"training_iteration": len(errors) + diverged, "top1_error": 1.0 if diverged else errors[-1], **said}


def suggest(listed: _Listed, name: str) -> Any:
    found = listed.suggest(name)
    return SimpleNamespace(trial_id=name, config=found) if isinstance(found, dict) else found


def test_a_trial_of_another_search_is_known_by_the_settings_that_this_one_searches(tmp_path: Path) -> None:
    log(tmp_path).keep(Trial("stage", {"lr.backbone": 0.1, "lr.heads": 0.2}, 0, errors=(0.5,), ended=True))
    wanted = Trial("stage", {"batch_size": 8}, 0)
    found = log(tmp_path).of(wanted)
    assert (found.settings, found.errors, found.ended) == (wanted.settings, (0.5,), True)


def test_bad_trials_are_stopped_the_plans_own_never_also_where_the_others_ended_before(tmp_path: Path) -> None:
    first = _Listed(trials(3), log(tmp_path), Tune(reduction_factor=3))
    halving, (own, good, bad) = _Halving(first, 4), [suggest(first, name) for name in "abc"]
    for trial in (own, good, bad):
        halving.on_trial_add(None, trial)
    assert halving.on_trial_result(None, good, result(0.2)) == halving.CONTINUE
    assert halving.on_trial_result(None, own, result(0.9)) == halving.CONTINUE
    assert halving.on_trial_result(None, bad, result(0.8)) == halving.STOP
    first.on_trial_complete("c", result(0.8))
    assert halving.on_trial_result(None, good, result(0.2, 0.15, 0.1, 0.1, last=True)) == halving.STOP
    first.on_trial_complete("b", result(0.2, 0.15, 0.1, 0.1, last=True))
    again = _Listed(trials(4), log(tmp_path), Tune(reduction_factor=3))  # the plan's own was broken off
    assert [trial.stage for trial in again.before if trial.ended] == ["stage 1", "stage 2"]
    halving, (own, late) = _Halving(again, 4), [suggest(again, name) for name in "de"]
    assert (own.config, late.config) == ({"number": 0}, {"number": 3})
    for trial in (own, late):
        halving.on_trial_add(None, trial)
    assert halving.on_trial_result(None, own, result(0.9)) == halving.CONTINUE
    assert halving.on_trial_result(None, late, result(0.7)) == halving.STOP, "it is compared with those of before"


def test_a_diverged_trial_is_the_worst_of_its_rung(tmp_path: Path) -> None:
    listed = _Listed(trials(2), log(tmp_path), Tune())
    halving, (own, other) = _Halving(listed, 4), [suggest(listed, name) for name in "ab"]
    for trial in (own, other):
        halving.on_trial_add(None, trial)
    halving.on_trial_result(None, own, result(0.5))
    assert halving.on_trial_result(None, other, result(diverged=True)) == halving.STOP
    listed.on_trial_complete("b", result(diverged=True))
    assert listed.log.trials["stage 1"].ended
    assert listed.log.trials["stage 1"].top1_error == 1.0


def test_what_an_interrupt_ends_begins_anew_and_its_seconds_count(tmp_path: Path) -> None:
    told: list[Trial] = []
    listed = _Listed(trials(1), log(tmp_path, told), Tune())
    suggest(listed, "a")
    listed.on_trial_result("a", result(0.5))
    listed.on_trial_complete("a", result(0.5))  # neither its last epoch nor stopped by the scheduler
    assert told == []
    again = _Listed(trials(1), log(tmp_path, told), Tune())
    assert suggest(again, "b").config == {"number": 0}
    again.on_trial_complete("b", result(0.5, 0.4, last=True))
    assert [(trial.errors, trial.seconds) for trial in told] == [((0.5, 0.4), 120.0)]
    assert log(tmp_path).trials == {"stage 0": told[0]}
    assert _Listed(trials(1), log(tmp_path), Tune()).is_over()


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"[1]", b"{}", b'[{"backbone": 0.1}]'])
def test_a_log_that_is_none_is_as_good_as_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log.json").write_bytes(content)
    assert log(tmp_path).trials == {}


def test_a_search_goes_on_on_another_machine_where_storage_is_a_bucket(machines: Callable[[str], Path]) -> None:
    for name, number in (("a", 1), ("b", 2)):
        listed = _Listed(trials(4), log(machines(name) / "tune"), Tune())
        assert len(listed.left) == 5 - number
        suggest(listed, name)
        listed.on_trial_complete(name, result(0.5, 0.4, last=True))


def test_a_trial_that_names_images_that_are_not_there_is_left_out(tmp_path: Path) -> None:
    log(tmp_path).keep(Trial("a", {}, 0, (0.5,), 1.0, True, False, (3, 10)))
    assert log(tmp_path).trials == {}


def test_no_trial_begins_once_the_hours_are_spent_but_for_the_finalists_and_the_plans_own(tmp_path: Path) -> None:
    recipe = Tune(hours=0.2, finalists=1, seeds=2)  # 720 s; of these 4 x 60 s for the finalists
    listed, begun = _Listed(trials(20), log(tmp_path), recipe), 0
    while suggest(listed, f"{begun}") != Searcher.FINISHED:
        listed.on_trial_complete(f"{begun}", result(0.5, 0.4, last=True))
        begun += 1
    assert begun == 8
    assert suggest(_Listed(trials(20), log(tmp_path), recipe), "again") == Searcher.FINISHED, "nor after a restart"
    assert suggest(_Listed(trials(20), log(tmp_path), Tune(hours=0.25)), "more") == Searcher.FINISHED
    assert suggest(_Listed(trials(20), log(tmp_path), Tune(hours=1.0)), "more").config == {"number": 8}
    assert suggest(_Listed(trials(1), log(tmp_path / "new"), Tune(hours=1e-9)), "own").config == {"number": 0}


@given(st.floats(1, 1e4), st.lists(st.floats(1, 1e4), max_size=9), st.floats(0.01, 100))
def test_hours_hold_for_trials_and_finalists_together(own: float, others: list[float], hours: float) -> None:
    recipe = Tune(hours=hours, finalists=2, seeds=3)
    found = [Trial("", {}, 0, (0.5,), seconds, ended=True) for seconds in (own, *others)]
    planned = own + sum(others) + 9 * own
    assert is_spent(found, recipe) == (planned >= 3600 * hours)


def test_finalists_went_through_all_epochs_to_fewer_errors_than_the_plans_own() -> None:
    def trial(*errors: float, **said: bool) -> Trial:
        return Trial("", {}, 0, errors, 1.0, said.get("ended", True), said.get("diverged", False))

    tried = [
        trial(0.6, 0.5),
        trial(0.1),  # stopped
        trial(0.5, 0.4),
        trial(0.5, 0.3, ended=False),  # broken off
        trial(0.4, 0.2),
        trial(0.5, 0.5),
        trial(0.1, diverged=True),
        trial(0.4, 0.45),
    ]
    assert finalists(tried, 2, 3) == [4, 2, 7]
    assert finalists(tried, 2, 1) == [4]
    assert finalists(tried[:2], 2, 3) == []
    assert finalists([trial(diverged=True), trial(0.5, 0.9)], 2, 3) == [1], "any error is less than that of none"


def test_all_is_wrong_where_the_loss_diverged_and_images_of_unknown_class_do_not_count() -> None:
    labels = np.array([0, 0, 1, -1])
    tried = [Trial("", {}, 0, wrong=wrong) for wrong in ((0, 3), (0,), (), (1, 3))]
    tried.append(Trial("", {}, 0, diverged=True, ended=True))
    tried.append(Trial("", {}, 0, wrong=(3,)))
    first, second = judged(tried, labels, 2, 0)
    assert first.errors == (0.0, 0.25)
    assert second.errors == (1.0, 0.0)
    assert second.gain == pytest.approx(0.25 - 0.5)


@pytest.mark.parametrize(("searches", "better", "least", "most"), [(200, 0.0, 0, 10), (30, 2.0, 27, 30)])
def test_in_19_of_20_searches_nothing_is_offered_where_all_settings_are_equal_and_most_offer_a_much_better_one(
    searches: int, better: float, least: int, most: int
) -> None:
    """Images differ in how hard they are, trainings by their seed; eight settings, three finalists, three seeds."""
    random, labels, offered = np.random.default_rng(0), np.arange(120) % 12, 0
    for _ in range(searches):
        hard = random.normal(0, 1.5, 120)

        def train(setting: int, hard: Any = hard) -> Trial:
            score = hard + random.normal(0, 0.1 if better else 0.4) - (better if setting == 3 else 0.0)
            wrong = np.flatnonzero(random.random(120) < 1 / (1 + np.exp(-score)))
            return Trial("", {}, 0, (len(wrong) / 120,), 1.0, True, False, tuple(map(int, wrong)))

        best = finalists([train(setting) for setting in range(8)], 1, 3)
        again = [train(setting) for setting in (0, *best) for _ in range(3)] if best else []
        found = judged(again, labels, 3, 0) if best else []
        offered += any(one.interval[0] > 0 for one in found)
    assert least <= offered <= most
