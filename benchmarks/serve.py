"""Requests/s and latency of `aliprod serve`, against what its network does alone on the same cores in the same run.

The network and the pictures are those of many_pictures.py. First the network alone, then with reading (JPEG decoded,
squared) in threads, in this process: no server can do more. Then a server on a local Ray and clients beside it on the
same cores, each of which sends a picture as soon as it has its answer. Then bad uploads: cut short, random, empty.

    OMP_WAIT_POLICY=passive python benchmarks/serve.py [--seconds 15] [--clients 32] [--bad 10000]
"""

import argparse
import asyncio
import io
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import psutil
from many_pictures import bare_rate, picture, small_network
from ratio import header

from aliprod.inference.classify import CHUNK, Recogniser
from aliprod.inference.pictures import squares
from aliprod.store.lineage import Voice


def main() -> None:
    """The limit, then the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--bad", type=int, default=10_000)
    asked = parser.parse_args()
    print(header())
    uploads = [jpeg(seed) for seed in range(64)]
    with tempfile.TemporaryDirectory(prefix="serve-") as temporary:
        folder = Path(temporary) / "weights"
        small_network(folder)
        recogniser = Recogniser.load([Voice(folder)], "center")
        alone, began = bare_rate(recogniser, CHUNK), time.process_time()
        reading = reading_rate(recogniser, uploads, asked.seconds)
        cpu = 1e3 * (time.process_time() - began) / (reading * asked.seconds)
        print(f"the network alone: {alone:,.0f} pictures/s; with reading: {reading:,.0f}, {cpu:.1f} ms of CPU each")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "aliprod", "serve", str(folder), "--views", "centre", "--port", str(port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
            try:
                if server.stdout is None or not server.stdout.readline():
                    raise SystemExit("it did not start")
                asyncio.run(measure(f"http://127.0.0.1:{port}", uploads, reading, asked, server.pid))
            finally:
                os.killpg(server.pid, signal.SIGINT)
        print(f"ended by Ctrl-C with status {server.returncode}")


async def measure(url: str, uploads: list[bytes], limit: float, asked: argparse.Namespace, server: int) -> None:
    """Load, then bad uploads."""
    await load(url, uploads, 3, asked.clients)  # warm
    for clients in (1, asked.clients):
        before, ours = cpu_of(server), time.process_time()
        seconds, statuses = await load(url, uploads, asked.seconds, clients)
        cpu, ours = cpu_of(server) - before, time.process_time() - ours
        rate = len(seconds) / asked.seconds
        median, late = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
        print(
            f"{clients} clients: {rate:,.0f} requests/s, {rate / limit:.2f} of the limit with reading; "
            f"median {1e3 * median:.0f} ms, p99 {1e3 * late:.0f} ms; statuses {dict(statuses)}; CPU a request: server "
            f"{1e3 * cpu / len(seconds):.1f} ms, clients {1e3 * ours / len(seconds):.1f} ms"
        )
    statuses = await send(url, bad_uploads(asked.bad, uploads), asked.clients)
    print(f"{asked.bad:,} bad uploads: statuses {dict(statuses)}")
    async with aiohttp.ClientSession() as session, session.get(f"{url}/healthz") as answer:
        print(f"afterwards: {await answer.text()}")


async def load(url: str, uploads: list[bytes], seconds: float, clients: int) -> tuple[list[float], Counter[int]]:
    """Latencies in seconds, and statuses, of so many clients for so long."""
    found, statuses, end = list[float](), Counter[int](), time.perf_counter() + seconds

    async def client(number: int) -> None:
        while (began := time.perf_counter()) < end:
            number += 1
            async with session.post(f"{url}/predict", data=uploads[number % len(uploads)]) as answer:
                await answer.read()
            statuses[answer.status] += 1
            found.append(time.perf_counter() - began)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*map(client, range(clients)))
    return found, statuses


async def send(url: str, bodies: Iterator[bytes], clients: int) -> Counter[int]:
    """Send each once; the statuses."""
    statuses = Counter[int]()

    async def client() -> None:
        for body in bodies:
            async with session.post(f"{url}/predict", data=body) as answer:
                await answer.read()
            statuses[answer.status] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client() for _ in range(clients)))
    return statuses


def bad_uploads(count: int, uploads: list[bytes]) -> Iterator[bytes]:
    """Pictures cut short, with bytes changed in the header, random bytes, nothing."""
    draw = random.Random(0)
    for number in range(count):
        sound = uploads[number % len(uploads)]
        cut = sound[: draw.randrange(len(sound) * 9 // 10)]
        yield [cut, draw.randbytes(20) + sound[20:], draw.randbytes(draw.randrange(2000)), b""][number % 4]


def reading_rate(recogniser: Recogniser, uploads: list[bytes], seconds: float) -> float:
    """Pictures/s of reading and looking, one process, a reading thread a core."""
    began, done = time.perf_counter(), 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as readers:
        ahead = [readers.submit(squares, recogniser.sizes, upload) for upload in uploads[:CHUNK]]
        while time.perf_counter() < began + seconds:
            ready = [one.result() for one in ahead]
            ahead = [readers.submit(squares, recogniser.sizes, upload) for upload in uploads[:CHUNK]]
            recogniser.answers(ready)
            done += CHUNK
    return done / (time.perf_counter() - began)


def cpu_of(pid: int) -> float:
    """Seconds of CPU of a process and all below it, so far."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in family if one.is_running())


def jpeg(seed: int) -> bytes:
    """A picture as a file."""
    content = io.BytesIO()
    picture(seed).save(content, "JPEG", quality=85)
    return content.getvalue()


if __name__ == "__main__":
    main()
