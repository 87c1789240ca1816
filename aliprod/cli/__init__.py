"""aliprod: parse, call, print.

Heavy modules are imported inside the commands, so that help and a refused plan stay fast.
"""

import os
import sys
from io import TextIOWrapper
from typing import Any, NoReturn

import click

from aliprod.cli.clusters import cluster_group
from aliprod.cli.completion import completion_command
from aliprod.cli.data import data_group
from aliprod.cli.drafts import init_command
from aliprod.cli.experiments import benchmark_command, tune_command
from aliprod.cli.plans import doctor_command, ensemble_command, plan_command, run_command, status_command
from aliprod.cli.results import (
    evaluate_command,
    export_command,
    predict_command,
    report_command,
    serve_command,
    trace_command,
)
from aliprod.errors import AliprodError

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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(package_name="aliprod", prog_name="aliprod")
def app() -> None:
    """Train an ensemble of image classifiers from one plan, on the Ray cluster you have.

    \b
    aliprod plan jobs/quickstart.toml     what would run
    aliprod run jobs/quickstart.toml      run it (a local Ray, SQLite for MLflow)
    """


for _command in (init_command, plan_command, run_command, ensemble_command, status_command):
    app.add_command(_command)
for _command in (report_command, trace_command, evaluate_command, predict_command, export_command, serve_command):
    app.add_command(_command)
for _command in (cluster_group, doctor_command, benchmark_command, tune_command, data_group, completion_command):
    app.add_command(_command)


def main() -> NoReturn:
    """The console script."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # plans and names of pictures are UTF-8, whatever the locale; workers inherit it
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    app(prog_name="aliprod")
    sys.exit(0)
