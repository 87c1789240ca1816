"""The picture of what an ensemble confuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aliprod.catalogue.catalogue import Catalogue
from aliprod.ensemble.add import write_ensemble
from aliprod.inference import probabilities
from aliprod.tracking import runs


@pytest.fixture
def ensemble(packages: Catalogue, tmp_path: Path) -> Path:
    """Of one member that takes every test image for the second class."""
    rows = torch.eye(packages.num_classes)[np.ones(len(packages.test), np.int64)]
    probabilities.write(tmp_path / "m", packages.test.ids, packages.classes, lambda missing: [rows[missing]])
    write_ensemble(tmp_path / "ensemble", [probabilities.open_store(tmp_path / "m")], record={"split": "test"})
    return tmp_path / "ensemble"


def test_every_labelled_image_is_counted_at_its_label_and_what_it_is_taken_for(
    packages: Catalogue, ensemble: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = runs._drawn
    monkeypatch.setattr(runs, "_drawn", lambda *given: drawn.append(given) or draw(*given))
    picture = runs.confusions(ensemble, packages, "test")
    [(counts, names, title)] = drawn
    assert packages.test_labels is not None
    expected = np.zeros((4, 4), np.int64)
    expected[:, 1] = np.bincount(packages.test_labels)
    assert (counts == expected).all()
    assert names == list(packages.names)
    assert title == f"{len(packages.test)} images of test; 4 of 4 classes"
    assert picture is not None
    assert len(picture.convert("RGB").getcolors(10**6) or []) > 10


def test_without_labels_there_is_no_picture(packages: Catalogue, ensemble: Path) -> None:
    assert runs.confusions(ensemble, replace(packages, test_labels=None), "test") is None
    assert runs.confusions(ensemble, packages, "val") is None, "nothing of val is predicted"
