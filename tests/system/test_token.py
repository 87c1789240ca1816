"""A cluster that asks for a token tells who has none, or a wrong one, from a cluster that is not there."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from aliprod.catalogue.catalogue import Catalogue
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.store import commit

TOKEN = "a" * 64
JOIN = "import sys; from aliprod.cluster.session import join; join(sys.argv[1]); print('joined')"


def environment(home: str, mode: str, token: str = "") -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ours |= {"HOME": home, "RAY_AUTH_MODE": mode, "RAY_USAGE_STATS_ENABLED": "0"}
    return ours | ({"RAY_AUTH_TOKEN": token} if token else {})


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[str, str]]:
    """The address of a head that asks for the token, and a home folder without one."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
        command += ["--node-ip-address=127.0.0.1", "--num-cpus=3", "--include-dashboard=false"]
        command += [f"--temp-dir={folder}/ray", "--object-store-memory=80000000"]
        quiet = subprocess.DEVNULL
        head = psutil.Popen(
            command, env=environment(folder, "token", TOKEN), stdout=quiet, stderr=quiet, start_new_session=True
        )
        try:
            end = time.monotonic() + 120
            while join(f"127.0.0.1:{port}", environment(folder, "token", TOKEN)).returncode and time.monotonic() < end:
                assert head.poll() is None
            yield f"127.0.0.1:{port}", folder
        finally:
            for process in [*head.children(recursive=True), head]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait()


def join(address: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", JOIN, address], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("mode", "token"), [("disabled", ""), ("token", "b" * 64), ("token", "")])
def test_a_token_that_is_refused_is_told_from_a_cluster_that_does_not_answer(
    guarded: tuple[str, str], mode: str, token: str
) -> None:
    address, home = guarded
    refused = join(address, environment(home, mode, token))
    assert f"{address}: this Ray cluster asks for a token, and none, or a wrong one, was shown." in refused.stderr
    assert "RAY_AUTH_MODE=token" in refused.stderr
    assert join(address, environment(home, "token", TOKEN)).stdout == "joined\n"


@pytest.mark.usefixtures("attended")
def test_replicas_on_such_a_cluster_answer_until_ctrl_c_which_leaves_the_cluster(
    guarded: tuple[str, str], packages: Catalogue, tmp_path: Path
) -> None:
    pytest.importorskip("ray.serve", reason="needs the extra `serve`")
    address, home = guarded
    config = weights.Config("test_resnet", (0.5,) * 3, (0.25,) * 3, "bicubic", 40, 32)
    model, names = Classifier("test_resnet", 2), weights.Classes((7, 8), ("a", "b"))
    commit.write(tmp_path / "weights", lambda new: weights.save(new, model.state_dict(), config, names), {})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "aliprod", "serve", str(tmp_path / "weights"), "--port", str(port)]
    command += ["--address", address, "--replicas", "2", "--views", "centre"]
    env, picture = environment(home, "token", TOKEN), Path(packages.test.path(0)).read_bytes()
    with psutil.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        try:
            assert f"http://127.0.0.1:{port}/" in server.stdout.readline()
            found = set()
            for _ in range(8):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/predict", picture, timeout=60) as answer:
                    found.add(answer.read())
            [told] = map(json.loads, found)
            assert {told["class_id"], *(one["class_id"] for one in told["top"])} == {7, 8}
            os.killpg(server.pid, signal.SIGINT)
            assert server.wait(120) == 130
        finally:
            if server.is_running():
                server.kill()
    assert join(address, env).returncode == 0
