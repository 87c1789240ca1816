"""What the tests start beside aliprod: a PostgreSQL of their own, and what loses answers on the way to a server."""

import http.client
import os
import pwd
import signal
import subprocess
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

# Debian's place, newest first; None where the package is not installed
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: float(path.parent.name))


@dataclass
class Postgres:
    """On loopback, below a folder, with a database and a user `mlflow`; as somebody who is not root."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        data, first = self.folder / "data", not (self.folder / "data").exists()
        if first:
            self._run("initdb", "--pgdata", str(data), "--username=mlflow", "--auth=trust", "--no-sync")
        options = ("-F", "-p", str(self.port), "-k", str(self.folder), "-h", "127.0.0.1")
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(_programs() / "postgres"), "-D", str(data), *options],
                cwd="/", stdout=log, stderr=log, start_new_session=True, **self._somebody(),
            )  # fmt: skip
        reach = ("-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow")
        while self._run("pg_isready", *reach, check=False):
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.1)
        if first:
            self._run("createdb", *reach, "mlflow")

    def signal(self, number: int) -> None:
        """To the postmaster and all that it has started."""
        assert self.process is not None
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for process in (pid, *map(int, children)):
            with suppress(ProcessLookupError):  # one that has just ended
                os.kill(process, number)
        if number == signal.SIGKILL:
            self.process.wait()

    def _run(self, program: str, *words: str, check: bool = True) -> int:
        command = [str(_programs() / program), *words]
        return subprocess.run(command, cwd="/", capture_output=True, check=check, **self._somebody()).returncode

    def _somebody(self) -> dict[str, Any]:
        if os.getuid():
            return {}
        nobody = pwd.getpwnam("nobody")
        os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _programs() -> Path:
    assert PROGRAMS is not None
    return PROGRAMS


class Proxy(ThreadingHTTPServer):
    """What stands before a server of this machine.

    Attributes:
        fault: "refuse" answers 503; "lose" has the server do what is asked, and answers 503 to all but GET; "" neither.
        lost: how many answers.
    """

    daemon_threads = True

    def __init__(self, port: int, behind: int) -> None:
        super().__init__(("127.0.0.1", port), _Passing)
        self.behind, self.fault, self.lost = behind, "", 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Passing(BaseHTTPRequestHandler):
    def pass_on(self) -> None:
        proxy = cast(Proxy, self.server)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if proxy.fault == "refuse":
            self._answer(503, [], b"busy")
            return
        with closing(http.client.HTTPConnection("127.0.0.1", proxy.behind)) as connection:
            try:
                connection.request(self.command, self.path, body, dict(self.headers))
                real = connection.getresponse()
                status, headers, answer = real.status, real.getheaders(), real.read()
            except OSError:  # nobody there: nor is this
                self.close_connection = True
                return
        if proxy.fault == "lose" and self.command != "GET":
            proxy.lost += 1
            self._answer(503, [], b"busy")
        else:
            self._answer(status, headers, answer)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = pass_on

    def _answer(self, status: int, headers: list[tuple[str, str]], answer: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with suppress(BrokenPipeError):  # nobody waits any more
            self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass
