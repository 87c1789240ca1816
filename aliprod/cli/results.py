"""The commands that use and explain what a plan has made."""

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aliprod.cli import flags
from aliprod.cli.flags import Asked, answer, as_json, cores, dumped, say, until_done
from aliprod.errors import Refused, listing, near_file
from aliprod.shown import escaped
from aliprod.store import commit, lineage, mirror
from aliprod.store.epochs import KINDS
from aliprod.store.lineage import Voice

if TYPE_CHECKING:
    from aliprod.export.formats import Format
    from aliprod.recipe import Views

_VIEWS: "dict[str, Views]" = {"ten": "ten_crop", "centre": "center"}
_ENDINGS = (".csv", ".jsonl", ".parquet")
_views_flag = click.option(
    "--views", type=click.Choice(list(_VIEWS)), default="ten", show_default=True, help="Crops of a picture."
)
_top_flag = click.option("--top", default=5, show_default=True, type=flags.count, help="Classes to tell.")


@click.command("report")
@flags.takes_plan
def report_command(asked: Asked) -> None:
    """Write the report of a plan in pictures, one HTML file.

    Errors, members, and what is taken for what.

    `run` writes it at its end; this writes it anew, in the middle of a run too.

    \b
    Example: aliprod report jobs/quickstart.toml
    """
    request = asked.request()
    from aliprod.report import page

    written = page.write(request)
    answer({"path": str(written)}, f"Report: {written}")


@click.command("trace")
@click.argument("submission", type=flags.path)
@flags.storage_flag
@flags.json_flag
def trace_command(submission: Path, storage: Path | None) -> None:
    """Show what a submission was made of.

    Members, versions, weights, keys, plan and catalogue.

    A copy, or one that was overwritten since, is found by its bytes.

    \b
    Example: aliprod trace ~/Downloads/submission.csv --storage /shared/aliprod
    """
    from aliprod.plan.places import default_storage

    found = lineage.find(submission, default_storage(storage))
    for one in found["members"].values():
        one["epoch"] += 1  # records count from 0, people from 1
    answer({"submission": str(submission), **found}, _origin(found))


@click.command("evaluate")
@click.argument("predictions", metavar="SUBMISSION", type=flags.path)
@click.argument("labels", type=flags.path)
@flags.json_flag
def evaluate_command(predictions: Path, labels: Path) -> None:
    """Tell the top-1 error of a submission against labels.

    Or of a folder of probabilities.

    LABELS is test_labels.json of a catalogue, or a table (CSV, JSON lines, Parquet) with the columns id and
    class_id; every image in it must have a prediction.

    \b
    Example: aliprod evaluate submission.csv photos/test_labels.json
    """
    predictions = mirror.local(predictions)
    commit.refresh(predictions.parent)
    for given in (predictions, labels):
        if not given.exists():
            advice = near_file(given) or "Give what `run` wrote, then the labels."
            raise Refused("there is no such file or folder.", given, advice)
    from aliprod.ensemble import evaluate

    found = evaluate.evaluate(predictions, labels)
    over_classes = f"top-1 error {found['top1_error']:.2%} (mean over {found['classes']} classes)"
    answer(found, f"{over_classes}, {found['top1_error_per_image']:.2%} per image of {found['images']}")
    if evaluate.fitted_on_these(predictions):
        why = "Weights and temperatures were fitted on these images, so the error is lower than on others."
        click.echo(f"{why} The report has the cross-fitted one.", err=True)


def _voices(asked: Asked) -> list[Voice]:
    """The weights folders that MODEL names, and what each counts. Refused: it names none."""
    if _is_registered(asked):
        from aliprod.plan import places
        from aliprod.tracking.registry import fetch  # MLflow takes seconds to import

        folder = places.default_storage(asked.storage)
        return [fetch(str(asked.file), places.default_tracking_uri(folder, asked.tracking_uri), folder / "models")]
    if asked.file.suffix == ".toml":
        request = asked.request()
        if not (found := lineage.voices(request.places.storage, request.plan.name)):
            what = "has no ensemble in this storage path yet."
            raise Refused(what, f"plan {request.plan.name}", "Run the plan first.")
        return found
    if not asked.file.is_dir():
        advice = "MODEL is a weights folder, models:/NAME@ALIAS, or a plan (PLAN.toml)."
        raise Refused("is no weights folder: there is no such folder.", asked.file, near_file(asked.file) or advice)
    return [Voice(asked.file)]


def _worth(asked: Asked) -> dict[str, Any] | None:
    """What the ensemble of a plan was found to be worth; None of others, and where that is not known."""
    if asked.file.suffix != ".toml":
        return None
    request = asked.request()
    return lineage.comparison(request.places.storage, request.plan.name)


def _absolute(asked: Asked) -> Asked:
    """The same for processes that have another working folder."""
    from aliprod.plan.places import default_storage, default_tracking_uri

    model = asked.file if _is_registered(asked) else asked.file.absolute()
    folder = asked.request().places.storage if model.suffix == ".toml" else default_storage(asked.storage)
    return Asked(model, storage=folder, tracking_uri=default_tracking_uri(folder, asked.tracking_uri))


def _is_registered(asked: Asked) -> bool:
    return str(asked.file).startswith("models:/")


_model = click.argument("file", metavar="MODEL", type=flags.path)
_takes_model = flags.takes(Asked, _model, flags.storage_flag, flags.tracking_flag)


@click.command("predict")
@_takes_model
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--out", type=flags.path, metavar="FILE", help="Write .csv, .jsonl or .parquet; a killed call goes on.")
@_views_flag
@_top_flag
@flags.json_flag
def predict_command(asked: Asked, inputs: tuple[str, ...], out: Path | None, views: str, top: int) -> None:
    """Classify pictures. With --json, one object a line.

    MODEL is a weights folder, an address in MLflow (models:/NAME@ALIAS), or a plan, whose ensemble is then asked.

    INPUT is a picture, a folder, a table of paths (CSV, Parquet), or a URI (s3://bucket/folder). What is no picture has
    an error in its row, and the exit status is 1 then.

    \b
    Example: aliprod predict models:/quickstart.resnet50.dcl@member photos/
    """
    if out and out.suffix not in _ENDINGS:
        raise Refused("has an ending that says no format.", out, f"Write {listing(_ENDINGS)}.")
    if out and any(out.exists() and out.samefile(given) for given in inputs if Path(given).exists()):
        raise Refused("is what is to be classified: it would be written over.", out, "Name another file.")
    voices = _voices(asked)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of torch that wait leave their cores to who reads
    from aliprod.inference.classify import Recogniser, classify, write_answers
    from aliprod.inference.pictures import listed

    pictures = listed(inputs)
    recogniser = Recogniser.load(voices, _VIEWS[views], top)
    failed = 0
    if out:
        done = until_done(write_answers(out, recogniser, pictures, cores()))
        answer(vars(done), f"{done.path}: {done.pictures:,} pictures, {done.unreadable:,} of them unreadable.")
        failed = done.unreadable
    else:
        for found in classify(recogniser, pictures, cores()):
            failed += "error" in found
            click.echo(dumped(found) if as_json() else escaped(_prediction(found)))
    if failed:
        click.echo(f"{failed:,} of {len(pictures):,} pictures cannot be read: see their errors.", err=True)
        sys.exit(1)


@click.command("export")
@_takes_model
@click.argument("out", type=flags.path)
@click.option("--to", "form", type=click.Choice(["onnx", "torch", "timm"]), default="onnx", show_default=True)
@click.option("--views", type=click.Choice(list(_VIEWS)), default="centre", show_default=True, help="Crops inside.")
@click.option("--images", metavar="INPUT", help="Pictures to compare on. [random ones]")
@flags.json_flag
def export_command(asked: Asked, out: Path, form: "Format", views: str, images: str | None) -> None:
    """Write a model or an ensemble as ONNX, or for torch or timm.

    Whoever uses it does not need aliprod. MODEL is as for predict. The folder OUT gets the model, its classes, and a
    README.md with the lines that feed it, once it answers as aliprod does on 100 pictures.

    \b
    Example: aliprod export jobs/quickstart.toml ensemble --views ten
    """
    voices = _voices(asked)
    from aliprod.export.folder import export

    say(f"Exporting {len(voices)} network{'s' if len(voices) > 1 else ''}, then comparing on pictures.")
    found = export(voices, out, form, _VIEWS[views], images, _worth(asked))
    apart = f"{found['largest_difference']:.1e} on {found['images']} {found['compared']}"
    answer(found, f"{out}: largest difference from aliprod's probabilities {apart}.")


@click.command("serve")
@_takes_model
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets everybody in who reaches it.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(1, 1_000), help="A GPU or a core each.")
@_views_flag
@_top_flag
@flags.address_flag
def serve_command(asked: Asked, views: str, top: int, **where: Any) -> None:
    """Answer for pictures over HTTP, and on a page. Needs the extra `serve`.

    MODEL is as for predict. Another version that models:/NAME@ALIAS comes to mean is swapped in within seconds.

    \b
    Example: aliprod serve models:/quickstart.resnet50.dcl@member
    """
    find = partial(_voices, _absolute(asked))
    find()  # what is wrong with it is said before anything is started
    try:
        from aliprod.cluster.serve import Serving, run
    except ImportError as error:
        advice = "Install it: pip install -c constraints.txt -e '.[serve]'"
        raise Refused(f"the extra serve is not installed ({error}).", advice=advice) from error
    run(Serving(str(asked.file), find, _VIEWS[views], top), address=asked.address, **where)


def _prediction(found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"{found['path']}: {found['error']}"
    return f"{found['path']}: {found['name'] or found['class_id']} ({found['probability']:.1%})"


def _origin(found: Mapping[str, Any]) -> str:
    from aliprod.report.status import table

    rows = [
        [name, one["version"], one["epoch"], one.get("weight", 1), one["weights"][:16], one["key"][:16], kind]
        for name, one in found["members"].items()
        for kind in [KINDS.get(one.get("kind"))]
    ]
    plan, catalogue = found["plan"], found["catalogue"]
    error = "" if found["top1_error"] is None else f", top-1 error {found['top1_error']:.2%} on {found['split']}"
    return (
        f"{table(rows, ['member', 'version', 'epoch', 'counts', 'weights', 'key', 'note'])}\n"
        f"Plan {plan['name']}, {plan['sha256'][:16]}{error}.\n"
        f"Catalogue {catalogue['path']}, {catalogue['fingerprint'][:16]}."
    )
