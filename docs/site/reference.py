"""The reference of a plan, made from the types that check it: a JSON Schema for editors, Markdown for people."""

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from aliprod import recipe
from aliprod.plan import schema as plans
from aliprod.plan.schema import Plan
from aliprod.recipe import Stage, options, settings

Schema = dict[str, Any]

_HEAD = """# The plan, key by key

Made by `make reference`, and `plan.schema.json` with it; change the descriptions in
`aliprod/plan/schema.py` and in `aliprod/recipe/`, not these files.
Any value can be given on the command line: `--set stages.dcl.epochs=4`. Paths in a plan count from the plan's
file, those of `--set` from the current folder. Names of plans, stages and backbones become folders: letters,
digits, dots, hyphens and underscores.

Editors complete and check a plan as it is typed: with [Taplo](https://taplo.tamasfe.dev), in VS Code as Even Better
TOML, a first line `#:schema PATH/plan.schema.json` says where the schema lies. What it cannot say (a member that is no
job, stages in a circle), `aliprod plan` checks.

`[stages.NAME]`, `[defaults]`, `[overrides.BACKBONE]` and `[overrides."BACKBONE/STAGE"]` say what a stage may say. The
weakest first: the plan's `seed`, defaults, stage, override of the backbone, override of the job. `lr`, `optimizer` and
`pseudo_labels` are merged key by key, `objective`, `images` and `soup` are replaced as a whole; a stage with `start`
ignores a `pretrained` of the defaults, one with `soup` their `epochs`.
"""
_TABLE = "| key | type | default | meaning |\n|---|---|---|---|\n"
_OBJECTIVES = """
## `objective`

A name alone, or a table with `name` and options. `package.module` is a module of your own.

| name | options and their defaults |
|---|---|
"""
_WORDS = {"integer": "whole number", "number": "number", "string": "string", "boolean": "true or false"}
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_OBJECTIVE = {"$ref": "#/$defs/ObjectiveRecipe"}
_OWN_MODULE = {"type": "string", "pattern": r"\."}


class _Untitled(GenerateJsonSchema):
    """Leaves out titles of settings, which only repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False


def plan_schema() -> Schema:
    """The JSON Schema of a plan: what each table may say; not what tables say about each other."""
    schema, stage = (model.model_json_schema(schema_generator=_Untitled) for model in (Plan, Stage))
    schema["$defs"] |= stage.pop("$defs") | {"Stage": stage}  # all its settings may be left out, as in every table
    for table in (schema, *schema["$defs"].values()):
        for name, text in _described(table["title"]).items():
            properties = table["properties"]
            properties[name] = dict(sorted([*properties[name].items(), ("description", text)]))
    said, properties = {"$ref": "#/$defs/Stage"}, schema["properties"]
    properties["defaults"] |= said
    properties["overrides"]["additionalProperties"] = said
    properties["stages"]["patternProperties"] = dict.fromkeys(properties["stages"]["patternProperties"], said)
    own = {"type": "object", "properties": {"name": _OWN_MODULE}, "required": ["name"]}
    alone, tables = {"enum": options.names()}, [_objective(name) for name in options.names()]
    schema["$defs"]["ObjectiveRecipe"] = {"anyOf": [alone, _OWN_MODULE, *tables, own]}
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def _described(table: str) -> dict[str, str]:
    """What stands below the settings of a table, for those whose Field does not describe them."""
    model: Any = next(getattr(module, table) for module in (plans, recipe, settings) if hasattr(module, table))
    found = dict[str, str]()
    for base in model.__mro__[: model.__mro__.index(BaseModel)]:
        for field, below in pairwise(ast.parse(inspect.getsource(base)).body[0].body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def files() -> dict[str, str]:
    """The files of docs/ that are made from the types, by name."""
    schema = plan_schema()
    rows = [f"| `{name}` | {', '.join(_options(_objective(name)))} |\n" for name in options.names()]
    return {
        "plan.md": "".join([_HEAD, *_sections("The plan", schema, schema["$defs"]), _OBJECTIVES, *rows]),
        "plan.schema.json": json.dumps(schema, indent=1) + "\n",
    }


def _objective(name: str) -> Schema:
    """An objective's table: its name and its options."""
    known = options.options(name)
    schema = known.model_json_schema(schema_generator=_Untitled) if known else {}
    properties = {"name": {"const": name}, **schema.get("properties", {})}
    return schema | {"properties": properties, "required": ["name", *schema.get("required", [])]}


def _options(objective: Schema) -> Iterator[str]:
    for name, option in list(objective["properties"].items())[1:]:
        yield f"`{name}` (required)" if name in objective["required"] else f"`{name} = {_literal(option['default'])}`"


def _sections(title: str, schema: Schema, definitions: Schema) -> Iterator[str]:
    """A section for a table, and after it those of the tables in it."""
    yield f"\n## {title}\n\n{schema['description']}\n\n{_TABLE}"
    for name, field in schema["properties"].items():
        text = field["description"].replace("|", "\\|")
        yield f"| `{name}` | {_type(field)} | {_default(field, name in schema.get('required', []))} | {text} |\n"
    for name, field in schema["properties"].items():
        for branch in [field, *field.get("anyOf", [])]:
            if "$ref" in branch and branch["$ref"] != _OBJECTIVE["$ref"]:
                below = "A stage" if name == "defaults" else f"`[{name}]`" if title == "The plan" else f"`{name}`"
                yield from _sections(below, definitions[branch["$ref"].rpartition("/")[2]], definitions)


def _type(schema: Schema) -> str:
    match schema:
        case {"$ref": name}:
            return "string or table" if name == _OBJECTIVE["$ref"] else "table"
        case {"const": value}:
            return f"`{_literal(value)}`"
        case {"enum": values}:
            return " or ".join(f"`{_literal(value)}`" for value in values)
        case {"anyOf": branches}:
            return " or ".join(_type(branch) for branch in branches if branch != {"type": "null"})
        case {"type": "array", "prefixItems": [first, *rest]}:
            return f"list of {_type(first)} ({1 + len(rest)})"
        case {"type": "array", "items": items}:
            return f"list of {_type(items)}"
        case {"type": "object"}:
            return "table"
    limits = [f"{words} {schema[limit]:,}" for limit, words in _LIMITS.items() if limit in schema]
    return ", ".join([_WORDS[schema["type"]], *limits])


def _default(field: Schema, required: bool) -> str:
    match field.get("default"):
        case None:
            return "required" if required else "none"
        case {"name": name} if _OBJECTIVE.items() <= field.items():
            return f"`{_literal(name)}`"
        case dict() as table:
            return "the table's own" if table else "none"
        case value:
            return f"`{_literal(value)}`"


def _literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for file, content in files().items():
        (folder / file).write_text(content, encoding="utf-8")
