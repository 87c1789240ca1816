"""The commands that use and explain what a plan has made."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aliprod.cli.flags import (
    Asked,
    answer,
    as_json,
    json_flag,
    path,
    say,
    storage_flag,
    takes,
    takes_plan,
    tracking_flag,
)
from aliprod.errors import Refused

if TYPE_CHECKING:
    from aliprod.export.formats import Format
    from aliprod.recipe import Views
    from aliprod.store.lineage import Voice


@click.command("report")
@takes_plan
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
@click.argument("submission", type=path)
@storage_flag
@json_flag
def trace_command(submission: Path, storage: Path | None) -> None:
    """Show what a submission was made of.

    Members, versions, weights, keys, plan and catalogue.

    A copy, or one that was overwritten since, is found by its bytes.

    \b
    Example: aliprod trace ~/Downloads/submission.csv --storage /shared/aliprod
    """
    from aliprod.plan.places import default_storage
    from aliprod.store import lineage

    found = lineage.find(submission, default_storage(storage))
    answer({"submission": str(submission), **found}, _origin(found))


@click.command("evaluate")
@click.argument("predictions", metavar="SUBMISSION", type=path)
@click.argument("labels", type=path)
@json_flag
def evaluate_command(predictions: Path, labels: Path) -> None:
    """Tell the top-1 error of a submission against labels.

    Or of a folder of probabilities.

    LABELS is test_labels.json of a catalogue, or a CSV with the columns id and class_id; every image in it must
    have a prediction.

    \b
    Example: aliprod evaluate submission.csv photos/test_labels.json
    """
    for given in (predictions, labels):
        if not given.exists():
            raise Refused("there is no such file or folder.", given, "Give what `run` wrote, then the labels.")
    from aliprod.ensemble import evaluate

    found = evaluate.evaluate(predictions, labels)
    over_classes = f"top-1 error {found['top1_error']:.2%} (mean over {found['classes']} classes)"
    answer(found, f"{over_classes}, {found['top1_error_per_image']:.2%} per image of {found['images']}")


@dataclass(frozen=True)
class _Named:
    """What the commands that take a model are given."""

    model: str
    storage: Path | None
    tracking_uri: str | None

    def voices(self) -> "tuple[list[Voice], dict[str, Any] | None]":
        """The weights folders that MODEL names, what each counts, and what their ensemble was found to be worth.

        Raises:
            Refused: it names none.
        """
        from aliprod.store.lineage import Voice, comparison, voices

        model = self.model
        if model.startswith("models:/"):
            from aliprod.plan import places
            from aliprod.tracking.registry import fetch  # MLflow takes seconds to import

            folder = places.default_storage(self.storage)
            tracking = places.default_tracking_uri(folder, self.tracking_uri)
            return [Voice(fetch(model, tracking, folder / "models"))], None
        if model.endswith(".toml"):
            asked = Asked(Path(model), (), self.storage, self.tracking_uri).request()
            storage, plan = asked.places.storage, asked.plan.name
            if not (found := voices(storage, plan)):
                raise Refused("has no ensemble in this storage path yet.", f"plan {plan}", "Run the plan first.")
            return found, comparison(storage, plan)
        if not Path(model).is_dir():
            advice = "MODEL is a weights folder, models:/NAME@ALIAS, or a plan (PLAN.toml)."
            raise Refused("is no weights folder: there is no such folder.", model, advice)
        return [Voice(Path(model))], None


_takes_model = takes(_Named, click.argument("model"), storage_flag, tracking_flag, json_flag)


@click.command("predict")
@_takes_model
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=path)
def predict_command(named: _Named, inputs: tuple[Path, ...]) -> None:
    """Classify products in files or folders of images. With --json, one object a line.

    MODEL is a weights folder, an address in MLflow (models:/NAME@ALIAS), or a plan, whose ensemble is then asked.

    \b
    Example: aliprod predict models:/quickstart.resnet50.dcl@member photos/
    """
    voices, _ = named.voices()
    from aliprod.inference.predict import classify

    failed = False
    for found in classify(voices, inputs):
        failed |= "error" in found
        click.echo(json.dumps(found, ensure_ascii=False) if as_json() else _prediction(found))
    if failed:
        sys.exit(1)


@click.command("export")
@_takes_model
@click.argument("folder", type=path)
@click.option("--format", "form", type=click.Choice(["onnx", "torch", "timm"]), default="onnx", show_default=True)
@click.option("--views", type=click.Choice(["center", "ten_crop"]), default="center", show_default=True)
@click.option("--images", type=path, help="Pictures to compare on. [random ones]")
def export_command(named: _Named, folder: Path, form: "Format", views: "Views", images: Path | None) -> None:
    """Write a model or an ensemble as ONNX, or for torch or timm.

    Whoever uses it does not need aliprod.

    MODEL as in `predict`. FOLDER gets the model, its classes, and a README.md with the lines that feed it, once it
    answers as aliprod does on 100 pictures.

    \b
    Example: aliprod export jobs/quickstart.toml ensemble --views ten_crop
    """
    voices, worth = named.voices()
    from aliprod.export.folder import export

    say(f"Exporting {len(voices)} network{'s' if len(voices) > 1 else ''}, then comparing on pictures.")
    found = export(voices, folder, form, views, images, worth)
    what = f"{folder}: largest difference from aliprod's probabilities on {found['compared']} {found['difference']:.1e}"
    answer({"folder": str(folder), **found}, what)


def _prediction(found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"{found['path']}: {found['error']}"
    return f"{found['path']}: {found['name'] or found['class_id']} ({found['probability']:.1%})"


def _origin(found: Mapping[str, Any]) -> str:
    from aliprod.report.status import table

    rows = [
        [name, one["version"], one["epoch"] + 1, one.get("weight", 1), one["weights"][:16], one["key"][:16]]
        for name, one in found["members"].items()
    ]
    plan, catalogue = found["plan"], found["catalogue"]
    error = "" if found["top1_error"] is None else f", top-1 error {found['top1_error']:.2%} on {found['split']}"
    return (
        f"{table(rows, ['member', 'version', 'epoch', 'counts', 'weights', 'key'])}\n"
        f"Plan {plan['name']}, {plan['sha256'][:16]}{error}.\n"
        f"Catalogue {catalogue['path']}, {catalogue['fingerprint'][:16]}."
    )
