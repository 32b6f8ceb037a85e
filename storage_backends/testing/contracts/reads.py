"""Checks of ``read``, ``size`` and ``get``."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from dcp_engine.storage import ByteStore, ReadRange
from storage_backends.testing.contracts.fixtures import StoreFixtures, alike, in_parallel, pattern
from storage_backends.testing.contracts.medium import Medium

__all__ = ["ReadChecks"]

_OTHER_PROCESS = """
import sys
from dcp_engine.registry import BackendRegistry
with BackendRegistry().open_store(sys.argv[1]) as store:
    print(store.get("f").decode())
    store.put("answer", b"from another process")
"""


def _read(store: ByteStore, name: str, *ranges: tuple[int, int]) -> list[bytes]:
    """Each of ``ranges``, (offset, length), in one call."""
    buffers = [bytearray(length) for _, length in ranges]
    store.read(
        name,
        [ReadRange(o, memoryview(b)) for (o, _), b in zip(ranges, buffers, strict=True)],
    )
    return [bytes(buffer) for buffer in buffers]


def _expected(data: bytes, *ranges: tuple[int, int]) -> list[bytes]:
    return [data[offset : offset + length] for offset, length in ranges]


class ReadChecks(StoreFixtures):
    """Everything is read that others have put there."""

    @pytest.fixture
    def data(self, store: ByteStore, medium: Medium) -> bytes:
        """The content of ``f``, put there without the store."""
        content = pattern(10_000)
        medium.write("f", content)
        return content

    def test_read_whole(self, store: ByteStore, data: bytes) -> None:
        assert alike(_read(store, "f", (0, len(data))), [data])
        assert alike(store.get("f"), data)
        assert store.size("f") == len(data)

    @pytest.mark.parametrize(
        "ranges",
        [
            pytest.param([(0, 1), (1, 9), (500, 1000), (9_999, 1)], id="sorted"),
            pytest.param([(9_000, 1000), (0, 10), (4_000, 123), (10, 10)], id="unsorted"),
            pytest.param([(0, 100), (100, 100), (200, 300), (500, 1)], id="adjacent"),
            pytest.param([(0, 500), (100, 500), (50, 10), (0, 10_000)], id="overlapping"),
            pytest.param([(7, 33), (7, 33), (7, 33)], id="repeated"),
            pytest.param([(0, 0), (5, 5), (10_000, 0), (3, 0)], id="empty"),
            pytest.param([(9_990 - 6 * n, 2) for n in range(1500)], id="many"),
        ],
    )
    def test_ranges(self, store: ByteStore, data: bytes, ranges: list[tuple[int, int]]) -> None:
        assert alike(_read(store, "f", *ranges), _expected(data, *ranges))

    def test_no_ranges(self, store: ByteStore, data: bytes) -> None:
        store.read("f", [])

    def test_only_the_range_is_filled(self, store: ByteStore, data: bytes) -> None:
        memory = bytearray(b"." * 30)
        views = [memoryview(memory)[5:10], memoryview(memory)[20:25]]
        store.read("f", [ReadRange(100, views[0]), ReadRange(50, views[1])])
        wanted = b"." * 5 + data[100:105] + b"." * 10 + data[50:55] + b"." * 5
        assert bytes(memory) == wanted

    def test_large_ranges(self, store: ByteStore, medium: Medium) -> None:
        data = pattern(self.LARGE, 5)
        medium.write("large", data)
        assert alike(_read(store, "large", (0, len(data))), [data])
        third = len(data) // 3
        ranges = [(1, third), (len(data) - third, third), (third + 7, 1)]
        assert alike(_read(store, "large", *ranges), _expected(data, *ranges))

    @pytest.mark.parametrize(
        "ranges",
        [
            [(9_999, 2)],
            [(10_000, 1)],
            [(20_000, 5)],
            [(0, 10_001)],
            [(0, 10), (9_990, 20)],
            [(9_990, 20), (0, 10)],
        ],
    )
    def test_reading_beyond_the_end(
        self, store: ByteStore, data: bytes, ranges: list[tuple[int, int]]
    ) -> None:
        with pytest.raises(EOFError):
            _read(store, "f", *ranges)

    def test_reading_an_empty_file(self, store: ByteStore, medium: Medium) -> None:
        medium.write("empty", b"")
        assert store.size("empty") == 0
        assert store.get("empty") == b""
        with pytest.raises(EOFError):
            _read(store, "empty", (0, 1))

    def test_what_is_not_there(self, store: ByteStore, data: bytes) -> None:
        for name in ("missing", "f2", "missing/f", "f/below-a-file"):
            with pytest.raises((FileNotFoundError, NotADirectoryError, OSError)) as caught:
                store.size(name)
            if not name.startswith("f/"):
                assert isinstance(caught.value, FileNotFoundError)
        for name in ("missing", "f2"):
            with pytest.raises(FileNotFoundError):
                _read(store, name, (0, 1))
            with pytest.raises(FileNotFoundError):
                store.get(name)

    def test_a_buffer_that_cannot_be_filled_is_refused(self, store: ByteStore, data: bytes) -> None:
        """Read-only memory, and memory with gaps that the store does not fill."""
        fixed = bytes(10)
        with pytest.raises((BufferError, OSError, TypeError, ValueError)):
            store.read("f", [ReadRange(0, memoryview(fixed))])
        assert fixed == bytes(10)
        memory = bytearray(10)
        try:
            store.read("f", [ReadRange(0, memoryview(memory)[::2])])
        except (BufferError, OSError, TypeError, ValueError, NotImplementedError):
            return
        assert alike(bytes(memory[::2]), data[:5])
        assert bytes(memory[1::2]) == bytes(5)

    def test_get_with_a_limit(self, store: ByteStore, data: bytes) -> None:
        assert alike(store.get("f", limit=len(data)), data)
        with pytest.raises(ValueError):
            store.get("f", limit=len(data) - 1)

    def test_threads_read(self, store: ByteStore, data: bytes) -> None:
        def one(number: int) -> None:
            chosen = random.Random(number)
            for _ in range(5):
                ranges = [(chosen.randrange(9_000), chosen.randrange(1000)) for _ in range(6)]
                assert alike(_read(store, "f", *ranges), _expected(data, *ranges))

        in_parallel(8, one)

    def test_nothing_is_remembered(self, store: ByteStore, medium: Medium) -> None:
        """What others replace or remove is seen at once: a manifest is such a file."""
        medium.write("f", b"first")
        assert store.get("f") == b"first"
        assert store.size("f") == 5
        medium.write("f", b"the second")
        assert store.size("f") == 10
        assert store.get("f") == b"the second"
        assert _read(store, "f", (4, 6)) == [b"second"]
        store.put("f", b"3")
        assert store.get("f") == b"3"

    def test_another_process_sees_it(
        self, store: ByteStore, medium: Medium, url: str | None
    ) -> None:
        if not store.shared_between_processes:
            pytest.skip("shared_between_processes is false")
        if url is None:
            pytest.skip("no URL: override the fixture url")
        store.put("f", b"from one process")
        done = subprocess.run(
            [sys.executable, "-c", _OTHER_PROCESS, url],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "from one process"
        assert medium.read("answer") == b"from another process"
