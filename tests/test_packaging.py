"""What a user installs and starts besides the code: versions, clusters, images."""

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import aliprod

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
HASHES = (ROOT / "hashes.txt").read_text()
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def requirements() -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != PROJECT["name"]]


# Versions


def test_every_constraint_is_an_exact_version_from_no_particular_place():
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line)] == []
    assert len(PINS) == len(LINES), "a package is pinned twice"


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_dependency_is_pinned_within_the_range_it_is_declared_for(requirement):
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("pin", ["ray", "mlflow", "torch", "torchvision", "timm"])
def test_what_a_dependency_needs_itself_is_pinned_too(pin):
    needed = [Requirement(line) for line in distribution(pin).requires or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert {canonicalize_name(one.name) for one in needed} - PINS.keys() == set()
    assert [str(one) for one in needed if PINS[canonicalize_name(one.name)] not in one.specifier] == []


def test_each_pin_has_the_hashes_of_its_files_and_nothing_else_has():
    found = re.findall(r"^([^\s#]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", HASHES, re.MULTILINE)
    assert {canonicalize_name(name): version for name, version in found} == {
        name: str(version) for name, version in PINS.items()
    }
    lines = [line for line in HASHES.splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"\S+==\S+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line)] == []


def test_clusters_and_images_run_the_ray_and_the_python_of_the_constraints():
    docker = load("cluster.yaml")["docker"]
    [python] = re.findall(r"PYTHON_IMAGE=python:(\d+\.\d+)", DOCKERFILE)
    tag = f"rayproject/ray:{PINS['ray']}-py{python.replace('.', '')}-"
    assert docker["head_image"].startswith(tag)
    assert docker["worker_image"].startswith(tag)
    assert python in SpecifierSet(PROJECT["requires-python"])
    assert f"Python {python}" in (ROOT / "constraints.txt").read_text()


def test_compose_names_its_images_by_the_version_of_the_project():
    services = load("docker/compose.yaml")["services"].values()
    images = {service["image"] for service in services if "build" in service}
    assert images == {f"aliprod:{aliprod.__version__}", f"aliprod-mlflow:{aliprod.__version__}"}


# Clusters


def test_no_cluster_starts_without_a_token():
    assert "-e RAY_AUTH_MODE=token" in load("cluster.yaml")["docker"]["run_options"]
    services = load("docker/compose.yaml")["services"]
    for service in (services["head"], services["worker"]):
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{service['secrets'][0]}"


def test_nothing_listens_beyond_loopback_that_a_browser_could_open():
    services = load("docker/compose.yaml")["services"].values()
    ports = [port for service in services for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []
    start = " ".join(load("cluster.yaml")["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--host 127.0.0.1" in start


# Jobs


def test_ray_accepts_the_runtime_environment_of_a_submitted_job():
    from ray.runtime_env import RuntimeEnv

    environment = load("jobs/runtime_env.yaml")
    assert RuntimeEnv(**environment)["env_vars"] == environment["env_vars"]
    assert "working_dir" not in environment, "it comes from the command line"
    assert not [name for name in environment["env_vars"] if re.search("TOKEN|PASSWORD|SECRET", name)]


def test_a_submitted_job_carries_the_code_and_the_plans_and_leaves_the_rest(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    archive, checkout = tmp_path / "working_dir.zip", tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=lambda _, names: {".git", ".venv", "runs"}.intersection(names))
    (checkout / "photos" / "train" / "cat").mkdir(parents=True)
    pictures = ["1.jpg", "2.JPEG", "3.PNG", "4.webp", "5.WebP", "6.gif", "7.BMP", "8.tif", "9.TIFF"]
    others = ["train-0.parquet", "train.arrow", "sums-0.npy", "model.safetensors", "model.onnx", "model.onnx.data"]
    large = [*(f"train/cat/{name}" for name in pictures), *others, "model.pt2", "net.pth", "a.tar", "a.tar.gz", "a.zip"]
    for name in ("mine.toml", "own.py", *(f"photos/{name}" for name in large)):
        (checkout / name).write_bytes(b"x")
    excludes = [*load("jobs/runtime_env.yaml")["excludes"], ".git", ".venv", "__pycache__"]  # the last three: Ray's
    create_package(str(checkout), archive, include_gitignore=True, excludes=excludes)
    names = ZipFile(archive).namelist()
    assert {"aliprod/__init__.py", "jobs/runtime_env.yaml", "pyproject.toml", "mine.toml", "own.py"} <= set(names)
    assert [name for name in names if name.startswith("photos/") and not name.endswith("/")] == []
    assert [name for name in names if name.startswith(("tests/", "docs/", "docker/", "runs/", ".venv/", ".git/"))] == []


def settings() -> set[str]:
    """The variables of Ray and MLflow that any of our files sets."""
    compose, cluster = load("docker/compose.yaml"), load("cluster.yaml")["docker"]
    options = " ".join(cluster["run_options"] + cluster["head_run_options"])
    names = set(load("jobs/runtime_env.yaml")["env_vars"]) | set(re.findall(r"-e (\w+)=", options))
    names |= {name for service in compose["services"].values() for name in service["environment"]}
    names |= {
        name for line in re.findall(r"^ENV (.*)$", DOCKERFILE, re.MULTILINE) for name in re.findall(r"(\w+)=", line)
    }
    return {name for name in names if name.startswith(("RAY_", "MLFLOW_"))}


def test_variables_that_we_set_are_variables_that_ray_and_mlflow_read():
    known: set[bytes] = set()
    for package in ("ray", "mlflow"):
        for path in Path(str(distribution(package).locate_file(package))).rglob("*.py"):
            known.update(re.findall(rb"\b(?:RAY|MLFLOW)_[A-Za-z0-9_]+", path.read_bytes()))
    assert len(settings()) > 8
    assert settings() - {name.decode() for name in known} == set()


# Files


def test_an_image_is_given_every_file_that_its_recipe_copies():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert sources == allowed
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a git checkout knows which files are the project's")
def test_no_file_names_a_home_folder_of_somebody_or_a_package_index():
    ours = ROOT if ROOT.parent == Path(tempfile.gettempdir()) else ROOT.parent  # docs may speak of /tmp
    strangers = re.compile(
        rf"{re.escape(str(ours))}/|/(?:home|Users)/(?!ray\b)\w|/root\b"  # ray: the images' own user
        r"|--(?:extra-)?index-url|--find-links|\bpypi\.org/simple|/whl/|file:///"
    )
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in filter(None, files.split("\0")):
        path = ROOT / name
        if path == Path(__file__) or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        found += [f"{name}: {match.group()}" for match in strangers.finditer(text)]
    assert found == []


def test_ci_runs_the_tests_and_the_checks_that_make_offers():
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"test", "check"} <= set(re.findall(r"^make (\w+)$", script.read_text(), re.MULTILINE)) <= targets


def test_importing_the_package_is_light():
    heavy = "import aliprod, sys; print(*{'torch', 'ray', 'mlflow', 'timm', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout
    assert out.strip() == ""
