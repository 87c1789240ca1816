"""What options an objective takes, read from its source: nothing is imported, least of all torch."""

import ast
import importlib.machinery
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SCALARS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
# Not by way of the package, which has no file where the current folder holds one named aliprod (a clone, results).
_FOLDER = Path(__file__).parents[1] / "objectives"


@dataclass(frozen=True)
class Option:
    """One keyword-only argument of an objective."""

    types: tuple[str, ...]  # of int, float, bool, str; empty: anything goes
    choices: tuple[Any, ...]  # of a Literal; empty: any value of the types
    required: bool
    default: Any  # None also where there is none or it is no literal

    def accepts(self, value: Any) -> bool:
        """Whether the annotation allows the value; a whole number stands for a float, true stands for no number."""
        if value in self.choices:
            return True
        if not self.types:
            return not self.choices
        return any(type(value) in ((int, float) if name == "float" else (SCALARS[name],)) for name in self.types)

    def canonical(self, value: Any) -> Any:
        """The value as the objective means it: 1 becomes 1.0 where a float is asked for, so that keys agree."""
        return float(value) if type(value) is int and "float" in self.types and "int" not in self.types else value

    def expected(self) -> str:
        """What a person may write."""
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
        return " or ".join([*(words[name] for name in self.types), *map(repr, self.choices)])


def names() -> list[str]:
    """The objectives that are there: files of objectives/ with a class Objective."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if options(path.stem) is not None)


@cache
def options(name: str) -> dict[str, Option] | None:
    """The options of an objective by name; None where there is no such file, or no class Objective in it.

    Args:
        name: "dcl" is objectives/dcl.py; a dotted name is a module of the user's, looked up on the Python path.
    """
    body = _class(name)
    return None if body is None else _signature(body)


@cache
def needs(name: str) -> dict[str, Any]:
    """What the class of an objective says that it needs beyond images and labels: `aliprod.objectives.Needs`."""
    for node in _class(name) or ():
        match node:
            case ast.Assign(targets=[ast.Name(id="needs")], value=ast.Call(keywords=keywords)):
                return {str(keyword.arg): _literal(keyword.value) for keyword in keywords}
    return {}


def complete(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of an objective, defaults included, in canonical form."""
    known = options(name) or {}
    defaults = {key: option.default for key, option in known.items() if not option.required}
    return {key: known[key].canonical(value) if key in known else value for key, value in (defaults | given).items()}


def _source(name: str) -> Path | None:
    first, *rest = name.split(".")
    if not all(part.isidentifier() for part in (first, *rest)):
        return None
    if not rest:
        return _FOLDER / f"{name}.py"
    return _module(first, rest)


def _module(first: str, rest: Sequence[str]) -> Path | None:
    """Where a module's source lies, found without importing the packages around it."""
    spec = importlib.util.find_spec(first)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def _class(name: str) -> list[ast.stmt] | None:
    """The body of an objective's class; None where there is none."""
    path = _source(name)
    try:
        tree = ast.parse(path.read_bytes()) if path else None
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    for node in tree.body if tree else []:
        if isinstance(node, ast.ClassDef) and node.name == "Objective":
            return node.body
    return None


def _signature(objective: list[ast.stmt]) -> dict[str, Option]:
    for node in objective:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return {argument.arg: _option(argument.annotation, default) for argument, default in pairs}
    return {}


def _option(annotation: ast.expr | None, default: ast.expr | None) -> Option:
    types, choices, known = _annotation(annotation)
    return Option(
        types=tuple(types) if known else (),
        choices=tuple(choices) if known else (),
        required=default is None,
        default=_literal(default),
    )


def _annotation(node: ast.expr | None) -> tuple[list[str], list[Any], bool]:
    """Scalar types and literal choices of an annotation, and whether all of it was understood."""
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            first, second = _annotation(left), _annotation(right)
            return first[0] + second[0], first[1] + second[1], first[2] and second[2]
        case ast.Name(id=name) if name in SCALARS:
            return [name], [], True
        case ast.Constant(value=None):
            return [], [], True
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            values = _literal(choices)
            return [], list(values) if isinstance(values, tuple) else [values], True
    return [], [], False


def _literal(node: ast.expr | None) -> Any:
    try:
        value = ast.literal_eval(node) if node else None
    except ValueError:
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value
