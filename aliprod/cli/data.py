"""The commands that make, check and prepare catalogues."""

from pathlib import Path

import click

from aliprod.cli.answers import answer, cores


@click.group("data")
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

    from aliprod.synth.synth import synthesise

    counts = asdict(synthesise(out, classes, images, seed, processes=cores()))
    if not as_json:
        click.echo("{path}: {classes} classes, {train} train, {val} val, {test} test images".format(**counts))
    answer(as_json, counts)


@data_group.command("check")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON, as the last line.")
def check_command(path: Path, as_json: bool) -> None:
    """Read every image of a catalogue and list what is wrong with it.

    \b
    Example: aliprod data check photos
    """
    from aliprod.ingest.check import check

    report = check(path, cores()).as_json()
    if not as_json:
        for problem in report["problems"]:
            click.echo(f"{problem['path']}: {problem['problem']}")
        click.echo(
            f"{report['readable']} of {report['images']} images are readable, {report['classes']} classes, "
            f"{len(report['problems'])} problems."
        )
    answer(as_json, report)


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
    from aliprod.ingest.prepare import prepare
    from aliprod.ingest.stored import Settings
    from aliprod.report import progress

    done = progress.prepared(prepare(path, out, Settings(short_side, quality), max_skipped, cores()))
    if not as_json:
        click.echo(done.text())
    answer(as_json, done.as_json())
