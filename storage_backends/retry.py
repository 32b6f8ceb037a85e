"""Tries a request to a medium again, if what went wrong may pass.

Belongs here: what kind of failure an exception is, and how long to wait. Does not belong here:
what the engine makes of a failure that stays (``fsspec_errors``).

Exceptions are judged by what they say of themselves (HTTP status, service code, errno, class
name), so that no client library has to be imported, or installed.
"""

from __future__ import annotations

import enum
import errno
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
)

__all__ = ["Failure", "RetryPolicy", "causes", "classify", "http_status", "service_code"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Failure(enum.Enum):
    """What may be done about a failure."""

    TRANSIENT = "transient"
    """A connection broke, a server had a bad moment: again, soon."""
    THROTTLED = "throttled"
    """The medium asks for fewer requests: again, later."""
    PERMANENT = "permanent"
    """Refused, not there, not possible: never again."""


_THROTTLING_CODES = re.compile(
    r"SlowDown|Throttl|RequestLimitExceeded|TooManyRequests|ServiceUnavailable|ServerBusy|"
    r"BandwidthLimitExceeded|rateLimitExceeded",
    re.IGNORECASE,
)
_TRANSIENT_CODES = frozenset(
    {
        "InternalError",
        "InternalServerError",
        "RequestTimeout",
        "OperationTimedOut",
        "OperationAborted",
        "ConditionalRequestConflict",
        "XAmzContentSHA256Mismatch",
        "BadDigest",
        "IncompleteBody",
    }
)
_THROTTLING_STATUS = frozenset({429, 503})
_TRANSIENT_STATUS = frozenset({408, 500, 502, 504})
_PERMANENT_CLASSES = frozenset(
    {
        "AuthenticationException",
        "BadHostKeyException",
        "ClientAuthenticationError",
        "CredentialRetrievalError",
        "DefaultCredentialsError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "PermissionDeniedError",
        "UnauthenticatedError",
    }
)
_TRANSIENT_CLASSES = frozenset(
    {
        "ChannelException",
        "ClientConnectionError",
        "ClientPayloadError",
        "ConnectTimeoutError",
        "ConnectionClosedError",
        "EndpointConnectionError",
        "HTTPClientError",
        "IncompleteRead",
        "IncompleteReadError",
        "NoValidConnectionsError",
        "ProtocolError",
        "ReadTimeoutError",
        "ResponseStreamingError",
        "SSHException",
        "ServerDisconnectedError",
        "ServerTimeoutError",
        "ServiceRequestError",
        "ServiceResponseError",
        "TransportError",
    }
)
_TRANSIENT_ERRNO = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.EREMOTEIO,
        errno.ETIMEDOUT,
    }
)
_PERMANENT_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_IN_TEXT = re.compile(r"\bstatus(?: code)?[: ]+(?P<status>[1-5]\d\d)\b", re.IGNORECASE)
_CONNECTION_TEXT = re.compile(
    r"socket is closed|connection (?:dropped|lost|reset|refused|closed)|error sending request|"
    r"garbage packet|timed? ?out",
    re.IGNORECASE,
)


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it came from, as far as it says so; at most ten."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and len(seen) < 10 and current not in seen:
        yield current
        seen.append(current)
        hidden = current.__suppress_context__
        current = current.__cause__ or (None if hidden else current.__context__)


def http_status(error: BaseException) -> int | None:
    """The HTTP status that ``error`` carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int):
            return status
    for name in ("status", "status_code", "http_status", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int) and 100 <= status < 600:
            return status
    if type(error).__module__.partition(".")[0] == "obstore":
        match = _IN_TEXT.search(str(error))
        return int(match["status"]) if match else None
    return None


def service_code(error: BaseException) -> str:
    """The service's own word for what went wrong, or ``""``."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    code = getattr(error, "error_code", None)
    return code if isinstance(code, str) else ""


def classify(error: BaseException) -> Failure:
    """What kind of failure ``error`` is. What nobody knows is permanent."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        # fsspec's HTTP says so of whatever goes wrong.
        return classify(error.__cause__)
    if not isinstance(error, Exception) or isinstance(error, _PERMANENT_ERRORS):
        return Failure.PERMANENT
    # What the service said first: libraries translate it, and lose whether to slow down.
    said: BaseException | None = error
    for _ in range(5):
        verdict = None if said is None else _of_service(said)
        if verdict is not None:
            return verdict
        said = None if said is None else said.__cause__
    for each in causes(error):
        verdict = _of_one(each)
        if verdict is not None:
            return verdict
    return Failure.PERMANENT


def _of_one(error: BaseException) -> Failure | None:
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _PERMANENT_CLASSES or isinstance(error, _PERMANENT_ERRORS):
        return Failure.PERMANENT
    by_service = _of_service(error)
    if by_service is not None:
        return by_service
    if names & _TRANSIENT_CLASSES or isinstance(error, ConnectionError | TimeoutError):
        return Failure.TRANSIENT
    if isinstance(error, EOFError):
        return Failure.TRANSIENT  # so paramiko says that the connection was dropped
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EBUSY:
        return Failure.THROTTLED
    if number in _TRANSIENT_ERRNO:
        return Failure.TRANSIENT
    if number is not None:
        return None if error.__cause__ is not None else Failure.PERMANENT
    return Failure.TRANSIENT if _CONNECTION_TEXT.search(str(error)) else None


def _of_service(error: BaseException) -> Failure | None:
    code, status = service_code(error), http_status(error)
    if _THROTTLING_CODES.search(code) or status in _THROTTLING_STATUS:
        return Failure.THROTTLED
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
        return Failure.TRANSIENT
    return None if status is None or status < 400 else Failure.PERMANENT


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how soon. Waits double, and are drawn between half of that and all of it, so
    that ranks that failed together do not come back together."""

    attempts: int = 6
    """Of one request, the first one included."""
    seconds: float = 120.0
    """No new attempt begins after so long."""
    first_wait: float = 0.1
    """Seconds, after a transient failure."""
    first_wait_throttled: float = 1.0
    """Seconds, where the medium asks for fewer requests."""
    longest_wait: float = 10.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    """For tests."""

    def call(
        self,
        action: Callable[[], T],
        *,
        what: str,
        scrub: Callable[[str], str] = str,
        before_next: Callable[[BaseException], None] | None = None,
    ) -> T:
        """The result of ``action``, tried as often as it takes and is allowed.

        Args:
            what: for the log.
            scrub: takes credentials out of what is logged.
            before_next: called with the failure before each new attempt.
        """

        def again(state: RetryCallState) -> None:
            error = _error_of(state)
            logger.warning(
                "could not %s, attempt %d of %d, %s: %s",
                what,
                state.attempt_number,
                self.attempts,
                classify(error).value,
                scrub(f"{type(error).__name__}: {error}"),
            )
            if before_next is not None:
                before_next(error)

        retrying = Retrying(
            stop=stop_after_attempt(self.attempts) | stop_after_delay(self.seconds),
            wait=self._wait,
            retry=retry_if_exception(lambda error: classify(error) is not Failure.PERMANENT),
            sleep=self.sleep,
            before_sleep=again,
            reraise=True,
        )
        return retrying(action)

    def _wait(self, state: RetryCallState) -> float:
        throttled = classify(_error_of(state)) is Failure.THROTTLED
        first = self.first_wait_throttled if throttled else self.first_wait
        longest = min(first * 2.0 ** (state.attempt_number - 1), self.longest_wait)
        return random.uniform(longest / 2, longest)


def _error_of(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome is not None else None
    return error if error is not None else RuntimeError("nothing failed")
