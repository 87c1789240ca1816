import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.inference.metrics import class_errors, mean_class_error, top_k_error


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "metric.npz", allow_pickle=False)


def test_errors_are_the_golden_ones(golden):
    labels, predicted = torch.from_numpy(golden["targets"]), torch.from_numpy(golden["predicted"])
    errors = class_errors(labels, predicted, 30)
    np.testing.assert_allclose(errors, golden["per_class_error"], rtol=0, atol=1e-12)  # NaN where a class has no image
    assert errors.dtype == torch.float64
    assert mean_class_error(labels, predicted, 30).item() == pytest.approx(golden["mean_class_error"].item(), abs=1e-12)


def test_top_k_errors_are_the_golden_ones(golden):
    labels, scores = torch.from_numpy(golden["targets"]), torch.from_numpy(golden["scores"])
    assert top_k_error(labels, scores, 1).item() == pytest.approx(golden["image_error"].item(), abs=1e-12)
    assert top_k_error(labels, scores, k=5).item() == pytest.approx(golden["top5_image_error"].item(), abs=1e-12)


def test_long_tail_makes_the_two_errors_differ():
    labels = torch.tensor([0] * 98 + [1, 2])
    predicted = torch.zeros(100, dtype=torch.int64)
    assert (predicted != labels).double().mean() == 0.02
    assert mean_class_error(labels, predicted, 4).item() == pytest.approx(2 / 3)  # class 3 has no image


def test_unknown_labels_are_left_out_and_foreign_predictions_are_wrong():
    labels, predicted = torch.tensor([0, -1, 1]), torch.tensor([0, 0, -1])
    assert class_errors(labels, predicted, 2).tolist() == [0.0, 1.0]
    assert top_k_error(labels, torch.eye(3)[:, :2], 1).item() == 0.5  # image 2 has two equal scores


def test_nothing_labelled_has_no_error():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert mean_class_error(nothing, nothing, 3).isnan()
    assert top_k_error(nothing, torch.zeros(0, 3), 1).isnan()


def test_label_outside_the_class_list_is_refused():
    with pytest.raises(ValueError, match="label 3 is outside a list of 3 classes"):
        class_errors(torch.tensor([3]), torch.tensor([0]), 3)


def test_ties_go_to_the_first_class():
    assert top_k_error(torch.tensor([0, 1]), torch.ones(2, 3), 1).item() == 0.5


@pytest.mark.parametrize("k", [1, 2, 3])
def test_nan_scores_are_errors(k):
    assert top_k_error(torch.tensor([0]), torch.tensor([[torch.nan, 0.0, 0.0]]), k).item() == 1.0


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_top_k_error_falls_with_k_to_zero_and_ignores_the_order_of_images(images, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (images,), generator=generator)
    scores = torch.randint(4, (images, num_classes), generator=generator).float()  # many ties
    errors = [top_k_error(labels, scores, k).item() for k in range(1, num_classes + 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    order = torch.randperm(images, generator=generator)
    assert top_k_error(labels[order], scores[order], 1).item() == errors[0]
    first = torch.tensor([row.index(max(row)) for row in scores.tolist()])
    assert errors[0] == (first != labels).double().mean().item()
