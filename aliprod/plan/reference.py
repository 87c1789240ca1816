"""The reference of a plan in Markdown, made from the types that check it."""

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from aliprod.plan import options
from aliprod.plan.schema import CatalogueSource, Cluster, Ensemble, Plan, Synth, Tune
from aliprod.recipe import LearningRate, OptimizerRecipe, PerClass, PseudoLabels, Soup, Stage

_MERGING = """\
`[stages.NAME]`, `[defaults]`, `[overrides.BACKBONE]` and `[overrides."BACKBONE/STAGE"]` say any of these. The weakest
first: the plan's `seed`, defaults, stage, override of the backbone, override of the job. `lr`, `optimizer` and
`pseudo_labels` are merged key by key, `objective`, `images` and `soup` are replaced as a whole; a stage with `start`
ignores a `pretrained` of the defaults."""
_TABLES: dict[str, tuple[str, type[BaseModel]]] = {
    "The plan": ("", Plan),
    "`[catalogue]`": ("", CatalogueSource),
    "`catalogue.synth`": ("", Synth),
    "A stage": (_MERGING, Stage),
    "`images`": ("", PerClass),
    "`pseudo_labels`": ("", PseudoLabels),
    "`soup`": ("", Soup),
    "`lr`": ("Used as written, never rescaled with the batch.", LearningRate),
    "`optimizer`": ("", OptimizerRecipe),
    "`[ensemble]`": ("", Ensemble),
    "`[cluster]`": ("None of it is part of a key: changing it trains nothing again.", Cluster),
    "`[tune]`": ("What `aliprod tune` tries; none of it is part of a key.", Tune),
}
_HEAD = """# The plan, key by key

Made by `python -m aliprod.plan.reference`; change the descriptions in `aliprod/plan/schema.py` and
in `aliprod/recipe.py`, not this file.
Any value can be given on the command line: `--set stages.dcl.epochs=4`. Paths in a plan count from the plan's
file, those of `--set` from the current folder. Names of plans, stages and backbones become folders: letters,
digits, dots, hyphens and underscores.
"""
_OBJECTIVES = """
## `objective`

A name alone, or a table with `name` and options. `package.module` is a module of your own.

"""
_WORDS = {int: "whole number", float: "number", str: "string", bool: "true or false"}


def reference() -> str:
    """All of docs/plan.md."""
    sections = [f"\n## {title}\n{_paragraph(text)}\n{_table(model)}" for title, (text, model) in _TABLES.items()]
    return _HEAD + "".join(sections) + _objectives()


def _paragraph(text: str) -> str:
    return f"\n{text}\n" if text else ""


def _table(model: type[BaseModel]) -> str:
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} | {_escaped(field.description or '')} |\n"
        for name, field in model.model_fields.items()
    ]
    return "| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)


def _objectives() -> str:
    rows = [
        f"| `{name}` | {', '.join(_option(key, option) for key, option in known.items())} |\n"
        for name in options.names()
        if (known := options.options(name)) is not None
    ]
    return _OBJECTIVES + "| name | options and their defaults |\n|---|---|\n" + "".join(rows)


def _option(key: str, option: options.Option) -> str:
    return f"`{key}` (required)" if option.required else f"`{key} = {_literal(option.default)}`"


def _type(field: FieldInfo) -> str:
    words = " or ".join(dict.fromkeys(_words(field.annotation)))
    limits = ", ".join(_limits(field.metadata))
    return _escaped(f"{words}, {limits}" if limits else words)


def _words(annotation: Any) -> Iterator[str]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from (f"`{_literal(value)}`" for value in inner)
    elif origin is Annotated:
        yield from _words(inner[0])
    elif origin in (Union, types.UnionType):
        for branch in inner:
            yield from _words(branch)
    elif origin is tuple:
        yield f"list of {' or '.join(_words(inner[0]))}" + ("" if inner[-1] is ... else f" ({len(inner)})")
    elif origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        yield "table"
    elif annotation in _WORDS:
        yield _WORDS[annotation]


def _limits(metadata: list[Any]) -> Iterator[str]:
    for limit in metadata:
        match limit:
            case annotated_types.Ge(ge=bound):
                yield f"at least {bound:,}"
            case annotated_types.Gt(gt=bound):
                yield f"above {bound:,}"
            case annotated_types.Le(le=bound):
                yield f"at most {bound:,}"
            case annotated_types.Lt(lt=bound):
                yield f"below {bound:,}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        name = getattr(field.default, "name", "")
        return f"`{_literal(name)}`" if field.default.model_extra is not None else "the table's own"
    return "none" if field.default in (None, {}) else f"`{_literal(field.default)}`"


def _literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
