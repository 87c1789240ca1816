"""What a shell completes: commands and options by click, plans and their jobs by what lies there."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from aliprod.errors import AliprodError


class ExpandedPath(click.Path):
    """A path; ~ at its beginning is the home folder, which no shell says behind the = of --storage=~/runs."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111  Path's raises on ~nobody


def plans(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Plans; where there are none folders, of plans or of photographs."""
    folder, name = os.path.split(incomplete)
    found = sorted(Path(os.path.expanduser(folder) or ".").glob("*.toml"))  # noqa: PTH111
    names = [f"{incomplete.removesuffix(name)}{one.name}" for one in found if one.name.startswith(name)]
    return [CompletionItem(incomplete, type="dir"), *map(CompletionItem, names)]


def jobs(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names of the jobs of the plan that is on the line."""
    try:
        said = _plan(context)["jobs"]
        names = [f"{backbone}/{stage}" for backbone, stages in said.items() for stage in stages]
    except (LookupError, TypeError, AttributeError):  # half of a plan
        return []
    return [name for name in names if name.startswith(incomplete)]


def settings(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """What the plan on the line says, to be overridden, such as ``stages.full.epochs=``."""
    return [f"{key}=" for key in _keys(_plan(context)) if key.startswith(incomplete)]


def _keys(table: dict[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from (f"{key}.{below}" for below in _keys(value))
        else:
            yield key


def _plan(context: click.Context) -> dict[str, Any]:
    """The tables of the plan on the line; {} where there is none."""
    from aliprod.plan import source

    try:
        return source.read(context.params.get("file") or Path(context.args[0])).data  # there behind an option
    except (AliprodError, LookupError, TypeError):
        return {}


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Make a shell complete commands, plans, jobs and settings.

    \b
    Example: aliprod completion bash >> ~/.bashrc
             aliprod completion zsh >> ~/.zshrc
             aliprod completion fish > ~/.config/fish/completions/aliprod.fish
    """
    if (kind := get_completion_class(shell)) is not None:
        click.echo(kind(click.get_current_context().find_root().command, {}, "aliprod", "_ALIPROD_COMPLETE").source())
