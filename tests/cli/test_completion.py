"""completion: what bash itself is told, without anything heavy."""

import subprocess
import sys
from pathlib import Path

import pytest
from shop import Shop, aliprod

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "timm", "ray", "mlflow", "numpy", "pyarrow", "pydantic"]
COMMAND = """\
#!{python} -P
import sys
from aliprod.cli import main
try:
    main()
finally:
    loaded = [name for name in {heavy} if name in sys.modules]
    open({note!r}, "a").write("".join(loaded))
"""
DRIVEN = """\
source completion.bash
COMP_WORDS=(aliprod "$@") COMP_CWORD=$#
complete -p aliprod >/dev/null && _aliprod_completion aliprod 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(shop: Shop, *words: str) -> list[str]:
    """What bash completes the last word to."""
    command, note = shop.folder / "bin" / "aliprod", shop.folder / "loaded"
    command.parent.mkdir(exist_ok=True)
    command.write_text(COMMAND.format(python=sys.executable, heavy=HEAVY, note=str(note)))
    command.chmod(0o755)
    (shop.folder / "completion.bash").write_text(aliprod("completion", "bash").stdout)
    path = {"PATH": f"{command.parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["/bin/bash", "-c", DRIVEN, "bash", *words],
        cwd=shop.folder, env=path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert note.read_text() == "", "completing must be fast"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pl"], ["plan"]),
        (["data", "ch"], ["check"]),
        (["plan", "--gp"], ["--gpus"]),
        (["run", "pl"], ["plan.toml"]),
        (["run", "./pl"], ["./plan.toml"]),
        (["tune", "plan.toml", ""], ["net/full", "net/accuracy"]),
        (["tune", "plan.toml", "net/a"], ["net/accuracy"]),
        (["tune", "nothing.toml", ""], []),
        (["run", "plan.toml", "--set", "stages.full."], ["stages.full.epochs="]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_bash_completes_commands_options_plans_and_jobs(shop: Shop, words: list[str], expected: list[str]) -> None:
    assert completed(shop, *words) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_too(shell: str) -> None:
    assert "_ALIPROD_COMPLETE" in aliprod("completion", shell).stdout


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shop.folder))
    assert aliprod("plan", "~/plan.toml", "--storage=~/elsewhere").exit_code == 0
    assert aliprod("plan", "~nobody-here/plan.toml").exit_code == 2
