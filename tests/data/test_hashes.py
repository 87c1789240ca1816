"""hashes: what is kept on disk groups images as their pictures do, whoever hashed them."""

import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aliprod.catalogue.alike import gray32
from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.decode import decode
from aliprod.catalogue.sources import read
from aliprod.data import duplicates, loader
from aliprod.data.duplicates import dct_hash
from aliprod.data.duplicates import groups as grouped
from aliprod.errors import Refused


@pytest.fixture
def copied(packages: Catalogue, tmp_path: Path) -> Catalogue:
    """A catalogue with one picture twice, in another size, and one that cannot be read."""
    shutil.copytree(packages.root, tmp_path / "packages")
    catalogue = read(tmp_path / "packages")
    picture = decode(catalogue.train.path(3))
    smaller = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.BICUBIC)
    smaller.save(catalogue.train.path(20), quality=70)
    catalogue.train.path(11).write_bytes(b"no picture")
    return catalogue


def test_groups_from_disk_are_those_of_the_pictures_and_the_unreadable_are_alone(
    copied: Catalogue, tmp_path: Path
) -> None:
    duplicates.write_hashes(tmp_path / "hashes", copied.train, 0)
    found = duplicates.hashed_groups(tmp_path / "hashes", 32, 6)
    readable = [row for row in range(32) if row != 11]
    bits = dct_hash(torch.from_numpy(np.stack([gray32(decode(copied.train.path(row))) for row in readable])))
    assert np.array_equal(found[readable], np.array(readable)[grouped(bits, 6).numpy()])
    assert found[20] == found[3]
    assert (found == 11).sum() == 1


def test_processes_that_help_change_no_byte(packages: Catalogue, tmp_path: Path) -> None:
    for name, processes in (("alone", 0), ("helped", 2)):
        duplicates.write_hashes(tmp_path / name, packages.train, processes)
    for file in ("bits.npy", "readable.npy"):
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "helped" / file).read_bytes()


def test_a_process_that_stands_still_is_waited_for_and_then_an_error(
    packages: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_PATIENCE_SECONDS", 1)
    images = packages.train.take(np.resize(np.arange(32), 3200))  # more than are read before it is stopped
    before = set(multiprocessing.active_children())

    def stopped() -> BaseProcess:
        while not (new := set(multiprocessing.active_children()) - before):
            time.sleep(0.001)
        process = new.pop()
        os.kill(process.pid or 0, signal.SIGSTOP)
        return process

    with ThreadPoolExecutor() as beside:
        process = beside.submit(stopped)
        with pytest.raises(RuntimeError, match="timed out") as _held:  # else the loader waits for the process to end
            duplicates.write_hashes(tmp_path / "hashes", images, 1)
        process.result().kill()
    assert not list(tmp_path.iterdir())


def test_hashes_of_other_images_or_none_are_refused(packages: Catalogue, tmp_path: Path) -> None:
    duplicates.write_hashes(tmp_path / "hashes", packages.train.take(np.arange(9)), 0)
    with pytest.raises(Refused, match="holds hashes of 9 images, not of 32"):
        duplicates.hashed_groups(tmp_path / "hashes", 32, 6)
    with pytest.raises(Refused, match="none: holds no hashes"):
        duplicates.hashed_groups(tmp_path / "none", 32, 6)
