"""aliprod: parse, call, print.

Heavy modules are imported inside the commands, so that help and a refused plan stay fast.
"""

import errno
import os
import sys
from io import TextIOWrapper
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class

from aliprod.cli import clusters, data, experiments, plans, results
from aliprod.errors import AliprodError, StorageFull

INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


@app.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Make a shell complete commands, plans, jobs and settings.

    \b
    Example: aliprod completion bash >> ~/.bashrc
             aliprod completion zsh >> ~/.zshrc
             aliprod completion fish > ~/.config/fish/completions/aliprod.fish
    """
    if (kind := get_completion_class(shell)) is not None:
        click.echo(kind(app, {}, "aliprod", "_ALIPROD_COMPLETE").source())


for _command in (plans.plan_command, plans.run_command, plans.ensemble_command, plans.status_command):
    app.add_command(_command)
for _command in (results.report_command, results.trace_command, results.evaluate_command, results.predict_command):
    app.add_command(_command)
for _command in (results.export_command, results.serve_command, plans.doctor_command, data.init_command):
    app.add_command(_command)
for _command in (experiments.benchmark_command, experiments.tune_command, data.data_group, clusters.cluster_group):
    app.add_command(_command)


def main() -> NoReturn:
    """The console script."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # plans and names of pictures are UTF-8, whatever the locale; workers inherit it
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    try:
        app(prog_name="aliprod")
    except OSError as error:
        if error.errno not in _FULL:
            raise
        full = StorageFull(f"cannot be written: {error.strerror}.", error.filename or "standard output", "Make room.")
        click.echo(f"Error: {full}", err=True)
        os._exit(full.status)  # what is left of the answer would be written once more
    sys.exit(0)
