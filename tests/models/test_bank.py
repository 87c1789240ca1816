"""Neighbours vote as the paper's equation says, however they are searched."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from aliprod.errors import Refused
from aliprod.models import classifier, weights
from aliprod.models.classifier import Classifier, votes
from aliprod.store import commit

CONFIG = weights.Config("test_resnet", (0.5,) * 3, (0.25,) * 3, "bilinear", 40, 32)
CLASSES = weights.Classes((1, 2, 3))


def written_out(features: Tensor, memory: Tensor, labels: Tensor, num_classes: int, k: int, tau: float) -> Tensor:
    """w_c = sum over the k nearest i of exp(s_i / tau) [c = c_i] (Wu et al. 2018, section 3.4), scaled to sum 1."""
    found = torch.zeros(len(features), num_classes, dtype=torch.float64)
    for row, feature in enumerate(normalize(features)):
        cosines = [float(feature @ one) for one in normalize(memory)]
        for nearest in sorted(range(len(memory)), key=lambda i: -cosines[i])[:k]:
            found[row, labels[nearest]] += torch.exp(torch.tensor(cosines[nearest] / tau, dtype=torch.float64))
    return found / found.sum(dim=1, keepdim=True)


@given(st.integers(1, 40), st.integers(1, 50), st.floats(0.02, 2), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_votes_are_the_papers_equation_however_many_are_compared_at_once(
    images: int, k: int, temperature: float, at_once: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory, features = (torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (images, 3))
    labels = torch.randint(5, (images,), generator=generator)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(classifier, "_AT_ONCE", at_once)
        found = votes(features, memory, labels, 5, k, temperature)
    torch.testing.assert_close(found, written_out(features, memory, labels, 5, k, temperature))


def test_a_picture_is_its_own_nearest_neighbour_in_any_length() -> None:
    memory = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).half()
    found = votes(3 * memory.float(), memory, torch.arange(7), 7, 1, 0.07)
    assert torch.equal(found, torch.eye(7))


def test_a_weights_folder_brings_its_bank_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier("test_resnet", 3, crop=32, bank=8).eval()
    model.classifier.fill(iter(torch.randn(8, model.classifier.in_features).split(3)), torch.arange(8) % 3, 4, 0.1)
    commit.write(
        tmp_path / "bank", partial(weights.save, tensors=model.state_dict(), config=CONFIG, classes=CLASSES), {}
    )
    loaded, _, classes = weights.load(tmp_path / "bank")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        pooled, logits = model.pool(model.features(images)), loaded(images)
    memory, labels = model.classifier.weight, model.classifier.labels
    torch.testing.assert_close(logits.softmax(dim=1), votes(pooled, memory, labels, 3, 4, 0.1))
    assert classes == CLASSES
    assert not [parameter for parameter in loaded.classifier.parameters() if parameter.requires_grad]
    with pytest.raises(Refused, match="tensors are missing or of another shape, the first classifier"):
        weights.load_parent(Classifier("test_resnet", 3, crop=32), tmp_path / "bank", CLASSES.ids)
