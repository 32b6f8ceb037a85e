"""Which parts of a URL, of options and of the environment are credentials, and text without them.

Belongs here: the names by which options are known to be secret, and the replacement. Does not
belong here: the URL itself in messages (``dcp_engine.redaction``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import unquote

from dcp_engine.redaction import HIDDEN

__all__ = ["Secrets", "is_secret_name"]

_SECRET = re.compile(
    r"key|secret|token|pass|credential|sas|sig|auth|connection_string|cookie|session",
    re.IGNORECASE,
)
_NOT_SECRET = re.compile(r"(file|filename|files|path|policy|anon|use_|_retries)$", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"^(AWS|S3|AZURE|GOOGLE|GCS|GCLOUD|HF|SSH|SFTP)_", re.IGNORECASE)
_NAMED_USERS = frozenset({"ftp", "hdfs", "sftp", "smb", "ssh", "webhdfs"})
"""Schemes where what stands before the "@" alone is a name; elsewhere it may be a token."""
_WHOLE_WORDS_BELOW = 6
"""A secret shorter than this is replaced only where it stands alone: "us" is in every text."""


def is_secret_name(name: str) -> bool:
    """Whether an option called ``name`` holds a credential, as its name says."""
    return bool(_SECRET.search(name)) and not _NOT_SECRET.search(name)


class Secrets:
    """The credentials of one medium, to be taken out of what its libraries say.

    Args:
        url: with user, password and query, perhaps chained.
        options: what the medium is opened with, nested.
        environment: default: that of this process.
    """

    def __init__(
        self,
        url: str = "",
        options: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        found = {*_of_url(url), *_of_options(options or {}, False)}
        found |= _of_environment(os.environ if environment is None else environment)
        ordered = sorted((text for text in found if text), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_pattern, ordered))) if ordered else None

    def scrub(self, text: str) -> str:
        """``text`` without credentials."""
        return text if self._pattern is None else self._pattern.sub(HIDDEN, text)

    def are_in(self, text: str) -> bool:
        """Whether ``text`` holds a credential."""
        return self._pattern is not None and self._pattern.search(text) is not None


def _pattern(secret: str) -> str:
    escaped = re.escape(secret)
    return rf"(?<!\w){escaped}(?!\w)" if len(secret) < _WHOLE_WORDS_BELOW else escaped


def _of_url(url: str) -> Iterator[str]:
    for part in url.split("::"):
        if "://" not in part:
            continue
        place, _, query = part.partition("?")
        host, _, path = place.partition("://")[2].partition("/")
        user = host.rpartition("@")[0]
        if not user and ":" in host and "@" in path:
            user = f"{host}/{path.rpartition('@')[0]}"
        if user:
            name, _, password = user.partition(":")
            is_named = place.partition("://")[0].lower() in _NAMED_USERS
            yield from _forms([password] if is_named else [user, password or name])
        for item in query.split("&"):
            name, _, value = item.partition("=")
            if is_secret_name(name):
                yield from _forms([value])


def _forms(texts: Iterable[str]) -> Iterator[str]:
    """As it is written in a URL, and as it is meant."""
    for text in texts:
        yield text
        yield unquote(text)


def _of_options(options: Mapping[str, object], is_secret: bool) -> Iterator[str]:
    for name, value in options.items():
        yield from _of_value(value, is_secret or is_secret_name(str(name)))


def _of_value(value: object, is_secret: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from _of_options(value, is_secret)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _of_value(item, is_secret)
    elif isinstance(value, bytes):
        if is_secret:
            yield value.decode(errors="replace")
    elif isinstance(value, str) and is_secret:
        yield value


def _of_environment(environment: Mapping[str, str]) -> set[str]:
    return {
        value
        for name, value in environment.items()
        if _ENVIRONMENT.match(name) and is_secret_name(name)
    }
