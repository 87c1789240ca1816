"""Flags that commands share, what a shell completes them to, and how commands answer."""

import functools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from aliprod.errors import AliprodError
from aliprod.plan import source
from aliprod.processes import ReadProgress
from aliprod.shown import escaped, lines
from aliprod.store.layout import flat

if TYPE_CHECKING:
    from aliprod.plan.open import Opened, Request

Done = TypeVar("Done")
Command = Callable[..., None]
_JSON = "aliprod.json"  # in click's context: whether --json is given


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
    return [f"{key}=" for key, _ in flat(_plan(context)) if key.startswith(incomplete)]


def _plan(context: click.Context) -> dict[str, Any]:
    """The tables of the plan on the line; {} where there is none."""
    try:
        return source.read(context.params.get("file") or Path(context.args[0])).data  # there behind an option
    except (AliprodError, LookupError, TypeError):
        return {}


class Share(click.FloatRange):
    """A number in a range; nan, which is in every range of click's, is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if math.isnan(found := super().convert(value, param, ctx)):
            self.fail(f"{value!r} is no number.", param, ctx)
        return found


path = ExpandedPath()
count = click.IntRange(1, 1_000_000)
seed = click.IntRange(0, 2**63 - 1)  # as in a plan, whose numbers have 64 bits
plan_argument = click.argument("file", type=path, shell_complete=plans)
storage_flag = click.option("--storage", type=path, help="Folder of all results, or s3://... [runs]")
sets_flag = click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a value of the plan.", shell_complete=settings
)
tracking_flag = click.option("--tracking-uri", help="MLflow. [SQLite in the storage folder]")
address_flag = click.option("--address", help="Ray cluster. [a local one of our own]")
json_flag = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    callback=lambda context, _, value: context.meta.update({_JSON: value}),
    help="Print the answer as JSON, as the last line.",
)


def as_json() -> bool:
    """Whether the command in progress was given --json."""
    return bool(click.get_current_context().meta.get(_JSON))


def say(text: str) -> None:
    """Print what happens on the way: on stderr where stdout is for the JSON."""
    click.echo(lines(text), err=as_json())


def answer(found: Mapping[str, Any] | None, text: str) -> None:
    """Print a command's answer: as JSON where that is asked for, else the text, where there is one."""
    if text or as_json():
        click.echo(dumped(found) if as_json() else lines(text))


def dumped(found: Mapping[str, Any] | None) -> str:
    """An answer as a line of JSON."""
    return escaped(json.dumps(found, ensure_ascii=False))


def until_done(events: Iterable[ReadProgress | Done]) -> Done:
    """The last of the events. Until then it is shown on stderr how far it is: one line that is renewed on a terminal, a
    line now and then in a log."""
    terminal = sys.stderr.isatty()
    before, after, seconds = ("\r", "\033[K", 0.2) if terminal else ("", "\n", 30.0)
    began = due = time.monotonic()
    for event in events:
        now = time.monotonic()
        if not isinstance(event, ReadProgress):
            click.echo("", err=True, nl=terminal and due > began)
            return event
        if now >= due or event.images == event.of:
            click.echo(f"{before}{event.line(now - began)}{after}", err=True, nl=False)
            due = now + seconds
    raise ValueError("nothing was done")


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def together(*parameters: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Parameters as one decorator, in their order."""
    return lambda command: functools.reduce(lambda decorated, one: one(decorated), reversed(parameters), command)


def takes(make: Callable[..., Any], *parameters: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Give a command parameters that it takes as one, the first of its arguments: what is made of them."""

    def decorated(command: Command) -> Command:
        @functools.wraps(command)
        def taking(**given: Any) -> None:
            own = {name: given.pop(name) for name in signature(make).parameters if name in given}
            command(make(**own), **given)

        return together(*parameters)(taking)

    return decorated


@dataclass(frozen=True)
class Asked:
    """What the commands that take a plan, or a model, are given."""

    file: Path
    sets: tuple[str, ...] = ()
    storage: Path | None = None
    tracking_uri: str | None = None
    address: str | None = None

    def request(self) -> "Request":
        """The checked plan, and where it runs."""
        from aliprod.plan.load import load

        plan = load(self.file, self.sets)  # first: a plan that is refused is refused at once
        from aliprod.plan.open import Request
        from aliprod.plan.places import resolve

        places = resolve(plan, self.storage, self.tracking_uri, self.address)
        # the address, which may hold a password, stands in the places alone
        plan = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"tracking_uri": None})})
        return Request(plan, self.file.read_text(encoding="utf-8-sig"), places)

    def opened(self) -> "Opened":
        """The plan with its jobs; without keys, and a note that says so, where the catalogue is not there."""
        request = self.request()
        from aliprod.plan.open import open_plan

        opened = open_plan(request)
        for remark in opened.catalogue.remarks if opened.catalogue else [opened.note]:
            click.echo(escaped(remark), err=True)
        return opened

    def benchmark(self) -> str:
        """The command that measures what a forecast needs."""
        flags = [word for text in self.sets for word in ("--set", text)]
        flags += ["--storage", str(self.storage)] if self.storage else []
        return shlex.join(["aliprod", "benchmark", "train", str(self.file), *flags])


places_flags = together(sets_flag, storage_flag, tracking_flag, address_flag, json_flag)
takes_plan = takes(Asked, plan_argument, places_flags)
