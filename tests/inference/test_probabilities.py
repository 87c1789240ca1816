import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.errors import Failed
from aliprod.inference.probabilities import open_store, tolerance, write
from aliprod.store import commit


def softmax(rows, num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, num_classes, generator=generator)).softmax(dim=1)


def blocks_of(values, per_block=64):
    """Blocks of the rows that are asked for."""
    return lambda rows: torch.as_tensor(values)[rows].split(per_block)


def ids(count):
    return [f"{i}.jpg" for i in range(count)]


@settings(max_examples=20, deadline=None)  # a commit waits for the disk
@given(
    rows=st.integers(0, 40),
    per_shard=st.integers(4, 15),
    per_block=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_what_is_written_is_read_across_blocks_and_shards(tmp_path_factory, rows, per_shard, per_block, seed, data):
    folder = tmp_path_factory.mktemp("store") / "probabilities"
    values = softmax(rows, 7, seed)
    labels = [None if i % 3 else i for i in range(rows)]
    classes = np.arange(7)[::-1] * 10
    write(folder, ids(rows), classes, blocks_of(values, per_block), labels, {"job": "a/b"}, per_shard)

    store = open_store(folder)
    expected = values.numpy().astype(np.float16)
    low = data.draw(st.integers(0, rows))
    high = data.draw(st.integers(low, rows))
    chosen = np.array(data.draw(st.lists(st.integers(0, max(0, rows - 1)), max_size=rows)), dtype=np.int64)
    assert store.take(np.arange(low, high)).tobytes() == expected[low:high].tobytes()
    assert store.take(chosen).tobytes() == expected[chosen].tobytes()
    assert store.ids.to_pylist() == ids(rows)
    assert store.labels.to_pylist() == labels
    assert store.classes.tolist() == classes.tolist()
    assert store.record == {"job": "a/b"}
    assert commit.verify(folder) == []


def test_files_open_with_numpy_and_parquet_alone(tmp_path):
    values = softmax(5, 3)
    write(tmp_path / "p", ids(5), [4, 5, 6], blocks_of(values), labels=[4, 5, 6, None, 4], rows_per_shard=2)
    shards = [np.load(tmp_path / "p" / f"probabilities-0000{i}.npy") for i in range(3)]
    assert [len(shard) for shard in shards] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(shards), values.half().numpy())
    rows = pq.read_table(tmp_path / "p" / "rows.parquet").to_pydict()
    assert rows == {"image_id": ids(5), "label": [4, 5, 6, None, 4]}
    assert pq.read_table(tmp_path / "p" / "classes.parquet").to_pydict() == {"class_id": [4, 5, 6]}


def test_arrow_arrays_are_taken_as_they_are(tmp_path):
    write(tmp_path / "a", pa.array(ids(3)), np.arange(2), blocks_of(softmax(3, 2)), pa.array([1, None, 0], pa.int64()))
    write(tmp_path / "b", ids(3), torch.arange(2), lambda _: [softmax(3, 2)], [1, None, 0])
    assert commit.digest(tmp_path / "a") == commit.digest(tmp_path / "b")


def test_blocks_make_no_difference_to_the_bytes(tmp_path):
    values = softmax(9, 4)
    write(tmp_path / "a", ids(9), range(4), blocks_of(values, 2), rows_per_shard=4)
    write(tmp_path / "b", ids(9), range(4), lambda _: [values], rows_per_shard=4)
    assert commit.digest(tmp_path / "a") == commit.digest(tmp_path / "b")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([0.5, 0.5, float("nan")], "hold NaN"),
        ([0.5, 0.5, float("inf")], "hold infinity"),
        ([0.75, 0.75, -0.5], "hold a number below zero"),
        ([0.5, 0.25, 0.25 + 2**-10], r"sum to 1\.00098, not to one"),
        ([0.0, 0.0, 0.0], "sum to 0, not to one"),
    ],
)
def test_row_that_is_no_distribution_is_named_and_nothing_is_left(tmp_path, row, problem):
    values = softmax(1300, 3)
    values[1234] = torch.tensor(row)
    with pytest.raises(Failed, match=rf"a/b: the probabilities of test image 1234\.jpg \(row 1,234\) {problem}"):
        write(tmp_path / "p", ids(1300), range(3), blocks_of(values, 100), record={"job": "a/b", "split": "test"})
    assert list(tmp_path.iterdir()) == []


def test_rows_as_far_from_one_as_rounding_can_take_them_are_accepted(tmp_path):
    assert tolerance(50_030) == pytest.approx(2e-3, rel=0.02)
    uniform = torch.full((1, 50_030), 1 / 50_030)  # every entry is rounded the same way
    confident = torch.full((1, 50_030), 2**-25)  # every small entry is flushed to zero
    confident[0, 0] = 1 - 50_029 * 2**-25
    write(tmp_path / "p", ids(2), range(50_030), blocks_of(torch.cat([uniform, confident])))
    sums = open_store(tmp_path / "p").take(np.arange(2)).sum(axis=1, dtype=np.float64)
    assert (abs(sums - 1) <= tolerance(50_030)).all()
    assert abs(sums - 1).max() > 1e-3


def test_rounding_is_to_the_nearest(tmp_path):
    values = torch.tensor([[1 / 3, 2 / 3]])
    write(tmp_path / "p", ["a"], [0, 1], blocks_of(values))
    assert open_store(tmp_path / "p").take(np.arange(1)).tolist() == [
        [0.333251953125, 0.66650390625]
    ]  # by IEEE 754, binary16


@pytest.mark.parametrize(
    ("names", "classes", "problem"),
    [
        (["a", "a"], [0, 1], "occurs twice"),
        (["a", "b"], [1, 1], "occurs twice"),
        (["a"], [0, 1], "a block of shape"),
        (["a", "b", "c"], [0, 1], "2 rows of probabilities for 3 images"),
        (["a", "b"], [0, 1, 2], "a block of shape"),
    ],
)
def test_ids_and_classes_must_fit_the_blocks(tmp_path, names, classes, problem):
    with pytest.raises(ValueError, match=problem):
        write(tmp_path / "p", names, classes, lambda _: [softmax(2, 2)])
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_or_half_there_is_said(tmp_path):
    with pytest.raises(Failed, match="holds no finished probabilities"):
        open_store(tmp_path / "p")
    write(tmp_path / "p", ids(4), range(3), blocks_of(softmax(4, 3)))
    shard = tmp_path / "p" / "probabilities-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(Failed, match="holds no finished probabilities"):
        open_store(tmp_path / "p")


def test_a_folder_that_holds_something_else_is_said_to_be_damaged(tmp_path):
    commit.write(tmp_path / "p", lambda folder: commit.write_file(folder / "rows.parquet", b"not Parquet"))
    with pytest.raises(Failed, match="the probabilities are damaged"):
        open_store(tmp_path / "p")


def test_verify_notices_a_changed_byte(tmp_path):
    write(tmp_path / "p", ids(4), range(3), blocks_of(softmax(4, 3)), rows_per_shard=2)
    shard = tmp_path / "p" / "probabilities-00001.npy"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    open_store(tmp_path / "p")  # the sizes are right
    assert commit.verify(tmp_path / "p") == ["probabilities-00001.npy"]


@pytest.mark.parametrize("rows", [[-1, 0, 1], [0, 1, 2, 3, 4], [2, 1, 9]])
def test_rows_that_are_not_there_are_refused(tmp_path, rows):
    write(tmp_path / "p", ids(4), range(3), blocks_of(softmax(4, 3)))
    with pytest.raises(IndexError):
        open_store(tmp_path / "p").take(np.array(rows))


MEMORY = """
import sys, numpy as np, torch
from pathlib import Path
from aliprod.inference.probabilities import open_store, write

def blocks(rows):
    return (torch.rand(50, 4000).softmax(1) for _ in range(len(rows) // 50))

def peak(rows):
    ids = [str(i) for i in range(rows)]
    folder = Path(sys.argv[1]) / str(rows)
    write(folder, ids, range(4000), blocks, rows_per_shard=int(sys.argv[2]))
    store = open_store(folder)
    for low in range(0, rows, 50):
        store.take(np.arange(low, low + 50)).max()
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

print(-peak(1000) + peak(10000))  # kB
"""


@pytest.mark.parametrize("per_shard", ["500", "10000"])
def test_memory_is_flat_in_rows_and_in_those_of_a_shard(tmp_path, per_shard):
    command = [sys.executable, "-c", MEMORY, tmp_path, per_shard]
    grown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 50_000  # the files are 80 MB, the float32 blocks are 160


RECORD = {"job": "a/b", "split": "test", "views": "ten_crop", "weights": "1"}


class Killed(BaseException):
    """Ends a writer; what a handler of errors or of an interrupt would do does not happen."""


def left_by_a_writer(folder, values, rows, record=None):
    """A writer of shards of four rows that ended after so many rows; the folder of its shards."""

    def blocks(missing):
        yield from values[missing[:rows]].split(2)
        raise Killed

    with pytest.raises(Killed):
        write(folder, ids(len(values)), range(3), blocks, record=record or RECORD, rows_per_shard=4)
    return list(folder.parent.glob(".*.unfinished"))


def gone_on(folder, values):
    """The rows that a writer asks for, and the digest of the store."""
    asked = []

    def blocks(missing):
        asked.extend(missing.tolist())
        return values[missing].split(3)

    write(folder, ids(len(values)), range(3), blocks, record=RECORD, rows_per_shard=4)
    assert list(folder.parent.iterdir()) == [folder]
    return asked, commit.digest(folder)


def undisturbed(folder, values):
    write(folder, ids(len(values)), range(3), blocks_of(values), record=RECORD, rows_per_shard=4)
    return commit.digest(folder)


@pytest.mark.parametrize(("rows", "first"), [(0, 0), (2, 0), (4, 4), (10, 8), (12, 12), (14, 14)])
def test_finished_shards_are_not_asked_for_again(tmp_path, rows, first):
    values = softmax(14, 3)
    left_by_a_writer(tmp_path / "stores" / "p", values, rows)
    commit.sweep(tmp_path / "stores")
    asked, digest = gone_on(tmp_path / "stores" / "p", values)
    assert asked == list(range(first, 14))
    assert digest == undisturbed(tmp_path / "p", values)


@pytest.mark.parametrize("file", ["probabilities-00001.npy", "manifest.json"])
def test_a_flipped_bit_in_a_finished_shard_is_noticed_and_that_shard_asked_for_again(tmp_path, caplog, file):
    values = softmax(14, 3)
    [shards] = left_by_a_writer(tmp_path / "stores" / "p", values, 12)
    damaged = bytearray((shards / "00001" / file).read_bytes())
    damaged[-9] ^= 1
    (shards / "00001" / file).write_bytes(damaged)
    asked, digest = gone_on(tmp_path / "stores" / "p", values)
    assert asked == [4, 5, 6, 7, 12, 13]
    assert digest == undisturbed(tmp_path / "p", values)
    assert f"{shards / '00001'} is damaged and is predicted again." in caplog.text


def test_a_torn_shard_is_asked_for_again(tmp_path):
    values = softmax(14, 3)
    [shards] = left_by_a_writer(tmp_path / "stores" / "p", values, 8)
    with (shards / "00000" / "probabilities-00000.npy").open("r+b") as file:
        file.truncate(100)
    asked, digest = gone_on(tmp_path / "stores" / "p", values)
    assert asked == [0, 1, 2, 3, *range(8, 14)]
    assert digest == undisturbed(tmp_path / "p", values)


@pytest.mark.parametrize("other", [{"weights": "2"}, {"catalogue": "of other images"}])
def test_shards_of_other_weights_or_images_are_swept_and_those_of_another_split_are_not(tmp_path, other):
    values = softmax(14, 3)
    [first] = left_by_a_writer(tmp_path / "p", values, 8)
    [val] = {*left_by_a_writer(tmp_path / "v", values, 8, RECORD | {"split": "val"})} - {first}
    left = left_by_a_writer(tmp_path / "q", values, 8, RECORD | other)
    assert first not in left
    assert val in left
    assert len(left) == 2


def test_shards_on_a_file_system_without_links_are_copied(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    values = softmax(14, 3)
    monkeypatch.setattr(os, "link", refused)
    assert gone_on(tmp_path / "stores" / "p", values)[1] == undisturbed(tmp_path / "p", values)
    assert commit.verify(tmp_path / "p") == []


def test_a_store_that_is_there_is_not_predicted_again(tmp_path):
    values = softmax(14, 3)
    digest = undisturbed(tmp_path / "p", values)
    assert gone_on(tmp_path / "p", values) == ([], digest)


def test_shards_of_many_classes_hold_whole_batches_of_a_prediction(tmp_path):
    for classes in (2, 4_242, 50_030):
        write(tmp_path / str(classes), ["a"], range(classes), blocks_of(torch.full((1, classes), 1 / classes)))
        rows = open_store(tmp_path / str(classes)).rows_per_shard
        assert rows % 256 == 0
        assert 0 < rows * classes * 2 <= 256 * 2**20


# A writer in a process of its own, and what happens to it as it touches its k-th file or folder, for every k.
DISTURBED = """
import json, os, signal, sys, torch
from pathlib import Path
from aliprod.store import commit
from aliprod.inference.probabilities import write

values = (4 * torch.randn(14, 3, generator=torch.Generator().manual_seed(0))).softmax(dim=1)
record = {"split": "test", "views": "ten_crop"}
root, disturbance, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
left, act = -1, None

def hook(event, arguments):
    global left
    if event in ("open", "os.rename", "os.link", "os.mkdir", "shutil.rmtree") and str(root) in str(arguments[0]):
        left -= 1
        if left == 0:
            act()

def predict(folder):
    def blocks(rows):
        for block in rows.reshape(-1, 2):
            with open(folder.parent.with_suffix(".log"), "a") as log:
                log.write("x" * len(block))
            yield values[block]
    write(folder, [str(row) for row in range(14)], range(3), blocks, record=record, rows_per_shard=4)

def in_child(moment, at_moment, folder):
    global left, act
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left, act = moment, at_moment
    predict(folder)
    os._exit(1 if left > 0 else 0)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

undisturbed = root / "undisturbed" / "p"
predict(undisturbed)  # before the children are forked: whatever loads itself at first use is loaded once
sys.addaudithook(hook)
moment, found = 1, []
while True:
    folder = root / str(moment) / "p"
    other = lambda: in_child(-1, None, folder)
    status = in_child(moment, die if disturbance == "killed" else other, folder)
    if status == 1:
        break
    if disturbance == "killed":
        other()
    there = [path.name for path in folder.parent.iterdir()]
    predicted = folder.parent.with_suffix(".log").stat().st_size
    found.append((status, commit.digest(folder), commit.verify(folder), there, predicted))
    moment += step
print(json.dumps([commit.digest(undisturbed), found]))
"""


def disturbed(tmp_path, disturbance, step):
    command = [sys.executable, "-c", DISTURBED, tmp_path, disturbance, str(step)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def test_a_writer_killed_at_any_moment_leaves_its_shards_and_the_next_writes_the_same_bytes(tmp_path):
    digest, found = disturbed(tmp_path, "killed", 9)
    assert len(found) > 8
    for status, own, wrong, _, predicted in found:
        assert (status, own, wrong) == (-signal.SIGKILL, digest, [])
        assert 14 <= predicted <= 14 + 4


def test_a_writer_that_another_overtakes_at_any_moment_ends_well_and_leaves_nothing(tmp_path):
    digest, found = disturbed(tmp_path, "overtaken", 9)
    assert len(found) > 8
    for status, own, wrong, there, _ in found:
        assert (status, own, wrong, there) == (0, digest, [], ["p"])
