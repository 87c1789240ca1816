"""An S3 server (moto's) that answers after a while and moves so many bytes a second, in all.

python benchmarks/slow_s3.py --port 5005 [--latency 0.02] [--megabytes 100]
"""

import argparse
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple


class Slow:
    """Holds each request for its latency, and for its share of the line."""

    def __init__(self, application: Callable[..., Iterable[bytes]], latency: float, rate: float) -> None:
        self.application, self.latency, self.rate = application, latency, rate
        self.lock, self.free = threading.Lock(), 0.0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        time.sleep(self.latency)
        self._move(int(environ.get("CONTENT_LENGTH") or 0))
        answer = b"".join(self.application(environ, start_response))
        self._move(len(answer))
        return [answer]

    def _move(self, size: int) -> None:
        with self.lock:  # one line for all: who comes later waits for those before
            self.free = max(self.free, time.monotonic()) + size / self.rate
            until = self.free
        time.sleep(max(0.0, until - time.monotonic()))


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=5005)
    parser.add_argument("--latency", type=float, default=0.02)
    parser.add_argument("--megabytes", type=float, default=100.0)
    asked = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = Slow(DomainDispatcherApplication(create_backend_app), asked.latency, asked.megabytes * 1e6)
    run_simple("127.0.0.1", asked.port, application, threaded=True)


if __name__ == "__main__":
    main()
