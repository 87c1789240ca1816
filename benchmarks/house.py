"""How large is the house? Lines, modules, functions and names of aliprod/, against the bars that we hold it to.

python benchmarks/house.py
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1] / "aliprod"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> list[Path]:
    """All modules but empty ``__init__`` files."""
    return sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.stat().st_size)


def lines_of(path: Path) -> int:
    """Physical lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    """Every node of every module."""
    for path in modules():
        yield from ((path, node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def functions() -> list[tuple[str, int, int]]:
    """Name, lines and arguments (self, cls and autograd's ctx apart) of each."""
    found = []
    for path, node in nodes():
        if isinstance(node, Function):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in arguments if name not in ("self", "cls", "ctx")])
            found.append((f"{path.relative_to(ROOT)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1, count))
    return found


def names_twice() -> dict[str, list[str]]:
    """Modules and public classes that share a name, in different places; ``Objective`` is one a method."""
    places: dict[str, set[str]] = defaultdict(set)
    for path in modules():
        if path.stem not in ("__init__", "__main__"):
            places[f"module {path.stem}"].add(str(path.relative_to(ROOT)))
    for path, node in nodes():
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != "Objective":
            places[f"class {node.name}"].add(str(path.relative_to(ROOT)))
    return {name: sorted(where) for name, where in sorted(places.items()) if len(where) > 1}


def crowded(most: int = 12) -> dict[str, int]:
    """Folders with more modules than that; objectives/ has one a method."""
    counts: dict[str, int] = defaultdict(int)
    for path in modules():
        if path.name != "__init__.py":
            counts[str(path.parent.relative_to(ROOT))] += 1
    return {room: count for room, count in counts.items() if count > most and room != "objectives"}


def main() -> None:
    """Print the figures."""
    files, found = modules(), functions()
    lengths = [length for _, length, _ in found]
    largest = max(files, key=lines_of)
    all_lines = sum(lines_of(path) for path in ROOT.rglob("*.py"))
    public = [n for _, n in nodes() if isinstance(n, (*Function.__args__, ast.ClassDef)) and not n.name.startswith("_")]
    naming = [path for path in files if "pseudo_label" in path.read_text(encoding="utf-8")]
    print(f"lines                        {all_lines:,}")
    print(f"modules                      {len(files)}")
    print(f"largest file                 {lines_of(largest)} ({largest.relative_to(ROOT)})")
    spread = f"median {median(lengths):.0f} lines, 90 % {quantiles(lengths, n=10)[-1]:.0f}"
    print(f"functions                    {len(found)}, {spread}")
    print(f"over 60 lines                {[name for name, length, _ in found if length > 60]}")
    print(f"over 6 arguments             {[name for name, _, count in found if count > 6]}")
    print(f"public without a docstring   {sum(ast.get_docstring(n) is None for n in public)} of {len(public)}")
    print(f"crowded folders              {crowded()}")
    print(f"files naming pseudo labels   {len(naming)}")
    print(f"names of two things          {names_twice()}")


if __name__ == "__main__":
    main()
