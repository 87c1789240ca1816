"""An objective's options are its signature, read without importing it."""

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from aliprod.errors import Refused
from aliprod.recipe import Needs
from aliprod.recipe.options import complete, names, needs, options

MARGIN = """
import torch_that_is_not_there
from typing import Literal

class Helper:
    def __init__(self, *, wrong: int = 1): ...

class Objective:
    def __init__(self, context, *, margin: float, blend: int | None = None, law: Literal["paper", "public"] = "paper",
                 soft: bool = True, table: list[float] = [1.0], scale: float = 2.0) -> None: ...
"""


GROUPS = """
class Objective:
    needs = Needs(tree=True)

    def __init__(self, context, *, others: int = 3, paired: bool = False) -> None:
        self.needs = Needs(tree=True, group=2 * others if paired else others + 1)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's package whose import would raise."""
    package = tmp_path / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "margin.py").write_text(MARGIN)
    (package / "groups.py").write_text(GROUPS)
    (package / "torn.py").write_text("class Objective(")
    monkeypatch.syspath_prepend(tmp_path)
    options.cache_clear()
    return "package_of_mine.margin"


def test_the_seeds_objectives_are_offered() -> None:
    assert {"accuracy", "cross_entropy", "dcl", "lio"} <= set(names())
    assert "__init__" not in names()


def test_a_signature_is_read_without_importing_the_module(module: str) -> None:
    known = options(module)
    assert known is not None
    assert list(known.model_fields) == ["margin", "blend", "law", "soft", "table", "scale"]
    assert known.model_fields["margin"].is_required()
    assert not known.model_fields["blend"].is_required()
    assert "package_of_mine" not in sys.modules


@pytest.mark.parametrize(
    ("option", "right", "wrong"),
    [
        ("margin", [1, 0.5, -2.0], [True, "1", None, [1.0]]),
        ("blend", [0, 7], [1.5, True, "x"]),
        ("law", ["paper", "public"], ["papers", 1, True]),
        ("soft", [True, False], [0, 1, "true"]),
        ("table", [[1.0], "anything", 3], []),
    ],
)
def test_values_are_checked_against_the_annotation(
    module: str, option: str, right: list[object], wrong: list[object]
) -> None:
    def accepts(value: object) -> bool:
        try:
            complete(module, {"margin": 1.0, option: value})
        except ValidationError:
            return False
        return True

    assert all(accepts(value) for value in right)
    assert not any(accepts(value) for value in wrong)


def test_completed_options_hold_the_defaults_and_floats_where_floats_are_meant(module: str) -> None:
    done = complete(module, {"margin": 1, "blend": 2})
    assert done == {"blend": 2, "law": "paper", "soft": True, "table": [1.0], "scale": 2.0, "margin": 1.0}
    assert type(done["margin"]) is float
    assert type(done["blend"]) is int


@pytest.mark.parametrize(
    ("given", "group"), [(None, 1), ({}, 4), ({"others": 1}, 2), ({"others": 2, "paired": True}, 4)]
)
def test_needs_are_arithmetic_of_options(module: str, given: dict[str, object] | None, group: int) -> None:
    assert needs("package_of_mine.groups", given) == Needs(tree=True, group=group)


@pytest.mark.parametrize("said", ["len(others)", "others.real", "GROUP", "others // 0", "'1' + others"])
def test_needs_that_are_no_arithmetic_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    (tmp_path / "margin.py").write_text(GROUPS.replace("2 * others if paired else others + 1", said))
    monkeypatch.syspath_prepend(tmp_path.parent)
    with pytest.raises(Refused, match="needs cannot be read: "):
        needs(f"{tmp_path.name}.margin", {})


@pytest.mark.parametrize(
    "name",
    ["", ".", "a..b", "../dcl", "package_of_mine.torn", "package_of_mine.none", "package_of_mine", "sys.x", "os.path",
     "__init__", "dcl\0", "no_such_package.x", "builtins.x", "dcl.py"],
)  # fmt: skip
def test_what_holds_no_objective_is_none(module: str, name: str) -> None:
    assert options(name) is None
