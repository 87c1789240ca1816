"""The commands that take a plan."""

import functools
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aliprod.cli.answers import answer
from aliprod.errors import AliprodError
from aliprod.plan.events import Changed, Ended, Event

if TYPE_CHECKING:
    from aliprod.catalogue.catalogue import Catalogue
    from aliprod.plan.graph import Job
    from aliprod.plan.open import Request


@dataclass(frozen=True)
class Asked:
    """What the commands that take a plan are given."""

    file: Path
    sets: tuple[str, ...]
    storage: Path | None
    tracking_uri: str | None
    address: str | None
    as_json: bool

    def request(self) -> "Request":
        """The checked plan, and where it runs."""
        from aliprod.plan.load import load
        from aliprod.plan.open import Request
        from aliprod.plan.places import resolve

        plan = load(self.file, self.sets)
        places = resolve(plan, self.storage, self.tracking_uri, self.address)
        return Request(plan, self.file.read_text(encoding="utf-8-sig"), places)

    def benchmark(self) -> str:
        """The command that measures what a forecast needs."""
        flags = [word for text in self.sets for word in ("--set", text)]
        flags += ["--storage", str(self.storage)] if self.storage else []
        return shlex.join(["aliprod", "benchmark", "train", str(self.file), *flags])


def takes_plan(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the argument FILE and the flags of `Asked`, beside its own."""

    @functools.wraps(command)
    def asked(**given: Any) -> None:
        command(Asked(**{one.name: given.pop(one.name) for one in fields(Asked)}), **given)

    options: tuple[Callable[..., Any], ...] = (
        click.argument("file", type=click.Path(path_type=Path)),
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a value of the plan."),
        click.option("--storage", type=click.Path(path_type=Path), help="Folder of all results. [runs]"),
        click.option("--tracking-uri", help="MLflow. [SQLite in the storage folder]"),
        click.option("--address", help="Ray cluster. [a local one of our own]"),
        click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON, as the last line."),
    )
    wrapped: Callable[..., None] = asked
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


@click.command("plan")
@click.option("--gpus", type=click.IntRange(1, 100_000), help="Forecast what the rest takes on so many.")
@takes_plan
def plan_command(asked: Asked, gpus: int | None) -> None:
    """Check a plan and show its jobs, their keys, what is done and what would run.

    With --gpus, how long that will take, job by job, from rates that finished or running jobs have told, else those
    of `aliprod benchmark train FILE`. Where jobs run on CPUs, N is how many ranks run at a time.

    \b
    Example: aliprod plan jobs/aliproducts.toml --set stages.dcl.epochs=4
             aliprod plan jobs/aliproducts.toml --gpus 8
    """
    from aliprod.plan.open import jobs_of, open_catalogue
    from aliprod.report import forecast, status

    request = asked.request()
    catalogue, note = open_catalogue(request)
    if note:
        click.echo(note, err=True)
    jobs = jobs_of(request.plan, catalogue)
    estimate = None if gpus is None or catalogue is None else _estimate(request, catalogue, jobs, gpus)
    rows = [
        {
            "name": job.name,
            "backbone": job.backbone,
            "stage": job.stage_name,
            "parents": list(job.parents),
            "key": job.key,
            "state": _state(job, request.places.storage),
            "member": job.member,
        }
        for job in jobs.values()
    ]
    if not asked.as_json:
        shown: list[list[object]] = [[*_columns(row), "yes" if row["member"] else ""] for row in rows]
        header = ["job", "needs", "key", "state", "member"]
        if estimate is not None:
            shown = [[*row, *forecast.cells(job)] for row, job in zip(shown, estimate["jobs"], strict=True)]
            header += forecast.HEADER
        click.echo(status.table(shown, header))
        waiting = sum(row["state"] == "waiting" for row in rows)
        click.echo(f"{len(rows)} jobs, {waiting} to train, {len(request.plan.ensemble.members)} members.")
        if estimate is not None:
            cluster = request.plan.cluster
            for line in forecast.lines(estimate, cluster.workers, cluster.use_gpu is not False, asked.benchmark()):
                click.echo(line)
        elif gpus is not None:
            click.echo(f"No forecast without the catalogue. Then this measures what it needs: {asked.benchmark()}")
    members = list(request.plan.ensemble.members)
    answer(asked.as_json, {"plan": request.plan.name, "jobs": rows, "members": members, "estimate": estimate})


def _estimate(request: "Request", catalogue: "Catalogue", jobs: "dict[str, Job]", gpus: int) -> dict[str, Any]:
    from aliprod.forecast.simulate import forecast
    from aliprod.orchestration.prepare import opened

    return asdict(forecast(opened(request, catalogue, jobs), gpus))


@click.command("run")
@takes_plan
def run_command(asked: Asked) -> None:
    """Run what is not finished, then gather the ensemble. Run it again to go on after anything.

    \b
    Example: aliprod run jobs/quickstart.toml --set catalogue.path=photos --storage /shared/aliprod
    """
    from aliprod.orchestration import driver

    request = asked.request()
    _drive(request, driver.run(request), asked.as_json, whole=True)


@click.command("ensemble")
@takes_plan
def ensemble_command(asked: Asked) -> None:
    """Write the ensemble anew from the checkpoints that carry the alias `member` in MLflow.

    \b
    Example: aliprod ensemble jobs/aliproducts.toml --storage /shared/aliprod
    """
    from aliprod.orchestration import driver

    request = asked.request()
    _drive(request, driver.ensemble(request), asked.as_json, whole=False)


@click.command("status")
@takes_plan
def status_command(asked: Asked) -> None:
    """Show the state of every job, now or at the end, from the storage path alone.

    Gain is a finished job's error less that of the job it starts from: below zero, it helped.

    \b
    Example: aliprod status jobs/quickstart.toml
    """
    from aliprod.report import status

    request = asked.request()
    jobs = _jobs(request)
    rows = status.states(request.plan, jobs, request.places)
    if not asked.as_json:
        shown = [
            [
                row["name"],
                row["state"].replace("_", " "),
                f"{row['epoch']}/{row['epochs']}",
                None if row["top1_error"] is None else 100 * row["top1_error"],
                "" if row["gain"] is None else f"{100 * row['gain']:+6.2f}",
                row["images_per_second"],
                row["eta_seconds"],
            ]
            for row in rows
        ]
        header = ["job", "state", "epoch", "top-1 error, %", "gain, points", "images/s", "seconds left"]
        click.echo(status.table(shown, header))
    answer(asked.as_json, {"plan": request.plan.name, "jobs": rows})


def _jobs(request: "Request") -> "dict[str, Job]":
    """The jobs of a plan; without keys, and a note that says so, where the catalogue is not there."""
    from aliprod.plan.open import open_jobs

    jobs, note = open_jobs(request)
    if note:
        click.echo(note, err=True)
    return jobs


def _drive(request: "Request", events: Iterator[Event], as_json: bool, whole: bool) -> None:
    """Print what happens as it happens, and write the report; exit 1 where a job failed."""
    from aliprod.report import status

    failures: list[Changed] = []
    for event in events:
        if isinstance(event, Changed) and event.state in ("failed", "not_run"):
            failures.append(event)
        if isinstance(event, Ended):
            _report(request, as_json)
            _summarise(event.outcome, as_json, whole)
        elif text := status.line(event):
            click.echo(text, err=as_json)
    if failures:
        for failure in failures:
            click.echo(f"Error: {failure.job} {failure.state.replace('_', ' ')}: {failure.detail}", err=True)
        click.echo("No ensemble was made. What is finished is kept; the same command goes on.", err=True)
        sys.exit(1)


def _report(request: "Request", as_json: bool) -> None:
    """What it lacks room for, or cannot read, spoils no run."""
    from aliprod.report import page

    try:
        click.echo(f"Report: {page.write(request)}", err=as_json)
    except AliprodError as error:
        click.echo(f"No report: {error}", err=True)


def _summarise(outcome: Mapping[str, Any], as_json: bool, whole: bool) -> None:
    from aliprod.report import status

    if not as_json:
        click.echo(
            f"Trained {len(outcome['trained'])}, reused {len(outcome['reused'])}, failed {len(outcome['failed'])}."
        )
        if outcome["ensemble"]:
            click.echo(status.outcome_table(outcome))
            click.echo(f"Submission: {outcome['ensemble']['submission'] or 'none, as there are no test images'}")
            click.echo(f"Probabilities: {outcome['ensemble']['probabilities']}")
    answer(as_json, outcome if whole else outcome["ensemble"])


def _state(job: "Job", storage: Path) -> str:
    from aliprod.plan import ledger

    return "finished" if ledger.finished(storage, job) is not None else "waiting"


def _columns(row: Mapping[str, Any]) -> list[str]:
    return [row["name"], ", ".join(row["parents"]), (row["key"] or "-")[:12], row["state"]]
