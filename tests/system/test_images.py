"""The images that docker/images.sh has built: who runs in them, what is in no layer of theirs, and a job in one."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from mlflow import MlflowClient
from services import PROGRAMS, Postgres

from aliprod.build.preflight import prepare
from aliprod.version import VERSION
from tests.conftest import make_all, open_file, s3_environment

if shutil.which("buildah") is None:
    pytest.skip("needs buildah, and the images that it builds", allow_module_level=True)
if "ALIPROD_IMAGES" not in os.environ:
    pytest.skip("needs the images: `make images` builds them, 20 GB, and runs this", allow_module_level=True)

SMALL = (
    *('backbones={n="test_resnet.r160_in1k"}', 'jobs={n=["full"]}', "overrides={}", 'ensemble.members=["n/full"]'),
    *("catalogue.synth.images=80", "stages.full.epochs=60", "cluster.save_every_steps=2", "cluster.cpus_per_worker=2"),
)
HEAD = """
    ray start --head --block --node-ip-address=127.0.0.1 --port={} --dashboard-port={} --num-cpus=2 --num-gpus=0 \
      --dashboard-agent-listen-port={} --ray-client-server-port={} > /tmp/head.log 2>&1 &
    trap "kill $!; wait" EXIT
    until ray job list --address http://127.0.0.1:{} > /dev/null 2>&1; do kill -0 $!; sleep 1; done
    ray job submit --address http://127.0.0.1:{} -- "$@"
"""


def buildah(*words: str | Path) -> str:
    environment = os.environ | {"BUILDAH_ISOLATION": "chroot"}
    command = ["buildah", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout.strip()


@pytest.fixture(scope="module", params=["aliprod", "aliprod-mlflow"])
def container(request: pytest.FixtureRequest) -> Iterator[str]:
    name = buildah("from", f"{request.param}:{VERSION}")
    yield name
    buildah("rm", name)


def test_nobody_is_root_in_it_and_nothing_of_its_build_is_left(container: str) -> None:
    inspected = json.loads(buildah("inspect", container))
    assert inspected["OCIv1"]["config"]["User"] == "1000"
    assert buildah("run", container, "--", "id", "-u") == "1000"
    history = json.dumps([inspected["OCIv1"], inspected["Docker"]["history"]])
    assert "://" not in history.replace("http://mlflow:5000", "").replace("postgresql+psycopg:///mlflow", "")
    root = Path(buildah("mount", container))
    left = [name for name in ("etc/pip.conf", "build", "root/.cache", "run/secrets") if (root / name).exists()]
    assert left == []
    assert not list((root / "home" / "ray").glob(".[a-z]*/pip*"))


@pytest.fixture
def team(free_ports: Callable[[int], list[int]], tmp_path: Path, s3: str) -> Iterator[dict[str, str]]:
    """The tracking server's image on a PostgreSQL and an S3 server of this machine; what a driver is told of them."""
    if PROGRAMS is None:
        pytest.skip("needs PostgreSQL: Debian's package postgresql")
    folder, (database, port) = Path(tempfile.mkdtemp(prefix="pg-")), free_ports(2)
    password = os.urandom(16).hex()
    told = {"PGHOST": "127.0.0.1", "PGPORT": str(database), "PGUSER": "mlflow", "MLFLOW_PORT": str(port)}
    told |= {"MLFLOW_AUTH_ADMIN_PASSWORD": password, "MLFLOW_FLASK_SERVER_SECRET_KEY": "session"}
    told |= {"MLFLOW_ARTIFACTS_DESTINATION": "s3://team/mlflow"} | s3_environment(s3)
    with ExitStack() as ending:
        postgres = Postgres(folder, database)
        ending.callback(shutil.rmtree, folder)
        postgres.start()
        ending.callback(postgres.signal, signal.SIGKILL)
        name = buildah("from", f"aliprod-mlflow:{VERSION}")
        ending.callback(buildah, "rm", name)
        words = json.loads(buildah("inspect", name))["OCIv1"]["config"]["Cmd"]
        environment = os.environ | {"BUILDAH_ISOLATION": "chroot"}
        log = ending.enter_context((tmp_path / "mlflow.log").open("wb"))
        command = ["buildah", "run", *variables(told), name, "--", *words]
        process = psutil.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        ending.callback(end, process)
        uri = f"http://127.0.0.1:{port}"
        # the call of the health check and of Kubernetes' probes, by the name that clients have for it
        probe = urllib.request.Request(f"{uri}/api/3.0/mlflow/server-info", headers={"Host": "mlflow:5000"})
        until = time.monotonic() + 120
        while not answers(probe):
            assert process.poll() is None, (tmp_path / "mlflow.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.5)
        known = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
        yield known | s3_environment(s3) | {"ALIPROD_STORAGE": "s3://team/runs"}


def answers(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request, timeout=8) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def end(process: psutil.Popen) -> None:
    for each in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def variables(told: dict[str, str]) -> list[str]:
    return [word for name, value in told.items() for word in ("--env", f"{name}={value}")]


@pytest.mark.usefixtures("torch_as_before")
def test_a_job_submitted_in_one_is_killed_twice_and_ends_with_the_bytes_of_a_folder_and_the_other_shows_it(
    team: dict[str, str], free_ports: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = buildah("from", f"aliprod:{VERSION}")
    words = [word for text in SMALL for word in ("--set", text)]
    plan = ("python", "/aliprod/jobs/run_plan.py", "/aliprod/jobs/quickstart.toml", *words)
    for variable, value in team.items():
        monkeypatch.setenv(variable, value)
    bucket, seen = boto3.client("s3"), -1
    try:
        for kill in (True, True, False):
            port, dashboard, *others = free_ports(4)
            script = HEAD.format(port, dashboard, *others, dashboard, dashboard)
            told = variables(team | {"RAY_AUTH_TOKEN": os.urandom(32).hex()})
            command = ["run", *told, name, "--", "bash", "-euc", script, "job", *plan]
            if not kill:
                buildah(*command)
                break
            environment, quiet = os.environ | {"BUILDAH_ISOLATION": "chroot"}, subprocess.DEVNULL
            process = psutil.Popen(["buildah", *command], env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
            until, before = time.monotonic() + 300, seen
            while (seen := newest(bucket)) <= before:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            end(process)
    finally:
        buildah("rm", name)
    quickstart = Path(__file__).parents[2] / "jobs" / "quickstart.toml"
    expected = prepare(open_file(quickstart, tmp_path / "folder", SMALL))
    make_all(expected)
    submission = bucket.get_object(Bucket="team", Key="runs/quickstart/submission.csv")["Body"].read()
    assert submission == (expected.folder / "ensemble" / "submission.csv").read_bytes()
    [weights] = keys(bucket, "runs/jobs/", "/model.safetensors")
    folder = expected.job_folder("n/full") / "weights"
    assert bucket.get_object(Bucket="team", Key=weights)["Body"].read() == (folder / "model.safetensors").read_bytes()
    assert keys(bucket, "mlflow/", "model.safetensors")
    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    assert {run.data.tags["aliprod.kind"]: run.info.status for run in runs} == dict.fromkeys(
        ("plan", "job", "ensemble"), "FINISHED"
    )


def keys(bucket: Any, prefix: str, ending: str) -> list[str]:
    pages = bucket.get_paginator("list_objects_v2").paginate(Bucket="team", Prefix=prefix)
    found = [one["Key"] for page in pages for one in page.get("Contents", [])]
    return [key for key in found if key.endswith(ending) and "/last/" not in key]


def newest(bucket: Any) -> int:
    """The step of the newest checkpoint in the bucket; -1 where there is none."""
    steps = [key.split("/step-")[1] for key in keys(bucket, "runs/jobs/", "/manifest.json") if "/step-" in key]
    return max((int(step.split("/")[0]) for step in steps), default=-1)
