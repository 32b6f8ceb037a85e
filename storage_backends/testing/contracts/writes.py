"""Checks of ``create`` and of the file it returns."""

from __future__ import annotations

import pytest

from dcp_engine.storage import ByteStore
from storage_backends.testing.contracts.fixtures import (
    StoreFixtures,
    alike,
    in_parallel,
    pattern,
    write_file,
)
from storage_backends.testing.contracts.medium import Medium

__all__ = ["WriteChecks"]


class WriteChecks(StoreFixtures):
    """Files that are written, finished, and given up."""

    def test_buffers_land_one_behind_the_other(self, store: ByteStore, medium: Medium) -> None:
        file = store.create("f")
        file.write([memoryview(b"abc"), memoryview(b""), memoryview(b"de")], 0)
        file.write([memoryview(b"fgh")], 5)
        file.write([], 8)
        file.close()
        assert medium.read("f") == b"abcdefgh"
        assert medium.names() == {"f"}

    def test_many_small_buffers(self, store: ByteStore, medium: Medium) -> None:
        """More than one system call takes."""
        parts = [pattern(n % 5, n) for n in range(3000)]
        file = store.create("f")
        file.write([memoryview(part) for part in parts], 0)
        file.close()
        assert alike(medium.read("f"), b"".join(parts))

    def test_empty_file(self, store: ByteStore, medium: Medium) -> None:
        store.create("never written").close()
        write_file(store, "nothing written", b"")
        assert medium.read("never written") == b""
        assert medium.read("nothing written") == b""
        assert [file.size for file in store.list()] == [0, 0]

    def test_large_file(self, store: ByteStore, medium: Medium) -> None:
        data = pattern(self.LARGE)
        view = memoryview(data)
        step = 1 << 20
        file = store.create("f", len(data))
        for begin in range(0, len(data), step):
            file.write([view[begin : begin + 77], view[begin + 77 : begin + step]], begin)
        file.sync()
        file.close()
        assert alike(medium.read("f"), data)
        assert store.size("f") == len(data)

    def test_files_that_bypass_a_cache(self, store: ByteStore, medium: Medium) -> None:
        """Content, size and listing are as ever, however the buffers are cut."""
        data = pattern(self.LARGE, 5)
        view = memoryview(data)
        file = store.create("f", len(data))
        file.bypass_cache()
        begin = 0
        for step in (4096, 1, 3 << 20, 511, len(data)):
            end = min(begin + step, len(data))
            middle = (begin + end) // 2
            file.write([view[begin:middle], view[middle:end]], begin)
            begin = end
        file.sync()
        file.close()
        assert alike(medium.read("f"), data)
        assert store.size("f") == len(data)
        assert [(found.name, found.size) for found in store.list()] == [("f", len(data))]

    def test_files_that_bypass_a_cache_and_are_given_up(
        self, store: ByteStore, medium: Medium
    ) -> None:
        file = store.create("f", self.LARGE)
        file.bypass_cache()
        file.write([memoryview(pattern(5000))], 0)
        file.abort()
        assert medium.names() == set()

    def test_one_large_write(self, store: ByteStore, medium: Medium) -> None:
        data = pattern(self.LARGE, 3)
        write_file(store, "f", data)
        assert alike(medium.read("f"), data)

    def test_the_size_given_is_a_hint(self, store: ByteStore, medium: Medium) -> None:
        for name, hint in (("smaller", 1), ("larger", 1000)):
            file = store.create(name, hint)
            file.write([memoryview(b"abc")], 0)
            file.close()
            assert medium.read(name) == b"abc"
            assert store.size(name) == 3

    def test_offsets_in_any_order(self, store: ByteStore, medium: Medium) -> None:
        if not store.random_write:
            pytest.skip("random_write is false")
        data = pattern(5000)
        file = store.create("f", len(data))
        for begin in range(4000, -1, -1000):
            file.write([memoryview(data)[begin : begin + 1000]], begin)
        file.close()
        assert alike(medium.read("f"), data)

    def test_the_last_write_wins_where_writes_overlap(
        self, store: ByteStore, medium: Medium
    ) -> None:
        if not store.random_write:
            pytest.skip("random_write is false")
        file = store.create("f")
        file.write([memoryview(b"aaaaaaaa")], 0)
        file.write([memoryview(b"bb"), memoryview(b"cc")], 3)
        file.write([memoryview(b"dddd")], 6)
        file.close()
        assert medium.read("f") == b"aaabbcdddd"

    def test_an_offset_out_of_order_is_refused(self, store: ByteStore, medium: Medium) -> None:
        """Silently putting the bytes elsewhere would be the worst answer."""
        if store.random_write:
            pytest.skip("random_write is true")
        for wrong in (2, 4):
            file = store.create("f")
            file.write([memoryview(b"abc")], 0)
            with pytest.raises(OSError):
                file.write([memoryview(b"x")], wrong)
            file.abort()
            assert medium.names() == set()

    def test_threads_write_one_file(self, store: ByteStore, medium: Medium) -> None:
        if not store.random_write:
            pytest.skip("random_write is false")
        data = pattern(8 * 50_000)
        file = store.create("f", len(data))

        def part(number: int) -> None:
            for begin in range(number * 50_000, (number + 1) * 50_000, 10_000):
                file.write([memoryview(data)[begin : begin + 10_000]], begin)

        in_parallel(8, part)
        file.close()
        assert alike(medium.read("f"), data)

    def test_threads_write_files_of_their_own(self, store: ByteStore, medium: Medium) -> None:
        in_parallel(8, lambda n: write_file(store, f"f{n}", pattern(20_000, n)))
        assert alike(medium.snapshot(), {f"f{n}": pattern(20_000, n) for n in range(8)})

    def test_two_files_at_once(self, store: ByteStore, medium: Medium) -> None:
        first, second = store.create("first"), store.create("second")
        for at in range(4):
            first.write([memoryview(b"1")], at)
            second.write([memoryview(b"22")], 2 * at)
        second.close()
        first.close()
        assert medium.snapshot() == {"first": b"1111", "second": b"22222222"}

    def test_buffers_are_the_caller_s_again_after_a_write(
        self, store: ByteStore, medium: Medium
    ) -> None:
        buffer = bytearray(b"before")
        file = store.create("f")
        file.write([memoryview(buffer)], 0)
        buffer[:] = b"after!"
        file.close()
        assert medium.read("f") == b"before"

    def test_buffers_are_not_changed(self, store: ByteStore) -> None:
        buffer = bytearray(pattern(10_000))
        file = store.create("f")
        file.write([memoryview(buffer)], 0)
        file.close()
        assert alike(buffer, pattern(10_000))

    def test_a_buffer_with_gaps_is_refused_or_written_right(
        self, store: ByteStore, medium: Medium
    ) -> None:
        file = store.create("f")
        try:
            file.write([memoryview(b"a-b-c-")[::2]], 0)
        except (BufferError, OSError, TypeError, ValueError):
            file.abort()
            assert medium.names() == set()
        else:
            file.close()
            assert medium.read("f") == b"abc"

    def test_sync(self, store: ByteStore, medium: Medium) -> None:
        """Also of nothing, twice, and in between."""
        file = store.create("f")
        file.sync()
        file.write([memoryview(b"ab")], 0)
        file.sync()
        file.sync()
        file.write([memoryview(b"c")], 2)
        file.close()
        assert medium.read("f") == b"abc"

    def test_another_store_sees_a_closed_file(self, store: ByteStore, other: ByteStore) -> None:
        list(other.list())  # what it may remember
        write_file(store, "f", b"abc")
        assert other.size("f") == 3
        assert other.get("f") == b"abc"
        assert [file.name for file in other.list()] == ["f"]

    def test_a_name_that_is_taken(self, store: ByteStore, medium: Medium) -> None:
        """Either it is refused and nothing changes, or the file takes the old one's place."""
        write_file(store, "f", b"old content")
        try:
            file = store.create("f")
        except FileExistsError:
            assert alike(medium.read("f"), b"old content")
            return
        file.write([memoryview(b"new")], 0)
        file.close()
        assert medium.read("f") == b"new"

    def test_abort_leaves_nothing(self, store: ByteStore, medium: Medium) -> None:
        file = store.create("f", 100)
        file.write([memoryview(pattern(self.LARGE))], 0)
        file.abort()
        assert medium.names() == set()
        assert [*store.list()] == []
        with pytest.raises(FileNotFoundError):
            store.size("f")
        write_file(store, "f", b"again")
        assert medium.snapshot() == {"f": b"again"}

    def test_abort_of_a_file_never_written(self, store: ByteStore, medium: Medium) -> None:
        store.create("f").abort()
        assert medium.names() == set()

    def test_abort_takes_nothing_else_along(self, store: ByteStore, medium: Medium) -> None:
        write_file(store, "f1", b"stays")
        file = store.create("f")
        file.write([memoryview(b"goes")], 0)
        file.abort()
        assert medium.snapshot() == {"f1": b"stays"}

    def test_abort_twice_and_after_the_file_is_gone(self, store: ByteStore, medium: Medium) -> None:
        file = store.create("f")
        file.write([memoryview(b"x")], 0)
        file.abort()
        file.abort()
        file = store.create("g")
        file.write([memoryview(b"x")], 0)
        store.delete(["g"])
        file.abort()
        assert medium.names() == set()

    def test_abort_after_close_is_no_error(self, store: ByteStore) -> None:
        """A writer that finds out too late gives up what it has closed already."""
        file = store.create("f")
        file.write([memoryview(b"x")], 0)
        file.close()
        file.abort()

    def test_a_closed_file_takes_no_more(self, store: ByteStore, medium: Medium) -> None:
        file = store.create("f")
        file.write([memoryview(b"abc")], 0)
        file.close()
        with pytest.raises((OSError, ValueError)):
            file.write([memoryview(b"more")], 3)
        assert medium.read("f") == b"abc"

    def test_a_file_given_up_takes_no_more(self, store: ByteStore, medium: Medium) -> None:
        file = store.create("f")
        file.write([memoryview(b"abc")], 0)
        file.abort()
        with pytest.raises((OSError, ValueError)):
            file.write([memoryview(b"more")], 3)
        assert medium.names() == set()
