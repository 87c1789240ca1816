"""Pseudo-labelling: what members together are sure of, without a table of all images in memory."""

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aliprod.data.selection import pseudo_labels
from aliprod.ensemble.add import confident, submission_order
from aliprod.errors import Failed
from aliprod.inference.probabilities import Probabilities, open_store, write


def tables(seed: int, members: int, rows: int, classes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seen = 6 * torch.randn(rows, classes, generator=generator)  # what all members see
    return [(seen + torch.randn(rows, classes, generator=generator)).softmax(1).half() for _ in range(members)]


def stored(folder: Path, found: list[torch.Tensor], seed: int = 0) -> list[Probabilities]:
    """Stores of the tables, each member's rows and columns in an order of its own."""
    rows, classes = found[0].shape
    ids, class_ids = np.array([f"{7 * row}.jpg" for row in range(rows)]), np.arange(classes) * 3
    for number, table in enumerate(found):
        draw = np.random.default_rng([seed, number])
        row, column = draw.permutation(rows), draw.permutation(classes)
        record = {"job": f"net{number}/balanced", "split": "test"}
        block = table[row][:, column]
        write(folder / f"{number}", ids[row].tolist(), class_ids[column], lambda _, b=block: [b], record=record)
    return [open_store(folder / f"{number}") for number in range(len(found))]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(0.2, 1), st.integers(1, 9))
def test_labels_are_those_of_the_mean_table(
    tmp_path_factory: pytest.TempPathFactory, seed: int, members: int, threshold: float, per_class: int
) -> None:
    found = tables(seed, members, 150, 5)  # three blocks of rows
    mean = torch.stack([table.double() for table in found]).mean(dim=0)
    rows, labels = pseudo_labels(mean, threshold, per_class)
    chosen, class_ids, sure = confident(stored(tmp_path_factory.mktemp("stores"), found, seed), threshold, per_class)
    expected = {f"{7 * row}.jpg": 3 * label for row, label in zip(rows.tolist(), labels.tolist(), strict=True)}
    ids = chosen.to_pylist()
    assert dict(zip(ids, class_ids.tolist(), strict=True)) == expected
    assert ids == sorted(ids, key=submission_order)
    assert max(Counter(class_ids.tolist()).values(), default=0) <= per_class
    top = mean[rows].max(dim=1).values.float()
    assert torch.equal(torch.from_numpy(sure), top)


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    few, many = (stored(tmp_path / f"{rows}", tables(0, 2, rows, 500)) for rows in (256, 2048))
    peaks = []
    for stores in (few, many):
        tracemalloc.start()
        confident(stores, 0.5, 30)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1792 * 500 * 8 / 10  # a tenth of the rows in float64


def test_members_of_other_images_are_refused(tmp_path: Path) -> None:
    one, other = (stored(tmp_path / f"{rows}", tables(0, 1, rows, 5)) for rows in (10, 11))
    with pytest.raises(Failed):
        confident([*one, *other], 0.5, 30)
