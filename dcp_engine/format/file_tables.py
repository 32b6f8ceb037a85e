"""The tables of files in a manifest: columns <-> JSON.

Belongs here: data, digest and extra files, and the checks of their names and sizes. Does not
belong here: looking at the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from dcp_engine.errors import DamagedCheckpointError, UsageError
from dcp_engine.format.json_columns import (
    Column,
    decode_as,
    encode_column,
    encode_fields,
    encode_list,
    expand_column,
    object_fields,
    refuse,
)
from dcp_engine.format.names import MAX_RANKS, check_extra_name
from dcp_engine.format.shard_file import DATA_ALIGNMENT
from dcp_engine.format.stored import MAX_BYTES, DataFile, DigestFile, ExtraFile

__all__ = [
    "decode_data_files",
    "decode_digest_files",
    "decode_extra_files",
    "encode_data_files",
    "encode_digest_files",
    "encode_extra_files",
]

_HEX_DIGEST = re.compile("[0-9a-f]{32}")
_encoder = msgspec.json.Encoder()


def encode_data_files(files: Sequence[DataFile]) -> bytes:
    """``data_files``."""
    return encode_fields(
        {
            "rank": encode_column(np.array([f.rank for f in files], np.int64)),
            "number": encode_column(np.array([f.number for f in files], np.int64)),
            "data_start": encode_column(np.array([f.data_start for f in files], np.int64)),
            "size": encode_list(np.array([f.size for f in files], np.int64)),
        }
    )


def encode_digest_files(files: Sequence[DigestFile]) -> bytes:
    """``digest_files``."""
    return encode_fields(
        {
            "rank": encode_column(np.array([f.rank for f in files], np.int64)),
            "size": encode_list(np.array([f.size for f in files], np.int64)),
            "xxh3_128": _encoder.encode([f.xxh3_128 for f in files]),
        }
    )


def encode_extra_files(files: Sequence[ExtraFile]) -> bytes:
    """``extra_files``. Raises ``UsageError`` for a name that a reader would refuse."""
    for file in files:
        reason = check_extra_name(file.name)
        if reason is not None:
            raise UsageError(f"{file.name!r} cannot be the name of an extra file: it {reason}")
    return encode_fields(
        {
            "name": _encoder.encode([f.name for f in files]),
            "size": encode_list(np.array([f.size for f in files], np.int64)),
            "xxh3_128": _encoder.encode([f.xxh3_128 for f in files]),
        }
    )


def decode_data_files(data: msgspec.Raw, world_size: int) -> tuple[DataFile, ...]:
    """Read ``data_files``."""
    fields = _section(data, "data_files", ("rank", "number", "data_start", "size"))
    sizes = decode_as(list[int], fields["size"], "data_files.size")
    count = len(sizes)

    def column(name: str, limit: int) -> list[int]:
        values = decode_as(Column, fields[name], f"data_files.{name}")
        expanded: list[int] = expand_column(values, count, limit, f"data_files.{name}").tolist()
        return expanded

    expand_column(sizes, count, MAX_BYTES + 1, "data_files.size")
    files = tuple(
        DataFile(rank=rank, number=number, data_start=data_start, size=size)
        for rank, number, data_start, size in zip(
            column("rank", world_size),
            column("number", MAX_RANKS),
            column("data_start", MAX_BYTES + 1),
            sizes,
            strict=True,
        )
    )
    if len({(f.rank, f.number) for f in files}) != count:
        refuse("data_files: a file is there twice")
    for file in files:
        if not DATA_ALIGNMENT <= file.data_start <= file.size or file.data_start % DATA_ALIGNMENT:
            raise DamagedCheckpointError(
                f"the manifest is invalid: {file.size} bytes with data from {file.data_start}",
                file=file.name,
            )
    return files


def decode_digest_files(data: msgspec.Raw, world_size: int) -> tuple[DigestFile, ...]:
    """Read ``digest_files``."""
    fields = _section(data, "digest_files", ("rank", "size", "xxh3_128"))
    sizes = decode_as(list[int], fields["size"], "digest_files.size")
    digests = _read_hex(fields["xxh3_128"], len(sizes), "digest_files.xxh3_128")
    expand_column(sizes, len(sizes), MAX_BYTES + 1, "digest_files.size")
    ranks = expand_column(
        decode_as(Column, fields["rank"], "digest_files.rank"),
        len(sizes),
        world_size,
        "digest_files.rank",
    ).tolist()
    if len(set(ranks)) != len(ranks):
        refuse("digest_files: a rank is there twice")
    return tuple(
        DigestFile(rank=rank, size=size, xxh3_128=digest)
        for rank, size, digest in zip(ranks, sizes, digests, strict=True)
    )


def decode_extra_files(data: msgspec.Raw) -> tuple[ExtraFile, ...]:
    """Read ``extra_files``. Raises ``DamagedCheckpointError`` (``unsafe_path``) for their names."""
    fields = _section(data, "extra_files", ("name", "size", "xxh3_128"))
    names = decode_as(list[str], fields["name"], "extra_files.name")
    sizes = decode_as(list[int], fields["size"], "extra_files.size")
    expand_column(sizes, len(names), MAX_BYTES + 1, "extra_files.size")
    digests = _read_hex(fields["xxh3_128"], len(names), "extra_files.xxh3_128")
    if len(set(names)) != len(names):
        refuse("extra_files: a file is there twice")
    for name in names:
        reason = check_extra_name(name)
        if reason is not None:
            raise DamagedCheckpointError(
                f"the manifest names an extra file {name[:200]!r}, which {reason}",
                kind="unsafe_path",
                hint="do not trust this checkpoint: its writer never makes such names",
            )
    return tuple(
        ExtraFile(name=name, size=size, xxh3_128=digest)
        for name, size, digest in zip(names, sizes, digests, strict=True)
    )


def _section(data: msgspec.Raw, what: str, required: Iterable[str]) -> dict[str, msgspec.Raw]:
    fields = object_fields(data, what)
    for name in required:
        if name not in fields:
            refuse(f"{what}: field {name!r} is missing")
    return fields


def _read_hex(data: msgspec.Raw, count: int, what: str) -> list[str]:
    digests: list[str] = decode_as(list[str], data, what)
    if len(digests) != count or not all(map(_HEX_DIGEST.fullmatch, digests)):
        refuse(f"{what}: not {count} digests of 32 hexadecimal digits")
    return digests
