"""What a catalogue's files say: rows and the product tree, as JSON, and the names in them, which become paths.

What is wrong with a whole file is said with its line; nothing is repaired in silence. A tree (nodes of ``name``,
``children`` and ``class_id``; the keys of AliProducts' own are not public) costs the names and levels, never the rest.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aliprod.errors import Refused, did_you_mean, listing
from aliprod.shown import escaped

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
UNREAD_SUFFIXES = (".heic", ".heif", ".avif")  # of telephones: photographs, which no decoder here opens
UNREAD = "is HEIC or AVIF, which is not read: save it as JPEG"
TREE = "product_tree.json"
DEEPEST = 64  # levels that are read: AliProducts has four

_LAYOUT = 'It should be {"images": [{"image_id": "1301307.jpg", "class_id": "0"}, ...]}.'
# One name on any system: no separator, no control character (NUL among them), no half of a surrogate pair.
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,255}")
_CLASS = re.compile(r"[0-9]{1,18}")  # fits int64


class Repeated(dict[str, Any]):
    """A JSON object that says a key twice, of which Python's parser would keep the last."""

    twice: str


def rows(file: Path) -> list[Any]:
    """The list under ``images``; its rows are not yet looked at. Refused: not UTF-8, not JSON, no list ``images``, or a
    key twice at the top."""
    top = document(file)
    if not isinstance(top, dict):
        raise Refused(f"has {_kind(top)} at the top, so there is no key images.", file, _LAYOUT)
    if isinstance(top, Repeated):
        text, key = utf8(file), f'"{top.twice}"'
        line = text.count("\n", 0, max(text.find(key, text.find(key) + 1), 0)) + 1
        raise Refused(f"has the key {top.twice} twice.", f"{file}, line {line}", "Keep one of them.")
    if "images" not in top:
        near = did_you_mean("images", top)
        raise Refused(f"has no key images; its keys are: {listing(top) or 'none'}.", file, f"{near} {_LAYOUT}".strip())
    if not isinstance(top["images"], list):
        raise Refused(f"has {_kind(top['images'])} under images, where a list of rows is expected.", file, _LAYOUT)
    return top["images"]


def document(file: Path) -> Any:
    """Any JSON file; an object that says a key twice is `Repeated`. Refused: empty, not UTF-8 or not JSON."""
    text = utf8(file)
    if not text.strip():
        raise Refused("is empty.", file, _LAYOUT)
    advice = "Was its download or its writing cut short? Write or fetch it again."
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"{file}, line {error.lineno}"
        raise Refused(f"is not JSON: {error.msg} at column {error.colno}.", where, advice) from error
    except RecursionError as error:
        raise Refused("is nested too deeply to be read.", file, _LAYOUT) from error
    except ValueError as error:  # a number of thousands of digits
        raise Refused(f"is not JSON that can be read: {error}.", file, advice) from error


def utf8(file: Path) -> str:
    """A text file, with or without a byte-order mark. Refused: it cannot be read, or is not UTF-8."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}.", file, "Check the file and its permissions.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"is not UTF-8: byte {content[error.start]:#04x} at position {error.start:,}."
        raise Refused(what, f"{file}, line {line}", "Save it as UTF-8.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    repeated = Repeated(plain)
    repeated.twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return repeated


def _kind(value: Any) -> str:
    kinds = {type(None): "null", dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return kinds.get(type(value), "a number")


def name_fault(name: Any) -> str:
    """Why a text cannot be the name of a file inside its folder; '' where it can."""
    if type(name) is not str:
        return f"its id is {_shown(name)}, not a text"
    if _NAME.fullmatch(name) and name not in (".", "..") and (len(name) < 64 or len(name.encode()) <= 255):
        return ""
    if not name:
        return "its id is empty"
    if "\\" in name:
        return "its id has a backslash, which stands in no name: folders are parted by /"
    if "/" in name or name in (".", ".."):
        return "its id is a path, not a name: it would lead out of its folder"
    if _NAME.fullmatch(name[:255]):
        return "its id is longer than the 255 bytes that a file name may have"
    return "its id has a control character or half a character, which no file name may have"


def path_fault(path: str) -> str:
    """Why a text cannot be a path below the catalogue's folder, with `/` between its names; '' where it can."""
    return next(filter(None, map(name_fault, path.split("/"))), "").replace("its id", "a name in its path")


def tidy(path: str) -> str:
    """A path without the parts that are `.`, which find and tar write and which lead nowhere."""
    return "/".join(part for part in path.split("/") if part != ".") if "./" in path else path


def class_number(class_id: Any) -> int | None:
    """``"7"``, ``"00007"`` and ``7`` are class 7; None for whatever else."""
    if type(class_id) is str:
        return int(class_id) if _CLASS.fullmatch(class_id) else None
    return class_id if type(class_id) is int and 0 <= class_id < 10**18 else None


def class_fault(class_id: Any) -> str:
    """Why a value is no class id."""
    return f"its class id is {_shown(class_id)}, not a number such as 7 or 00007"


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = escaped(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


class Leaf(NamedTuple):
    """A class in the tree: its name and the nodes above it, from the one below the root down to itself."""

    class_id: int
    name: str
    nodes: tuple[int, ...]


def leaves(root: Path) -> tuple[dict[int, Leaf], list[str]]:
    """The leaves of a catalogue's tree by class id, and what is wrong with it; nothing of both without the file."""
    if not (root / TREE).is_file():
        return {}, []
    try:
        found = list(_walk(document(root / TREE)))
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
    """(L, K) int64: the node of every class on every level, numbered within it by first appearance in ``classes``.

    Ragged trees are padded by repeating the leaf; a class that is not in the tree is its own ancestor. The last level
    is 0 to K - 1, the classes themselves.
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
    return np.array([pa.array(nodes).dictionary_encode().indices for nodes in levels], np.int64)


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
