"""The commands as a user finds them."""

from collections.abc import Iterator

import click
import pytest
from shop import aliprod

from aliprod.cli import app


def commands(group: click.Group, name: str = "") -> Iterator[tuple[str, click.Command]]:
    for part, command in group.commands.items():
        full = f"{name} {part}".strip()
        if isinstance(command, click.Group):
            yield from commands(command, full)
        else:
            yield full, command


@pytest.mark.parametrize("name", [name for name, _ in commands(app)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_command_shows_an_example(name: str, flag: str) -> None:
    result = aliprod(*name.split(), flag)
    assert result.exit_code == 0
    assert f"Example: aliprod {name} " in result.output


def test_help_names_every_command() -> None:
    for name, _ in commands(app):
        assert f"  {name.split()[-1]} " in aliprod(*name.split()[:-1], "--help").output


def test_a_misspelt_command_or_flag_is_named() -> None:
    assert "No such command 'rnu'" in aliprod("rnu").stderr
    assert "--storrage" in aliprod("plan", "plan.toml", "--storrage", "x").stderr
    assert aliprod("rnu").exit_code == aliprod("plan", "plan.toml", "--storrage", "x").exit_code == 2


@pytest.mark.parametrize("name", ["", "data", *(name for name, _ in commands(app))])
def test_help_fits_a_terminal_of_80_columns_and_cuts_no_summary_off(name: str) -> None:
    lines = aliprod(*name.split(), "--help").output.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert [line for line in lines if line.endswith("...") and not line.startswith("Usage")] == []
