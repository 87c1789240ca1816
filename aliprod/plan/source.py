"""The text of a plan: read with care, overridden by --set, and asked which line a setting stands on.

A plan may be written by a careless hand or a hostile one: a dotted key of 100,000 parts in 200 kB takes
tomllib all the memory of a machine, so size and dots are limited before anything is parsed.
"""

import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time  # a datetime is a date
from pathlib import Path
from typing import Any

from aliprod.errors import Refused, did_you_mean, listing, near_file

Key = tuple[str | int, ...]  # the way to a setting: names of tables and places in lists

MOST_NAMES = 500  # that are searched for the nearest one, so that a hostile plan takes no minutes
MOST_BYTES = 256_000
MOST_DOTS = 50  # in one line
MOST_DEPTH = 8
_PART = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_DOTTED = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER_OR_SETTING = re.compile(rf"[ \t]*(\[\[?[ \t]*)?({_DOTTED})[ \t]*(?(1)\]|=)")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Source:
    """A parsed plan and where each of its settings comes from."""

    path: Path
    data: dict[str, Any]  # with --set applied
    lines: dict[Key, int]  # of the file's settings and table headers, from 1
    text: tuple[str, ...]  # the file's lines
    flags: dict[Key, str]  # of what --set says: the flag as it was written

    def flag(self, key: Key) -> str | None:
        """The flag that gave a setting its value, if one did."""
        return next((text for flag, text in reversed(self.flags.items()) if key[: len(flag)] == flag), None)

    def where(self, key: Key, quoted: str | None = None) -> str:
        """File and line of a setting, or of the nearest table around it; file and flag where --set gave it. ``quoted``:
        a string inside the value, whose own line is wanted."""
        if flag := self.flag(key):
            return f"{self.path}, {flag}"
        beneath = [text for flag, text in self.flags.items() if flag[: len(key)] == key]
        line = next((self.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.lines), None)
        place = f"{self.path}, line {self._line_of(quoted, line)}" if line else str(self.path)
        return ", ".join([place, *beneath])

    def _line_of(self, quoted: str | None, start: int) -> int:
        if quoted is None:
            return start
        end = min((line for line in self.lines.values() if line > start), default=len(self.text) + 1)
        inside = enumerate(self.text[start - 1 : end - 1], start)
        return next((number for number, line in inside if f'"{quoted}"' in line or f"'{quoted}'" in line), start)


def read(path: Path, sets: Sequence[str] = ()) -> Source:
    """Read a plan's file and apply the --set flags. ``sets``: KEY=VALUE each; VALUE is TOML, and what is no TOML value
    is taken as a string. Refused: the file cannot be read or is no TOML, or a flag is malformed."""
    text = _text(path)
    data = _parse(text, path)
    flags: dict[Key, str] = {}
    for flag in sets:
        key, value = _flag(flag, path)
        _assign(data, key, value, f"{path}, --set {flag}")
        flags.pop(key, None)  # the last one counts, also in order
        flags[key] = f"--set {flag}"
    lines = tuple(text.split("\n"))
    source = Source(path, data, _index(lines), lines, flags)
    if deep := next((key for key, _ in _values(data) if len(key) > MOST_DEPTH), None):
        what = f"{dotted(deep[:3])}... is nested too deep."
        raise Refused(what, source.where(deep), f"{MOST_DEPTH} levels are enough.")
    return source


def odd_values(data: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    """What TOML can say and a plan cannot: nan, dates, whole numbers beyond 64 bits, NUL; with what is wrong."""
    for key, value in _values(data):
        match value:
            case float() if not math.isfinite(value):
                yield key, f"{value}: a number must be finite"
            case int() if abs(value) >= 2**63:
                yield key, "a whole number beyond 64 bits"
            case date() | time():
                yield key, "a date: a plan holds none"
            case str() if "\0" in value:
                yield key, "a string with a NUL in it"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a plan."""

    key: Key
    sentence: str
    advice: str = ""
    quoted: str | None = None  # the string that stands on the line to be named


def unknown(
    key: Key, sentence: str, name: str, names: Iterable[str], listed: str, quoted: str | None = None
) -> Problem:
    """A name that is none of ``names``; the advice has the nearest and, after ``listed``, all."""
    known = list(names)[:MOST_NAMES]
    known_as = f"{listed}: {listing(known)}." if known else f"{listed}: none."
    return Problem(key, sentence, f"{did_you_mean(name[:128], known)} {known_as}".strip(), quoted)


def dotted(key: Key) -> str:
    """A key as it is written in TOML: quoted where it must be."""
    return ".".join(part if _BARE.fullmatch(part) else shown(part) for part in map(str, key))


def shown(value: Any) -> str:
    """A value of a plan as text: short, and without the control characters that steer a terminal."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def toml_of(value: object) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{dotted((key,))} = {toml_of(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_of, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")  # which JSON leaves bare, and TOML forbids


def absolute(source: Source, key: Key, value: str) -> str:
    """A path of the plan made absolute: against its folder, or the current one where --set gave it; no URI is."""
    if "://" in value:
        return value
    base = Path.cwd() if source.flag(key) else source.path.absolute().parent
    return os.path.abspath(base / os.path.expanduser(value))  # noqa: PTH100, PTH111  Path's follow links, and raise on ~nobody


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise Refused(f"a plan has at most {MOST_BYTES:,} bytes; this file is larger.", path, "Is it a plan?")
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        advice = near_file(path, "*.toml") or near_file(path)  # photographs, perhaps
        raise Refused(f"the plan cannot be read: {error.strerror or error}.", path, advice) from None
    except UnicodeDecodeError as error:
        what = f"the plan is not UTF-8: byte {error.start + 1:,} fits in no character."
        raise Refused(what, path, "Save it as UTF-8.") from None
    except ValueError as error:  # a NUL in the path
        raise Refused(f"the plan cannot be read: {error}.", str(path).replace("\0", "\\0")) from None


def _parse(text: str, where: Path | str) -> dict[str, Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MOST_DOTS and not line.lstrip().startswith("#"):
            raise Refused(f"more than {MOST_DOTS} dots in one line.", f"{where}, line {number}", "Break long lists.")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        sentence, _, place = str(error).partition(" (at ")
        found = re.match(r"line \d+", place)
        raise Refused(f"this is no TOML: {sentence}.", f"{where}, {found[0]}" if found else where) from None
    except RecursionError:
        raise Refused("lists or tables are nested too deep.", where, f"{MOST_DEPTH} levels are enough.") from None
    except ValueError as error:  # an integer of more than 4,300 digits
        raise Refused(f"this is no TOML: {error}.", where) from None


def _flag(flag: str, path: Path) -> tuple[Key, Any]:
    name, equals, text = flag.partition("=")
    where = f"{path}, --set {flag}"
    if not flag.isprintable():  # also half characters, which no file can hold
        raise Refused("a flag holds printable characters only.", f"{path}, --set {flag!a}")
    key = _parts(name) if re.fullmatch(_DOTTED, name.strip()) and name.count(".") <= MOST_DOTS else ()
    if not equals or not key:
        raise Refused("--set takes KEY=VALUE, like stages.dcl.epochs=4.", where)
    if len(key) > MOST_DEPTH - 1:
        raise Refused(f"no setting lies {len(key)} tables deep.", where)
    return key, _value(text.strip(), where)


def _value(text: str, where: str) -> Any:
    try:
        return _parse(f"value = {text}", where)["value"]
    except Refused:
        if text[:1] in ("", "[", "{", '"', "'"):
            raise
        return text


def _assign(data: dict[str, Any], key: Key, value: Any, where: str) -> None:
    table = data
    for depth, part in enumerate(key[:-1], 1):
        if depth == 2 and key[0] == "stages" and part not in table:  # a stage of no job would say nothing, unnoticed
            raise Refused(f"there is no stage {shown(part)}.", where, did_you_mean(str(part), map(str, table)))
        inner = table.setdefault(str(part), {})
        if part == "objective" and isinstance(inner, str):  # "dcl" is short for { name = "dcl" }
            inner = table["objective"] = {"name": inner}
        if not isinstance(inner, dict):
            raise Refused(f"{dotted(key[:depth])} is no table: it has no settings of its own.", where)
        table = inner
    table[str(key[-1])] = value


def _parts(name: str) -> Key:
    """The names of a dotted key, unquoted; none where it is malformed."""
    try:
        table: Any = tomllib.loads(f"{name} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    key: Key = ()
    while isinstance(table, dict):
        ((part, table),) = table.items()
        key += (part,)
    return key


def _index(lines: Sequence[str]) -> dict[Key, int]:
    """Line numbers of table headers and settings. A line inside a long string may look like one: the first counts."""
    index: dict[Key, int] = {}
    table: Key = ()
    for number, line in enumerate(lines, 1):
        if found := _HEADER_OR_SETTING.match(line):
            key = _parts(found[2]) if found[1] else table + _parts(found[2])
            table = key if found[1] else table
            for length in range(1, len(key) + 1):
                index.setdefault(key[:length], number)
    return index


def _values(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """A value and all that is in it, one level deeper than is allowed."""
    yield key, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inside if len(key) <= MOST_DEPTH else ():
        yield from _values(one, (*key, name))
