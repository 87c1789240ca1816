import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.ensemble.add import (
    add_members,
    each_block,
    match,
    submission,
    top_classes,
    write_ensemble,
)
from aliprod.ensemble.guesses import read_predictions
from aliprod.errors import Failed, Refused
from aliprod.inference.probabilities import open_store, write
from aliprod.store import commit


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "ensemble.npz", allow_pickle=False)


@pytest.fixture(scope="module")
def golden_members(golden):
    return [
        (
            golden[f"m{m}_ids"].tolist(),
            torch.from_numpy(golden[f"m{m}_classes"]),
            torch.from_numpy(golden[f"m{m}_probabilities"]),
        )
        for m in range(int(golden["members"]))
    ]


def stores(folder, members, rows_per_shard=8):
    for number, (ids, classes, rows) in enumerate(members):
        record = {"job": f"net{number}/balanced", "split": "test"}
        blocks = rows.split(7)
        write(folder / f"m{number}", ids, classes, lambda _, b=blocks: b, None, record, rows_per_shard)
    return [open_store(folder / f"m{number}") for number in range(len(members))]


def drawn(count, rows, num_classes, seed, sharpness=4.0):
    generator = torch.Generator().manual_seed(seed)
    ids, classes = [f"{i * 7}.jpg" for i in range(rows)], torch.arange(num_classes) * 3
    easy = 3 * sharpness * torch.randn(rows, num_classes, generator=generator)  # what all members see
    return [
        (ids, classes, (easy + sharpness * torch.randn(rows, num_classes, generator=generator)).softmax(1).half())
        for _ in range(count)
    ]


def shuffled(members, seed):
    generator = np.random.default_rng(seed)
    changed = []
    for ids, classes, rows in members:
        row, column = generator.permutation(len(ids)), generator.permutation(len(classes))
        changed.append(([ids[i] for i in row], classes[column], rows[row][:, column]))
    return [changed[i] for i in generator.permutation(len(changed))]


def streamed(members, rows_per_block=5):
    """The sums, rounded once to float32."""
    return torch.cat([block.rounded.clone() for block in each_block(match(members), rows_per_block)])


def test_sum_predictions_and_submission_are_the_golden_ones(golden, golden_members):
    ids, classes, sums = add_members(golden_members)
    assert ids == golden["ids"].tolist()
    assert classes.tolist() == golden["classes"].tolist()
    assert sums.numpy().tobytes() == golden["sum"].tobytes()
    predicted = top_classes(sums, classes, 1)[:, 0]
    assert predicted.tolist() == golden["predicted"].tolist()
    assert top_classes(sums, classes, count=5).tolist() == golden["top5"].tolist()
    assert submission(ids, predicted) == str(golden["submission"])


def test_ensemble_from_stores_is_the_golden_one(golden, golden_members, tmp_path):
    members = stores(tmp_path, golden_members)
    assert streamed(members).numpy().tobytes() == golden["sum"].astype(np.float32).tobytes()
    write_ensemble(tmp_path / "ensemble", members, rows_per_block=10)
    predictions = read_predictions(tmp_path / "ensemble")
    assert submission(predictions.ids, predictions.predicted) == str(golden["submission"])
    written = np.load(tmp_path / "ensemble" / "sums-00000.npy")
    assert written.tobytes() == golden["sum"].astype(np.float32).tobytes()
    table = pq.read_table(tmp_path / "ensemble" / "predictions.parquet").to_pydict()
    assert table["image_id"] == golden["ids"].tolist()
    assert table["class_id"] == golden["predicted"].tolist()
    assert table["top_classes"] == golden["top5"].tolist()
    shares = np.sort(golden["sum"], axis=1)[:, :-6:-1] / int(golden["members"])
    np.testing.assert_allclose(table["shares"], shares, rtol=1e-15)


def test_ties_go_to_the_first_class(golden):
    ties = torch.from_numpy(golden["tie_probabilities"]).double()
    assert top_classes(ties, torch.arange(3), 1)[:, 0].tolist() == golden["tie_argmax"].tolist()
    assert top_classes(torch.ones(1, 400), torch.arange(400), 5).tolist() == [[0, 1, 2, 3, 4]]


@settings(max_examples=10, deadline=None)  # a commit waits for the disk
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 200), st.integers(0, 2**31), st.floats(0.1, 20))
def test_neither_order_nor_blocks_nor_store_change_a_byte(tmp_path_factory, count, rows, classes, seed, sharpness):
    members = drawn(count, rows, classes, seed, sharpness)
    ids, _, sums = add_members(members)
    again = add_members(shuffled(members, seed))
    assert again[0] == ids
    assert again[2].numpy().tobytes() == sums.numpy().tobytes()
    straight = stores(tmp_path_factory.mktemp("straight"), members)
    mixed = stores(tmp_path_factory.mktemp("mixed"), shuffled(members, seed), rows_per_shard=5 + seed % 9)
    assert match(straight).ids.to_pylist() == ids
    assert streamed(straight, 1 + seed % 7).numpy().tobytes() == sums.float().numpy().tobytes()
    assert streamed(mixed).numpy().tobytes() == sums.float().numpy().tobytes()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.integers(1, 400), st.integers(0, 2**31), st.floats(0.1, 20))
def test_the_five_highest_are_those_of_a_stable_sort_of_the_exact_sum(
    tmp_path_factory, count, classes, seed, sharpness
):
    rows = 6
    members = drawn(count, rows, classes, seed, sharpness)
    members = [(ids, names, (part * 16).round() / 16) for ids, names, part in members]  # ties everywhere
    for _, _, part in members:
        part[:, 0] += 1 - part.sum(1, dtype=torch.float64)
        part.clamp_(min=0)
        part[part.sum(1, dtype=torch.float64) != 1] = torch.eye(classes, dtype=torch.float16)[0]
    folder = tmp_path_factory.mktemp("ties")
    ensemble = match(stores(folder, members))
    sums = sum(part.double() for _, _, part in members)
    order = sums.sort(dim=1, descending=True, stable=True).indices[:, :5]
    found = ensemble.sums(0, rows)
    assert torch.equal(found.columns, order)
    assert torch.equal(found.values, sums.gather(1, order))
    assert torch.equal(top_classes(sums, torch.arange(classes), 5), order)


def test_sums_of_one_and_more_that_float32_cannot_hold_are_exact(tmp_path):
    rows = torch.tensor([[1 - 2**-11, 2**-24, 2**-24], [2**-24, 1 - 2**-11, 3 * 2**-24]]).half()
    members = stores(
        tmp_path, [(["a", "b"], torch.arange(3), rows)] * 2 + [(["a", "b"], torch.arange(3), rows.flip(0))]
    )
    expected = 2 * rows.double() + rows.flip(0).double()
    assert (expected.float().double() != expected).any()
    assert torch.equal(streamed(members), expected.float())
    assert torch.equal(match(members).sums(0, 2).values, expected.sort(dim=1, descending=True).values)


def test_whole_weights_count_members_as_often(tmp_path):
    members = stores(tmp_path, drawn(3, 9, 40, 1))
    write_ensemble(tmp_path / "a", members, weights=[3, 0, 1])
    write_ensemble(tmp_path / "b", [members[0]] * 3 + [members[2]])
    for name in ("sums-00000.npy", "rows.parquet", "classes.parquet", "predictions.parquet"):
        assert commit.sha256(tmp_path / "a" / name) == commit.sha256(tmp_path / "b" / name)
    assert [m["weight"] for m in commit.read(tmp_path / "a")["members"]] == [3, 1]
    assert len(read_predictions(tmp_path / "a").ids) == 9


@pytest.mark.parametrize("weights", [[1, 1], [0, 0, 0], [1, -1, 1], [127, 1, 0], [1.5, 1, 1]])
def test_weights_that_cannot_be_added_exactly_are_refused(tmp_path, weights):
    with pytest.raises(Refused, match="cannot be added"):
        match(stores(tmp_path, drawn(3, 2, 3, 0)), weights)
    with pytest.raises(Refused, match="cannot be added"):
        add_members([])


def broken(members, number, change):
    ids, classes, rows = members[number]
    ids, classes, rows = list(ids), classes.clone(), rows.clone()
    members[number] = change(ids, classes, rows) or (ids, classes, rows)
    return members


@pytest.mark.parametrize(
    ("value", "problem"),
    [(float("nan"), "hold NaN"), (float("inf"), "hold infinity"), (-0.5, "hold a number below zero"), (1.0, "sum to")],
)
def test_member_in_memory_with_a_bad_row_is_named(value, problem):
    members = drawn(3, 6, 5, 0, sharpness=0.1)
    members[2][2][4, 0] = value
    with pytest.raises(Failed, match=rf"member 2: the probabilities of image 28\.jpg \(row 4\) {problem}"):
        add_members(members)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.95])
def test_store_whose_bytes_went_bad_is_named_with_its_own_row(tmp_path, value):
    members = shuffled(drawn(3, 30, 5, 0), 1)
    opened = stores(tmp_path, members, rows_per_shard=30)
    shard = np.load(tmp_path / "m1" / "probabilities-00000.npy", mmap_mode="r+")
    shard[17] = value / 5
    shard.flush()
    name = members[1][0][17]
    with pytest.raises(Failed, match=rf"net1/balanced: the probabilities of test image {name} \(row 17\) ") as caught:
        write_ensemble(tmp_path / "ensemble", opened)
    assert "Nothing was written." in str(caught.value)
    assert not (tmp_path / "ensemble").exists()


def test_missing_row_names_the_member_that_lacks_it(tmp_path):
    members = drawn(3, 6, 5, 0)
    members[1] = (members[1][0][:-1], members[1][1], members[1][2][:-1])
    with pytest.raises(Failed, match=r"net1/balanced: has no probabilities of image 35\.jpg, which net0/balanced has"):
        match(stores(tmp_path / "a", members))
    with pytest.raises(Failed, match=r"net0/balanced: has no probabilities of image 35\.jpg, which net1/balanced has"):
        match(stores(tmp_path / "b", [members[1], members[0]]))
    with pytest.raises(Failed, match=r"member 1: has no probabilities of image 35\.jpg"):
        add_members(members)


def test_image_that_occurs_twice_is_named():
    members = drawn(2, 3, 5, 0)
    for number in (0, 1):
        doubled = list(members)
        doubled[number] = (["0.jpg", "7.jpg", "7.jpg"], members[number][1], members[number][2])
        with pytest.raises(Failed, match=rf"member {number}: has more than one row for image 7\.jpg"):
            add_members(doubled)


@pytest.mark.parametrize("classes", [[0, 3, 6, 9, 13], [0, 3, 6, 9], [0, 3, 6, 9, 9]])
def test_other_class_list_names_the_member(tmp_path, classes):
    members = drawn(2, 3, 5, 0)
    members[1] = (members[1][0], torch.tensor(classes), torch.eye(5)[:3, : len(classes)].half())
    with pytest.raises(Failed, match="member 1: has another class list"):
        add_members(members)
    if len(set(classes)) == len(classes):
        with pytest.raises(Failed, match="net1/balanced: has another class list"):
            match(stores(tmp_path, members))


def test_submission_puts_digit_stems_first_by_number_then_the_rest_as_strings():
    ids = ["b.jpg", "10.jpg", "9.jpg", "B.jpg", "2", "1a.jpg", "007.jpg", "9" * 5000 + ".jpg", 'x,"y".jpg']
    lines = submission(ids, torch.arange(9)).splitlines()
    assert lines[:5] == ["id,predicted", "2,4", "007.jpg,6", "9.jpg,2", "10.jpg,1"]
    assert [line[-1] for line in lines[5:]] == ["7", "5", "3", "0", "8"]
    assert lines[-1] == '"x,""y"".jpg",8'


def test_an_ensemble_of_other_members_takes_the_place_of_the_old(tmp_path):
    members = stores(tmp_path, drawn(3, 20, 6, 3))
    write_ensemble(tmp_path / "ensemble", members[:1])
    first = read_predictions(tmp_path / "ensemble")
    digest = commit.digest(tmp_path / "ensemble")
    write_ensemble(tmp_path / "ensemble", members[:1], rows_per_block=3)
    assert commit.digest(tmp_path / "ensemble") == digest
    write_ensemble(tmp_path / "ensemble", members[1:])
    assert read_predictions(tmp_path / "ensemble").predicted.tolist() != first.predicted.tolist()
    assert [m["job"] for m in commit.read(tmp_path / "ensemble")["members"]] == ["net1/balanced", "net2/balanced"]
    assert commit.verify(tmp_path / "ensemble") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ensemble", "m0", "m1", "m2"]


def test_an_old_ensemble_stays_where_the_new_one_fails(tmp_path):
    members = stores(tmp_path, drawn(2, 4, 6, 3), rows_per_shard=4)
    write_ensemble(tmp_path / "ensemble", members[:1])
    digest = commit.digest(tmp_path / "ensemble")
    shard = np.load(tmp_path / "m1" / "probabilities-00000.npy", mmap_mode="r+")
    shard[3] = np.nan
    shard.flush()
    with pytest.raises(Failed, match="hold NaN"):
        write_ensemble(tmp_path / "ensemble", members)
    assert commit.digest(tmp_path / "ensemble") == digest


def test_two_drivers_that_write_one_ensemble_at_once_leave_a_whole_one(tmp_path):
    members = stores(tmp_path, drawn(2, 20, 6, 3))
    choices = [members, members[:1], members[1:], members[::-1]]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(partial(write_ensemble, tmp_path / "ensemble"), choices))
    assert len(read_predictions(tmp_path / "ensemble").ids) == 20
    assert commit.verify(tmp_path / "ensemble") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ensemble", "m0", "m1"]


def test_no_image_makes_an_empty_ensemble(tmp_path):
    members = stores(tmp_path, [([], torch.arange(4), torch.zeros(0, 4))] * 2)
    write_ensemble(tmp_path / "ensemble", members)
    predictions = read_predictions(tmp_path / "ensemble")
    assert submission(predictions.ids, predictions.predicted) == "id,predicted\n"


def test_no_ensemble_is_said(tmp_path):
    with pytest.raises(Failed, match="holds no finished ensemble"):
        read_predictions(tmp_path / "ensemble")


MEMORY = """
import resource, sys, torch
from pathlib import Path
from aliprod.ensemble.add import write_ensemble
from aliprod.inference.probabilities import open_store, write

def peak(rows):
    ids, folder, same = [str(i) for i in range(rows)], Path(sys.argv[1]) / str(rows), torch.rand(50, 4000).softmax(1)
    write(folder / "a", ids, range(4000), lambda _: (same for _ in range(rows // 50)), rows_per_shard=500)
    write_ensemble(folder / "sum", [open_store(folder / "a")] * 2, rows_per_block=100)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(-peak(1000) + peak(8000))  # kB
"""


def test_memory_is_flat_in_rows(tmp_path):
    grown = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 60_000  # the sums alone are 128 MB
