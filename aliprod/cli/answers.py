"""What every command does at its end."""

import json
import os
from collections.abc import Mapping
from typing import Any

import click


def answer(as_json: bool, found: Mapping[str, Any]) -> None:
    """Print the answer as JSON, where that is asked for."""
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
