"""What an image and a class may be called: ids come from strangers and become paths."""

import re
from typing import Any

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

# One name on any system: no separator, no control character (NUL among them), no half of a surrogate pair.
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,255}")
_CLASS = re.compile(r"[0-9]{1,18}")  # fits int64


def name_fault(name: Any) -> str:
    """Why a text cannot be the name of a file inside its folder; '' where it can."""
    if type(name) is not str:
        return f"its id is {_shown(name)}, not a text"
    if _NAME.fullmatch(name) and name not in (".", "..") and (len(name) < 64 or len(name.encode()) <= 255):
        return ""
    if not name:
        return "its id is empty"
    if "/" in name or "\\" in name or name in (".", ".."):
        return "its id is a path, not a name: it would lead out of its folder"
    if _NAME.fullmatch(name[:255]):
        return "its id is longer than the 255 bytes that a file name may have"
    return "its id has a control character or half a character, which no file name may have"


def path_fault(path: str) -> str:
    """Why a text cannot be a path below the catalogue's folder, with `/` between its names; '' where it can."""
    faults = filter(None, map(name_fault, path.split("/")))
    fault = next(faults, "")
    return fault.replace("its id", "a name in its path") if fault else ""


def class_number(class_id: Any) -> int | None:
    """``"7"``, ``"00007"`` and ``7`` are class 7; None for whatever else."""
    if type(class_id) is str:
        return int(class_id) if _CLASS.fullmatch(class_id) else None
    return class_id if type(class_id) is int and 0 <= class_id < 10**18 else None


def class_fault(class_id: Any) -> str:
    """Why a value is no class id."""
    return f"its class id is {_shown(class_id)}, not a number such as 7 or 00007"


def printable(text: str) -> str:
    """A stranger's text that any stream of UTF-8 can carry."""
    return text.encode("utf-8", "replace").decode()


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = printable(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
