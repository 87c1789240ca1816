"""Every command of the docs is typed: page by page, in order, in one folder, as a reader does."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from aliprod.cli import app

ROOT = Path(__file__).resolve().parents[2]
FIRST = [ROOT / "docs" / name for name in ("index.md", "photographs.md")]
OTHERS = [*sorted(set(ROOT.glob("docs/*.md")) - set(FIRST)), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [page for page in [*FIRST, *OTHERS] if "```sh\n" in page.read_text(encoding="utf-8")]

NOT_TYPED = {  # only understood, and why
    "aliprod doctor": "needs a cluster; tests/system/test_doctor.py has it ask a sound and a sick one",
    "aliprod ensemble": "starts a Ray again; tests/system/test_run.py moves the alias and runs it",
    "aliprod init": "measures for half a minute; tests/cli/test_drafts.py runs it",
    "aliprod run jobs/aliproducts.toml --storage s3": "needs a bucket; tests/system/test_bucket.py runs a plan in one",
    "aliprod status jobs/aliproducts.toml --storage s3": "likewise",
    "aliprod run photos ": "runs for minutes what init has written; tests/cli/test_drafts.py",
    'aliprod predict photos.toml "s3': "needs a bucket; tests/cli/test_results.py and tests/catalogue ask a local one",
    "aliprod serve": "serves until it is ended; tests/system/test_serve.py",
    "aliprod tune": "trains for minutes on a GPU; tests/system/test_tune.py runs it on a smaller plan",
    "aliprod benchmark train jobs/": "measures five large networks; tests/cli/test_experiments.py runs it",
    ".venv/bin/pytest": "would run the tests within the tests",
    "curl": "asks what is served; tests/system/test_serve.py asks the same paths",
    "kubectl": "needs a cluster; tests/test_kubernetes.py looks at what these apply",
    "make": "installs gigabytes, or is what runs this test",
    "mlflow": "serves until it is ended; tests/system/test_mlflow_server.py starts one with these flags",
    "pip": "installs gigabytes",
    "ray": "needs a cluster of machines; tests/system/test_submit.py submits to one of this machine",
}


class Shell:
    """Types commands in a folder; each once, however many pages have it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.typed = folder, set[str]()

    def type(self, command: str) -> None:
        if command in self.typed:
            return
        self.typed.add(command)
        program = re.sub(r"^([A-Z_]+=\S* )*", "", command)
        if any(f"{program} ".startswith(start) for start in NOT_TYPED):
            understood(program)
            return
        words = shlex.split(command)
        if words[0] == "aliprod" and words[1] != "run":
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{command}\n{result.output}{result.exception!r}"
            return
        command = re.sub(r"\baliprod\b", f"{sys.executable} -m aliprod", command, count=1)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def commands(page: Path) -> list[str]:
    """The lines of its blocks ```sh, continued ones joined, without remarks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#\s.*", "", line) for line in lines]


def understood(command: str) -> None:
    """Refuse what its program would refuse: flags that are not there, values that are none."""
    match shlex.split(command):
        case ["aliprod", *rest]:
            parsed(app, rest)
        case ["ray", *rest]:
            submitted(rest)
        case ["mlflow", *rest]:
            with warnings.catch_warnings(action="ignore"):  # of its type hints
                from mlflow.cli import cli as mlflow
            parsed(mlflow, rest)
        case ["curl", *_, address]:
            assert address == "http://127.0.0.1:8000/predict"
        case ["kubectl", "apply" | "create", "-f" | "-k", path]:
            assert (ROOT / path).exists() or Path(path, "kustomization.yaml").exists()
        case ["kubectl", *words]:
            assert words[0] in ("create", "get", "port-forward")
            assert words[words.index("--namespace") + 1] == "aliprod"
        case ["make", target]:
            assert f"\n{target}: " in (ROOT / "Makefile").read_text(encoding="utf-8")
        case ["pip", "install", *words]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            package = words[-1] if "-e" in words else ""
            assert set(re.findall(r"\w+", package)) <= project["optional-dependencies"].keys()
            assert all((ROOT / word).exists() for word in words if word.endswith(".txt"))
        case [".venv/bin/pytest", path]:
            assert (ROOT / path).exists()
        case _:
            pytest.fail(f"nobody looks at {command}")


def submitted(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    match parsed(cli, words).params.get("entrypoint", ()):
        case ("python", "jobs/run_plan.py", *words):
            parsed(app, ["run", *words])
        case ("python", "-m", "aliprod", *words):
            parsed(app, words)
        case entrypoint:
            assert entrypoint == ()


def parsed(command: click.Command, words: list[str]) -> click.Context:
    context = click.Context(command, **command.context_settings)  # click keeps what -h is called in the command
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(context, name)
        assert found, name
        command = found
    return command.make_context(command.name, words, parent=context)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with the files that pages show (``# NAME`` on top), in which all of the first page has been typed."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("jobs", "aliprod", "cluster.yaml"):  # as from a checkout
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        here(patch, folder)
        for page in PAGES:
            for name, text in re.findall(r"```\w+\n# (\S+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
        typing = Shell(folder)
        for command in commands(FIRST[0]):
            typing.type(command)
    return typing


def here(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for variable in [name for name in os.environ if name.startswith(("ALIPROD_", "MLFLOW_", "RAY_"))]:
        patch.delenv(variable)
    patch.chdir(folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_works(shell: Shell, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, shell.folder)
    typed = commands(page)
    assert typed
    for command in typed:
        shell.type(command)


@pytest.mark.parametrize("page", [*FIRST, *OTHERS], ids=lambda page: page.stem)
def test_no_command_stands_where_it_is_not_typed(page: Path) -> None:
    blocks = re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for kind, block in blocks if kind != "sh" for line in block.splitlines()]
    assert [line for line in lines if re.match(r"(aliprod|make|ray|mlflow|pip|python) ", line)] == []
