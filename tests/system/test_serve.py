"""A model behind HTTP, on a real Ray Serve and a real MLflow database."""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from aliprod.inference.classify import Recogniser, classify
from aliprod.inference.pictures import listed
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.plan.jobs import Job
from aliprod.recipe import Stage
from aliprod.store import commit
from aliprod.store.lineage import Voice
from aliprod.synth.synth import synthesise
from aliprod.tracking.runs import JobProgress, PlanProgress
from aliprod.tracking.sync import Tracking

pytest.importorskip("ray.serve", reason="needs the extra `serve`")
MODEL = "shop.net.full"


@dataclass(frozen=True)
class Served:
    """A server of the version that the alias ``member`` marks, and the weights folders of versions 1 and 2."""

    url: str
    client: MlflowClient
    folders: tuple[Path, Path]
    pictures: list[Path]

    def ask(self, body: bytes, kind: str = "image/jpeg", path: str = "/predict") -> tuple[int, Any]:
        """Status and answer of a POST."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return bytes(answer.read())

    def expected(self, version: int) -> list[dict[str, Any]]:
        """What `aliprod predict` answers for the pictures."""
        recogniser = Recogniser.load([Voice(self.folders[version - 1])])
        return list(classify(recogniser, listed(list(map(str, self.pictures))), 1))


def network(seed: int) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        torch.manual_seed(seed)
        model = Classifier("test_resnet", 3)
        torch.nn.init.normal_(model.classifier.weight)
        model.train()(torch.randn(16, 3, 32, 32))
        config = weights.Config("test_resnet", (0.5,) * 3, (0.25,) * 3, "bicubic", 40, 32, epoch=seed, top1_error=0.5)
        weights.save(folder, model.state_dict(), config, weights.Classes((7, 8, 9), ("a", "", "c")))

    return fill


@pytest.fixture(scope="module")
def served(attended_module: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two versions in a registry, and a server; in the end Ctrl-C leaves nothing of it behind."""
    storage = tmp_path_factory.mktemp("storage")
    synthesise(storage / "photos", classes=3, images=18, seed=0)
    job = Job("net/full", "net", "test_resnet", "full", Stage(epochs=2), (), None, (), (), True, {})
    folder = storage / "jobs" / "net" / "full" / str(job.key)
    for seed, name in enumerate(("weights", "last")):
        commit.write(folder / name, network(seed), {})
    lines = [{"epoch": epoch, "time_ms": 1_700_000_000_000, "val/top1_error": 0.5} for epoch in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    uri = f"sqlite:///{storage}/mlflow.db"
    tracking = Tracking(uri, "shop", storage / "mlartifacts", print)
    tracking.show(PlanProgress('name = "shop"\n', "0" * 64, "FINISHED", "", (JobProgress(job, folder, "finished"),)))
    assert tracking.flush(120) == []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "aliprod", "serve", f"models:/{MODEL}@member", "--port", str(port)]
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "ALIPROD_"))}
    ours |= {"RAY_memory_monitor_refresh_ms": "0"}
    command += ["--storage", str(storage)]
    with psutil.Popen(command, env=ours, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
            pictures = sorted((storage / "photos" / "test").iterdir())[:6]
            folders = folder / "weights", folder / "last"
            yield Served(f"http://127.0.0.1:{port}", MlflowClient(uri, uri), folders, pictures)
            family = process.children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(120) == 130
            assert psutil.wait_procs(family, timeout=30)[1] == []
        finally:
            for one in [*process.children(recursive=True), process] if process.is_running() else []:
                one.kill()


def form(files: dict[str, bytes]) -> tuple[bytes, str]:
    part = '--limit\r\nContent-Disposition: form-data; name="file"; filename="{}"\r\n\r\n'
    body = b"".join(part.format(name).encode() + content + b"\r\n" for name, content in files.items())
    return body + b"--limit--\r\n", "multipart/form-data; boundary=limit"


def test_answers_are_those_of_predict(served: Served) -> None:
    expected = served.expected(1)
    for picture, answer in zip(served.pictures, expected, strict=True):
        status, told = served.ask(picture.read_bytes())
        assert (status, told.pop("model"), told.pop("version")) == (200, f"models:/{MODEL}@member", "1")
        assert told["class_id"] == answer["class_id"]
        assert [one["probability"] for one in told["top"]] == pytest.approx(
            [one["probability"] for one in answer["top"]], abs=2e-6
        )
    status, told = served.ask(*form({picture.name: picture.read_bytes() for picture in served.pictures}))
    assert (status, [one["path"] for one in told["answers"]]) == (200, [picture.name for picture in served.pictures])
    assert [one["class_id"] for one in told["answers"]] == [answer["class_id"] for answer in expected]
    assert json.loads(served.get("/healthz")) == {"status": "ok", "model": f"models:/{MODEL}@member", "version": "1"}
    assert b"Drop a photograph" in served.get("/")


def bad_uploads(sound: bytes) -> Iterator[tuple[bytes, str, str]]:
    """Body, type, and a word of the answer."""
    draw = random.Random(0)
    huge = io.BytesIO()
    Image.new("1", (10_000, 6_000)).save(huge, "PNG")
    yield b"", "image/jpeg", "is empty"
    yield b"this is no picture", "text/plain", "is no JPEG"
    yield huge.getvalue(), "image/png", "pixels large"
    yield b"nonsense", "multipart/form-data", "form"
    yield *form({}), "no file"
    yield *form({"a.jpg": b"nonsense"}), "None of the files"
    for _ in range(20):
        yield sound[: draw.randrange(4, len(sound) - 100)], "image/jpeg", "The picture is"
        yield draw.randbytes(draw.randrange(1, 1000)), "image/jpeg", "The picture is"


def test_bad_uploads_get_a_sentence_and_harm_nobody(served: Served) -> None:
    sound = served.pictures[0].read_bytes()
    for body, kind, word in bad_uploads(sound):
        status, told = served.ask(body, kind)
        assert 400 <= status < 500, (status, told, body[:50])
        assert word in told["error"], told
    assert served.ask(sound, path="/elsewhere")[0] == 404
    assert served.ask(sound, path="/healthz")[0] == 405
    both = served.ask(*form({"bad.jpg": b"nonsense", "good.jpg": sound}))
    assert (both[0], ["error" in one for one in both[1]["answers"]]) == (200, [True, False])
    assert served.ask(sound)[0] == 200


def test_what_is_too_big_is_refused(served: Served) -> None:
    status, told = served.ask(b"\xff\xd8\xff" + bytes(33 * 2**20))
    assert (status, told["error"]) == (413, "A request of more than 33,554,432 bytes is refused.")


def test_replicas_without_room_are_refused(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "aliprod", "serve", str(served.folders[0]), "--replicas", "999", "--port", port]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert (asked.returncode, "999 replicas take a core or GPU each" in asked.stderr) == (2, True), asked.stderr


def test_the_alias_is_followed_and_no_request_fails_meanwhile(served: Served) -> None:
    found, over = list[tuple[int, Any]](), threading.Event()

    def load() -> None:
        while not over.is_set():
            found.append(served.ask(served.pictures[0].read_bytes()))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    served.client.set_registered_model_alias(MODEL, "member", "2")
    end = time.monotonic() + 120
    while json.loads(served.get("/healthz"))["version"] != "2" and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(1)
    over.set()
    for thread in threads:
        thread.join()
    assert {status for status, _ in found} == {200}
    expected = {str(version): served.expected(version)[0]["probability"] for version in (1, 2)}
    assert expected["1"] != expected["2"]
    for _, told in found:
        assert told["probability"] == pytest.approx(expected[told["version"]], abs=2e-6)
    assert {told["version"] for _, told in found} == {"1", "2"}
