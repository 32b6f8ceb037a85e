"""Digests of blocks, and the file that holds one rank's.

Belongs here: computing xxh3 over bytes, and the packed layout of ``rank00003.digests`` (see
``docs/format.md``). Does not belong here: reading or writing either kind of file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from dcp_engine.errors import DamagedCheckpointError, UnsupportedVersionError

__all__ = [
    "DEFAULT_BLOCK_SIZE",
    "DIGEST_VERSION",
    "DigestTable",
    "block_count",
    "block_digests",
    "check_block_size",
    "decode_digests",
    "digest_value",
    "encode_digests",
    "xxh3_128_hex",
]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bytes = bytes | bytearray | memoryview

DEFAULT_BLOCK_SIZE = 65536
"""Bytes under one digest: 0.012 % of the data, and what a partial read is widened to."""
MIN_BLOCK_SIZE = 512
MAX_BLOCK_SIZE = 1 << 30
DIGEST_VERSION = 1

_MAGIC = b"dcp-xxh3"
_HEADER = struct.Struct("<8sIIQQQ")
_MAX_BYTES = 1 << 60


def digest_value(data: Bytes) -> int:
    """xxh3-64 of ``data``, as an unsigned integer."""
    return xxhash.xxh3_64_intdigest(data)


def xxh3_128_hex(*parts: Bytes) -> str:
    """xxh3-128 of ``parts`` joined, as 32 lower-case hexadecimal digits."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def check_block_size(block_size: int) -> bool:
    """Whether ``block_size`` is a power of two from 512 bytes to 1 GiB."""
    return MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE and not block_size & (block_size - 1)


def block_count(nbytes: int, block_size: int) -> int:
    """Blocks in a chunk of ``nbytes``; the last one may be short."""
    return -(-nbytes // block_size)


def block_digests(buffer: Bytes, block_size: int = DEFAULT_BLOCK_SIZE) -> U64:
    """xxh3-64 of each ``block_size`` bytes of ``buffer`` (contiguous), counted from its begin.

    Releases the GIL while it computes. Returns uint64, one per block.
    """
    digest = xxhash.xxh3_64_intdigest
    nbytes = len(buffer) if isinstance(buffer, bytes) else memoryview(buffer).nbytes
    if nbytes <= block_size:
        return np.array([digest(buffer)] if nbytes else [], np.uint64)
    view = memoryview(buffer)
    if view.format != "B" or view.ndim != 1:
        view = view.cast("B")
    return np.array(
        [digest(view[i : i + block_size]) for i in range(0, nbytes, block_size)], np.uint64
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class DigestTable:
    """One rank's digests."""

    block_size: int
    file_numbers: I64
    """(F,) ascending: the rank's data files."""
    header_digests: U64
    """(F,) xxh3-64 of each file's bytes before its data section."""
    file: I64
    """(C,) the number of the file each chunk lies in; ascending, then ``start`` is."""
    start: I64
    """(C,) relative to the file's data section."""
    nbytes: I64
    """(C,) above 0: a chunk without bytes has no digests."""
    first_block: I64
    """(C + 1,) row of ``blocks`` at which each chunk's digests begin."""
    blocks: U64

    def header_digest(self, file_number: int) -> int:
        """The digest of a file's header. Raises ``DamagedCheckpointError`` if there is none."""
        at = int(np.searchsorted(self.file_numbers, file_number))
        if at == len(self.file_numbers) or int(self.file_numbers[at]) != file_number:
            raise _invalid(f"there is no digest of the header of data file {file_number}")
        return int(self.header_digests[at])

    def lookup(self, file_number: int, start: int) -> tuple[int, U64]:
        """Size in bytes and block digests of the chunk that begins at ``start`` in a file.

        Raises ``DamagedCheckpointError`` (``digest_mismatch``) if there is none.
        """
        low = int(np.searchsorted(self.file, file_number, side="left"))
        high = int(np.searchsorted(self.file, file_number, side="right"))
        at = low + int(np.searchsorted(self.start[low:high], start))
        if at == high or int(self.start[at]) != start:
            raise _invalid(f"there is no chunk at byte {start} of data file {file_number}")
        return int(self.nbytes[at]), self._digests_of(at)

    def rows(self, file: I32 | I64, start: I64) -> I64:
        """``lookup`` for many chunks at once: their rows in this table.

        Raises ``DamagedCheckpointError`` (``digest_mismatch``) if one of them is missing.
        """
        found = np.empty(len(start), np.int64)
        for number in np.unique(file).tolist():
            low = int(np.searchsorted(self.file, number, side="left"))
            high = int(np.searchsorted(self.file, number, side="right"))
            of_file = np.flatnonzero(file == number)
            at = low + np.searchsorted(self.start[low:high], start[of_file])
            inside = at < high
            if not inside.all() or (self.start[at] != start[of_file]).any():
                raise _invalid(f"a chunk of data file {number} has no digests")
            found[of_file] = at
        return found

    def _digests_of(self, row: int) -> U64:
        return self.blocks[int(self.first_block[row]) : int(self.first_block[row + 1])]


def encode_digests(
    *,
    block_size: int,
    header_digests: Sequence[tuple[int, int]],
    file: I32 | I64,
    start: I64,
    nbytes: I64,
    blocks: Sequence[U64] | U64,
) -> bytes:
    """Encode one rank's digests.

    ``header_digests`` holds (file number, xxh3-64 of the header) per data file; ``file``,
    ``start`` and ``nbytes`` (C,) tell each chunk's place, in any order, and ``blocks[i]`` is what
    ``block_digests`` gave for chunk ``i``; or ``blocks`` is all of these one behind the other,
    where the chunks are in the order of (``file``, ``start``). Chunks without bytes are left out.
    """
    order = np.lexsort((start, file))
    if isinstance(blocks, np.ndarray):
        if (order != np.arange(len(order))).any():
            raise ValueError("digests in one array are of chunks in order")
        joined = blocks
    order = order[nbytes[order] > 0]
    headers = sorted(header_digests)
    if not isinstance(blocks, np.ndarray):
        parts = [blocks[row] for row in order.tolist()]
        joined = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    expected = int((-(-nbytes[order] // block_size)).sum())
    if len(joined) != expected:
        raise ValueError(f"{len(joined)} block digests for chunks of {expected} blocks")
    return b"".join(
        (
            _HEADER.pack(_MAGIC, DIGEST_VERSION, block_size, len(headers), len(order), len(joined)),
            np.array([digest for _, digest in headers], "<u8").tobytes(),
            start[order].astype("<u8").tobytes(),
            nbytes[order].astype("<u8").tobytes(),
            joined.astype("<u8", copy=False).tobytes(),
            np.array([number for number, _ in headers], "<u4").tobytes(),
            file[order].astype("<u4").tobytes(),
        )
    )


def decode_digests(data: bytes) -> DigestTable:
    """Read a digest file. Its arrays share memory with ``data``.

    Raises ``DamagedCheckpointError`` (``digest_mismatch``) for anything ``encode_digests`` does
    not make, ``UnsupportedVersionError`` for another version.
    """
    if len(data) < _HEADER.size:
        raise _invalid(f"{len(data)} bytes are too few")
    magic, version, block_size, files, chunks, blocks = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise _invalid("it does not begin as digest files do")
    if version != DIGEST_VERSION:
        raise UnsupportedVersionError(
            f"the digest file has version {version}, this dcp_engine reads {DIGEST_VERSION}",
            hint="install a newer dcp_engine",
        )
    if not check_block_size(block_size):
        raise _invalid(f"a block of {block_size} bytes")
    # Counts are compared with the size before anything is made of them.
    if len(data) != _HEADER.size + 12 * files + 20 * chunks + 8 * blocks:
        raise _invalid("its size does not fit the counts in its header")
    position = _HEADER.size

    def column(count: int, dtype: str) -> npt.NDArray[np.unsignedinteger]:
        nonlocal position
        array = np.frombuffer(data, dtype, count=count, offset=position)
        position += array.nbytes
        return array

    header_digests = column(files, "<u8")
    start, nbytes = column(chunks, "<u8"), column(chunks, "<u8")
    digests, numbers, file = column(blocks, "<u8"), column(files, "<u4"), column(chunks, "<u4")
    if chunks and int(max(start.max(), nbytes.max())) > _MAX_BYTES:
        raise _invalid("a position is absurdly large")
    table = DigestTable(
        block_size=block_size,
        file_numbers=numbers.astype(np.int64),
        header_digests=header_digests.astype(np.uint64, copy=False),
        file=file.astype(np.int64),
        start=start.astype(np.int64),
        nbytes=nbytes.astype(np.int64),
        first_block=_first_blocks(nbytes.astype(np.int64), block_size, blocks),
        blocks=digests.astype(np.uint64, copy=False),
    )
    _check_order(table)
    return table


def _first_blocks(nbytes: I64, block_size: int, blocks: int) -> I64:
    counts = -(-nbytes // block_size)
    # Each count is compared before they are added up: the sum of hostile ones could wrap.
    if len(counts) and (int(counts.min()) < 1 or int(counts.max()) > blocks):
        raise _invalid("a chunk has no bytes, or more blocks than there are digests")
    first = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=first[1:])
    if int(first[-1]) != blocks:
        raise _invalid(f"{blocks} block digests for chunks of {int(first[-1])} blocks")
    return first


def _check_order(table: DigestTable) -> None:
    if (np.diff(table.file_numbers) <= 0).any():
        raise _invalid("its data files are not in order")
    if not np.isin(table.file, table.file_numbers).all():
        raise _invalid("a chunk lies in a data file that it does not list")
    same = table.file[1:] == table.file[:-1]
    ends = table.start + table.nbytes
    if (np.diff(table.file) < 0).any() or (same & (table.start[1:] < ends[:-1])).any():
        raise _invalid("its chunks overlap or are not in order")


def _invalid(what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"the digest file is invalid: {what}", kind="digest_mismatch")
