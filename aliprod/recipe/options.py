"""Options and needs of an objective, read from its source: nothing is imported, least of all torch."""

import ast
import importlib.machinery
import importlib.util
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, create_model

from aliprod.errors import Refused
from aliprod.recipe.settings import Frozen, Needs

_SCALARS = {"int": int, "float": float, "bool": bool, "str": str}
_ARITHMETIC = ast.Constant | ast.Name | ast.BinOp | ast.UnaryOp | ast.BoolOp | ast.Compare | ast.IfExp
_ARITHMETIC |= ast.expr_context | ast.operator | ast.unaryop | ast.boolop | ast.cmpop
_ARITHMETIC |= ast.JoinedStr | ast.FormattedValue
# Not by way of the package, which has no file where the current folder holds one named aliprod (a clone, results).
_FOLDER = Path(__file__).parents[1] / "objectives"


class Options(Frozen):
    """Options of an objective. A whole number stands for a float, true for no number."""

    model_config = ConfigDict(protected_namespaces=())


def names() -> list[str]:
    """The objectives that are there: files of objectives/ with a class Objective."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if options(path.stem) is not None)


@cache
def options(name: str) -> type[Options] | None:
    """The options of an objective, keyword-only arguments of its class, as a model of the objective's name; None where
    there is no such file, or no class Objective in it. "dcl" is objectives/dcl.py; a dotted name is a module of the
    user's, looked up on the Python path. An option whose annotation is no scalar, no Literal and no union of them takes
    anything; one whose default is no literal has the default None."""
    if not _class(name):
        return None
    init = _init(name)
    pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True) if init else ()
    found: dict[str, Any] = {
        argument.arg: (_type(argument.annotation), ... if default is None else _literal(default))
        for argument, default in pairs
        if not argument.arg.startswith("_")
    }
    with warnings.catch_warnings(action="ignore"):  # pydantic warns of options that are named as its own methods
        return create_model(name, __base__=Options, **found)


def complete(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of an objective, defaults included, in canonical form: 1 becomes 1.0 where a float is asked for.
    pydantic.ValidationError: an option that the objective has not, or of another type."""
    known = options(name)
    return dict(given) if known is None else known.model_validate(given).model_dump()


def needs(name: str, given: Mapping[str, Any] | None = None) -> Needs:
    """What an objective needs beyond images and labels, as `aliprod.objectives.build` would set it. ``given``: options;
    None: what it needs whatever its options. Refused: it is said in another way than below.

    It stands in the class body as ``needs = Needs(...)``, or in ``__init__`` as ``self.needs = Needs(...)`` where it
    depends on options: arithmetic of options and literals alone.
    """
    init = _init(name) if given is not None else None
    for node in [*reversed(init.body if init else []), *_class(name)]:
        match node:
            case ast.Assign(targets=[ast.Name("needs") | ast.Attribute(attr="needs")], value=ast.Call(keywords=said)):
                known = complete(name, given or {}) if init else {}
                values = {word.arg: _evaluated(name, word.value, known) for word in said}
                return Needs(**{field.name: values[field.name] for field in fields(Needs) if field.name in values})
    return Needs()


def refusals(name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What an objective would refuse of its options, and its advice: each ``require(holds, what, advice)`` at the top
    of its ``__init__`` that asks about options alone."""
    init = _init(name)
    known = complete(name, given) if init else {}
    for node in init.body if init else ():
        match node:
            case ast.Expr(ast.Call(ast.Name("require"), [holds, *said])):
                with suppress(Refused):
                    if not _evaluated(name, holds, known):
                        what, advice = (_evaluated(name, one, known) for one in said)
                        yield str(what).rstrip("."), str(advice)


def _evaluated(name: str, node: ast.expr, known: dict[str, Any]) -> Any:
    """The value of arithmetic; neither calls nor attributes, so that nothing of a module is run."""
    try:
        if all(isinstance(part, _ARITHMETIC) for part in ast.walk(node)):
            return eval(compile(ast.Expression(node), name, "eval"), {"__builtins__": {}}, known)  # noqa: S307
    except (NameError, TypeError, ValueError, ArithmeticError):
        pass
    advice = "Its needs are literals in the class body, or arithmetic of options and literals in __init__."
    raise Refused(f"what objective {name} needs cannot be read: {ast.unparse(node)}.", advice=advice)


@cache
def _class(name: str) -> list[ast.stmt]:
    """The body of an objective's class; [] where there is none."""
    path = _source(name)
    try:
        tree = ast.parse(path.read_bytes() if path else b"")
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    return next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Objective"), [])


def _source(name: str) -> Path | None:
    """Where an objective's source lies, found without importing the packages around it."""
    first, *rest = name.split(".")
    if not all(part.isidentifier() for part in (first, *rest)):
        return None
    if not rest:
        return _FOLDER / f"{name}.py"
    spec = importlib.util.find_spec(first)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def _init(name: str) -> ast.FunctionDef | None:
    return next((node for node in _class(name) if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)


def _type(node: ast.expr | None) -> Any:
    """The type that an annotation says; Any where it is not understood."""
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            either, other = _type(left), _type(right)
            return Any if Any in (either, other) else either | other
        case ast.Name(id=name) if name in _SCALARS:
            return _SCALARS[name]
        case ast.Constant(value=None):
            return None
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            values = _literal(choices)
            values = values if isinstance(values, tuple) else (values,)
            return Literal[values] if all(isinstance(value, int | str) for value in values) else Any
    return Any


def _literal(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value
