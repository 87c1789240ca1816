"""docs/methods.md: a section for every objective, and nothing to copy that a plan would refuse."""

import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

from aliprod import objectives
from aliprod.plan import options
from aliprod.recipe import Stage

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^#|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL))
BLOCKS = {title: re.findall(r"```toml\n(.*?)```", section, flags=re.DOTALL) for title, section in SECTIONS.items()}
OBJECTIVES = [module.name for module in pkgutil.iter_modules(objectives.__path__)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_a_section_with_equation_source_cost_and_when(name: str) -> None:
    section = SECTIONS[name]
    assert all(word in section for word in ("L = ", "*Source*", "*Cost*", "*When*"))
    (block,) = BLOCKS[name]
    stage = Stage.model_validate(tomllib.loads(block))
    assert stage.objective.name == name
    assert set(stage.objective.options) <= set(options.options(name).model_fields)
    assert f"[{name}](#{name})" in TEXT


@pytest.mark.parametrize("title", [title for title, blocks in BLOCKS.items() if blocks and title not in OBJECTIVES])
def test_the_lines_of_what_is_no_objective_are_a_stages(title: str) -> None:
    for block in BLOCKS[title]:
        Stage.model_validate(tomllib.loads(block))


def test_no_line_is_a_placeholder_and_no_objective_is_made_up() -> None:
    assert "TODO" not in TEXT
    assert {title for title in SECTIONS if title.islower()} == set(OBJECTIVES)
