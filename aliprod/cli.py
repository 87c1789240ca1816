"""aliprod: parse, call, print.

Heavy modules are imported inside the commands, so that help and a refused plan stay fast.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from aliprod import __version__
from aliprod.errors import AliprodError
from aliprod.plan.events import Changed, Ended, Event

if TYPE_CHECKING:
    from aliprod.plan.graph import Job
    from aliprod.plan.open import Request
    from aliprod.training.benchmark import Part

INTERRUPTED = 130


class Commands(click.Group):
    """A group whose errors end in one screen and an exit status, never in a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except AliprodError as error:
            click.echo(f"Error: {error}", err=True)
            context.exit(error.status)
        except KeyboardInterrupt:
            click.echo("Interrupted. What is finished is kept; the same command goes on.", err=True)
            context.exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="aliprod")
def app() -> None:
    """Train an ensemble of image recognisers from one plan, on the Ray cluster you have.

    \b
    aliprod plan jobs/quickstart.toml     what would run
    aliprod run jobs/quickstart.toml      run it (a local Ray, SQLite for MLflow)
    """


def main() -> NoReturn:
    """The console script."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    app(prog_name="aliprod")
    sys.exit(0)


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


def takes_plan(command: Callable[[Asked], None]) -> Callable[..., None]:
    """A command with the argument FILE and the flags of `Asked`."""

    @functools.wraps(command)
    def asked(**given: Any) -> None:
        command(Asked(**given))

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


@app.command("plan")
@takes_plan
def plan_command(asked: Asked) -> None:
    """Check a plan and show its jobs, their keys, what is done and what would run.

    \b
    Example: aliprod plan jobs/aliproducts.toml --set stages.dcl.epochs=4
    """
    from aliprod.report import status

    request = asked.request()
    jobs = _jobs(request)
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
        shown = [[*_columns(row), "yes" if row["member"] else ""] for row in rows]
        click.echo(status.table(shown, ["job", "starts from", "key", "state", "member"]))
        waiting = sum(row["state"] == "waiting" for row in rows)
        click.echo(f"{len(rows)} jobs, {waiting} to train, {len(request.plan.ensemble.members)} members.")
    _answer(
        asked.as_json,
        {"plan": request.plan.name, "jobs": rows, "members": list(request.plan.ensemble.members), "estimate": None},
    )


@app.command("run")
@takes_plan
def run_command(asked: Asked) -> None:
    """Run what is not finished, then gather the ensemble. Run it again to go on after anything.

    \b
    Example: aliprod run jobs/quickstart.toml --set catalogue.path=photos --storage /shared/aliprod
    """
    from aliprod.orchestration import driver

    _drive(driver.run(asked.request()), asked.as_json, whole=True)


@app.command("ensemble")
@takes_plan
def ensemble_command(asked: Asked) -> None:
    """Write the ensemble anew from the checkpoints that carry the alias `member` in MLflow.

    \b
    Example: aliprod ensemble jobs/aliproducts.toml --storage /shared/aliprod
    """
    from aliprod.orchestration import driver

    _drive(driver.ensemble(asked.request()), asked.as_json, whole=False)


@app.command("status")
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
    _answer(asked.as_json, {"plan": request.plan.name, "jobs": rows})


@app.command("evaluate")
@click.argument("predictions", metavar="SUBMISSION", type=click.Path(path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON, as the last line.")
def evaluate_command(predictions: Path, labels: Path, as_json: bool) -> None:
    """Top-1 error of a submission, or of a folder of probabilities, against labels.

    LABELS is test_labels.json of a catalogue, or a CSV with the columns id and class_id; every image in it must
    have a prediction.

    \b
    Example: aliprod evaluate runs/quickstart/submission.csv photos/test_labels.json
    """
    from aliprod.ensemble import evaluate

    found = evaluate.evaluate(predictions, labels)
    if not as_json:
        click.echo(
            f"top-1 error {found['top1_error']:.2%} (mean over {found['classes']} classes), "
            f"{found['top1_error_per_image']:.2%} per image of {found['images']}"
        )
    _answer(as_json, found)


@app.command("predict")
@click.argument("model")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--storage", type=click.Path(path_type=Path), help="Folder of all results. [runs]")
@click.option("--tracking-uri", help="MLflow. [SQLite in the storage folder]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def predict_command(
    model: str, inputs: tuple[Path, ...], storage: Path | None, tracking_uri: str | None, as_json: bool
) -> None:
    """Recognise products in files or folders of images.

    MODEL is a weights folder, an address in MLflow (models:/NAME@ALIAS), or a plan, whose ensemble is then asked.

    \b
    Example: aliprod predict models:/quickstart.resnet50.dcl@member photos/
    """
    from aliprod.orchestration import recognise

    failed = False
    for answer in recognise.recognise(model, inputs, storage, tracking_uri):
        failed |= "error" in answer
        click.echo(json.dumps(answer, ensure_ascii=False) if as_json else _recognised(answer))
    if failed:
        sys.exit(1)


@app.command("benchmark")
@click.argument("part", type=click.Choice(["loader", "step", "train"]))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--network", default="resnet50", show_default=True, help="timm's name.")
@click.option("--crop", default=224, show_default=True, type=click.IntRange(8, 4096), help="Pixels.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images a step.")
@click.option("--loader-processes", default=0, show_default=True, type=click.IntRange(0), help="That read images.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Counted, after as many more.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON, as the last line.")
def benchmark_command(
    part: "Part", path: Path, network: str, crop: int, batch_size: int, loader_processes: int, steps: int, as_json: bool
) -> None:
    """Measure what limits training on this machine: the loader alone, the step alone, or the training of both.

    PATH is a catalogue.

    \b
    Example: aliprod benchmark train photos --network resnet50 --loader-processes 8
    """
    from dataclasses import asdict

    from aliprod.data import sources
    from aliprod.models.recogniser import check_network
    from aliprod.recipe import Stage
    from aliprod.training.benchmark import measure

    check_network(network, "--network")
    augmentation = ("random_resized_crop", "flip", "auto_augment", "cutout")
    stage = Stage(resize=max(crop, 256), crop=crop, batch_size=batch_size, augmentation=augmentation)
    found = measure(part, stage, network, sources.read(path), steps, loader_processes=loader_processes)
    if not as_json:
        click.echo(
            f"{found.part}: {found.images_per_second:,.1f} images/s on {found.device}, waiting for pictures "
            f"{found.data_wait_share:.0%} of the time, {found.memory_bytes / 1e6:,.0f} MB. "
            f"The {found.limited_by} limits."
        )
    _answer(as_json, asdict(found))


@app.group("data")
def data_group() -> None:
    """Make, check and prepare catalogues of images."""


@data_group.command("synth")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--classes", default=8, show_default=True, type=click.IntRange(2), help="Classes.")
@click.option("--images", default=212, show_default=True, type=click.IntRange(1), help="Training images.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Same seed, same pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON, as the last line.")
def synth_command(out: Path, classes: int, images: int, seed: int, as_json: bool) -> None:
    """Render a long-tailed catalogue of product packages in AliProducts layout.

    \b
    Example: aliprod data synth photos --classes 100 --images 5000
    """
    from dataclasses import asdict

    from aliprod.data.synth import synthesise

    counts = asdict(synthesise(out, classes, images, seed, processes=_cores()))
    if not as_json:
        click.echo("{path}: {classes} classes, {train} train, {val} val, {test} test images".format(**counts))
    _answer(as_json, counts)


@data_group.command("check")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON, as the last line.")
def check_command(path: Path, as_json: bool) -> None:
    """Read every image of a catalogue and list what is wrong with it.

    \b
    Example: aliprod data check photos
    """
    from aliprod.data.check import check

    report = check(path, _cores()).as_json()
    if not as_json:
        for problem in report["problems"]:
            click.echo(f"{problem['path']}: {problem['problem']}")
        click.echo(
            f"{report['readable']} of {report['images']} images are readable, {report['classes']} classes, "
            f"{len(report['problems'])} problems."
        )
    _answer(as_json, report)


@data_group.command("prepare")
@click.argument("path", metavar="CATALOGUE")
@click.argument("out")
@click.option("--short-side", default=512, show_default=True, type=click.IntRange(8), help="Pixels, at most.")
@click.option("--quality", default=90, show_default=True, type=click.IntRange(50, 100), help="Of JPEGs made anew.")
@click.option(
    "--max-skipped", default=0.5, show_default=True, type=click.FloatRange(0, 1), help="Share that may be unreadable."
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON, as the last line.")
def prepare_command(path: str, out: str, short_side: int, quality: int, max_skipped: float, as_json: bool) -> None:
    """Read every image once and write it, upright RGB of a bounded size, into Parquet shards to train from.

    What cannot be read is skipped and listed. A call that was killed goes on where it was: start it again.
    Both may be URIs, such as s3://bucket/photos?endpoint_override=HOST:PORT.

    \b
    Example: aliprod data prepare photos prepared
    """
    from aliprod.data.prepare import prepare
    from aliprod.data.stored import Settings
    from aliprod.report import progress

    done = progress.prepared(prepare(path, out, Settings(short_side, quality), max_skipped, _cores()))
    if not as_json:
        click.echo(done.text())
    _answer(as_json, done.as_json())


def _jobs(request: "Request") -> "dict[str, Job]":
    """The jobs of a plan; without keys, and a note that says so, where the catalogue is not there."""
    from aliprod.plan.open import open_jobs

    jobs, note = open_jobs(request)
    if note:
        click.echo(note, err=True)
    return jobs


def _drive(events: Iterator[Event], as_json: bool, whole: bool) -> None:
    """Print what happens as it happens; exit 1 where a job failed."""
    from aliprod.report import status

    failures: list[Changed] = []
    for event in events:
        if isinstance(event, Changed) and event.state in ("failed", "not_run"):
            failures.append(event)
        if isinstance(event, Ended):
            _summarise(event.outcome, as_json, whole)
        elif text := status.line(event):
            click.echo(text, err=as_json)
    if failures:
        for failure in failures:
            click.echo(f"Error: {failure.job} {failure.state.replace('_', ' ')}: {failure.detail}", err=True)
        click.echo("No ensemble was made. What is finished is kept; the same command goes on.", err=True)
        sys.exit(1)


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
    _answer(as_json, outcome if whole else outcome["ensemble"])


def _state(job: "Job", storage: Path) -> str:
    from aliprod.plan import ledger

    return "finished" if ledger.finished(storage, job) is not None else "waiting"


def _recognised(answer: Mapping[str, Any]) -> str:
    if "error" in answer:
        return f"{answer['path']}: {answer['error']}"
    return f"{answer['path']}: {answer['name'] or answer['class_id']} ({answer['probability']:.1%})"


def _answer(as_json: bool, answer: Mapping[str, Any]) -> None:
    if as_json:
        click.echo(json.dumps(answer, ensure_ascii=False))


def _columns(row: Mapping[str, Any]) -> list[str]:
    return [row["name"], ", ".join(row["parents"]), (row["key"] or "-")[:12], row["state"]]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
