"""A model behind HTTP, by Ray Serve: a picture in, its classes out.

POST /predict    a picture as the body, or several as files of a form
GET /healthz     the model and the version that answers
GET /            a page to drop a photograph on
"""

import asyncio
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from aliprod.catalogue.decode import Unreadable
from aliprod.cluster.session import Signals, join
from aliprod.errors import AliprodError, Failed, Refused
from aliprod.inference.classify import CHUNK, Answer, Recogniser
from aliprod.inference.pictures import Squares, squares
from aliprod.recipe import Views
from aliprod.store.lineage import Voice

MOST_BYTES = 32 * 2**20  # of a request
POLL_SECONDS = 10.0  # after which it is asked again which version is meant
_WAIT_SECONDS = 0.005  # for pictures that are looked at together
_APP = "aliprod"
_LEAN = ("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP")  # a seventh of its CPU
_PAGE = Path(__file__).with_name("drop.html")
_ONLY_ITSELF = (
    "default-src 'none'; connect-src 'self'; img-src blob:; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)

log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Serving:
    """What is served, by its name for people, and how. ``find``: asked now and then whose word counts."""

    model: str
    find: Callable[[], Sequence[Voice]]
    views: Views
    top: int


@dataclass(frozen=True, eq=False)
class Version:
    """One state of a model, loaded."""

    voices: Sequence[Voice]
    recogniser: Recogniser
    number: str  # MLflow's, else the first digits of a hash of the weights

    @classmethod
    def load(cls, serving: Serving, voices: Sequence[Voice]) -> "Version":
        """Refused: as `Recogniser.load`."""
        recogniser = Recogniser.load(voices, serving.views, serving.top)
        digest = hashlib.sha256(json.dumps(recogniser.facts["members"]).encode()).hexdigest()[:12]
        return cls(voices, recogniser, str(voices[0].version or digest))


class Endpoint:
    """A replica. It asks for the version that is meant, loads another beside the one that answers, and swaps them."""

    def __init__(self, serving: Serving) -> None:
        torch.set_num_threads(1)  # reading has the other cores, and more replicas have them
        self.serving, self.page = serving, _PAGE.read_text(encoding="utf-8")
        self.current = Version.load(serving, serving.find())
        self.readers = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            try:
                if (voices := self.serving.find()) != self.current.voices:
                    self.current = Version.load(self.serving, voices)
            except (AliprodError, OSError) as error:
                log.warning("%s goes on with version %s: %s", self.serving.model, self.current.number, error)

    async def __call__(self, request: Request) -> Response:
        """Answer a request; one that cannot be answered gets a sentence and its status."""
        version = self.current
        named = {"model": self.serving.model, "version": version.number}
        try:
            match request.method, request.url.path:
                case "GET", "/":
                    return HTMLResponse(self.page, headers={"Content-Security-Policy": _ONLY_ITSELF})
                case "GET", "/healthz":
                    return JSONResponse({"status": "ok"} | named)
                case "POST", "/predict":
                    found = await self._predict(_limited(request), version)
                    return JSONResponse(found | named, 422 if "error" in found else 200)
                case _, "/" | "/healthz" | "/predict":
                    raise HTTPException(405, "GET / and /healthz, POST /predict.")
            raise HTTPException(404, "There are /, /healthz and /predict.")
        except HTTPException as error:
            return JSONResponse({"error": error.detail}, error.status_code)
        except (MultiPartException, ClientDisconnect) as error:
            return JSONResponse({"error": f"The form cannot be read: {error}"}, 400)

    async def _predict(self, request: Request, version: Version) -> Answer:
        """The answer for the picture of a request, or those for its pictures."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return await self._answer(version, await request.body())
        async with request.form() as form:
            parts = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
            files = [(part.filename, await part.read()) for part in parts]
        if not files:
            return {"error": "The form holds no file."}
        found = await asyncio.gather(*(self._answer(version, content) for _, content in files))
        answers = [{"path": name} | answer for (name, _), answer in zip(files, found, strict=True)]
        nothing = {"error": "None of the files can be read."} if all("error" in one for one in found) else {}
        return nothing | {"answers": answers}

    async def _answer(self, version: Version, content: bytes) -> Answer:
        loop = asyncio.get_running_loop()
        try:
            seen = await loop.run_in_executor(self.readers, squares, version.recogniser.sizes, content)
        except Unreadable as reason:
            return {"error": f"The picture {reason}."}
        answer: Answer = await self._look((version.recogniser, seen))
        return answer

    @serve.batch(max_batch_size=CHUNK, batch_wait_timeout_s=_WAIT_SECONDS)
    async def _look(self, asked: list[tuple[Recogniser, Squares]]) -> list[Answer]:
        """Pictures that came at about the same time; while versions are swapped, of two."""
        found: list[Answer] = []
        for recogniser, some in groupby(asked, itemgetter(0)):
            found += await asyncio.to_thread(recogniser.answers, [seen for _, seen in some])
        return found


def run(serving: Serving, host: str, port: int, replicas: int, address: str | None) -> None:
    """Serve until a signal ends it, on a local Ray of our own, or on the head of the cluster at ``address``.

    Raises:
        Refused: the port is taken, the replicas have no room, or as `Recogniser.load`. Unreachable: no such cluster.
        Failed: it did not start.
        KeyboardInterrupt: Ctrl-C, SIGTERM; nothing is left behind.
    """
    signals = Signals()
    if not address:
        _look_at_port(host, port)
    Version.load(serving, serving.find())  # of a replica that cannot start, Ray Serve does not say why
    for name in _LEAN:
        os.environ.setdefault(name, "0")
    with signals.starting_others():
        join(address)
    log.setLevel(logging.WARNING)
    has = ray.cluster_resources()
    deployment = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=2 * CHUNK,
        ray_actor_options={"num_gpus": int("GPU" in has)},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    try:
        if replicas > (room := int(has.get("GPU", has["CPU"]))):
            what = f"{replicas} replicas take a core or GPU each, and here are {room}."
            if not address:  # it would wait for ever
                raise Refused(what, "--replicas", "Give less, or the --address of a cluster.")
            print(f"{what} Waiting until the cluster has grown (Ctrl-C ends it).", flush=True)
        serve.start(http_options=HTTPOptions(host=host, port=port, location="HeadOnly"))
        serve.run(deployment(Endpoint).bind(serving), name=_APP)
        print(f"{serving.model} is at http://{host}:{port}/ (Ctrl-C ends it).", flush=True)
        threading.Event().wait()
    except RuntimeError as error:
        raise Failed(f"Ray Serve could not start it: {str(error).strip().splitlines()[-1]}", serving.model) from error
    finally:
        if address:  # else all of it ends with Ray
            serve.delete(_APP)
        ray.shutdown()


def _look_at_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        what, advice = f"cannot be listened at: {error.strerror}.", "Give another --port or --host."
        raise Refused(what, f"{host}:{port}", advice) from error


def _limited(request: Request) -> Request:
    """A request whose body may have so many bytes, however many it says. HTTPException (413): it has more."""
    taken = 0

    async def receive() -> Any:
        nonlocal taken
        message = await request.receive()
        taken += len(message.get("body", b""))
        if taken > MOST_BYTES:
            raise HTTPException(413, f"A request of more than {MOST_BYTES:,} bytes is refused.")
        return message

    return Request(request.scope, receive)
