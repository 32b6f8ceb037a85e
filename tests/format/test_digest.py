"""Block digests, and the file they are kept in."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import CheckpointError, DamagedCheckpointError, UnsupportedVersionError
from dcp_engine.format.digest import (
    DigestTable,
    block_count,
    block_digests,
    check_block_size,
    decode_digests,
    digest_value,
    encode_digests,
    xxh3_128_hex,
)

SETTINGS = settings(max_examples=100, deadline=None)
BLOCK = 512


@SETTINGS
@given(st.integers(0, 2000), st.integers(1, 600))
def test_block_digests_are_xxh3_of_each_block(nbytes: int, block: int) -> None:
    data = np.random.default_rng(nbytes).bytes(nbytes)
    expected = [
        int.from_bytes(xxhash.xxh3_64_digest(data[i : i + block]), "big")
        for i in range(0, nbytes, block)
    ]
    for buffer in (data, bytearray(data), memoryview(data)):
        digests = block_digests(buffer, block)
        assert digests.dtype == np.uint64
        assert digests.tolist() == expected
    assert len(expected) == block_count(nbytes, block)


def test_any_contiguous_memory_is_digested_as_its_bytes() -> None:
    array = np.arange(1000, dtype=np.float32).reshape(10, 100)
    assert (block_digests(memoryview(array), BLOCK) == block_digests(array.tobytes(), BLOCK)).all()


def test_digests_of_whole_values() -> None:
    assert digest_value(b"abc") == int(xxhash.xxh3_64_hexdigest(b"abc"), 16)
    assert xxh3_128_hex(b"") == "99aa06d3014798d86001c324468d497f"


@pytest.mark.parametrize(
    ("size", "ok"), [(0, False), (256, False), (512, True), (1000, False), (1 << 31, False)]
)
def test_block_sizes(size: int, ok: bool) -> None:
    assert check_block_size(size) is ok


Chunk = tuple[int, int, bytes]


@st.composite
def chunk_lists(draw: st.DrawFn) -> list[Chunk]:
    """Chunks (file, start, bytes) that do not overlap, in any order."""
    chunks: list[Chunk] = []
    for file in range(draw(st.integers(0, 3))):
        position = 0
        for nbytes in draw(st.lists(st.integers(0, 3 * BLOCK), max_size=5)):
            data = np.random.default_rng(position + file).bytes(nbytes)
            chunks.append((file, position, data))
            position += nbytes + draw(st.integers(0, 9))
    return draw(st.permutations(chunks))


def encode(chunks: list[Chunk], headers: list[tuple[int, int]]) -> bytes:
    return encode_digests(
        block_size=BLOCK,
        header_digests=headers,
        file=np.array([file for file, _, _ in chunks], np.int32),
        start=np.array([start for _, start, _ in chunks], np.int64),
        nbytes=np.array([len(data) for _, _, data in chunks], np.int64),
        blocks=[block_digests(data, BLOCK) for _, _, data in chunks],
    )


HEADERS = [(2, 22), (0, 2**64 - 1), (1, 11)]


@SETTINGS
@given(chunk_lists())
def test_every_chunk_is_found_again(chunks: list[Chunk]) -> None:
    table = decode_digests(encode(chunks, HEADERS))
    assert table.block_size == BLOCK
    assert [table.header_digest(n) for n in range(3)] == [2**64 - 1, 11, 22]
    present = [chunk for chunk in chunks if chunk[2]]
    for file, start, data in present:
        nbytes, digests = table.lookup(file, start)
        assert nbytes == len(data)
        assert (digests == block_digests(data, BLOCK)).all()
    rows = table.rows(
        np.array([c[0] for c in present], np.int64), np.array([c[1] for c in present], np.int64)
    )
    assert table.nbytes[rows].tolist() == [len(c[2]) for c in present]
    assert len(table.start) == len(present)


def test_the_order_of_chunks_does_not_change_the_file() -> None:
    chunks = [(0, 0, b"a" * 600), (1, 5, b"b"), (0, 600, b"c")]
    assert encode(chunks, HEADERS) == encode(chunks[::-1], HEADERS[::-1])


def test_what_is_not_there_is_an_error() -> None:
    table = decode_digests(encode([(0, 0, b"abc"), (1, 8, b"d")], HEADERS))
    for file, start in ((0, 1), (0, 3), (1, 0), (2, 0), (9, 0)):
        with pytest.raises(DamagedCheckpointError, match="no chunk") as caught:
            table.lookup(file, start)
        assert caught.value.kind == "digest_mismatch"
        with pytest.raises(DamagedCheckpointError, match="no digests"):
            table.rows(np.array([file]), np.array([start]))
    with pytest.raises(DamagedCheckpointError, match="header of data file 9"):
        table.header_digest(9)


def test_wrong_number_of_blocks_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="block digests"):
        encode_digests(
            block_size=BLOCK,
            header_digests=[(0, 1)],
            file=np.array([0]),
            start=np.array([0]),
            nbytes=np.array([BLOCK + 1]),
            blocks=[np.array([1], np.uint64)],
        )


def patched(data: bytes, at: int, value: int, size: int) -> bytes:
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


GOOD = encode([(0, 0, b"a" * 600), (0, 600, b"c"), (1, 5, b"b")], [(0, 1), (1, 2)])
# Header 40, 2 header digests, 3 starts, 3 sizes, 4 blocks, 2 numbers, 3 files.
STARTS, SIZES = 56, 80
NUMBERS = SIZES + 24 + 32
BAD = {
    "empty": b"",
    "cut": GOOD[:-1],
    "longer": GOOD + b"\0",
    "magic": b"x" + GOOD[1:],
    "block size": patched(GOOD, 12, 1000, 4),
    "absurd files": patched(GOOD, 16, 2**63, 8),
    "absurd chunks": patched(GOOD, 24, 2**60, 8),
    "absurd blocks": patched(GOOD, 32, 2**61, 8),
    "overlap": patched(GOOD, STARTS + 8, 599, 8),
    "order": patched(GOOD, STARTS + 8, 0, 8),
    "huge start": patched(GOOD, STARTS, 2**63, 8),
    "huge size": patched(GOOD, SIZES, 2**64 - 1, 8),
    "no bytes": patched(GOOD, SIZES + 8, 0, 8),
    "more blocks": patched(GOOD, SIZES + 8, 10 * BLOCK, 8),
    "fewer blocks": patched(GOOD, SIZES, BLOCK, 8),
    "file twice": patched(GOOD, NUMBERS + 4, 0, 4),
    "file unknown": patched(GOOD, NUMBERS + 8 + 8, 7, 4),
    "file order": patched(GOOD, NUMBERS + 8, 1, 4),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_invalid_files_are_refused(data: bytes) -> None:
    with pytest.raises(DamagedCheckpointError) as caught:
        decode_digests(data)
    assert caught.value.kind == "digest_mismatch"


def test_another_version_is_refused() -> None:
    with pytest.raises(UnsupportedVersionError, match="version 2"):
        decode_digests(patched(GOOD, 8, 2, 4))


@SETTINGS
@given(st.data())
def test_mutations_give_tables_or_errors(data: st.DataObject) -> None:
    encoded = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        table = decode_digests(bytes(encoded))
    except CheckpointError:
        return
    assert isinstance(table, DigestTable)
    for file, start in zip(table.file.tolist(), table.start.tolist(), strict=True):
        table.lookup(file, start)
