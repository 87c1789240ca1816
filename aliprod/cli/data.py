"""The commands that make, check and prepare catalogues."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aliprod.cli.flags import Asked, Share, answer, cores, json_flag, path, seed, storage_flag, takes, until_done
from aliprod.errors import Refused
from aliprod.shown import escaped

if TYPE_CHECKING:
    from aliprod.catalogue.sources import Reading
    from aliprod.ingest.check import Report


@click.group("data")
def data_group() -> None:
    """Make, check and prepare catalogues of images."""


@data_group.command("synth")
@click.argument("out", type=path)
@click.option("--classes", default=8, show_default=True, type=click.IntRange(2, 1_000_000), help="Classes.")
@click.option("--images", default=212, show_default=True, type=click.IntRange(1, 100_000_000), help="Training images.")
@click.option("--seed", default=0, show_default=True, type=seed, help="Same seed, same pictures.")
@json_flag
def synth_command(out: Path, classes: int, images: int, seed: int) -> None:
    """Render a long-tailed catalogue of product packages.

    In AliProducts layout.

    \b
    Example: aliprod data synth photos --classes 100 --images 5000
    """
    from dataclasses import asdict

    from aliprod.synth.synth import synthesise

    counts = asdict(synthesise(out, classes, images, seed, processes=cores()))
    answer(counts, "{path}: {classes} classes, {train} train, {val} val, {test} test images".format(**counts))


@dataclass(frozen=True)
class AskedReading:
    """What the commands that read a catalogue without a plan are told of it, as [catalogue] in a plan would."""

    column: tuple[str, ...] = ()
    val: float | None = None
    seed: int = 0
    links: Path | None = None

    def reading(self) -> "Reading":
        """How it is to be read. Refused: a column that is none."""
        from aliprod.catalogue.sources import Reading

        columns = dict(text.partition("=")[::2] for text in self.column)
        if wrong := [role for role, name in columns.items() if role not in ("path", "class", "split") or not name]:
            advice = "Say --column path=NAME, --column class=NAME or --column split=NAME."
            raise Refused("names no column.", f"--column {wrong[0]}", advice)
        return Reading(columns, self.val, self.seed, self.links)


takes_reading = takes(
    AskedReading,
    click.option("--column", multiple=True, metavar="ROLE=NAME", help="Of a table: path, class or split."),
    click.option("--val", type=Share(0, 0.5), help="Share to hold out where there is no val."),
    click.option("--seed", default=0, show_default=True, type=seed, help="Of what is held out."),
    click.option("--links", type=path, help="Folder below which links and absolute paths may lead."),
)


@data_group.command("check")
@takes_reading
@click.argument("catalogue", metavar="PATH", type=path)
@click.option("--strict", is_flag=True, help="Exit with 1 where anything is wrong.")
@storage_flag
@json_flag
def check_command(asked: AskedReading, catalogue: Path, strict: bool, storage: Path | None) -> None:
    """Read every image of a catalogue and list what is wrong with it.

    Of a plan, it is the plan's catalogue, read as the plan says; labels that its ensemble doubts are listed too.

    \b
    Example: aliprod data check photos
    """
    is_plan = catalogue.suffix == ".toml"
    if is_plan and asked != AskedReading():
        raise Refused("is a plan, which says itself how to read.", catalogue, "Say it there, under [catalogue].")
    from aliprod.ingest.check import check

    found = _checked_plan(catalogue, storage) if is_plan else check(catalogue, cores(), asked.reading())
    report = found.as_json()
    lines = [escaped(f"{problem['path']}: {problem['problem']}") for problem in report["problems"]]
    splits = ", ".join(f"{report[split]} {split}" for split in ("train", "val", "test"))
    readable = f"{report['readable']} of {report['images']} images are readable ({splits})"
    classes = f"{report['classes']} class{'es' * (report['classes'] != 1)}"
    last = f"{readable}, {classes}, {len(lines)} problem{'s' * (len(lines) != 1)}."
    answer(report, "\n".join([*map(escaped, report["notes"]), *lines, last]))
    if strict and lines:
        click.get_current_context().exit(1)


def _checked_plan(file: Path, storage: Path | None) -> "Report":
    """The report on a plan's catalogue, and on what its ensemble says of the labels."""
    request = Asked(file, (), storage).request()
    from aliprod.ingest.check import check
    from aliprod.plan.open import open_plan
    from aliprod.plan.places import catalogue_reading
    from aliprod.recipe.options import needs
    from aliprod.report.error_analysis import doubted

    opened = open_plan(request)
    catalogue = opened.read_catalogue()
    asked = {name: job.stage.objective for name, job in opened.jobs.items()}
    groups = {name: needs(objective.name, objective.options).group for name, objective in asked.items()}
    report = check(catalogue.root, cores(), catalogue_reading(opened.plan, opened.places), groups)
    return replace(report, problems=(*report.problems, *doubted(opened.folder, catalogue)))


@data_group.command("prepare")
@takes_reading
@click.argument("catalogue")
@click.argument("out")
@click.option("--short-side", default=512, show_default=True, type=click.IntRange(8, 65_535), help="Pixels, at most.")
@click.option("--quality", default=90, show_default=True, type=click.IntRange(50, 100), help="Of JPEGs made anew.")
@click.option("--max-skipped", default=0.5, show_default=True, type=Share(0, 1), help="Share that may be unreadable.")
@json_flag
def prepare_command(
    asked: AskedReading, catalogue: str, out: str, short_side: int, quality: int, max_skipped: float
) -> None:
    """Write a catalogue as Parquet shards to train from.

    Every image is read once and written upright, RGB, of a bounded size.

    What cannot be read is skipped and listed. A call that was killed goes on where it was: start it again.
    Both may be URIs, such as s3://bucket/photos?endpoint_override=HOST:PORT.

    \b
    Example: aliprod data prepare photos prepared
    """
    from aliprod.ingest.prepare import Settings, prepare

    done = until_done(prepare(catalogue, out, Settings(short_side, quality), max_skipped, cores(), asked.reading()))
    answer(done.as_json(), done.text())
