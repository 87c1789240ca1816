"""Errors by counting, as a person would with a pencil."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.inference import probabilities
from aliprod.inference.metrics import score
from aliprod.inference.probabilities import as_labels

ids = st.sampled_from([0, 7, 42, 50029, 10**17])
rows = st.lists(st.tuples(ids | st.none(), ids), max_size=30)


@settings(deadline=None)
@given(rows)
def test_the_error_is_the_mean_over_classes_of_the_share_of_wrong_images(pairs: list[tuple[int | None, int]]) -> None:
    labels = pa.array([label for label, _ in pairs], pa.int64())
    predicted = np.array([guess for _, guess in pairs], np.int64)
    wrong: defaultdict[int, list[bool]] = defaultdict(list)
    for label, guess in pairs:
        if label is not None:
            wrong[label].append(label != guess)
    found = score(labels, predicted)
    if not wrong:
        assert found is None
        return
    assert found is not None
    per_class = [sum(images) / len(images) for images in wrong.values()]
    every = [miss for images in wrong.values() for miss in images]
    assert found["top1_error"] == pytest.approx(sum(per_class) / len(per_class), abs=1e-12)
    assert found["top1_error_per_image"] == pytest.approx(sum(every) / len(every), abs=1e-12)
    assert (found["images"], found["classes"]) == (len(every), len(wrong))


def test_a_rare_class_counts_as_much_as_a_frequent_one() -> None:
    found = score(pa.array([3] * 99 + [8]), np.array([3] * 100))
    assert found == {"top1_error": 0.5, "top1_error_per_image": 0.01, "images": 100, "classes": 2}


def store(folder: Path, classes: list[int], blocks: list[list[float]]) -> probabilities.Probabilities:
    ids = [f"{row}.jpg" for row in range(len(blocks))]
    probabilities.write(folder, ids, classes, lambda _: [torch.tensor(blocks)])
    return probabilities.open_store(folder)


def test_the_class_of_the_highest_probability_is_predicted_and_ties_go_to_the_lowest_id(tmp_path: Path) -> None:
    member = store(
        tmp_path / "store", [42, 7, 3], [[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.5, 0.5, 0], [0.25, 0.375, 0.375]]
    )
    assert member.predicted().tolist() == [42, 3, 7, 3]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_the_columns_changes_no_prediction(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    draw = np.random.default_rng(seed)
    eighths = draw.multinomial(8, [0.25] * 4, size=6) / 8  # many ties
    order = draw.permutation(4)
    classes = np.array([3, 9, 27, 81])
    one = store(tmp_path_factory.mktemp("one") / "store", classes.tolist(), eighths.tolist())
    other = store(tmp_path_factory.mktemp("other") / "store", classes[order].tolist(), eighths[:, order].tolist())
    assert one.predicted().tolist() == other.predicted().tolist()


def test_more_rows_than_are_read_at_once_are_all_predicted(tmp_path: Path) -> None:
    places = np.arange(2500) % 3
    member = store(tmp_path / "store", [5, 6, 7], np.eye(3)[places].tolist())
    assert member.predicted().tolist() == (5 + places).tolist()


def test_rows_of_the_class_list_become_class_ids() -> None:
    assert as_labels([1, -1, 0], np.array([7, 42])).to_pylist() == [42, None, 7]
    assert as_labels([], np.array([7])).to_pylist() == []
