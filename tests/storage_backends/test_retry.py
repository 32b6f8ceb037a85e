"""Which failures may pass, and how often and how soon a request is made again."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from storage_backends.retry import Failure, RetryPolicy, classify

THROTTLED, TRANSIENT, PERMANENT = Failure.THROTTLED, Failure.TRANSIENT, Failure.PERMANENT


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """As gcsfs' and aiohttp's."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}")
        self.code = status


class SSHException(Exception):
    """As paramiko's, and below its refusal."""


class AuthenticationException(SSHException):
    pass


def caused(error: BaseException, by: BaseException) -> BaseException:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ClientError("SlowDown", 503), THROTTLED),
        (ClientError("ThrottlingException", 400), THROTTLED),
        (ClientError("ServiceUnavailable", 503), THROTTLED),
        (ClientError("503", 503), THROTTLED),
        (HttpError(429), THROTTLED),
        (OSError(errno.EBUSY, "Please reduce your request rate"), THROTTLED),
        (ClientError("InternalError", 500), TRANSIENT),
        (ClientError("RequestTimeout", 400), TRANSIENT),
        (ClientError("ConditionalRequestConflict", 409), TRANSIENT),
        (HttpError(502), TRANSIENT),
        (ConnectionResetError(), TRANSIENT),
        (TimeoutError(), TRANSIENT),
        (EOFError(), TRANSIENT),
        (SSHException("Timeout opening channel."), TRANSIENT),
        (OSError("Socket is closed"), TRANSIENT),
        (OSError(errno.EIO, "Input/output error"), TRANSIENT),
        (caused(OSError(errno.EIO, "translated"), ClientError("Throttling", 400)), THROTTLED),
        (caused(RuntimeError("wrapped"), ConnectionResetError()), TRANSIENT),
        (ClientError("AccessDenied", 403), PERMANENT),
        (ClientError("NoSuchBucket", 404), PERMANENT),
        (ClientError("PreconditionFailed", 412), PERMANENT),
        (caused(OSError(errno.EINVAL, "translated"), ClientError("BadRequest", 400)), PERMANENT),
        (HttpError(401), PERMANENT),
        (AuthenticationException("no"), PERMANENT),
        (FileNotFoundError(errno.ENOENT, "gone"), PERMANENT),
        (caused(FileNotFoundError(), ClientError("NoSuchKey", 404)), PERMANENT),
        (caused(FileNotFoundError("by fsspec's HTTP"), ConnectionResetError()), TRANSIENT),
        (caused(FileNotFoundError("by fsspec's HTTP"), HttpError(503)), THROTTLED),
        (caused(FileExistsError(), ConnectionResetError()), PERMANENT),
        (FileExistsError(), PERMANENT),
        (PermissionError(), PERMANENT),
        (OSError(errno.ENOSPC, "full"), PERMANENT),
        (OSError("Failure"), PERMANENT),
        (NotImplementedError(), PERMANENT),
        (ValueError("nobody knows"), PERMANENT),
        (KeyboardInterrupt(), PERMANENT),
    ],
    ids=lambda value: repr(value) if isinstance(value, BaseException) else value.value,
)
def test_kinds_of_failure(error: BaseException, failure: Failure) -> None:
    assert classify(error) is failure


class Clock:
    """Remembers how long it was to sleep."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def policy(self, **options: Any) -> RetryPolicy:
        return RetryPolicy(sleep=self.slept.append, **options)


def failing(times: int, error: BaseException) -> Callable[[], str]:
    left = [error] * times

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    return call


def test_waits_double_up_to_a_bound_and_are_longer_when_throttled() -> None:
    clock = Clock()
    policy = clock.policy(attempts=8, longest_wait=2.0)
    assert policy.call(failing(7, TimeoutError()), what="x") == "done"
    bounds = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert all(b / 2 <= s <= b for s, b in zip(clock.slept, bounds, strict=True))
    clock.slept.clear()
    assert policy.call(failing(2, HttpError(503)), what="x") == "done"
    assert all(b / 2 <= s <= b for s, b in zip(clock.slept, [1.0, 2.0], strict=True))


def test_the_last_failure_is_raised_as_it_is() -> None:
    error = ConnectionResetError("again")
    clock = Clock()
    with pytest.raises(ConnectionResetError) as caught:
        clock.policy(attempts=3).call(failing(5, error), what="x")
    assert caught.value is error
    assert len(clock.slept) == 2


@pytest.mark.parametrize("error", [PermissionError("no"), KeyboardInterrupt()])
def test_what_cannot_pass_is_raised_at_once(error: BaseException) -> None:
    clock = Clock()
    with pytest.raises(type(error)):
        clock.policy().call(failing(1, error), what="x")
    assert clock.slept == []


def test_the_log_tells_without_credentials(caplog: pytest.LogCaptureFixture) -> None:
    Clock().policy().call(
        failing(1, TimeoutError("of secret")),
        what="read f",
        scrub=lambda text: text.replace("secret", "***"),
    )
    assert "could not read f, attempt 1 of 6, transient: TimeoutError: of ***" in caplog.text
    assert "secret" not in caplog.text


def test_before_next_can_put_an_end_to_it() -> None:
    def stop(error: BaseException) -> None:
        raise EOFError("the file ends here") from error

    with pytest.raises(EOFError, match="ends here"):
        Clock().policy().call(failing(1, TimeoutError()), what="x", before_next=stop)
