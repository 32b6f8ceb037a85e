"""Options in the query of a checkpoint's URL: ``s3://bucket/run?endpoint_url=http://...``.

Belongs here: taking a URL apart, and what a value written as text means. Does not belong here:
which options a medium knows.
"""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import parse_qsl

from dcp_engine.errors import UsageError
from dcp_engine.registry import scheme_of
from storage_backends.secrets import is_secret_name

__all__ = ["split_query"]

_MAX_DIGITS = 1000
_QUERY_IS_ADDRESS = frozenset({"http", "https"})
"""Schemes whose query belongs to the resource: a signed URL, for example."""


def split_query(url: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """``url`` without its query, and the options in the query.

    Of a chained URL the last link's query counts. Values are text, but for ``true``, ``false``,
    ``none``, whole numbers, and what begins with ``{`` or ``[``, which is JSON; a value whose name
    says that it is a credential is text whatever it looks like. A path that is no URL has no
    query, nor has a link over ``http`` one of ours.
    """
    text = os.fspath(url)
    head, chain, last = text.rpartition("::")
    if "://" not in last or scheme_of(last) in _QUERY_IS_ADDRESS or "?" not in last:
        return text, {}
    place, _, query = last.partition("?")
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in options:
            raise UsageError(f"option {name!r} is given twice", checkpoint=text)
        options[name] = value if is_secret_name(name) else _value(name, value, text)
    return f"{head}{chain}{place}", options


def _value(name: str, text: str, url: str) -> Any:
    lower = text.lower()
    if lower in ("true", "false"):
        return lower == "true"
    if lower == "none":
        return None
    if text.isascii() and text.removeprefix("-").isdigit():
        if len(text) > _MAX_DIGITS:
            raise UsageError(
                f"the number of option {name!r} has {len(text)} digits", checkpoint=url
            )
        return int(text)
    if text.startswith(("{", "[")):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(
                f"the value of option {name!r} begins like JSON, but is none", checkpoint=url
            ) from None
    return text
