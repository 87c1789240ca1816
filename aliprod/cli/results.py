"""The commands that show what came of a plan."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from aliprod.cli.answers import answer
from aliprod.cli.plans import Asked, takes_plan


@click.command("report")
@takes_plan
def report_command(asked: Asked) -> None:
    """Write the report of a plan in pictures, one HTML file: errors, members, and what is taken for what.

    `run` writes it at its end; this writes it anew, in the middle of a run too.

    \b
    Example: aliprod report jobs/quickstart.toml
    """
    from aliprod.report import page

    path = page.write(asked.request())
    if not asked.as_json:
        click.echo(f"Report: {path}")
    answer(asked.as_json, {"path": str(path)})


@click.command("trace")
@click.argument("submission", type=click.Path(path_type=Path))
@click.option("--storage", type=click.Path(path_type=Path), help="Folder of all results. [runs]")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON, as the last line.")
def trace_command(submission: Path, storage: Path | None, as_json: bool) -> None:
    """Show what a submission was made of: members, versions, weights, keys, plan and catalogue.

    A copy, or one that was overwritten since, is found by its bytes.

    \b
    Example: aliprod trace ~/Downloads/submission.csv --storage /shared/aliprod
    """
    from aliprod.store import lineage

    found = lineage.find(submission, storage or Path(os.environ.get("ALIPROD_STORAGE", "runs")))
    if not as_json:
        click.echo(_told(found))
    answer(as_json, {"submission": str(submission), **found})


def _told(origin: Mapping[str, Any]) -> str:
    from aliprod.report.status import table

    rows = [
        [name, member["version"], member["epoch"] + 1, member["weights"][:16], member["key"][:16]]
        for name, member in origin["members"].items()
    ]
    plan, catalogue = origin["plan"], origin["catalogue"]
    error = "" if origin["top1_error"] is None else f", top-1 error {origin['top1_error']:.2%} on {origin['split']}"
    return "\n".join(
        [
            table(rows, ["member", "version", "epoch", "weights", "key"]),
            f"Plan {plan['name']}, {plan['sha256'][:16]}{error}.",
            f"Catalogue {catalogue['path']}, {catalogue['fingerprint'][:16]}.",
        ]
    )
