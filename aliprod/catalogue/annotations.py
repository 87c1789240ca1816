"""JSON files of a catalogue: what is wrong with a whole file is said with its line; nothing is repaired in silence."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from aliprod.errors import Refused, did_you_mean, listing

_LAYOUT = 'It should be {"images": [{"image_id": "1301307.jpg", "class_id": "0"}, ...]}.'


class Repeated(dict[str, Any]):
    """A JSON object that says a key twice, of which Python's parser would keep the last."""

    twice: str


def rows(file: Path) -> list[Any]:
    """The list under ``images``; its rows are not yet looked at.

    Raises:
        Refused: not UTF-8, not JSON, no list ``images``, or a key twice at the top.
    """
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
    """Any JSON file; an object that says a key twice is `Repeated`.

    Raises:
        Refused: empty, not UTF-8 or not JSON; the line is named.
    """
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
    """A text file, with or without a byte-order mark.

    Raises:
        Refused: it cannot be read, or is not UTF-8; the line is named.
    """
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
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}.get(type(value), "a number")
