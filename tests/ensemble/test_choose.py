import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.ensemble.choose import greedy, weights
from aliprod.inference.metrics import mean_class_error


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "greedy_selection.npz", allow_pickle=False)


@pytest.mark.parametrize("score", ["nll", "error"])
def test_picks_scores_and_weights_are_the_golden_ones(golden, score):
    probabilities, labels = torch.from_numpy(golden["probabilities"]), torch.from_numpy(golden["targets"])
    picks, scores = greedy(probabilities, labels, int(golden["rounds"]), score)
    assert picks.tolist() == golden[f"{score}_picks"].tolist()
    np.testing.assert_allclose(scores.numpy(), golden[f"{score}_scores"], rtol=0, atol=1e-10)
    counts = np.array(weights(picks, scores, 6))
    assert counts.sum() == golden[f"{score}_best_round"]
    np.testing.assert_allclose(counts / counts.sum(), golden[f"{score}_weights"], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 30), st.integers(2, 6), st.integers(0, 2**31))
def test_the_first_pick_is_the_best_single_member_and_the_score_is_that_of_the_mean(members, images, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(members, images, classes, generator=generator).double().softmax(2)
    labels = torch.randint(classes, (images,), generator=generator)
    picks, scores = greedy(probabilities, labels, 4)
    singles = [-p[torch.arange(images), labels].log().mean().item() for p in probabilities]
    assert singles[picks[0]] == pytest.approx(min(singles), abs=1e-11)
    mean = probabilities[picks].mean(0)
    assert scores[-1].item() == pytest.approx(-mean[torch.arange(images), labels].log().mean().item(), abs=1e-9)
    _, errors = greedy(probabilities, labels, 3, "error")
    assert errors[0] == min(mean_class_error(labels, p.argmax(1), classes).round(decimals=12) for p in probabilities)


def test_equal_members_are_picked_from_the_lowest():
    probabilities = torch.full((3, 4, 2), 0.5)
    picks, scores = greedy(probabilities, torch.tensor([0, 1, 0, 1]), 3)
    assert picks.tolist() == [0, 0, 0]
    assert weights(picks, scores, 3) == [1, 0, 0]


def test_a_probability_that_flushed_to_zero_does_not_rule_a_member_out():
    probabilities = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.25, 0.75], [0.25, 0.75]]], dtype=torch.float16)
    _, scores = greedy(probabilities, torch.tensor([0, 0]), 2)
    assert scores.isfinite().all()


def test_images_without_a_label_do_not_count():
    probabilities = torch.randn(3, 6, 4).softmax(2)
    labels = torch.tensor([0, -1, 2, -1, 1, 3])
    for score in ("nll", "error"):
        expected = greedy(probabilities[:, labels >= 0], labels[labels >= 0], 3, score)
        for found, wanted in zip(greedy(probabilities, labels, 3, score), expected, strict=True):
            assert torch.equal(found, wanted)


def test_another_score_is_refused():
    with pytest.raises(ValueError, match="score must be"):
        greedy(torch.ones(1, 1, 1), torch.zeros(1, dtype=torch.int64), 1, "accuracy")
