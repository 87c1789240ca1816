"""product_tree.json: the names of the classes and their ancestors.

The keys of AliProducts' own file are not public; ours is nested nodes of ``name``, ``children`` and ``class_id``.
A file that says it otherwise costs the names and levels, never the catalogue.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aliprod.catalogue.annotations import document
from aliprod.catalogue.identity import class_number
from aliprod.errors import Refused, listing

FILE = "product_tree.json"
DEEPEST = 64  # levels that are read: AliProducts has four


@dataclass(frozen=True)
class Leaf:
    """A class in the tree: its name and the nodes above it, from the one below the root down to itself."""

    class_id: int
    name: str
    nodes: tuple[int, ...]


def leaves(root: Path) -> tuple[dict[int, Leaf], list[str]]:
    """The leaves of a catalogue's tree by class id, and what is wrong with it; nothing of both without the file."""
    if not (root / FILE).is_file():
        return {}, []
    try:
        found = list(_walk(document(root / FILE)))
    except Refused as refused:
        return {}, [f"{refused.what} Names and levels of the classes are left out"]
    if not found:
        return {}, ["no node has a class_id: names and levels of the classes are left out"]
    first = {leaf.class_id: leaf for leaf in reversed(found)}
    return first, [
        f"class {leaf.class_id} is twice in the tree ({first[leaf.class_id].name}, {leaf.name}): the first counts"
        for leaf in found
        if leaf is not first[leaf.class_id]
    ]


def ancestors(leaves: dict[int, Leaf], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The node of every class on every level, numbered within its level by first appearance in ``classes``.

    Ragged trees are padded by repeating the leaf; a class that is not in the tree is its own ancestor.

    Returns:
        (L, K) int64; the last level is 0 to K - 1, the classes themselves.
    """
    paths = [leaves[class_id].nodes if class_id in leaves else () for class_id in classes.tolist()]
    # the last node of a path is the class: written as itself, negative, so that it is no inner node's number
    levels = [
        [path[level] if level < len(path) - 1 else -1 - label for label, path in enumerate(paths)]
        for level in range(max(1, *map(len, paths)))
    ]
    return renumbered(np.array(levels, np.int64))


def renumbered(levels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the nodes of every level, (L, K) int64, by first appearance."""
    numbered = np.empty_like(levels)
    for level, nodes in enumerate(levels):
        _, first, inverse = np.unique(nodes, return_index=True, return_inverse=True)
        numbered[level] = np.argsort(np.argsort(first))[inverse]
    return numbered


def without_pictures(leaves: dict[int, Leaf], classes: NDArray[np.int64]) -> str:
    """One sentence about the classes of the tree that have no training image, or ''."""
    missing = sorted(leaves.keys() - set(classes.tolist()))
    if not missing:
        return ""
    return f"{len(missing):,} of its classes have no training image and are left out: {listing(map(str, missing))}"


def _walk(top: Any) -> Iterator[Leaf]:
    """Depth first, in the file's order, without recursion: a hostile tree may be deep."""
    number = 0
    below_the_root = top["children"] if isinstance(top, dict) and isinstance(top.get("children"), list) else top
    stack: list[tuple[Any, tuple[int, ...]]] = [(below_the_root, ())]
    while stack:
        node, above = stack.pop()
        if not isinstance(node, dict):
            stack += [(child, above) for child in reversed(node)] if isinstance(node, list) else []
            continue
        number += 1
        nodes = (*above, number)
        class_id = class_number(node.get("class_id", node.get("category_id")))
        if class_id is not None:
            name = node.get("name")
            yield Leaf(class_id, name if isinstance(name, str) else "", nodes)
        children = node.get("children")
        if isinstance(children, list) and len(nodes) < DEEPEST:
            stack += [(child, nodes) for child in reversed(children)]
