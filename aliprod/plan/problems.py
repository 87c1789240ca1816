"""What pydantic finds wrong with a table, said in the plan's own words: key, sentence, nearest right name."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from aliprod.errors import did_you_mean, listing
from aliprod.plan.source import Key, dotted, shown
from aliprod.recipe.options import Options

MOST_NAMES = 500  # that are searched for the nearest one, so that a hostile plan takes no minutes
_MOST_ERRORS = 200
_EXPECTED = {  # pydantic's kinds of errors
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "finite_number": "a finite number",
    "string_too_short": "a string that is not empty",
    "literal_error": "{expected}",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


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


def shape(model: type[BaseModel], data: Any, error: ValidationError, at: Key = ()) -> Iterator[Problem]:
    """Problems of a table that does not fit its model; one a key, the most exact of a union's branches. ``at``: key of
    the table in the plan."""
    found: dict[Key, list[ErrorDetails]] = {}
    for details in error.errors()[:_MOST_ERRORS]:
        found.setdefault(_real(details["loc"], data, details["type"]), []).append(details)
    around = {key[:length] for key in found for length in range(len(key))}
    for key, several in found.items():
        if key not in around:
            yield _problem(model, data, at, key, several)


def _real(loc: Key, data: Any, kind: str) -> Key:
    """pydantic's location without the names of union branches, which are no keys of the plan."""
    key: list[str | int] = []
    for place, part in enumerate(loc):
        last = place == len(loc) - 1
        if isinstance(data, dict) and (part in data or (last and kind == "missing")):
            key.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            key.append(part)
            data = data[part] if part < len(data) else None  # a place that is missing
    return tuple(key)


def _problem(model: type[BaseModel], data: Any, at: Key, key: Key, several: list[ErrorDetails]) -> Problem:
    first = several[0]
    whole, name = at + key, str(key[-1]) if key else ""
    table = dotted((at + key)[:-1]) or "a plan"
    match first["type"]:
        case "extra_forbidden":
            names = sorted(_fields(model, key[:-1]))
            sentence, listed = f"{table} has no setting {dotted((name,))}.", f"{_kind(at, key)} may say"
            if issubclass(model, Options):
                of = model.__name__
                sentence, listed = f"{table}: {of} has no option {dotted((name,))}.", f"Options of {of}"
            deeper = [f"{field}.{name}" for field in names if name in _fields(model, (*key[:-1], field))]
            return unknown(whole, sentence, name, names + deeper, listed)
        case "missing":
            too_few = isinstance(_at(data, key[:-1]), list)
            return Problem(whole, f"{table} has too few values." if too_few else f"{table} lacks {dotted((name,))}.")
        case "value_error":
            reason = first["msg"].removeprefix("Value error, ")
            return Problem(whole, f"{dotted(whole)}: {reason}." if whole else f"{reason}.")
    expected = " or ".join(dict.fromkeys(map(_expected, several)))
    value = _at(data, key)
    near = did_you_mean(value[:128], re.findall(r'"([^"]+)"', expected)) if isinstance(value, str) else ""
    return Problem(whole, f"{dotted(whole)} = {shown(value)} must be {expected}.", near)


def _expected(details: ErrorDetails) -> str:
    known = _EXPECTED.get(details["type"])
    return details["msg"] if known is None else known.format(**details.get("ctx", {})).replace("'", '"')


def _kind(at: Key, key: Key) -> str:
    table = (at + key)[:-1]
    in_stage = table[:1] == ("defaults",) or (len(table) == 2 and table[0] in ("stages", "overrides", "tune"))
    return "A stage" if in_stage else dotted(table[-1:]) or "A plan"


def _at(data: Any, key: Key) -> Any:
    for part in key:
        data = data[part]
    return data


def _fields(model: type[BaseModel], key: Key) -> Iterable[str]:
    """Names of the settings of the table at ``key``."""
    for part in key:
        field = model.model_fields.get(str(part))
        inner = next(_models(field.annotation), None) if field else None
        if inner is None:
            return ()
        model = inner
    return model.model_fields


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
