"""A manifest's bytes. The layout is in ``docs/format.md``.

Belongs here: the top level of the JSON, its small sections, its digest, and every check that does
not need a chunk table. Does not belong here: the tensors' section (``tensor_section``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from dcp_engine.errors import (
    CheckpointError,
    DamagedCheckpointError,
    UnsupportedVersionError,
    UsageError,
)
from dcp_engine.format.digest import check_block_size, xxh3_128_hex
from dcp_engine.format.file_tables import (
    decode_data_files,
    decode_digest_files,
    decode_extra_files,
    encode_data_files,
    encode_digest_files,
    encode_extra_files,
)
from dcp_engine.format.json_columns import decode_as, field_parts, object_fields, refuse
from dcp_engine.format.lazy_maps import make_object_maps, make_tensor_maps
from dcp_engine.format.names import MAX_RANKS, is_save_id
from dcp_engine.format.nesting import Nesting
from dcp_engine.format.stored import (
    DataFile,
    DigestFile,
    ExtraFile,
    Manifest,
    StoredObject,
)
from dcp_engine.format.tensor_encoding import TensorSection
from dcp_engine.format.tensor_section import TensorSectionReader

__all__ = [
    "FORMAT_MAJOR",
    "FORMAT_VERSION",
    "MAX_MANIFEST_BYTES",
    "decode_manifest",
    "encode_manifest",
    "encode_user_metadata",
]

FORMAT_MAJOR = 1
FORMAT_VERSION = "1.0"
MAX_MANIFEST_BYTES = 4 << 30
"""Readers refuse to load more: a hundred million chunks."""
MAX_TOKEN_BYTES = 4096
_JSON = "use str keys, and None, bool, int, finite float, str, list and dict as values"

_encoder = msgspec.json.Encoder()
_BEGIN = b'{"format":"dcp_engine","version":"'
_HEAD = re.compile(rb'\{"format":"dcp_engine","version":"([0-9]{1,9})\.([0-9]{1,9})"[,}]')
_TAIL = re.compile(rb',"manifest_xxh3_128":"([0-9a-f]{32})"\}\n')
_TAIL_BYTES = len(b',"manifest_xxh3_128":""}\n') + 32


def encode_manifest(
    *,
    save_id: str,
    world_size: int,
    time: float,
    writers: Mapping[str, str],
    user_metadata: Mapping[str, Any],
    block_size: int,
    data_files: Sequence[DataFile],
    digest_files: Sequence[DigestFile],
    extra_files: Sequence[ExtraFile],
    tensors: TensorSection,
    objects: Iterable[StoredObject],
    nesting: bytes,
    token: str | None = None,
    rank: int | None = None,
) -> bytes:
    """Encode a manifest, its digest included. Same arguments, same bytes.

    ``token`` and ``rank`` are given for one rank's manifest of a collective-free save. Raises
    ``UsageError`` for user metadata that JSON does not give back as it was.
    """
    fields: dict[str, bytes | Sequence[bytes]] = {
        "format": b'"dcp_engine"',
        "version": _encoder.encode(FORMAT_VERSION),
        "save_id": _encoder.encode(save_id),
        "world_size": _encoder.encode(world_size),
        "time": _encoder.encode(float(time)),
        "writers": _encoder.encode(dict(writers)),
        "user_metadata": encode_user_metadata(user_metadata),
        "block_size": _encoder.encode(block_size),
    }
    if token is not None:
        fields["token"] = _encoder.encode(token)
        fields["rank"] = _encoder.encode(rank)
    fields["data_files"] = encode_data_files(data_files)
    fields["digest_files"] = encode_digest_files(digest_files)
    fields["extra_files"] = encode_extra_files(extra_files)
    fields["tensors"] = tensors.data
    fields["objects"] = _encoder.encode([_object_record(entry) for entry in objects])
    fields["nesting"] = nesting
    parts = field_parts(fields)[:-1]
    parts.append(b',"manifest_xxh3_128":"%b"}\n' % xxh3_128_hex(*parts).encode())
    return b"".join(parts)


def _object_record(entry: StoredObject) -> list[object]:
    # Owners are written as one more than the rank, 0 for none, as in the tensors' section.
    common: list[object] = [entry.name, entry.owner + 1, entry.pickled]
    if entry.inline is not None:
        return [*common, entry.inline]
    return [*common, None, entry.file, entry.start, entry.nbytes]


def encode_user_metadata(user_metadata: Mapping[str, Any]) -> bytes:
    """Its JSON. Raises ``UsageError`` if that does not give back what was given."""
    try:
        data = _encoder.encode(dict(user_metadata))
        same = msgspec.json.decode(data) == dict(user_metadata)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"user_metadata cannot be written as JSON: {error}", hint=_JSON) from error
    if not same:
        raise UsageError(
            "user_metadata would come back changed",
            hint=_JSON,
        )
    return data


class _ObjectRecord(msgspec.Struct, array_like=True, frozen=True):
    name: str
    owner: int
    pickled: bool
    inline: bytes | None
    file: int = -1
    start: int = 0
    nbytes: int = 0


def decode_manifest(data: bytes, *, checkpoint: object | None = None) -> Manifest:
    """Read a manifest. Chunk tables stay undecoded until their tensor is asked for.

    Raises ``DamagedCheckpointError`` (``manifest_truncated``, ``digest_mismatch``,
    ``unsafe_path``, ``manifest_invalid``) and ``UnsupportedVersionError``.
    """
    try:
        return _decode(data)
    except CheckpointError as error:
        raise error.with_context(checkpoint=checkpoint) from error.__cause__


def _decode(data: bytes) -> Manifest:
    version = _check_frame(data)
    fields = object_fields(memoryview(data)[:-1], "top level")
    missing = _REQUIRED - fields.keys()
    if missing:
        refuse(f"field {min(missing)!r} is missing")
    save_id = decode_as(str, fields["save_id"], "save_id")
    if not is_save_id(save_id):
        refuse(f"save_id: {save_id[:80]!r} is not 32 hexadecimal digits")
    world_size = decode_as(int, fields["world_size"], "world_size")
    if not 1 <= world_size <= MAX_RANKS:
        refuse(f"world_size: {world_size}")
    time = decode_as(float, fields["time"], "time")
    if not (math.isfinite(time) and time >= 0):
        refuse(f"time: {time}")
    block_size = decode_as(int, fields["block_size"], "block_size")
    if not check_block_size(block_size):
        refuse(f"block_size: {block_size}")
    token, rank = _read_token(fields, world_size)
    data_files = decode_data_files(fields["data_files"], world_size)
    digest_files = decode_digest_files(fields["digest_files"], world_size)
    ranks = {f.rank for f in data_files} | {f.rank for f in digest_files}
    if rank is not None and not ranks <= {rank}:
        refuse(f"rank {rank} names files of another rank")
    if not {f.rank for f in data_files} <= {f.rank for f in digest_files}:
        refuse("digest_files: a rank with data files has none")
    section = TensorSectionReader(fields["tensors"], data_files, complete=rank is None)
    tensors, per_rank_tensors = make_tensor_maps(section, world_size)
    objects, per_rank_objects = make_object_maps(
        _read_objects(fields["objects"], data_files), world_size
    )
    clash = (tensors.keys() | per_rank_tensors.keys()) & objects.keys()
    clash |= tensors.keys() & per_rank_objects.keys()
    if clash:
        refuse("it is both a tensor and an object", tensor=min(clash))
    return Manifest(
        version=version,
        save_id=save_id,
        world_size=world_size,
        time=time,
        writers=_read_writers(fields["writers"]),
        user_metadata=_read_user_metadata(fields["user_metadata"]),
        block_size=block_size,
        token=token,
        rank=rank,
        tensors=tensors,
        per_rank_tensors=per_rank_tensors,
        objects=objects,
        per_rank_objects=per_rank_objects,
        nesting=Nesting(bytes(fields["nesting"])),
        data_files=data_files,
        digest_files=digest_files,
        extra_files=decode_extra_files(fields["extra_files"]),
    )


_REQUIRED = frozenset(
    (
        "format", "version", "save_id", "world_size", "time", "writers", "user_metadata",
        "block_size", "data_files", "digest_files", "extra_files", "tensors", "objects", "nesting",
    )
)  # fmt: skip


def _check_frame(data: bytes) -> str:
    """Check what stands at both ends: format and version, and the digest. Returns the version."""
    if len(data) > MAX_MANIFEST_BYTES:
        refuse(f"{len(data)} bytes are more than {MAX_MANIFEST_BYTES}")
    tail = _TAIL.fullmatch(data[-_TAIL_BYTES:])
    if tail is not None:
        # The digest comes first: a flipped bit in the version is damage, not a new format.
        expected = tail.group(1).decode()
        actual = xxh3_128_hex(memoryview(data)[:-_TAIL_BYTES])
        if actual != expected:
            raise DamagedCheckpointError(
                "the manifest is not what was written: its digest differs", kind="digest_mismatch"
            )
    head = _HEAD.match(data)
    if head is None and _BEGIN.startswith(data):
        raise DamagedCheckpointError(
            f"the manifest ends after {len(data)} bytes", kind="manifest_truncated"
        )
    if head is None:
        refuse("it does not begin as manifests of dcp_engine do")
    major, minor = int(head.group(1)), int(head.group(2))
    if major != FORMAT_MAJOR:
        raise UnsupportedVersionError(
            f"the checkpoint has format version {major}.{minor}, this dcp_engine reads "
            f"{FORMAT_MAJOR}",
            hint=f"install a dcp_engine that reads format {major}",
        )
    if tail is None:
        raise DamagedCheckpointError(
            "the manifest ends early: its digest is not at its end", kind="manifest_truncated"
        )
    return f"{major}.{minor}"


def _read_token(
    fields: Mapping[str, msgspec.Raw], world_size: int
) -> tuple[str | None, int | None]:
    if "token" not in fields:
        return None, None
    token = decode_as(str, fields["token"], "token")
    rank = decode_as(int, fields.get("rank", msgspec.Raw(b"-1")), "rank")
    if not 0 < len(token.encode()) <= MAX_TOKEN_BYTES or not 0 <= rank < world_size:
        refuse("token: a token, and a rank below the world size, belong together")
    return token, rank


def _read_objects(data: msgspec.Raw, files: Sequence[DataFile]) -> list[StoredObject]:
    records: list[_ObjectRecord] = decode_as(list[_ObjectRecord], data, "objects")
    entries = []
    for record in records:
        if record.inline is None:
            if not 0 <= record.file < len(files):
                refuse("it names a data file that is not there", tensor=record.name)
            file = files[record.file]
            if (
                record.start < 0
                or record.nbytes < 1
                or record.start + record.nbytes > file.size - file.data_start
            ):
                refuse(
                    "an object reaches outside its file",
                    kind="chunk_out_of_bounds",
                    tensor=record.name,
                )
        entries.append(
            StoredObject(
                name=record.name,
                pickled=record.pickled,
                inline=record.inline,
                file=record.file,
                start=record.start,
                nbytes=record.nbytes if record.inline is None else len(record.inline),
                owner=record.owner - 1,
            )
        )
    return entries


def _read_writers(data: msgspec.Raw) -> Mapping[str, str]:
    fields = object_fields(data, "writers")
    return {name: decode_as(str, value, "writers") for name, value in fields.items()}


def _read_user_metadata(data: msgspec.Raw) -> Mapping[str, object]:
    values: dict[str, object] = decode_as(dict[str, Any], data, "user_metadata")

    def refuse_twice(pairs: list[tuple[str, object]]) -> None:
        if len({key for key, _ in pairs}) != len(pairs):
            refuse("user_metadata: a key is there twice")

    try:
        json.loads(bytes(data), object_pairs_hook=refuse_twice)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise DamagedCheckpointError(f"the manifest is invalid: user_metadata: {error}") from error
    return values
