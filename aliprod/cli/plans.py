"""The commands that look at a plan and run it."""

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.filesize import decimal as size

from aliprod.build.events import DONE, LOST, Changed, Ended
from aliprod.cli import flags
from aliprod.cli.data import drafted
from aliprod.cli.flags import Asked, answer, say
from aliprod.errors import AliprodError, Refused, Unreachable
from aliprod.shown import escaped, lines
from aliprod.store import mirror

if TYPE_CHECKING:
    from aliprod.forecast.demand import Demand
    from aliprod.plan.open import Opened, Request


@click.command("plan")
@click.option("--gpus", type=click.IntRange(1, 100_000), help="Forecast what the rest takes on so many.")
@flags.takes_plan
def plan_command(asked: Asked, gpus: int | None) -> None:
    """Check a plan and show what would run, and why.

    Its jobs, their keys, what is done, what differs from what was trained before, and what disk and, where rates are
    known, GPU-hours the rest takes.

    With --gpus, how long that will take, job by job, from rates that finished or running jobs have shown, else those
    of `aliprod benchmark train FILE`. Where jobs run on CPUs, N is how many ranks run at a time.

    \b
    Example: aliprod plan jobs/aliproducts.toml --set stages.dcl.epochs=4
             aliprod plan jobs/aliproducts.toml --gpus 8
    """
    opened = asked.opened()
    _remark(opened)
    from aliprod.build.state import told
    from aliprod.forecast.demand import demand
    from aliprod.forecast.simulate import forecast
    from aliprod.report import estimate as shown

    plan, states = opened.plan, told(opened).states
    takes = None if opened.catalogue is None else demand(opened)
    estimate = None if gpus is None or takes is None else asdict(forecast(opened, gpus, takes.todo))
    jobs = [_row(opened, name, states[name] in DONE, takes) for name in opened.jobs]
    missing, total = (takes.kinds, takes.total) if takes else ({}, None)
    on_gpus = plan.cluster.use_gpu is not False
    said = [_jobs_table(jobs, estimate, states, on_gpus)]
    said += [f"{job['name']}: {'; '.join(job['because'])}" for job in jobs if job["because"] not in ([], ["new"])]
    waiting = sum(job["state"] == "waiting" for job in jobs)
    made = ", ".join(f"{kind} {count}" for kind, count in missing.items())
    counts = f"{len(jobs)} jobs, {waiting} to train, {len(plan.ensemble.members)} members."
    said += [f"{counts} To make: {made}." if made else counts, shown.takes(total, on_gpus)]
    said += [] if gpus is None else shown.lines(estimate, on_gpus, asked.benchmark())
    found = {"plan": plan.name, "jobs": jobs, "members": plan.ensemble.members, "missing": missing}
    answer(found | {"takes": total, "estimate": estimate}, "\n".join(filter(None, said)))


@click.command("run")
@flags.takes_plan
def run_command(asked: Asked) -> None:
    """Run what is not finished, then add up the ensemble. Run it again to go on after anything.

    FILE is a plan; or photographs, for which one is written as `aliprod init` does.

    \b
    Example: aliprod run photos
             aliprod run jobs/quickstart.toml --storage /shared/aliprod
    """
    _drive(drafted(asked), whole=True)


@click.command("ensemble")
@flags.takes_plan
def ensemble_command(asked: Asked) -> None:
    """Write the ensemble anew from the checkpoints chosen in MLflow.

    Those are the versions that carry the alias `member`.

    \b
    Example: aliprod ensemble jobs/aliproducts.toml --storage /shared/aliprod
    """
    _drive(asked, whole=False)


@click.command("status")
@flags.takes_plan
def status_command(asked: Asked) -> None:
    """Show the state of every job, now or at the end.

    From the storage path alone.

    Change is a finished job's error less that of the job it starts from: below zero, it helped.

    \b
    Example: aliprod status jobs/quickstart.toml
    """
    opened = asked.opened()
    from aliprod.build import state
    from aliprod.forecast.left import Outlook
    from aliprod.report import status

    standing, now = state.told(opened), time.time()
    left = Outlook(opened).left(standing, now) if standing.running else None
    jobs, tasks = status.states(opened, standing, left.ends if left else {}), status.tasks(standing, now)
    found = {"plan": opened.plan.name, "jobs": jobs, "tasks": tasks, "eta_seconds": left.seconds if left else None}
    answer(found, status.text(found))


@click.command("doctor")
@click.argument("file", type=flags.path, required=False, shell_complete=flags.plans)
@flags.places_flags
def doctor_command(file: Path | None, **where: Any) -> None:
    """Ask a cluster whether it can run plans.

    Every node: versions, storage and its speed, GPUs, memory, limits, clock; and MLflow. With a plan, whether that has
    room. Exit status 3 where anything has to be mended first.

    \b
    Example: aliprod doctor jobs/aliproducts.toml --address HEAD:6379
    """
    from aliprod.plan.places import resolve

    if file is None and where["sets"]:
        raise Refused("overrides a plan, and none is given.", "--set", "Give one, or leave it out.")
    opened = Asked(file, **where).opened() if file else None
    places = opened.places if opened else resolve(None, where["storage"], where["tracking_uri"], where["address"])
    say("Asking MLflow, Ray, and every node ...")
    from aliprod.cluster.doctor import examine
    from aliprod.report.status import table

    checks = list(examine(places, opened))
    bad = [check for check in checks if not check.ok]
    rows = [[check.name, check.node, "ok" if check.ok else "NOT OK", check.found] for check in checks]
    said = [f"{check.name}{f' on {check.node}' if check.node else ''}: {check.advice}" for check in bad]
    last = f"{len(bad)} of {len(checks)} checks fail." if bad else "This cluster can run plans."
    text = "\n".join([table(rows, ["check", "node", "", "found"]), *said, last])
    answer({"checks": [asdict(check) for check in checks]}, text)
    if bad:
        sys.exit(Unreachable.status)


def _row(opened: "Opened", name: str, done: bool, takes: "Demand | None") -> dict[str, Any]:
    """What `plan --json` says of a job."""
    from aliprod.forecast.demand import known
    from aliprod.report.estimate import because

    job = opened.jobs[name]
    return {
        "name": job.name,
        "backbone": job.backbone,
        "stage": job.stage_name,
        "parents": list(job.parents),
        "key": job.key,
        "state": "finished" if done else "waiting",
        "member": job.member,
        "because": [] if done else because(opened, name),
        "bytes": known(takes.kept[name]) if takes else None,
        "gpu_hours": known(takes.gpu_hours[name]) if takes else None,
    }


def _jobs_table(
    rows: list[dict[str, Any]], estimate: dict[str, Any] | None, states: Mapping[str, str], on_gpus: bool
) -> str:
    """The jobs for people, with their states as a run tells them."""
    from aliprod.report import estimate as forecast
    from aliprod.report import status

    header = ["job", "needs", "key", "state", "member", "disk", "GPU-hours" if on_gpus else "rank-hours"]
    shown: list[list[object]] = []
    for row in rows:
        state = row["state"] if row["state"] == "finished" else states[row["name"]].replace("_", " ")
        member = "yes" if row["member"] else ""
        disk = size(int(row["bytes"])) if row["bytes"] else ""
        first = [row["name"], ", ".join(row["parents"]), (row["key"] or "-")[:12], state, member]
        shown.append([*first, disk, row["gpu_hours"] or None])
    if estimate is not None:
        header += forecast.HEADER
        shown = [[*row, *forecast.cells(job)] for row, job in zip(shown, estimate["jobs"], strict=True)]
    return status.table(shown, header)


def _remark(request: "Request") -> None:
    """Say what of a plan does nothing."""
    from aliprod.plan.checks import remarks

    for remark in remarks(request.plan):
        click.echo(escaped(remark), err=True)


def _drive(asked: Asked, whole: bool) -> None:
    """Print what happens as it happens, and write the report; exit 1 where a job failed."""
    request = asked.request()
    from aliprod.report import status

    plan, jobs = request.plan, sum(map(len, request.plan.jobs.values()))
    what = f"Plan {plan.name}: {jobs} jobs, {len(plan.ensemble.members)} members. Loading Ray and MLflow."
    say(status.stamped(f"{what} Storage path: {mirror.shown(request.places.storage)}."))
    _remark(request)
    from aliprod.cli.watch import watched
    from aliprod.cluster import driver  # it takes seconds

    failures, outcome = list[Changed](), dict[str, Any]()
    for event in watched(driver.run(request, whole)):
        if isinstance(event, Changed) and event.state in LOST:
            failures.append(event)
        if isinstance(event, Ended):
            outcome |= event.outcome
    from aliprod.report import page

    try:
        say(f"Report: {page.write(request)}")
    except AliprodError as error:  # what it lacks room for, or cannot read, spoils no run
        click.echo(f"No report: {error}", err=True)
    answer(outcome if whole else outcome["ensemble"], status.summary(outcome))
    if failures:
        for failure in failures:
            click.echo(lines(f"Error: {failure.job} {failure.state.replace('_', ' ')}: {failure.detail}"), err=True)
        made = "The ensemble was made: it needs none of them." if outcome["ensemble"] else "No ensemble was made."
        click.echo(f"{made} What is finished is kept; the same command goes on.", err=True)
        sys.exit(1)
