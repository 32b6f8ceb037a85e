"""Names of files and directories of a checkpoint, and who owns a data directory.

Belongs here: making, parsing and checking names, and the content of ``owner.json``. Does not
belong here: looking at any medium, and deciding what is garbage.
"""

from __future__ import annotations

import re
import secrets

import msgspec

from dcp_engine.errors import DamagedCheckpointError

__all__ = [
    "MANIFEST_NAME",
    "MAX_RANKS",
    "OWNER_NAME",
    "TORCH_METADATA_NAME",
    "OwnerRecord",
    "check_extra_name",
    "data_directory",
    "data_file_name",
    "decode_owner",
    "digest_file_name",
    "encode_owner",
    "extra_file_name",
    "is_save_id",
    "new_save_id",
    "parse_data_directory",
    "parse_data_file_name",
    "parse_digest_file_name",
    "parse_rank_manifest_name",
    "rank_manifest_name",
]

MANIFEST_NAME = "manifest.json"
OWNER_NAME = "owner.json"
TORCH_METADATA_NAME = ".metadata"
"""Marks a checkpoint of torch.distributed.checkpoint; the engine has no file of that name."""
EXTRA_PREFIX = "extra/"

MAX_RANKS = 1_000_000
"""Ranks, and data files of one rank, are below this."""
MAX_NAME_BYTES = 1024
"""Longest name of an extra file, as UTF-8 with its prefix."""
MAX_PART_BYTES = 255
"""Longest part of it: what common file systems take."""

_SAVE_ID = re.compile(r"[0-9a-f]{32}")
_DATA_DIRECTORY = re.compile(r"data-([0-9a-f]{32})")
# A number is written in exactly one way: no zeros ahead of more than the fixed width.
_RANK = r"([0-9]{5}|[1-9][0-9]{5})"
_NUMBER = r"([0-9]{2}|[1-9][0-9]{2,5})"
_DATA_FILE = re.compile(rf"rank{_RANK}-{_NUMBER}\.safetensors")
_DIGEST_FILE = re.compile(rf"rank{_RANK}\.digests")
_RANK_MANIFEST = re.compile(rf"manifest-rank{_RANK}\.json")
# Backslash and colon mean something to Windows, control characters to terminals and logs.
_UNSAFE_CHARACTER = re.compile("[\x00-\x1f\x7f\\\\:]")


def new_save_id() -> str:
    """32 random hexadecimal digits."""
    return secrets.token_hex(16)


def is_save_id(text: str) -> bool:
    """Whether ``text`` is 32 lower-case hexadecimal digits."""
    return _SAVE_ID.fullmatch(text) is not None


def data_directory(save_id: str) -> str:
    """Name of the directory that holds a save's files."""
    if not is_save_id(save_id):
        raise ValueError(f"a save id is 32 lower-case hexadecimal digits, not {save_id!r}")
    return f"data-{save_id}"


def parse_data_directory(name: str) -> str | None:
    """The save id in ``name``, or None if it is not the name of a data directory."""
    match = _DATA_DIRECTORY.fullmatch(name)
    return match.group(1) if match else None


def data_file_name(rank: int, number: int) -> str:
    """Name of a data file: ``rank00003-01.safetensors``."""
    _check_number(rank)
    _check_number(number)
    return f"rank{rank:05d}-{number:02d}.safetensors"


def parse_data_file_name(name: str) -> tuple[int, int] | None:
    """Rank and number in the name of a data file, or None."""
    match = _DATA_FILE.fullmatch(name)
    return (int(match.group(1)), int(match.group(2))) if match else None


def digest_file_name(rank: int) -> str:
    """Name of a rank's digest file: ``rank00003.digests``."""
    _check_number(rank)
    return f"rank{rank:05d}.digests"


def parse_digest_file_name(name: str) -> int | None:
    """The rank in the name of a digest file, or None."""
    match = _DIGEST_FILE.fullmatch(name)
    return int(match.group(1)) if match else None


def rank_manifest_name(rank: int) -> str:
    """Name of one rank's manifest of a collective-free save: ``manifest-rank00003.json``."""
    _check_number(rank)
    return f"manifest-rank{rank:05d}.json"


def parse_rank_manifest_name(name: str) -> int | None:
    """The rank in the name of a rank's own manifest, or None."""
    match = _RANK_MANIFEST.fullmatch(name)
    return int(match.group(1)) if match else None


def _check_number(number: int) -> None:
    if not 0 <= number < MAX_RANKS:
        raise ValueError(f"ranks and file numbers are from 0 to {MAX_RANKS - 1}, not {number}")


def extra_file_name(name: str) -> str:
    """The stored name, relative to the data directory, of what the caller calls ``name``.

    Raises ``ValueError`` for a name that ``check_extra_name`` would refuse.
    """
    stored = EXTRA_PREFIX + name
    reason = check_extra_name(stored)
    if reason is not None:
        raise ValueError(f"{name!r} cannot be the name of an extra file: it {reason}")
    return stored


def check_extra_name(stored: str) -> str | None:
    """Why ``stored`` may not be the name of an extra file, or None if it may."""
    if not stored.startswith(EXTRA_PREFIX):
        return f"does not begin with {EXTRA_PREFIX!r}"
    if _UNSAFE_CHARACTER.search(stored):
        return "holds a backslash, a colon or a control character"
    try:
        encoded = stored.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if len(encoded) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    for part in encoded.split(b"/"):
        if part in (b"", b".", b".."):
            return "has an empty part, '.' or '..'"
        if len(part) > MAX_PART_BYTES:
            return f"has a part longer than {MAX_PART_BYTES} bytes"
    return None


class OwnerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Who is writing into a data directory: enough to tell later whether it still lives."""

    run_id: str
    restart_count: int
    group: str
    host: str
    boot_id: str
    pid: int


def encode_owner(owner: OwnerRecord) -> bytes:
    """The content of ``owner.json``."""
    return msgspec.json.encode(owner) + b"\n"


def decode_owner(data: bytes) -> OwnerRecord:
    """Read ``owner.json``. Raises ``DamagedCheckpointError(kind="manifest_invalid")``."""
    try:
        return msgspec.json.decode(data, type=OwnerRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"the owner record cannot be read: {error}", file=OWNER_NAME
        ) from error
