"""The reference and the schema that editors take are the types': both are current, and say what a plan may say."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "docs" / "plan.schema.json").read_text(encoding="utf-8"))
PLANS = sorted((ROOT / "jobs").glob("*.toml"))


def problems(plan: dict[str, Any]) -> list[str]:
    return [error.json_path for error in Draft202012Validator(SCHEMA).iter_errors(plan)]


def test_both_files_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs/site/reference.py", tmp_path], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.md", "plan.schema.json"}
    for made in tmp_path.iterdir():
        assert (ROOT / "docs" / made.name).read_text(encoding="utf-8") == made.read_text(encoding="utf-8")


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.name)
def test_the_plans_that_come_along_fit_the_schema_that_they_name(plan: Path) -> None:
    text = plan.read_text(encoding="utf-8")
    named = text.splitlines()[0].removeprefix("#:schema ")
    assert json.loads((plan.parent / named).read_text(encoding="utf-8")) == SCHEMA
    assert problems(tomllib.loads(text)) == []


@pytest.mark.parametrize(
    ("setting", "at"),
    [
        ("stages.full.epohcs=2", "$.stages.full"),
        ("defaults.epochs=0", "$.defaults.epochs"),
        ("defaults.lr.head=1", "$.defaults.lr"),
        ('overrides.resnet50.resize="256"', "$.overrides.resnet50.resize"),
        ('stages.full.objective="dlc"', "$.stages.full.objective"),
        ('stages.full.objective={ name = "dcl", part = 2 }', "$.stages.full.objective"),
        ('stages.full.objective={ name = "dcl", parts = 2.5 }', "$.stages.full.objective"),
        ("cluster.worker=2", "$.cluster"),
    ],
)
def test_a_setting_that_no_plan_may_say_does_not_fit(setting: str, at: str) -> None:
    key, _, value = setting.partition("=")
    plan = tomllib.loads((ROOT / "jobs" / "aliproducts.toml").read_text(encoding="utf-8"))
    *tables, name = key.split(".")
    table = plan
    for part in tables:
        table = table.setdefault(part, {})
    table[name] = tomllib.loads(f"value = {value}")["value"]
    assert problems(plan) == [at]


@pytest.mark.parametrize(
    "objective",
    ["lio", {"name": "lio", "positives": 2}, {"name": "dcl", "beta": 1}, "mine.margin", {"name": "a.b", "c": 1}],
)
def test_objectives_fit_by_name_and_with_options_those_of_the_users_too(objective: Any) -> None:
    plan = tomllib.loads((ROOT / "jobs" / "aliproducts.toml").read_text(encoding="utf-8"))
    plan["stages"]["full"]["objective"] = objective
    assert problems(plan) == []
