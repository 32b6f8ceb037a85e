"""Credentials appear in no error, no log and no file, whatever goes wrong."""

from __future__ import annotations

import logging
import pickle
import traceback

import pytest

import dcp_engine as dcp
from dcp_engine.errors import StorageError
from storage_backends.fsspec import FsspecWriter, RetryPolicy
from storage_backends.fsspec_errors import storage_calls
from storage_backends.secrets import Secrets
from tests.servers.s3 import KEY, SECRET, S3Server
from tests.storage_backends.fsspec.mediums import BucketMedium
from tests.storage_backends.fsspec.states import empty, state

PASSWORD = "the-password-of-somebody"


def everything_said(error: BaseException) -> str:
    """What a traceback prints, and what travels to other ranks."""
    printed = "".join(traceback.format_exception(error))
    copy = pickle.loads(pickle.dumps(error)) if isinstance(error, StorageError) else error
    return f"{printed}\n{error!r}\n{copy}\n{copy!r}"


@pytest.mark.parametrize("action", ["deny", "fail", "throttle", "reset"])
@pytest.mark.parametrize("way", ["query", "options"])
def test_failed_saves_and_loads(
    s3: S3Server, caplog: pytest.LogCaptureFixture, action: str, way: str
) -> None:
    caplog.set_level(logging.INFO)
    bucket = s3.new_bucket()
    policy = RetryPolicy(attempts=2, sleep=lambda _: None)
    url = s3.url(f"{bucket}/run") if way == "query" else f"s3://{bucket}/run"
    options = {} if way == "query" else s3.options
    s3.tell({"match": [], "action": action, "times": 1000})
    said = caplog.text
    with pytest.raises(dcp.CheckpointException) as saved:
        dcp.save(
            state(),
            checkpoint_id=url,
            storage_writer=FsspecWriter(url, retries=policy, **options),
        )
    with pytest.raises(dcp.CheckpointException) as loaded:
        dcp.load(
            empty(),
            checkpoint_id=url,
            storage_reader=dcp.FsspecReader(url, retries=policy, **options),
        )
    said += everything_said(saved.value) + everything_said(loaded.value) + caplog.text
    assert bucket in said
    assert SECRET not in said
    assert KEY not in said
    assert s3.endpoint not in str(saved.value.checkpoint)


def test_files_of_a_checkpoint(s3: S3Server) -> None:
    bucket = s3.new_bucket()
    dcp.save(state(), checkpoint_id=s3.url(f"{bucket}/run"))
    for name, content in BucketMedium(s3.client(), bucket, "run").snapshot().items():
        assert SECRET.encode() not in content, name
        assert KEY.encode() not in content, name


@pytest.mark.parametrize(
    "url",
    [
        f"sftp://user:{PASSWORD}@127.0.0.1:1/run?retries=1",
        f"sftp://user@127.0.0.1:1/run?retries=0&password={PASSWORD}",
        f"sftp://127.0.0.1:1/run?nonsense=1&password={PASSWORD}",
        f"s3://b/run?no_such_option=1&secret={PASSWORD}&username=x&key=y",
        f"no-such-scheme://user:{PASSWORD}@host/run",
        f"zip://x::no-such-scheme://user:{PASSWORD}@host/run",
    ],
)
def test_places_that_cannot_be_opened(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(dcp.CheckpointError) as caught:
        dcp.save(state(), checkpoint_id=url, timeout=30)
    assert PASSWORD not in everything_said(caught.value)
    assert PASSWORD not in caplog.text


def test_what_a_library_says_is_not_chained_if_it_tells() -> None:
    """A traceback prints causes too."""
    secrets = Secrets("", {"password": PASSWORD}, {})

    def failing(error: Exception) -> StorageError:
        with (
            pytest.raises(StorageError) as caught,
            storage_calls("read", secrets=secrets, checkpoint="x://", file="f"),
        ):
            raise error
        return caught.value

    inner = ValueError(f"cannot log in with {PASSWORD}")
    outer = RuntimeError("it failed")
    outer.__cause__ = inner
    for error in (inner, outer):
        assert PASSWORD not in everything_said(failing(error))
    harmless = ValueError("cannot log in")
    assert failing(harmless).__cause__ is harmless
