"""Weights and temperatures fitted on labelled images, and what an ensemble is worth."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.ensemble.add import write_ensemble
from aliprod.ensemble.calibrate import TEMPERATURES, losses, temperature
from aliprod.ensemble.choose import FOLDS, WHOLE, Combination, fit, fitted, folds, forward, mixture
from aliprod.ensemble.compare import compare
from aliprod.ensemble.guesses import read_predictions
from aliprod.errors import Failed
from aliprod.inference.metrics import score
from aliprod.inference.probabilities import Probabilities, open_store, tempered, write

SKILLS = ((1.5, 1.0), (1.2, 3.0), (1.0, 0.5), (0.0, 2.0))  # how well a member sees, and how sure it is; the last: noise
OWN = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).uniform(0.01, 1, (4, 30)))


def drawn(rows: int, skill: float, sharpness: float, seed: int, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(rows) % classes
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(rows), labels] += skill
    return (logits * sharpness).softmax(1).half(), labels


def store(folder: Path, probabilities: torch.Tensor, labels: torch.Tensor, name: str) -> Probabilities:
    ids, classes = [f"{number}.jpg" for number in range(len(labels))], 3 * np.arange(probabilities.shape[1])
    record = {"job": name, "split": "val"}
    write(folder, ids, classes, lambda _: [probabilities], (3 * labels).tolist(), record, rows_per_shard=70)
    return open_store(folder)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Probabilities]:
    folder = tmp_path_factory.mktemp("members")
    return [
        store(folder / f"{number}", *drawn(400, *skill, seed=number), f"net/{number}")
        for number, skill in enumerate(SKILLS)
    ]


@pytest.fixture(scope="module", params=["greedy", "weights"])
def combine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@settings(max_examples=20, deadline=None)
@given(OWN)
def test_mixed_members_are_never_worse_than_the_best_of_them_and_their_order_changes_nothing(own: np.ndarray) -> None:
    alone = -np.log(own).mean(axis=1)
    for how in ("greedy", "weights"):
        whole = np.array(fitted(how, own))
        assert whole.sum() == WHOLE if how == "weights" else whole.sum() >= 1
        assert -np.log(whole / whole.sum() @ own).mean() <= alone.min() + 1e-4
        order = np.random.default_rng(0).permutation(len(own))
        assert fitted(how, own[order]) == tuple(whole[order])


@settings(max_examples=20, deadline=None)
@given(OWN)
def test_no_shift_of_weight_between_two_members_lowers_the_loss_of_the_mixture(own: np.ndarray) -> None:
    shares = mixture(own)
    assert shares.sum() == pytest.approx(1)
    assert (shares >= 0).all()
    best = -np.log(shares @ own).mean()
    for one in np.eye(len(own)):
        assert -np.log((0.99 * shares + 0.01 * one) @ own).mean() >= best - 1e-4


def test_noise_has_next_to_no_weight_and_a_member_that_is_too_sure_is_cooled(members, combine) -> None:
    for found in fit(members, combine, seed=0):
        assert found.weights[3] <= 0.02 * sum(found.weights)
        assert found.weights[0] == max(found.weights)
        assert found.temperatures[2] < 1 < found.temperatures[1]


@pytest.mark.parametrize("sharpness", [0.6, 1.0, 2.5])
def test_a_temperature_is_the_nearest_of_those_that_are_tried(sharpness: float) -> None:
    probabilities, labels = drawn(500, 2.0, sharpness, seed=7)
    found = losses(probabilities.numpy(), labels.numpy())
    exact = temperature(probabilities.double().clamp_min(2.0**-25).log(), labels).item()
    best = TEMPERATURES[found.mean(axis=0).argmin()]
    assert abs(np.log2(best / exact)) <= 1 / 8
    place = int(found.mean(axis=0).argmin())
    own = tempered(probabilities, best)[torch.arange(500), labels]
    np.testing.assert_allclose(found[:, place], -own.log().numpy(), rtol=1e-9)


def test_each_fold_is_left_out_once_and_another_seed_deals_them_anew() -> None:
    held = folds(103, 5)
    assert set(np.bincount(held)) == {20, 21}
    assert len(np.bincount(held)) == FOLDS
    assert (held == folds(103, 5)).all()
    assert (held != folds(103, 6)).any()


def test_what_is_fitted_on_the_others_does_not_see_a_fold(members, combine, tmp_path: Path) -> None:
    before = fit(members, combine, seed=3)
    held = folds(400, 3)
    order = [int(name.removesuffix(".jpg")) for name in sorted(members[0].ids.to_pylist(), key=lambda n: int(n[:-4]))]
    wrong = torch.arange(400) % 6
    wrong[np.array(order)[held == 2]] = 0  # other labels in one fold
    changed = [
        store(tmp_path / one.name, torch.from_numpy(one.take(np.arange(400)).copy()), wrong, one.name)
        for one in members
    ]
    after = fit(changed, combine, seed=3)
    assert [one == other for one, other in zip(before, after, strict=True)].index(True) == 2
    assert sum(one == other for one, other in zip(before[:-1], after[:-1], strict=True)) == 1


def test_the_order_of_members_and_the_size_of_blocks_change_no_byte(members, combine, tmp_path: Path) -> None:
    found = fit(members, combine, seed=0)[-1]
    turned = fit(members[::-1], combine, seed=0)[-1]
    assert turned == Combination(found.weights[::-1], found.temperatures[::-1])
    for name, some, what, block in (("a", members, found, 7), ("b", members[::-1], turned, 400)):
        write_ensemble(tmp_path / name, some, what.weights, None, block, what.temperatures)
    for file in ("sums-00000.npy", "submission.csv", "predictions.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    kept = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert {one["weight"] for one in kept["record"]["members"]} == {weight for weight in found.weights if weight}


def test_a_comparison_tells_the_errors_of_the_sum_and_of_each_member(members, tmp_path: Path) -> None:
    told = compare(members, [Combination((1,) * 4)], seed=0)
    write_ensemble(tmp_path / "sum", members)
    predicted = read_predictions(tmp_path / "sum")
    order = pa.compute.index_in(predicted.ids, value_set=members[0].ids)
    labels = members[0].labels.take(order)
    assert told["ensemble"]["top1_error"] == (score(labels, predicted.predicted) or {})["top1_error"]
    for member in members:
        own = told["members"][member.name]
        assert own["top1_error"] == (score(member.labels, member.predicted()) or {})["top1_error"]
        assert own["gain"] == own["top1_error"] - told["ensemble"]["top1_error"]
        assert own["interval"][0] <= own["top1_error"] <= own["interval"][1]
        assert own["gain_interval"][0] <= own["gain"] <= own["gain_interval"][1]
    assert told["sum"]["gain_interval"] == [0, 0]
    write_ensemble(tmp_path / "three", members[:3])
    error = (score(labels, read_predictions(tmp_path / "three").predicted) or {})["top1_error"]
    assert told["members"]["net/3"]["left_out"]["top1_error"] == error
    assert told["members"]["net/3"]["left_out"]["gain_interval"][1] < 0, "the ensemble is better without noise"
    assert compare(members, [Combination((1,) * 4)], seed=0) == told
    first, second = (one.predicted()[np.argsort(one.ids.to_pylist())] for one in members[:2])
    assert told["disagreement"][0][1] == told["disagreement"][1][0] == np.mean(first != second) > 0
    assert [row[place] for place, row in enumerate(told["disagreement"])] == [0.0] * 4


def test_fitted_weights_gain_where_a_member_is_noise_and_the_smallest_ensemble_leaves_it_out(members, combine) -> None:
    told = compare(members, fit(members, combine, seed=0), seed=0)
    assert told["sum"]["gain_interval"][0] > 0
    assert "net/3" not in told["smallest"]["members"]
    assert told["smallest"]["top1_error"] <= told["ensemble"]["top1_error"] + told["smallest"]["standard_error"]


def test_copies_gain_nothing_and_one_of_them_is_enough(combine, tmp_path: Path) -> None:
    rows = drawn(200, 1.5, 1.0, seed=1)
    copies = [store(tmp_path / str(number), *rows, f"net/{number}") for number in range(3)]
    told = compare(copies, fit(copies, combine, seed=0), seed=0)
    low, high = told["sum"]["gain_interval"]
    assert low <= 0 <= high
    assert abs(told["sum"]["gain"]) < 0.02
    assert len(told["smallest"]["members"]) == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_few_images_and_a_single_member_are_compared_too(rows: int, tmp_path: Path) -> None:
    one = store(tmp_path / "a", *drawn(rows, 9.0, 1.0, seed=1), "net/a")
    told = compare([one], [Combination((1,))], seed=0)
    assert told["images"] == rows
    assert told["members"]["net/a"]["left_out"] is None
    assert told["smallest"]["members"] == ["net/a"]


def test_images_without_a_label_are_left_out(tmp_path: Path) -> None:
    rows, labels = drawn(60, 1.5, 1.0, seed=1)
    write(tmp_path / "a", [f"{n}.jpg" for n in range(60)], np.arange(6), lambda _: [rows],
          [int(label) if number % 2 else None for number, label in enumerate(labels)])  # fmt: skip
    assert compare([open_store(tmp_path / "a")], [Combination((1,))], seed=0)["images"] == 30


def test_a_forward_order_begins_with_the_best_and_passes_over_what_has_no_weight() -> None:
    own = np.array([[0.5, 0.5], [0.9, 0.8], [0.99, 0.01], [1.0, 1.0]])
    assert forward(own, [1, 1, 1, 0])[0] == 1
    assert sorted(forward(own, [1, 1, 1, 0])) == [0, 1, 2]


def test_a_row_that_is_no_distribution_is_named_before_a_temperature_hides_it(members, tmp_path: Path) -> None:
    rows, labels = drawn(70, 1.5, 1.0, seed=1)
    broken = store(tmp_path / "a", rows, labels, "net/a")
    rows = rows.numpy().copy()
    rows[5] *= 2
    np.save(tmp_path / "a" / "probabilities-00000.npy", rows)
    with pytest.raises(Failed, match=r"5\.jpg \(row 5\) sum to 2"):
        fit([broken], "greedy", seed=0)
    with pytest.raises(Failed, match=r"5\.jpg \(row 5\) sum to 2"):
        write_ensemble(tmp_path / "sum", [broken], temperatures=[2.0])
