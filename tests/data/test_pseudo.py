"""pseudo: labels of test images come back as rows of the catalogue, or are refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data import pseudo
from aliprod.errors import Refused
from aliprod.store import commit


def labelled(folder: Path, ids: list[str], class_ids: list[int]) -> Path:
    count = len(ids)
    pseudo.write(folder, pa.array(ids, pa.string()), np.array(class_ids, np.int64), np.full(count, 0.95), {"by": ["a"]})
    return folder


def test_labels_come_back_as_rows_in_the_order_in_which_they_were_written(packages: Catalogue, tmp_path: Path) -> None:
    ids = packages.test.ids.to_pylist()
    chosen = [ids[30], ids[2], ids[17]]
    rows, labels = pseudo.read(labelled(tmp_path / "a", chosen, packages.classes[[3, 0, 3]].tolist()), packages)
    assert rows.tolist() == [30, 2, 17]
    assert labels.tolist() == [3, 0, 3]
    assert commit.read(tmp_path / "a") == {"by": ["a"]}


def test_that_nobody_was_sure_of_any_image_is_no_fault(packages: Catalogue, tmp_path: Path) -> None:
    rows, labels = pseudo.read(labelled(tmp_path / "a", [], []), packages)
    assert (len(rows), len(labels)) == (0, 0)


@pytest.mark.parametrize(("image", "class_id"), [("gone.jpg", None), (None, 10**6), (None, -1)])
def test_labels_of_other_images_or_classes_are_refused(
    packages: Catalogue, tmp_path: Path, image: str | None, class_id: int | None
) -> None:
    ids = [packages.test.ids[0].as_py(), image or packages.test.ids[1].as_py()]
    first = int(packages.classes[0])
    folder = labelled(tmp_path / "a", ids, [first, first if class_id is None else class_id])
    with pytest.raises(Refused, match="a: are pseudo labels of another catalogue"):
        pseudo.read(folder, packages)


def test_a_folder_without_pseudo_labels_is_refused(packages: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="none: holds no pseudo labels"):
        pseudo.read(tmp_path / "none", packages)
