"""annotations: names and ancestors of the classes."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aliprod.catalogue import annotations
from aliprod.catalogue.sources import read


def leaves_of(folder: Path, top: Any) -> tuple[dict[int, annotations.Leaf], list[str]]:
    (folder / annotations.TREE).write_text(json.dumps(top))
    return annotations.leaves(folder)


def ancestors(folder: Path, top: Any, *classes: int) -> list[list[int]]:
    levels: list[list[int]] = annotations.ancestors(leaves_of(folder, top)[0], np.array(classes)).tolist()
    return levels


def leaf(class_id: object) -> dict[str, object]:
    return {"name": f"class {class_id}", "class_id": class_id}


def inner(*children: object) -> dict[str, object]:
    return {"name": "inner", "children": list(children)}


def test_grocery_has_the_levels_and_names_of_its_tree(shared: Path) -> None:
    grocery = read(shared / "data/grocery")
    assert grocery.ancestor is not None
    assert [len(set(level)) for level in grocery.ancestor.tolist()] == [3, 17, 48]
    assert grocery.names[33] == "Golden-Delicious"
    apples = [33, 47, 36, 34, 45]
    assert len(set(grocery.ancestor[1, apples].tolist())) == 1
    assert grocery.ancestor[1].tolist().count(grocery.ancestor[1, 33]) == len(apples)


def test_a_node_of_a_level_lies_below_one_node_of_the_level_above(shared: Path) -> None:
    ancestor = read(shared / "data/grocery").ancestor
    assert ancestor is not None
    for above, below in pairwise(ancestor):
        assert len(set(zip(above.tolist(), below.tolist(), strict=True))) == len(set(below.tolist()))


def test_a_ragged_tree_repeats_the_leaf(tmp_path: Path) -> None:
    ragged = inner(leaf(0), inner(leaf("1"), inner(leaf("00002"), leaf(3))))
    assert ancestors(tmp_path, ragged, 0, 1, 2, 3) == [[0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]]


def test_a_class_outside_the_tree_is_its_own_ancestor(tmp_path: Path) -> None:
    assert ancestors(tmp_path, inner(inner(leaf(1), leaf(5))), 1, 3, 5) == [[0, 1, 0], [0, 1, 2]]


def test_the_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    one = inner(inner(leaf(0), leaf(1)), inner(leaf(2), leaf(3)))
    other = inner(inner(leaf(3), leaf(2)), inner(leaf(1), leaf(0)))
    assert ancestors(tmp_path, one, 0, 1, 2, 3) == ancestors(tmp_path, other, 0, 1, 2, 3)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", '{"Level1": {"Level2": ["a"]}}', "[" * 50_000, '{"children": {"a": 1}}']
)
def test_a_tree_that_cannot_be_read_costs_the_names_and_not_the_catalogue(tmp_path: Path, content: str) -> None:
    (tmp_path / annotations.TREE).write_text(content)
    (tmp_path / "train.json").write_text('{"images": [{"image_id": "a.jpg", "class_id": 7}]}')
    catalogue = read(tmp_path)
    assert catalogue.ancestor is None
    assert catalogue.names == ("",)
    assert [problem.path for problem in catalogue.problems] == [annotations.TREE]


def test_a_deep_tree_does_not_grow_the_catalogue_without_bound(tmp_path: Path) -> None:
    deep = leaf(0)
    for _ in range(300):
        deep = inner(deep)
    assert len(ancestors(tmp_path, inner(deep, leaf(1)), 0, 1)) <= annotations.DEEPEST


def test_without_a_tree_there_are_no_levels_and_no_complaint(tmp_path: Path) -> None:
    assert annotations.leaves(tmp_path) == ({}, [])


def test_a_class_twice_and_a_class_without_pictures_are_named(shared: Path) -> None:
    said = [problem.problem for problem in read(shared / "data/broken").problems if problem.path == annotations.TREE]
    assert ["class 3 is twice" in text for text in said].count(True) == 1
    assert [text.endswith(": 5") for text in said].count(True) == 1
