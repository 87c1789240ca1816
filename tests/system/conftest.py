"""A Ray cluster of the tests' own, a tiny catalogue, and a tiny plan."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from aliprod.synth.synth import synthesise

sys.path.append(str(Path(__file__).parent))  # where services.py is

PLAN = """\
format = 1
name = "tiny"

[catalogue]
path = "catalogue"

[backbones]
resnet = "test_resnet.r160_in1k"
efficientnet = "test_efficientnet.r160_in1k"

[defaults]
resize = 72
crop = 64
augmentation = ["random_crop", "flip"]
batch_size = 8
lr = { backbone = 0.02, heads = 0.02 }

[stages.full]
epochs = 3

[stages.dcl]
start = "full"
objective = { name = "dcl", parts = 2 }

[stages.lio]
start = "full"
objective = { name = "lio", positives = 1 }

[stages.accuracy]  # so slow that its second epoch is no better than its first: it leaves a best and a last checkpoint
start = "dcl"
objective = "accuracy"
epochs = 2
lr = { backbone = 1e-7, heads = 1e-7 }

[jobs]
resnet = ["full", "dcl", "lio", "accuracy"]
efficientnet = ["full"]

[ensemble]
members = ["resnet/dcl", "resnet/lio", "resnet/accuracy", "efficientnet/full"]

[cluster]
save_every_steps = 2
use_gpu = false
poll_seconds = 0.2
"""


@dataclass(frozen=True)
class Cluster:
    """A Ray head with four CPUs, open on loopback, with a home of its own.

    Attributes:
        address, dashboard: of its GCS, host and port; of its dashboard, http.
        environment: for what talks to it.
    """

    process: psutil.Popen
    address: str
    dashboard: str
    environment: dict[str, str]

    @property
    def home(self) -> Path:
        return Path(self.environment["HOME"])

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """`aliprod ARGUMENTS --address OURS`, in a process group of its own."""
        return self.start_alone(*arguments, "--address", self.address)

    def start_alone(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """The same without an address."""
        command = [sys.executable, "-m", "aliprod", *map(str, arguments)]
        return subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def aliprod(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """The same, waited for."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=900)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        return [process for process in self.process.children(recursive=True) if _title(process) == "RayTrainWorker"]

    def left(self) -> Counter[str]:
        """What drivers have on it: processes that do something, actors, placement groups. TrainStateActor is Ray's own,
        one a cluster, which tells the dashboard of trainings."""
        found = Counter(_title(process) for process in self.process.children(recursive=True))
        for what, gone in (("actors", "DEAD"), ("placement_groups", "REMOVED")):
            listed = self.ask(f"/api/v0/{what}?limit=9999")["data"]["result"]["result"]
            found.update(one.get("class_name", what) for one in listed if one["state"] != gone)
        return Counter({name: count for name, count in found.items() if name not in ("", "IDLE", "TrainStateActor")})

    @contextmanager
    def node(
        self, *options: str, mount: str = "", environment: dict[str, str] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Another node, by what `ray start` is told of it, in a process group of its own; killed in the end.

        Args:
            mount: a command that mounts something for it alone. environment: what differs from the cluster's.
        """
        [port] = _free_ports(1)
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={self.address}"]
        ray += ["--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0", *options]
        ray += [
            f"--dashboard-agent-listen-port={port}",
            "--object-store-memory=100000000",
            "--include-log-monitor=false",
        ]
        if mount:
            ray = ["unshare", "--mount", "sh", "-c", f"{mount} && exec {shlex.join(ray)}"]
        before, log = self.alive(), self.home / f"node-{port}.log"
        with log.open("wb") as output:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            variables = self.environment | (environment or {})
            node = subprocess.Popen(ray, env=variables, cwd=self.home, start_new_session=True, **streams)
        try:
            self.until(lambda: node.poll() is not None or self.alive() > before, seconds=180)
            assert node.poll() is None, log.read_text()
            yield node
        finally:
            node.terminate()  # what is killed at once is missed for 20 s
            with suppress(subprocess.TimeoutExpired):
                node.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
            self.until(lambda: self.alive() <= before, seconds=180)  # the other tests have the cluster as it was

    def alive(self) -> int:
        """How many nodes it has."""
        nodes = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def until(self, true: Callable[[], Any], process: Any = None, seconds: int = 300) -> None:
        """Wait for something to happen on it, while a process runs: where that ends before, its log is the answer."""
        end = time.monotonic() + seconds
        while not true():
            over = process is not None and process.poll() is not None
            if over or time.monotonic() > end:
                if process is not None:
                    process.kill()
                log = process.communicate() if process is not None else ""
                raise AssertionError(f"{'its process ended first' if over else f'not within {seconds} s'}: {log}")
            time.sleep(0.02)

    def ask(self, path: str, method: str = "GET") -> Any:
        """What the dashboard answers."""
        asked = urllib.request.Request(f"{self.dashboard}{path}", method=method)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.load(answer)


@dataclass
class MlflowServer:
    """One worker, without the job execution that would start eight processes more; over SQLite by default."""

    folder: Path
    port: int
    store: str = ""
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = self.store or f"sqlite:///{self.folder}/mlflow.db"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", store]
        command += ["--artifacts-destination", f"{self.folder}/artifacts", *self.options]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | self.environment
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + 120
        while not self._healthy():
            assert time.monotonic() < until, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Started at the first test that asks for it, killed with all it started after the last."""
    with head(4) as found:
        yield found


@pytest.fixture(scope="session")
def heads() -> Any:
    """What starts another."""
    return head


@contextmanager
def head(cpus: int, grows: dict[str, Any] | None = None) -> Iterator[Cluster]:
    """A Ray of its own.

    Args:
        grows: configuration of Ray's autoscaler, whose nodes are then processes of this machine.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie below it, and a socket's path is at most 107
    (folder / "home" / "aliprod").mkdir(parents=True)  # where submitted jobs keep results: it is no package
    gcs, dashboard, agent, client = _free_ports(4)
    others = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "ALIPROD_"))}
    environment = others | {
        "HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # of nodes that are told to end
        "RAY_memory_monitor_refresh_ms": "0",  # it counts the whole machine: other programs would get ours killed
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
        *(f"--num-cpus={cpus}", "--num-gpus=0", f"--port={gcs}", f"--temp-dir={folder}"),
        *("--include-dashboard=true", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"),
        *("--object-store-memory=200000000", "--include-log-monitor=false"),
    ]
    if grows is not None:
        environment |= {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        environment["RAY_CLOUD_INSTANCE_ID"] = FAKE_HEAD_NODE_ID
        fake = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__qualname__}"
        provider = {"type": "external", "module": fake}  # its own type lacks a file in Ray's wheel, example.yaml
        provider |= {"gcs_address": f"127.0.0.1:{gcs}", "launch_multiple": True, "disable_node_updaters": True}
        config = folder / "home" / "ray_bootstrap_config.yaml"  # where `ray up` leaves it
        config.write_text(json.dumps(grows | {"provider": provider}))
        command.append(f"--autoscaling-config={config}")
    with (folder / "head.log").open("wb") as log:
        process = psutil.Popen(
            command,
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        found = Cluster(process, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment)
        found.until(lambda: process.poll() is not None or _answers(found), seconds=180)
        assert process.poll() is None, (folder / "head.log").read_text()
        yield found
    finally:
        family = [*process.children(recursive=True), process]
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a plan of five tiny jobs, beside its catalogue of 4 classes."""
    folder = tmp_path_factory.mktemp("plan")
    synthesise(folder / "catalogue", classes=4, images=64, seed=0)
    (folder / "tiny.toml").write_text(PLAN)
    return folder / "tiny.toml"


@pytest.fixture(scope="session")
def servers() -> type[MlflowServer]:
    """What starts another."""
    return MlflowServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    [port] = _free_ports(1)
    server = MlflowServer(tmp_path_factory.mktemp("server"), port)
    server.start()
    yield server
    server.signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    return _free_ports


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _answers(cluster: Cluster) -> bool:
    try:
        return cluster.alive() > 0
    except (OSError, ValueError, KeyError, TypeError):
        time.sleep(0.3)
        return False


def _title(process: psutil.Process) -> str:
    """What a process of Ray says that it does; "" for others."""
    with suppress(psutil.NoSuchProcess, IndexError):
        title = process.cmdline()[0]
        return title.removeprefix("ray::").split(".")[0].split("(")[0] if title.startswith("ray::") else ""
    return ""
