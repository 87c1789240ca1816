"""The house is as CONTRIBUTING.md says: its rooms, one name for one thing, nothing too large."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> object:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import house
    finally:
        sys.path.pop(0)
    return house


def test_the_table_of_rooms_names_every_folder_and_module_of_the_package() -> None:
    table = re.search(r"## The rooms\n.*?\n\n(\|.*?)\n\n", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert table
    named = [name for row in table[1].splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    folders = {path.parent.name for path in ROOT.glob("aliprod/*/__init__.py")}
    modules = {path.stem for path in ROOT.glob("aliprod/*.py") if not path.stem.startswith("__")}
    assert set(named) == folders | modules
    assert len(named) == len(set(named))


def test_the_three_walks_lead_through_functions_that_are_there() -> None:
    walks = re.search(r"## Three walks\n(.*?)\n## ", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert walks
    steps = re.findall(r"`(\w+/\w+)(?:\.(\w+))?", walks[1])
    assert len(steps) > 30
    for module, name in steps:
        text = (ROOT / "aliprod" / f"{module}.py").read_text()
        assert re.search(rf"(def|class) {name}\b" if name else "", text), f"{module}.{name}"


def test_no_two_modules_or_classes_share_a_name(house: object) -> None:
    assert house.names_twice() == {}  # type: ignore[attr-defined]


def test_no_folder_is_crowded_no_file_and_no_function_long(house: object) -> None:
    assert house.crowded() == {}  # type: ignore[attr-defined]
    assert max(house.lines_of(path) for path in house.modules()) <= 400  # type: ignore[attr-defined]
    functions = house.functions()  # type: ignore[attr-defined]
    assert [name for name, lines, _ in functions if lines > 60] == []
    assert len([name for name, _, arguments in functions if arguments > 6]) <= 3


@pytest.mark.parametrize("program", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(program: Path) -> None:
    """Nobody runs them at every commit, so a name that moved would go unseen."""
    tree = ast.parse(program.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in (node for node in imports if str(node.module).split(".")[0] == "aliprod"):
        module = importlib.import_module(str(node.module))
        for name in (alias.name for alias in node.names):
            assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), f"{node.module}.{name}"
