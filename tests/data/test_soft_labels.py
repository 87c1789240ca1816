"""soft_labels: what a teacher said comes back as a distribution, whoever asks in which order."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aliprod.data.training_set import LARGEST, SoftLabels, spread, write_soft_labels
from aliprod.errors import Refused
from aliprod.store import commit
from aliprod.store.resumable import ResumableRows

HALF = 2.0**-11  # largest relative rounding error of a normal float16


def distributions(seed: int, rows: int, classes: int, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))).softmax(1)


def names(count: int) -> pa.StringArray:
    return pa.array([f"{row}.jpg" for row in range(count)], pa.string())


def taught(folder: Path, table: Tensor, ids: pa.StringArray | None = None) -> Path:
    """A folder of the soft labels of a table, written in blocks of 3 rows."""
    class_ids = np.arange(table.shape[1]) * 7
    rows = ResumableRows(folder, ids or names(len(table)), class_ids, {"job": "net/full"}, 4)
    write_soft_labels(rows, lambda rows: table[rows].split(3))
    return folder


def said(folders: list[Path], ids: pa.StringArray, classes: int) -> Tensor:
    found = SoftLabels.open(folders, ids, np.arange(classes) * 7)
    return spread(*found.rows(np.arange(len(ids))), found.num_classes)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 12), st.integers(0, 9), st.floats(0, 30))
def test_rows_are_distributions_of_the_teachers_largest_and_an_even_rest(
    seed: int, teachers: int, kept: int, others: int, scale: float
) -> None:
    tables = distributions(seed, 4 * teachers, kept + others, scale).view(4, teachers, -1)
    top = tables.topk(kept, dim=2)
    found = spread(top.indices, top.values.half().float(), kept + others)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    assert (found >= 0).all()
    rest = (1 - top.values.sum(dim=2, keepdim=True)) / max(1, others)
    expected = rest.expand_as(tables).scatter(2, top.indices, top.values).mean(dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * HALF)


def test_of_few_classes_all_is_kept_up_to_half_precision(tmp_path: Path) -> None:
    table = distributions(0, 10, LARGEST)
    found = said([taught(tmp_path / "a", table)], names(10), LARGEST)
    torch.testing.assert_close(found, table, rtol=3 * HALF, atol=2.0**-24)


def test_of_many_classes_the_largest_are_kept_and_the_others_are_equal(tmp_path: Path) -> None:
    table = distributions(1, 10, 100)
    found = said([taught(tmp_path / "a", table)], names(10), 100)
    top = table.topk(LARGEST, dim=1)
    torch.testing.assert_close(found.gather(1, top.indices), top.values, rtol=3 * HALF, atol=1e-6)
    others = found.masked_fill(torch.zeros_like(table, dtype=torch.bool).scatter(1, top.indices, True), torch.nan)
    mean = (1 - top.values.sum(dim=1)) / (100 - LARGEST)
    for row, share in zip(others, mean, strict=True):
        assert len(set(row[~row.isnan()].tolist())) == 1
        torch.testing.assert_close(row[~row.isnan()][0], share, rtol=0.3, atol=1e-6)  # what the rounding leaves


def test_teachers_are_averaged_each_matched_by_image_id(tmp_path: Path) -> None:
    tables = [distributions(seed, 12, 9) for seed in (1, 2)]
    mixed = np.random.default_rng(0).permutation(12)
    other = taught(tmp_path / "b", tables[1][mixed], names(12).take(pa.array(mixed)))
    folders = [taught(tmp_path / "a", tables[0]), other]
    asked = np.array([11, 3, 7])  # some of them, in an order of their own
    found = said(folders, names(12).take(pa.array(asked)), 9)
    torch.testing.assert_close(found, (tables[0] + tables[1])[asked] / 2, rtol=0, atol=2 * HALF)
    torch.testing.assert_close(found, said(folders[::-1], names(12).take(pa.array(asked)), 9), rtol=0, atol=1e-7)


def test_soft_labels_of_other_images_or_classes_or_none_are_refused(tmp_path: Path) -> None:
    folder = taught(tmp_path / "a", distributions(0, 5, 4))
    for ids, classes in ((names(6), np.arange(4) * 7), (names(5), np.arange(4)), (names(5), np.arange(5) * 7)):
        with pytest.raises(Refused, match="a: are soft labels of other images or classes"):
            SoftLabels.open([folder], ids, classes)
    with pytest.raises(Refused, match="none: holds no finished soft labels"):
        SoftLabels.open([folder, tmp_path / "none"], names(5), np.arange(4) * 7)


def test_parts_of_the_images_are_the_same_bytes_as_all(tmp_path: Path) -> None:
    table = distributions(3, 14, 9)
    rows = ResumableRows(tmp_path / "parts", names(14), np.arange(9) * 7, {"job": "net/full"}, 4)
    for part in range(4):
        assert commit.read(rows.folder) is None
        write_soft_labels(rows, lambda rows: table[rows].split(3), (part, 4))
    assert commit.digests(rows.folder) == commit.digests(taught(tmp_path / "whole", table))


def test_a_teacher_that_leaves_images_out_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = ResumableRows(tmp_path / "a", names(8), np.arange(4), {}, 256)
    with pytest.raises(ValueError, match="6 rows of probabilities for 8 images"):
        write_soft_labels(rows, lambda _: distributions(0, 6, 4).split(3))
    assert commit.read(tmp_path / "a") is None
    assert not list(tmp_path.iterdir())


# A teacher, killed as it touches its k-th file or folder for every ninth k, and one that goes on after it.
KILLED = """
import json, os, signal, sys, numpy as np, pyarrow as pa, torch
from pathlib import Path
from aliprod.store import commit
from aliprod.data.training_set import write_soft_labels
from aliprod.store.resumable import ResumableRows

root, left = Path(sys.argv[1]), 0
table = torch.randn(26, 100, generator=torch.Generator().manual_seed(0)).softmax(dim=1)

def hook(event, arguments):
    global left
    if event in ("open", "os.rename", "os.mkdir", "shutil.rmtree") and str(root) in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def teach(folder):
    def blocks(rows):
        for some in rows.reshape(-1, 2):
            with open(folder.parent.with_suffix(".log"), "a") as log:
                log.write("x" * len(some))
            yield table[some]
    rows = ResumableRows(folder, pa.array([str(row) for row in range(26)]), np.arange(100), {}, 4)
    write_soft_labels(rows, blocks)

def in_child(moment, folder):
    global left
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = moment
    teach(folder)
    os._exit(0)

undisturbed = root / "undisturbed" / "soft"
teach(undisturbed)  # before the children are forked: whatever loads itself at first use is loaded once
sys.addaudithook(hook)
moment, found = 1, []
while in_child(moment, folder := root / str(moment) / "soft"):
    in_child(-1, folder)
    found.append((commit.digest(folder), folder.parent.with_suffix(".log").stat().st_size))
    moment += 9
print(json.dumps([commit.digest(undisturbed), found]))
"""


def test_a_teacher_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, check=True)
    digest, found = json.loads(done.stdout)
    assert len(found) > 8
    for own, looked_at in found:
        assert own == digest
        assert 26 <= looked_at <= 26 + 4  # one shard, at most, is looked at again


def test_an_image_costs_six_bytes_a_class_and_no_more_classes_than_are_kept(tmp_path: Path) -> None:
    folder = taught(tmp_path / "a", distributions(0, 200, 1000))
    size = sum((folder / name).stat().st_size for name in ("classes.npy", "probabilities.npy"))
    assert size == 200 * LARGEST * 6 + 2 * 128  # numpy's headers
