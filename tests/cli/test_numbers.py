"""No number on a command line ends in a traceback: every number of every command, and of every setting of a plan."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from shop import Shop

from aliprod.cli import app

LINES = 2_000
SETTINGS = {  # where each table of the schema stands in the plan
    "Stage": "stages.full.",
    "LearningRate": "stages.full.lr.",
    "OptimizerRecipe": "stages.full.optimizer.",
    "PerClass": "stages.full.images.",
    "PseudoLabels": "stages.full.pseudo_labels.",
    "Synth": "catalogue.synth.",
    "CatalogueSource": "catalogue.",
    "Ensemble": "ensemble.",
    "Cluster": "cluster.",
    "Tune": "tune.",
}
COMMANDS = {  # what else stands on a command's line, so that it gets to its numbers, and to its end
    "plan": ["plan.toml"],
    "data synth": ["new", "--classes", "3", "--images", "15"],
    "data check": ["photos"],
    "data prepare": ["photos", "prepared"],
    "init": ["photos", "--out", "/dev/null/x"],
    "benchmark": ["loader", "photos", "--crop", "16", "--batch-size", "2", "--steps", "1"],
    "cluster aws": ["aws.yaml", "--ami", "ami-0", "--nfs", "host:/folder"],
    "predict": ["weights", "photos/none.jpg"],
    "serve": ["none"],
}
WHOLE = ["0", "-1", "1", "2", "7", "+7", " 7 ", "007", "1_0", "٣", "½", "", "0x10", "1.5", "1e3", "--", "1,000", "1/2"]
WHOLE += [f"{2**31}", f"{2**32}", f"{2**53 + 1}", f"{2**63 - 1}", f"{2**63}", "9" * 400, "-" + "9" * 400, "9" * 5000]
FLOATS = ["nan", "inf", "-inf", "1e400", "-1e400", "1e308", "5e-324", "-0.0", "0.1", "1." + "0" * 400, "1e", ".5"]


def numbers(group: click.Group, name: str = "") -> Iterator[tuple[str, str]]:
    """Each command with each of its flags that is a number."""
    for part, command in group.commands.items():
        full = f"{name} {part}".strip()
        if isinstance(command, click.Group):
            yield from numbers(command, full)
        kinds = (click.types.IntParamType, click.types.FloatParamType)
        yield from ((full, one.opts[0]) for one in command.params if isinstance(one.type, kinds))


def settings() -> list[str]:
    """Each setting of a plan that may be a number."""
    schema = json.loads((Path(__file__).parents[2] / "docs" / "plan.schema.json").read_text(encoding="utf-8"))
    tables = {"": schema, **{SETTINGS[name]: schema["$defs"][name] for name in SETTINGS}}
    found = [
        where + key for where, table in tables.items() for key, says in table["properties"].items() if _number(says)
    ]
    return [*found, "stages.full.objective.gamma", "stages.full.lr.milestones"]


def _number(says: Any) -> bool:
    return any(kind in json.dumps(says) for kind in ('"integer"', '"number"'))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more processes than cores
def test_no_number_ends_in_a_traceback(shop: Shop, weights_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, flags, keys = random.Random(0), sorted(numbers(app)), settings()
    assert {command for command, _ in flags} == COMMANDS.keys()
    assert len(keys) > 40
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one core: pictures are read without other processes
    failed = []
    for _ in range(LINES):
        value = draw.choice(WHOLE + FLOATS)
        if draw.random() < 0.8:
            line = ["plan", "plan.toml", "--set", f"{draw.choice(keys)}={value}"]
        else:
            command, flag = draw.choice(flags)
            line = [*command.split(), *COMMANDS[command], flag, value]
        result = CliRunner().invoke(app, line)
        known = isinstance(result.exception, SystemExit | None) and result.exit_code in (0, 1, 2, 3)
        failed += [] if known else [(line, result.exception)]
    assert failed == []
