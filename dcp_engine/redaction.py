"""Takes credentials out of text that people will see.

Belongs here: URLs without what is secret in them. Does not belong here: which options of a medium
are secret (``storage_backends.secrets``).
"""

from __future__ import annotations

import re

__all__ = ["HIDDEN", "redact_url"]

HIDDEN = "***"
"""What stands where a credential was."""

_PART = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<place>[^?]*)(?P<query>\?.*)?", re.S)


def redact_url(text: str) -> str:
    """``text``, if it is a URL, without user, password and query; anything else as it is.

    All links of a chained URL (``a::b://...``) are treated.
    """
    if "://" not in text:
        return text
    return "::".join(_redact(part) for part in text.split("::"))


def _redact(part: str) -> str:
    match = _PART.fullmatch(part)
    if match is None:
        return part
    query = f"?{HIDDEN}" if match["query"] else ""
    return f"{match['scheme']}{_without_user(match['place'])}{query}"


def _without_user(place: str) -> str:
    host, slash, path = place.partition("/")
    if "@" in host:
        return f"{HIDDEN}@{host.rpartition('@')[2]}{slash}{path}"
    if ":" in host and "@" in path:
        # A password with a "/" in it, not escaped: rather too much is hidden than too little.
        return f"{HIDDEN}@{path.rpartition('@')[2]}"
    return place
