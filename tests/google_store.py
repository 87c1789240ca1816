"""A server that answers as Google Cloud Storage's XML API does, for one bucket, as far as we ask for it.

python tests/google_store.py PORT

Written after https://cloud.google.com/storage/docs/xml-api/reference-headers: an object has a generation, a new one
with each write; a write may ask for the one that it replaces, 0 for none. Google's own test bench has no listings in
XML, and pip knows no other stand-in that has.
"""

import email.utils
import hashlib
import itertools
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Found:
    content: bytes
    generation: int
    written: float = field(default_factory=time.time)

    @property
    def headers(self) -> dict[str, str]:
        written = email.utils.formatdate(self.written, usegmt=True)
        return {"ETag": self.tag, "x-goog-generation": str(self.generation), "Last-Modified": written}

    @property
    def tag(self) -> str:
        return f'"{hashlib.md5(self.content).hexdigest()}"'


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, Found] = {}  # noqa: RUF012 - one server in a process
    generations, lock = itertools.count(1), threading.Lock()

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/team").removeprefix("/")

    def do_GET(self) -> None:
        found = self.objects.get(self.name)
        if not self.name:
            self._list()
        elif found is None:
            self._answer(404)
        elif asked := self.headers.get("Range"):
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            part = {"Content-Range": f"bytes {first}-{last}/{len(found.content)}"}
            self._answer(206, found.content[first : last + 1], found.headers | part)
        else:
            self._answer(200, found.content, found.headers)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            if source := self.headers.get("x-goog-copy-source"):
                content = self.objects[unquote(source).partition("/")[2]].content
            there, expected = self.objects.get(self.name), self.headers.get("x-goog-if-generation-match")
            if expected is not None and int(expected) != (there.generation if there else 0):
                self._answer(412)
                return
            new = self.objects[self.name] = Found(content, next(self.generations))
        self._answer(200, headers=new.headers)

    def do_DELETE(self) -> None:
        self._answer(404 if self.objects.pop(self.name, None) is None else 204)

    def _list(self) -> None:
        prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><Generation>{one.generation}</Generation>"
            f"<LastModified>{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(one.written))}</LastModified>"
            f"<ETag>{escape(one.tag)}</ETag><Size>{len(one.content)}</Size></Contents>"
            for name, one in sorted(self.objects.copy().items())
            if name.startswith(prefix)
        )
        self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode())

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
