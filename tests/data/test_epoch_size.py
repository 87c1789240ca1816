"""epoch_size: what is counted is what an order of the rows, cut into batches, has."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aliprod.data.selection import EpochSize, epoch_size, grouped
from aliprod.errors import Refused


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 8), st.integers(1, 4))
def test_an_epoch_has_the_whole_batches_of_its_groups(counts: list[int], group: int, batches: int, shares: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    groups = len(grouped(labels, group, 0, 0))
    if groups < shares:
        with pytest.raises(Refused, match=f"{groups * group} training images are too few for {shares} shares"):
            epoch_size(np.array(counts), batches * group * shares, group, shares)
        return
    size = epoch_size(np.array(counts), batches * group * shares, group, shares)
    assert size.groups_per_batch % shares == 0
    assert size.groups_per_batch == batches * shares or (
        size.steps == 1 and 0 <= groups - size.groups_per_batch < shares
    )
    assert size.steps == groups // size.groups_per_batch


def test_a_rest_of_a_batch_makes_no_step_and_too_few_images_make_one() -> None:
    assert epoch_size(np.array([10, 13]), 8) == EpochSize(8, 2)
    assert epoch_size(np.array([3, 2]), 8) == EpochSize(5, 1)
    assert epoch_size(np.array([5, 1, 4]), 8, group=4) == EpochSize(2, 2)  # 2 + 1 + 1 groups


@pytest.mark.parametrize(("batch_size", "group", "shares"), [(8, 4, 4), (3, 4, 1), (8, 1, 3)])
def test_a_batch_that_cannot_be_dealt_in_whole_groups_is_refused(batch_size: int, group: int, shares: int) -> None:
    with pytest.raises(Refused, match=f"Make it a multiple of {group * shares}"):
        epoch_size(np.array([50]), batch_size, group, shares)


def test_counting_steps_imports_no_torch() -> None:
    loaded = "import sys, aliprod.data.selection; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
