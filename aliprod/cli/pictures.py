"""The commands that recognise and score."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from aliprod.cli.answers import answer


@click.command("evaluate")
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
    answer(as_json, found)


@click.command("predict")
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
    for found in recognise.recognise(model, inputs, storage, tracking_uri):
        failed |= "error" in found
        click.echo(json.dumps(found, ensure_ascii=False) if as_json else _recognised(found))
    if failed:
        sys.exit(1)


def _recognised(found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"{found['path']}: {found['error']}"
    return f"{found['path']}: {found['name'] or found['class_id']} ({found['probability']:.1%})"
