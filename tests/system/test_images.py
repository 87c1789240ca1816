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

import boto3
import psutil
import pytest
from mlflow import MlflowClient
from services import PROGRAMS, Postgres

from aliprod.version import VERSION
from tests.conftest import s3_environment

if shutil.which("buildah") is None:
    pytest.skip("needs buildah, and the images that it builds", allow_module_level=True)
if "ALIPROD_IMAGES" not in os.environ:
    pytest.skip("needs the images: `make images` builds them, 30 GB, and runs this", allow_module_level=True)

SMALLEST = (
    *("--set", 'backbones={n="test_resnet.r160_in1k"}', "--set", 'jobs={n=["full"]}', "--set", "overrides={}"),
    *("--set", 'ensemble.members=["n/full"]', "--set", "stages.full.epochs=1", "--set", "catalogue.synth.images=40"),
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


def test_a_job_submitted_in_one_runs_the_quickstart_at_its_smallest_and_the_other_shows_it(
    team: dict[str, str], free_ports: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = buildah("from", f"aliprod:{VERSION}")
    port, dashboard, *others = free_ports(4)
    script = HEAD.format(port, dashboard, *others, dashboard, dashboard)
    plan = ("python", "/aliprod/jobs/run_plan.py", "/aliprod/jobs/quickstart.toml", *SMALLEST)
    try:
        token = {"RAY_AUTH_TOKEN": os.urandom(32).hex()}
        buildah("run", *variables(team | token), name, "--", "bash", "-euc", script, "job", *plan)
    finally:
        buildah("rm", name)
    for variable, value in team.items():
        monkeypatch.setenv(variable, value)
    bucket = boto3.client("s3")
    submission = bucket.get_object(Bucket="team", Key="runs/quickstart/submission.csv")["Body"].read()
    assert submission.startswith(b"id,predicted\n")
    assert bucket.list_objects_v2(Bucket="team", Prefix="mlflow/")["KeyCount"] > 0
    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    assert {run.data.tags["aliprod.kind"]: run.info.status for run in runs} == dict.fromkeys(
        ("plan", "job", "ensemble"), "FINISHED"
    )
