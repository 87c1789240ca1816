"""A cluster that asks for a token tells who has none, or a wrong one, from a cluster that is not there."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

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
        command += ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--include-dashboard=false"]
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
