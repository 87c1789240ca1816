"""sources: the layouts that people bring, each read as they mean it, or refused in words that say what to do."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.sources import Reading, read
from aliprod.errors import Refused
from aliprod.ingest.check import check

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "make.py"
NAMES = """
test_in_class_folders test_flat validation valid val_and_valid no_split no_split_with_copies nested_classes
linked_class_inside linked_class_outside empty_class class_missing_in_val table_image_label table_filename_label
table_semicolon table_tab table_with_split table_absolute table_blank_class labels_as_floats labels_with_zeros
metadata_csv one_leak odd_suffixes
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Any, dict[str, Any]]]]:
    """A folder with all cases made, and what is right for each."""
    if not CASES.is_file():
        pytest.skip("needs ../shared/cases/make.py, which is not beside this checkout")
    spec = importlib.util.spec_from_file_location("make", CASES)
    assert spec
    assert spec.loader
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    out = tmp_path_factory.mktemp("cases")
    for name, (fill, _) in make.CASES.items():
        make.made = 0
        (out / name).mkdir()
        fill(out / name)
    return out, make.CASES


@pytest.fixture
def kept(tmp_path: Path) -> Reading:
    """As without a plan, with a cache of our own."""
    return Reading(kept=tmp_path / "held-out")


def test_no_case_is_forgotten(cases: tuple[Path, dict[str, Any]]) -> None:
    assert sorted(NAMES.split()) == sorted(cases[1])


@pytest.mark.parametrize("name", NAMES.split())
def test_each_layout_is_read_as_it_is_meant(cases: tuple[Path, Any], kept: Reading, name: str) -> None:
    folder, right = cases[0] / name, dict(cases[1][name][1])
    right.pop("why")
    if "refused" in right:
        with pytest.raises(Refused) as refused:
            read(folder, kept)
        assert right["refused"] in str(refused.value)
        assert refused.value.where.startswith(str(folder))
        assert refused.value.advice
        return
    report, catalogue = check(folder, 1, kept), read(folder, kept)
    said = "\n".join([*(f"{flaw.path}: {flaw.problem}" for flaw in report.problems), *report.notes])
    assert report.readable == report.images or name == "linked_class_outside", said
    counts = {images.split: len(images) for images in catalogue.splits} | {"total": report.images}
    found = counts | {
        "classes": sorted(catalogue.names),
        "test_labels": catalogue.test_labels is not None,
        "leaks": said.count("leak"),
        "seeded": _ids(catalogue) == _ids(read(folder, Reading(kept=kept.kept and kept.kept / "other"))),
        "together": _copies_stay_together(catalogue),
    }
    share, named = right.pop("val_share", None), [right.pop(word, "") for word in ("named", "hint")]
    columns = right.pop("columns", [])
    assert {what: found[what] for what in right} == right
    assert all(word in said for word in (*named, *columns))
    assert not right.get("hint") or "Did you mean" in said
    if share:
        held, whole = Counter(catalogue.val.labels.tolist()), catalogue.class_counts + 0
        assert sorted(held) == list(range(catalogue.num_classes))
        copies = 3 if "together" in right else 1
        for label, images in held.items():
            assert images == max(round(share * (whole[label] + images)), copies)


def _ids(catalogue: Catalogue) -> list[list[str]]:
    return [sorted(images.paths.to_pylist()) for images in catalogue.splits]


def _copies_stay_together(catalogue: Catalogue) -> bool:
    """A copy of N.jpg is Nb.jpg or Nc.jpg."""
    return not {p[: p.index("/") + 2] for p in catalogue.train.paths.to_pylist()} & {
        p[: p.index("/") + 2] for p in catalogue.val.paths.to_pylist()
    }
