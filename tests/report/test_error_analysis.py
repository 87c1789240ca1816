"""Error analysis of an ensemble: counted, and never more or less than there is."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.catalogue.catalogue import Catalogue, Images
from aliprod.ensemble.add import write_ensemble
from aliprod.inference import probabilities
from aliprod.report.error_analysis import Scored, by_size, confusions, reliability, scored

PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


def of(pairs: list[tuple[int, int]]) -> Scored:
    truth, predicted = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    ids = pa.array([str(row) for row in range(len(pairs))], pa.string())
    images = Images("test", ids, truth, ids, Path())
    sure = np.linspace(0.5, 1.0, len(pairs))
    return Scored(images, np.arange(len(pairs)), truth, predicted, sure, np.where(truth == predicted, sure, 1 - sure))


@settings(deadline=None)
@given(PAIRS)
def test_every_wrong_image_belongs_to_one_confusion(pairs: list[tuple[int, int]]) -> None:
    found = confusions(of(pairs), most=100)
    assert sum(confusion.count for confusion in found) == sum(truth != guess for truth, guess in pairs)
    for confusion in found:
        alike = [place for place, pair in enumerate(pairs) if pair == (confusion.truth, confusion.predicted)]
        assert confusion.place == alike[-1]  # the surest
        assert confusion.count == pairs.count((confusion.truth, confusion.predicted)) <= confusion.of
        assert confusion.of == sum(truth == confusion.truth for truth, _ in pairs)
    assert [confusion.count for confusion in found] == sorted((c.count for c in found), reverse=True)


@settings(deadline=None)
@given(PAIRS, st.lists(st.integers(1, 9), min_size=5, max_size=5))
def test_the_groups_of_sizes_hold_every_scored_class_once_and_the_same_mean_error(
    pairs: list[tuple[int, int]], counts: list[int]
) -> None:
    found = of(pairs)
    sizes = by_size(found, np.array(counts, np.int64))
    classes = sorted(set(found.truth.tolist()))
    errors = [np.mean([guess != truth for truth, guess in pairs if truth == label]) for label in classes]
    assert sum(size.classes for size in sizes) == len(classes)
    assert np.isclose(sum(size.classes * size.error for size in sizes), sum(errors))
    assert all(first.high < second.low for first, second in itertools.pairwise(sizes))


def test_predictions_are_matched_with_labels_by_id(packages: Catalogue, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(len(packages.test))
    given_to = np.arange(len(order)) % packages.num_classes  # of each image, in the catalogue's order
    rows = np.eye(packages.num_classes, dtype=np.float32)[given_to[order]]
    ids = packages.test.ids.take(pa.array(order))
    probabilities.write(tmp_path / "member", ids, packages.classes, lambda missing: [torch.from_numpy(rows[missing])])
    write_ensemble(tmp_path / "ensemble", [probabilities.open_store(tmp_path / "member")])

    found = scored(tmp_path / "ensemble", packages, "test")
    assert packages.test_labels is not None
    assert found.rows.tolist() == list(range(len(packages.test)))
    assert found.truth.tolist() == packages.test_labels.tolist()
    assert found.predicted.tolist() == given_to.tolist()
    right = found.truth == found.predicted
    assert found.sure.tolist() == [1.0] * len(order)
    assert found.own.tolist() == right.astype(float).tolist()


@settings(deadline=None)
@given(PAIRS)
def test_bins_hold_every_image_once_and_the_same_share_of_right_ones(pairs: list[tuple[int, int]]) -> None:
    found = of(pairs)
    bins, error = reliability(found)
    assert sum(one.images for one in bins) == len(pairs)
    assert np.isclose(sum(one.images * one.right for one in bins), sum(truth == guess for truth, guess in pairs))
    assert np.isclose(sum(one.images * one.sure for one in bins), found.sure.sum())
    assert abs(np.mean(found.truth == found.predicted) - found.sure.mean()) - 1e-9 <= error <= 1


def test_a_label_is_doubted_where_the_other_class_is_as_sure_as_for_its_own_images() -> None:
    truth, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 0, 1, 0, 0])
    sure = np.array([0.9, 0.7, 0.6, 0.8, 0.79])  # images of class 0 are 0.8 sure in the mean
    ids = pa.array(list("abcde"))
    found = Scored(
        Images("test", ids, truth, ids, Path()), np.arange(5), truth, predicted, sure, sure * (truth == predicted)
    )
    assert found.suspects().tolist() == [False, False, False, True, False]
    assert found.mistakes().tolist() == [3, 4]


def test_no_mistake_doubts_no_label() -> None:
    assert not of([(0, 0), (1, 1)]).suspects().any()
    assert of([(0, 0)]).mistakes().tolist() == []
