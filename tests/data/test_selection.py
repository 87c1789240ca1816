"""selection: invariants of the orders, and the golden pseudo labels."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from aliprod.catalogue.sources import read
from aliprod.data.selection import (
    Integers,
    _draws,
    balanced,
    class_balanced_order,
    grouped,
    order,
    pseudo_labels,
    reversed_order,
    surest,
)

labelled = st.lists(st.integers(0, 6), max_size=60).map(lambda labels: np.array(labels, np.int64))
seeds = st.integers(0, 2**40)


def ids_of(labels: Integers) -> pa.StringArray:
    return pa.array([f"{row:03d}.jpg" for row in range(len(labels))], pa.string())


CLASSES = np.arange(7) * 10


@given(labelled, st.integers(1, 12), seeds)
def test_balanced_keeps_all_of_a_small_class_and_the_limit_of_a_large_one(
    labels: Integers, limit: int, seed: int
) -> None:
    rows = balanced(labels, ids_of(labels), CLASSES, limit, seed)
    assert np.array_equal(rows, np.unique(rows))
    for label, count in Counter(labels.tolist()).items():
        assert (labels[rows] == label).sum() == min(count, limit)


@given(labelled, st.integers(1, 12), seeds, st.randoms())
def test_balanced_does_not_see_the_order_of_the_file(labels: Integers, limit: int, seed: int, random: object) -> None:
    mixed = np.random.default_rng(seed).permutation(len(labels))
    ids = ids_of(labels)
    straight = ids.take(pa.array(balanced(labels, ids, CLASSES, limit, seed)))
    other = ids.take(pa.array(mixed))
    assert set(straight.to_pylist()) == set(
        other.take(pa.array(balanced(labels[mixed], other, CLASSES, limit, seed))).to_pylist()
    )


@given(labelled, st.integers(1, 4), seeds)
def test_what_a_class_keeps_does_not_hang_on_the_others(labels: Integers, limit: int, seed: int) -> None:
    ids = ids_of(labels)
    rows = balanced(labels, ids, CLASSES, limit, seed)
    alone = np.flatnonzero(labels == 3)
    without = balanced(np.zeros(len(alone), np.int64), ids.take(pa.array(alone)), CLASSES[3:4], limit, seed)
    assert np.array_equal(rows[labels[rows] == 3], alone[without])


def test_an_equal_id_in_another_class_does_not_change_what_is_kept() -> None:
    labels = np.zeros(40, np.int64)
    plain = pa.array([f"{row}.jpg" for row in range(40)])
    qualified = pa.array([f"30/{row}.jpg" if row % 2 else f"{row}.jpg" for row in range(40)])
    class_ids = np.array([30])
    assert np.array_equal(balanced(labels, plain, class_ids, 9, 1), balanced(labels, qualified, class_ids, 9, 1))


def test_another_seed_chooses_other_images_of_grocery_and_the_counts_are_the_readmes(shared: Path) -> None:
    grocery = read(shared / "data/grocery")
    train = grocery.train
    first, second = (balanced(train.labels, train.ids, grocery.classes, 30, seed) for seed in (0, 1))
    assert len(first) == len(second) == 867
    assert len(balanced(train.labels, train.ids, grocery.classes, 10, 0)) == 440
    assert not np.array_equal(first, second)


@given(st.integers(0, 500), seeds, st.integers(0, 100))
def test_an_epoch_sees_every_row_once(count: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(order(count, seed, epoch)), np.arange(count))


def test_epochs_and_seeds_have_orders_of_their_own_and_the_same_ones_again() -> None:
    orders = {(seed, epoch): tuple(order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(set(orders.values())) == 25
    assert orders[2, 3] == tuple(order(50, 2, 3))


def test_every_row_comes_first_equally_often() -> None:
    firsts = np.bincount([order(8, 0, epoch)[0] for epoch in range(4000)], minlength=8)
    assert chisquare(firsts).pvalue > 1e-4


def test_the_draws_are_splitmix64() -> None:
    state = (int(_draws(1, "a")[0]), int(_draws(2, "a")[1]))
    invert = [_unmix(value) for value in state]
    assert (invert[1] - invert[0]) % 2**64 == 0x9E3779B97F4A7C15  # the step between its states


def _unmix(value: int) -> int:
    """The inverse of splitmix64's output function, in plain integers."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        unshifted = value
        for _ in range(3):
            unshifted = value ^ (unshifted >> shift)
        value = unshifted * pow(factor, -1, 2**64) % 2**64
    return value


@given(labelled, st.integers(1, 5), seeds, st.integers(0, 9))
def test_groups_are_of_one_class_and_show_every_image(labels: Integers, group: int, seed: int, epoch: int) -> None:
    rows = grouped(labels, group, seed, epoch)
    counts = Counter(labels.tolist())
    assert rows.shape == (sum(-(-count // group) for count in counts.values()), group)
    assert all(len(set(labels[members].tolist())) == 1 for members in rows)
    seen = Counter(rows.ravel().tolist())
    assert set(seen) == set(range(len(labels)))
    for row, times in seen.items():
        if (count := counts[int(labels[row])]) >= group:
            assert times <= 2  # once, and once more where it completes the last group
        else:
            assert times in (group // count, -(-group // count))
    for members in rows:
        assert len(set(members.tolist())) == min(group, counts[int(labels[members[0]])])


def test_groups_of_a_class_are_scattered_over_the_epoch_and_differ_between_epochs() -> None:
    labels = np.repeat(np.arange(10), 40)
    one, other = grouped(labels, 4, 0, 0), grouped(labels, 4, 0, 1)
    assert not np.array_equal(one, other)
    assert len(set(labels[one[:20, 0]].tolist())) > 4
    assert set(map(frozenset, one.tolist())) != set(map(frozenset, other.tolist()))


def test_the_reversed_sampler_draws_a_class_by_its_inverse_count() -> None:
    counts = np.array([40, 20, 10, 5])
    labels = np.repeat(np.arange(4), counts)
    drawn = np.concatenate([reversed_order(labels, 7, epoch) for epoch in range(200)])
    expected = (40 / counts) / (40 / counts).sum()  # n_max / n_i
    assert chisquare(np.bincount(labels[drawn]), expected * len(drawn)).pvalue > 1e-4
    inside = np.bincount(drawn)[labels == 0]
    assert chisquare(inside).pvalue > 1e-4


@given(labelled, seeds)
def test_the_reversed_sampler_draws_as_many_rows_as_there_are(labels: Integers, seed: int) -> None:
    rows = reversed_order(labels, seed, 0)
    assert len(rows) == len(labels)
    assert all(0 <= row < len(labels) for row in rows)


def test_the_class_balanced_sampler_draws_every_class_and_every_image_of_a_class_equally_often() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [200, 40, 9, 1]))
    drawn = np.concatenate([class_balanced_order(labels, 7, epoch) for epoch in range(200)])
    assert len(drawn) == 200 * len(labels)
    assert chisquare(np.bincount(labels[drawn])).pvalue > 1e-4
    for label in range(3):
        assert chisquare(np.bincount(drawn, minlength=250)[labels == label]).pvalue > 1e-4


@given(labelled, seeds, st.integers(0, 5))
def test_the_class_balanced_sampler_is_a_function_of_seed_and_epoch(labels: Integers, seed: int, epoch: int) -> None:
    rows = class_balanced_order(labels, seed, epoch)
    assert rows.shape == labels.shape
    assert np.array_equal(rows, class_balanced_order(labels, seed, epoch))
    assert all(0 <= row < len(labels) for row in rows)


def test_epochs_and_seeds_have_class_balanced_draws_of_their_own() -> None:
    labels = np.arange(50) % 5
    drawn = {tuple(class_balanced_order(labels, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(drawn) == 25


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 3)), max_size=40), st.integers(0, 10), st.integers(1, 5))
def test_the_surest_of_each_label_are_chosen_the_first_of_equals(
    rows: list[tuple[int, int]], least: int, per_class: int
) -> None:
    top, labels = np.array(rows, np.int64).reshape(-1, 2).T
    expected = []
    for label in range(4):
        sure = [row for row in range(len(rows)) if labels[row] == label and top[row] >= least]
        expected += sorted(sure, key=lambda row: (-top[row], row))[:per_class]
    assert surest(top / 10, labels, least / 10, per_class).tolist() == sorted(expected)


def test_pseudo_labels_are_the_golden_ones(shared: Path) -> None:
    golden = np.load(shared / "golden/pseudo_label.npz")
    table = torch.from_numpy(golden["probabilities"])
    rows, labels = pseudo_labels(table, float(golden["threshold"]), int(golden["per_class_cap"]))
    assert rows.dtype == labels.dtype == torch.int64
    assert rows.tolist() == golden["selected"].tolist()
    assert labels.tolist() == golden["labels"].tolist()


def test_nobody_is_sure_of_nothing() -> None:
    rows, labels = pseudo_labels(torch.full((4, 3), float("nan")), 0.5, 2)
    assert len(rows) == len(labels) == 0
