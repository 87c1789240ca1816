"""A TOML file and --set flags become a Plan, or a list of everything that is wrong with them.

Whether the catalogue is there is asked by who needs it; timm itself by `run`, where it is not the version of the list.
"""

import re
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from functools import reduce
from itertools import islice
from operator import getitem
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from aliprod.errors import Refused, did_you_mean
from aliprod.plan import checks
from aliprod.plan.schema import Plan, Settings
from aliprod.plan.source import MOST_DEPTH, Key, Problem, Source, absolute, dotted, odd_values, read, shown, unknown
from aliprod.recipe import Stage, options
from aliprod.recipe.options import Options
from aliprod.recipe.search import MOST_CHOICES, UNSEARCHED, Range, Way, nested, searched

MOST_PROBLEMS = 20
_PATHS = (("catalogue", "path"), ("catalogue", "links"), ("cluster", "storage"))
_STAND_IN: dict[str, Any] = {"format": 1, "name": "plan", "catalogue": {"path": "."}}  # lets the rest be checked
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


def load(path: Path, sets: Sequence[str] = ()) -> Plan:
    """Read and check a plan. ``sets``: what --set gave: KEY=VALUE each, VALUE in TOML.

    Its paths are made absolute: those of the file count from its folder, those of ``sets`` from the current one.
    Refused: with file, line (or flag), key and nearest right name of each of the first 20 problems.
    """
    source = read(path, sets)
    found: dict[Key, Problem] = {}
    for problem in islice(_problems(source), 10 * MOST_PROBLEMS):  # some say the same of several jobs
        found.setdefault((*problem.key, problem.quoted or "", problem.sentence), problem)
    if found:
        raise _refusal(source, list(found.values()))
    _make_paths_absolute(source)
    return Plan.model_validate(source.data)


def _refusal(source: Source, problems: list[Problem]) -> Refused:
    first = problems[0]
    if len(problems) == 1:
        return Refused(first.sentence, source.where(first.key, first.quoted), first.advice)
    lines = [
        f"{source.where(problem.key, problem.quoted)}: {problem.sentence} {problem.advice}".rstrip()
        for problem in problems[:MOST_PROBLEMS]
    ]
    more = len(problems) > MOST_PROBLEMS
    count = f"more than {MOST_PROBLEMS} problems; the first {MOST_PROBLEMS}" if more else f"{len(problems)} problems"
    return Refused(f"{count}:", source.path, "\n".join(lines))


def _problems(source: Source) -> Iterator[Problem]:
    for key, complaint in odd_values(source.data):
        if key[0] in Plan.model_fields:  # else it is worse than odd
            yield Problem(key, f"{dotted(key)} is {complaint}.")
    plan, structural = _structure(source.data)
    yield from structural
    wrong: set[Key] = set()
    for key, table in _layers(source.data):
        for problem in _layer(key, table):
            wrong.add(key)
            yield problem
    if plan is None:
        return
    plan, misnamed = checks.mended(plan)
    yield from misnamed
    if plan is not None:
        yield from checks.unknown_networks(plan)
        yield from checks.edges(plan)
        yield from checks.together(plan, wrong)
        yield from checks.names_of_jobs(plan)
        yield from _search(plan.tune.search, dict.fromkeys(_named_objectives(source.data, plan.tune.search)))


def _structure(data: dict[str, Any]) -> tuple[Plan | None, list[Problem]]:
    """The plan, and what is wrong with its tables; a plan also where it is one without what is wrong."""
    try:
        return Plan.model_validate(data), []
    except ValidationError as error:
        problems = list(shape(Plan, data, error))
    for most in (MOST_DEPTH, 1):  # without the settings that are wrong, else without their tables
        right = _without({problem.key[:most] for problem in problems}, data)
        with suppress(ValidationError):
            return Plan.model_validate(_STAND_IN | right), problems
    return None, problems


def _without(keys: Set[Key], table: Any, at: Key = ()) -> Any:
    """A table of a plan without the settings at these keys."""
    if not isinstance(table, dict) or len(at) == MOST_DEPTH:
        return table
    return {name: _without(keys, inner, (*at, name)) for name, inner in table.items() if (*at, name) not in keys}


def _layers(data: dict[str, Any]) -> Iterator[tuple[Key, Settings]]:
    """Every table of stage settings, with its key."""
    tables: list[tuple[Key, Any]] = [(("defaults",), data.get("defaults"))]
    for group in ("stages", "overrides"):
        named = data.get(group)
        tables += [((group, name), table) for name, table in named.items()] if isinstance(named, dict) else []
    yield from ((key, table) for key, table in tables if isinstance(table, dict))


def _layer(at: Key, table: Settings) -> Iterator[Problem]:
    """Wrong settings of one table, whatever the others say."""
    try:
        stage = Stage.model_validate(table)
    except ValidationError as error:
        inside = [problem for problem in shape(Stage, table, error, at) if problem.key != at]
        if inside:
            yield from inside
            return
        stage = Stage.model_validate({key: value for key, value in table.items() if key == "objective"})
    if "objective" not in table:
        return
    name, at = stage.objective.name, (*at, "objective")
    known = options.options(name)
    if known is None:
        yield unknown(at, f"{dotted(at)}: there is no objective {shown(name)}.", name, options.names(), "Objectives")
        return
    try:
        known.model_validate(stage.objective.options)
    except ValidationError as error:
        yield from shape(known, stage.objective.options, error, at)


def _search(search: Settings, objectives: Iterable[str]) -> Iterator[Problem]:
    """Settings that no stage has, or that are not searched for; ranges and choices that none can have. ``objectives``:
    those of the plan: an option is one of theirs."""
    at: Key = ("tune", "search")
    for way, said in searched(search):
        key, choices = (*at, *way), said
        if way[0] in UNSEARCHED:
            yield Problem(key, f"{dotted(key)} is not searched for: {UNSEARCHED[way[0]]}.")
            continue
        if isinstance(said, dict):
            try:
                choices = [Range.model_validate(said).low, said["high"]]
            except ValidationError as error:
                yield from shape(Range, said, error, key)
                continue
        if not isinstance(choices, list) or not 1 <= len(choices) <= MOST_CHOICES:
            expected = f"a list of 1 to {MOST_CHOICES} choices, or a range {{ low = 1, high = 2 }}"
            yield Problem(key, f"{dotted(key)} = {shown(said)} must be {expected}.")
            continue
        for choice in choices:
            yield from _choice(at, way, choice, objectives)


def _choice(at: Key, way: Way, choice: Any, objectives: Iterable[str]) -> Iterator[Problem]:
    """What is wrong with a setting of a stage whose other settings are not known."""
    option = way[0] == "objective" and len(way) > 1 and way != ("objective", "name")
    tables = [nested({way: choice, ("objective", "name"): name}) for name in objectives] if option else []
    found = [list(_layer(at, table)) for table in tables or [nested({way: choice})]]
    yield from min(found, key=lambda problems: not problems[0].advice.startswith("Did")) if all(found) else ()


def _named_objectives(data: dict[str, Any], search: Settings) -> Iterator[str]:
    """Objectives that a plan says, among the choices of a search too."""
    chosen = {way: said for way, said in searched(search) if isinstance(said, list)}
    said = [table.get("objective") for _, table in _layers(data)]
    said += [*chosen.get(("objective", "name"), []), Stage().objective.name]
    yield from (name for one in said if isinstance(name := one.get("name") if isinstance(one, dict) else one, str))


def _make_paths_absolute(source: Source) -> None:
    paths = [((*key, "pretrained"), table) for key, table in _layers(source.data)]
    paths += [((name, key), source.data.get(name, {})) for name, key in _PATHS]
    for key, table in paths:
        setting = str(key[-1])
        if isinstance(value := table.get(setting), str):
            table[setting] = absolute(source, key, value)


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
            too_few = isinstance(reduce(getitem, key[:-1], data), list)
            return Problem(whole, f"{table} has too few values." if too_few else f"{table} lacks {dotted((name,))}.")
        case "value_error":
            reason = first["msg"].removeprefix("Value error, ")
            return Problem(whole, f"{dotted(whole)}: {reason}." if whole else f"{reason}.")
    expected = " or ".join(dict.fromkeys(map(_expected, several)))
    value = reduce(getitem, key, data)
    near = did_you_mean(value[:128], re.findall(r'"([^"]+)"', expected)) if isinstance(value, str) else ""
    return Problem(whole, f"{dotted(whole)} = {shown(value)} must be {expected}.", near)


def _expected(details: ErrorDetails) -> str:
    known = _EXPECTED.get(details["type"])
    return details["msg"] if known is None else known.format(**details.get("ctx", {})).replace("'", '"')


def _kind(at: Key, key: Key) -> str:
    table = (at + key)[:-1]
    in_stage = table[:1] == ("defaults",) or (len(table) == 2 and table[0] in ("stages", "overrides", "tune"))
    return "A stage" if in_stage else dotted(table[-1:]) or "A plan"


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
