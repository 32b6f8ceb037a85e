"""An S3 endpoint that fails when it is told to: moto behind a middleware. Run as a script.

``python s3_server.py PORT``. Rules come by ``PUT /-/faults``, what was asked is told by
``GET /-/log``. See ``tests.servers.s3`` for the side of the tests.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto import settings
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_ERRORS = {
    "throttle": ("503 Slow Down", "SlowDown"),
    "fail": ("500 Internal Server Error", "InternalError"),
    "deny": ("403 Forbidden", "AccessDenied"),
    "refuse": ("501 Not Implemented", "NotImplemented"),
}
PAGE = 100
"""Objects in one page of a listing: less than S3's 1,000, so that tests need not make so many."""


class Endpoint:
    """The WSGI application."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self._lock = threading.Lock()
        # moto looks whether an object is there and stores it later; S3 does both at once.
        self._conditional = threading.Lock()
        self._faults: list[dict[str, Any]] = []
        self._log: list[dict[str, Any]] = []
        self._released = threading.Event()
        self._at_once = 0
        self._most_at_once = 0

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith("/-/"):
            return self._control(environ, start)
        with self._lock:
            self._at_once += 1
            self._most_at_once = max(self._most_at_once, self._at_once)
        try:
            return self._serve(environ, start)
        finally:
            with self._lock:
                self._at_once -= 1

    def _serve(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        fault = self._fault_for(environ)
        entry = {
            "method": environ["REQUEST_METHOD"],
            "path": environ["PATH_INFO"],
            "query": environ.get("QUERY_STRING", ""),
            "range": environ.get("HTTP_RANGE", ""),
            "nbytes": int(environ.get("CONTENT_LENGTH") or 0),
            "fault": fault,
        }
        with self._lock:
            self._log.append(entry)
        if fault == "hang":
            self._released.wait(60)
        if fault == "reset":
            return self._reset(environ)
        if fault in _ERRORS:
            _drain(environ)
            status, code = _ERRORS[fault]
            text = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
            body = b"" if environ["REQUEST_METHOD"] == "HEAD" else text
            start(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            return [body]
        if environ.get("HTTP_IF_NONE_MATCH") or environ.get("HTTP_IF_MATCH"):
            with self._conditional:
                answer = list(self._app(environ, start))
        else:
            answer = list(self._app(environ, start))
        if fault == "lose reply":
            return self._reset(environ)
        return answer

    def _fault_for(self, environ: dict[str, Any]) -> str | None:
        asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        if environ.get("HTTP_IF_NONE_MATCH") or environ.get("HTTP_IF_MATCH"):
            asked += " If-"
        with self._lock:
            for fault in self._faults:
                if all(word in asked for word in fault["match"]):
                    fault["seen"] = fault.get("seen", 0) + 1
                    after = fault.get("after", 0)
                    if after < fault["seen"] <= after + fault.get("times", 1):
                        return str(fault["action"])
        return None

    @staticmethod
    def _reset(environ: dict[str, Any]) -> Iterable[bytes]:
        connection: socket.socket = environ["werkzeug.socket"]
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # The handler's own files would keep it open.
        os.close(connection.detach())
        return []

    def _control(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            if environ["REQUEST_METHOD"] == "PUT":
                self._faults = json.loads(_drain(environ))
                self._released.set()  # what hangs now
                self._released = threading.Event()
                self._log = []
                self._most_at_once = self._at_once
            answer = json.dumps({"log": self._log, "most_at_once": self._most_at_once}).encode()
        start("200 OK", [("Content-Type", "application/json")])
        return [answer]


def _drain(environ: dict[str, Any]) -> bytes:
    return bytes(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))


def main() -> None:
    settings.get_s3_default_max_keys = lambda: PAGE
    app = Endpoint(DomainDispatcherApplication(create_backend_app))
    make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True).serve_forever()


if __name__ == "__main__":
    main()
