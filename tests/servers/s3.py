"""An S3 endpoint for tests: moto in server mode, over HTTP."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.ports import free_port
from tests.servers.process import answers, server

KEY = "AKIATESTTESTTESTTEST"
SECRET = "a-secret-that-nobody-may-see"


class S3Server:
    """A running endpoint."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self._client: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """What s3fs is opened with."""
        return {"key": KEY, "secret": SECRET, "endpoint_url": self.endpoint}

    def client(self) -> Any:
        """boto3: another way to the same objects."""
        if self._client is None:
            import boto3

            self._client = boto3.client(
                "s3",
                region_name="us-east-1",
                endpoint_url=self.endpoint,
                aws_access_key_id=KEY,
                aws_secret_access_key=SECRET,
            )
        return self._client

    def obstore(self) -> Any:
        """A second client, in Rust, by its fsspec face."""
        from obstore.fsspec import FsspecStore

        return FsspecStore(
            "s3",
            access_key_id=KEY,
            secret_access_key=SECRET,
            endpoint=self.endpoint,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def url(self, path: str, **options: Any) -> str:
        """URL of ``bucket/key`` with all that is needed to open it in its query."""
        query = {"endpoint_url": self.endpoint, "key": KEY, "secret": SECRET, **options}
        return f"s3://{path}?{urlencode(query)}"

    def new_bucket(self) -> str:
        """The name of an empty bucket, made now."""
        name = f"bucket-{uuid.uuid4().hex}"
        self.client().create_bucket(Bucket=name)
        return name

    def tell(self, *faults: dict[str, Any]) -> None:
        """From now on, and until told otherwise, fail so; and forget the log.

        A fault: ``match`` (words, all in ``"METHOD /bucket/key?query"``, behind which a conditional
        request has `` If-``), ``action`` (``reset``, ``lose reply``, ``throttle``, ``fail``,
        ``deny``, ``refuse``, ``hang`` until told otherwise), ``times`` (1), ``after`` (0) requests.
        """
        self._ask("faults", json.dumps(list(faults)).encode())

    def log(self) -> list[dict[str, Any]]:
        """What was asked since the last ``tell``."""
        return list(self._ask("log")["log"])

    def wait_for(self, fault: str) -> None:
        """Until a request has met ``fault``."""
        deadline = time.monotonic() + 60
        while not any(entry["fault"] == fault for entry in self.log()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no request met {fault!r}")
            time.sleep(0.02)

    def most_at_once(self) -> int:
        """Most requests that were under way at a time since the last ``tell``."""
        return int(self._ask("log")["most_at_once"])

    def _ask(self, what: str, data: bytes | None = None) -> dict[str, Any]:
        method = "GET" if data is None else "PUT"
        request = urllib.request.Request(f"{self.endpoint}/-/{what}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.load(answer))


@contextmanager
def run_s3(directory: Path) -> Iterator[S3Server]:
    """An endpoint for the time of the block."""
    port = free_port()
    script = str(Path(__file__).with_name("s3_server.py"))
    command = [sys.executable, "-W", "ignore", script, str(port)]
    with server(command, directory / "s3.log", lambda: answers(port)):
        yield S3Server(port)
