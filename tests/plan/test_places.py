"""Where a plan runs: a flag before the plan, the plan before the environment, the environment before the default."""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from aliprod.errors import Refused
from aliprod.plan.load import load
from aliprod.plan.places import SUBMITTED, catalogue_path, default_storage, resolve
from aliprod.plan.schema import Plan
from aliprod.store.layout import OWN

VARIABLES = ("ALIPROD_STORAGE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", SUBMITTED)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def plan(load_text: Callable[..., Plan], small: str) -> Callable[[bool], Plan]:
    """The small plan, with or without places of its own."""
    places = '[cluster]\nstorage = "in the plan"\ntracking_uri = "http://in.the.plan"\n'
    bare = small.partition("[cluster]")[0]
    return lambda own: load_text(bare + (places if own else ""))


@pytest.mark.parametrize(("flag", "own", "environment"), [*product([True, False], repeat=3)])
def test_a_flag_goes_before_the_plan_and_the_plan_before_the_environment(
    plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: bool, own: bool, environment: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if environment:
        monkeypatch.setenv("ALIPROD_STORAGE", "in the environment")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://in.the.environment")
        monkeypatch.setenv("RAY_ADDRESS", "in.the.environment:1")
    given = (Path("in a flag"), "http://in.a.flag", "in.a.flag:1") if flag else (None, None, None)
    places = resolve(plan(own), *given)
    winner = "flag" if flag else "plan" if own else "environment" if environment else ""
    article = "a" if flag else "the"
    assert places.storage == (tmp_path / f"in {article} {winner}" if winner else tmp_path / "runs")
    default = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert places.tracking_uri == (f"http://in.{article}.{winner}" if winner else default)
    assert places.address == ("in.a.flag:1" if flag else "in.the.environment:1" if environment else None)
    assert places.note == ""


def test_mlflow_keeps_files_in_the_storage_path_where_it_is_a_database_there(plan: Any, tmp_path: Path) -> None:
    assert resolve(plan(False), tmp_path, None, None).artifacts == tmp_path / "mlartifacts"
    assert resolve(plan(False), tmp_path, "http://127.0.0.1:5000", None).artifacts is None


def test_a_submitted_job_without_storage_keeps_its_results_at_home_and_says_so(
    plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(SUBMITTED, "{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    places = resolve(plan(False), None, None, None)
    assert places.storage == tmp_path / "aliprod"
    assert str(tmp_path / "aliprod") in places.note


@pytest.mark.parametrize("given", ["flag", "environment"])
def test_a_submitted_job_with_storage_says_nothing(
    plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str
) -> None:
    monkeypatch.setenv(SUBMITTED, "{}")
    if given == "environment":
        monkeypatch.setenv("ALIPROD_STORAGE", str(tmp_path))
    places = resolve(plan(False), tmp_path if given == "flag" else None, None, None)
    assert (places.storage, places.note) == (tmp_path, "")


def test_a_tilde_is_the_home_folder(plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ALIPROD_STORAGE", "~/results")
    assert resolve(plan(False), None, None, None).storage == tmp_path / "results"


def test_a_rendered_catalogue_lies_in_the_storage_path_and_another_one_where_the_plan_says(
    load_text: Callable[..., Plan], small: str, tmp_path: Path
) -> None:
    plain = load_text(small)
    assert catalogue_path(plain, resolve(plain, tmp_path, None, None)) == tmp_path / "pictures"
    paths = set()
    for synth in (
        "{ classes = 8, images = 20 }",
        "{ classes = 8, images = 21 }",
        "{ classes = 8, images = 20, seed = 1 }",
    ):
        rendered = load_text(small.replace('path = "pictures"', f"synth = {synth}"))
        paths.add(catalogue_path(rendered, resolve(rendered, tmp_path / "runs", None, None)))
    assert len(paths) == 3, "other pictures lie elsewhere"
    assert all(path.is_relative_to(tmp_path / "runs") for path in paths)


def test_a_path_is_all_that_changes_where_a_plan_renders_its_catalogue() -> None:
    quickstart = Path(__file__).resolve().parents[2] / "jobs" / "quickstart.toml"
    plan = load(quickstart, ["catalogue.path=photos"])
    assert catalogue_path(plan, resolve(plan, None, None, None)) == Path("photos").absolute()


def test_the_storage_folder_is_the_flags_then_the_environments_then_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ALIPROD_STORAGE", raising=False)
    assert default_storage() == tmp_path / "runs"
    monkeypatch.setenv("ALIPROD_STORAGE", "~/results")
    assert default_storage() == tmp_path / "home" / "results"
    assert default_storage(Path("~/mine")) == tmp_path / "home" / "mine"


@pytest.mark.parametrize("name", ["50%20", "what?", "a#b"])
def test_a_storage_path_that_no_address_of_sqlite_can_hold_is_refused_but_with_a_server(
    plan: Any, tmp_path: Path, name: str
) -> None:
    with pytest.raises(Refused, match=f"has a {re.escape(next(iter(set('%?#') & set(name))))} in its path"):
        resolve(plan(False), tmp_path / name, None, None)
    assert resolve(plan(False), tmp_path / name, "http://host:5000", None).storage == tmp_path / name


@pytest.mark.parametrize("name", [*OWN, "Jobs"])
def test_a_plan_cannot_have_the_name_of_a_folder_that_all_plans_share(
    load_text: Callable[..., Plan], small: str, name: str
) -> None:
    with pytest.raises(Refused, match="which keeps what all plans share"):
        load_text(re.sub(r'name = "[^"]*"', f'name = "{name}"', small, count=1))
