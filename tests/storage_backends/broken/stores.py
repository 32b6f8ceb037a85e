"""Stores that break one promise each, and the check of the contract that has to notice.

Belongs here: mistakes that somebody who writes a store could make. Does not belong here: faults
that come and go (``storage_backends.testing.faulty``).
"""

from __future__ import annotations

import posixpath
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from dcp_engine.storage import Buffer, ByteStoreFile, ReadRange, StoredFile
from storage_backends.memory import MemoryStore
from storage_backends.testing.wrapping import WrappingByteStore, WrappingFile

CAUGHT_BY: dict[type[WrappingByteStore], tuple[str, ...]] = {}
"""Every broken store, and the checks that must fail for it."""


def caught_by(*checks: str) -> Callable[[type[WrappingByteStore]], type[WrappingByteStore]]:
    def note(store: type[WrappingByteStore]) -> type[WrappingByteStore]:
        CAUGHT_BY[store] = checks
        return store

    return note


class Broken(WrappingByteStore):
    """All stores of one place share ``inner``, and what threads of a test meet at."""

    inner: MemoryStore

    def meet(self) -> None:
        """Go on when another thread is here too; alone after a while."""
        meeting: threading.Barrier = vars(self.inner).setdefault("meeting", threading.Barrier(2))
        with suppress(threading.BrokenBarrierError):
            meeting.wait(2)

    def let_look(self) -> None:
        """Go on when somebody has read; anyway after a while."""
        looked: threading.Event = vars(self.inner).setdefault("looked", threading.Event())
        looked.clear()
        looked.wait(2)

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        try:
            self.inner.read(name, ranges)
        finally:
            if "looked" in vars(self.inner):
                vars(self.inner)["looked"].set()


# Files


@caught_by("test_offsets_in_any_order", "test_the_last_write_wins_where_writes_overlap")
class AppendsWhateverTheOffset(Broken):
    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        file.write(buffers, self.inner.size(name))


@caught_by("test_an_offset_out_of_order_is_refused")
class AppendsWithoutALook(AppendsWhateverTheOffset):
    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.random_write = False


@caught_by("test_buffers_land_one_behind_the_other", "test_large_file")
class WritesTheFirstBufferOnly(Broken):
    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        file.write(buffers[:1], offset)


@caught_by("test_many_small_buffers")
class TakesAsManyBuffersAsTheSystem(Broken):
    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        file.write(buffers[:1024], offset)


@caught_by("test_one_large_write")
class WritesOnePartOnly(Broken):
    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        file.write([buffer[: 8 << 20] for buffer in buffers], offset)


class _LateFile(WrappingFile):
    """Hands everything on at the end."""

    def __init__(self, store: WrappingByteStore, name: str, inner: ByteStoreFile) -> None:
        super().__init__(store, name, inner)
        self._held: list[tuple[Sequence[Buffer], int]] = []

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        self._held.append((list(buffers), offset))

    def close(self) -> None:
        for buffers, offset in self._held:
            super().write(buffers, offset)
        super().close()


@caught_by("test_buffers_are_the_caller_s_again_after_a_write")
class KeepsTheCallersBuffers(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        return _LateFile(self, name, self.inner.create(name, size))


@caught_by("test_buffers_are_not_changed")
class EncryptsInPlace(Broken):
    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        file.write(buffers, offset)
        for buffer in buffers:
            if not buffer.readonly:
                buffer[:] = bytes(buffer.nbytes)


@caught_by("test_a_buffer_with_gaps_is_refused_or_written_right")
class WritesTheGapsToo(Broken):
    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        whole: list[Any] = [b if b.contiguous else memoryview(b.obj) for b in buffers]
        file.write(whole, offset)


@caught_by("test_threads_write_one_file")
class SeeksThenWrites(Broken):
    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        self.position = offset
        self.meet()
        file.write(buffers, self.position)


@caught_by("test_the_size_given_is_a_hint")
class TakesTheHintForTheSize(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        file = self.inner.create(name, size)
        file.write([memoryview(bytes(size or 0))], 0)
        return WrappingFile(self, name, file)


class _UnwrittenFile(WrappingFile):
    written = False

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        self.written = self.written or any(buffer.nbytes for buffer in buffers)
        super().write(buffers, offset)

    def close(self) -> None:
        if self.written:
            super().close()
        else:
            self.abort()


@caught_by("test_empty_file")
class HasNoEmptyFiles(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        return _UnwrittenFile(self, name, self.inner.create(name, size))


class _KeptFile(WrappingFile):
    def abort(self) -> None:
        self.close()


@caught_by("test_abort_leaves_nothing", "test_abort_of_a_file_never_written")
class KeepsWhatWasGivenUp(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        return _KeptFile(self, name, self.inner.create(name, size))


class _StrictFile(WrappingFile):
    ended = False

    def close(self) -> None:
        self.ended = True
        super().close()

    def abort(self) -> None:
        if self.ended:
            raise OSError("the file has ended")
        self.ended = True
        super().abort()


@caught_by("test_abort_twice_and_after_the_file_is_gone", "test_abort_after_close_is_no_error")
class RefusesToAbortTwice(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        return _StrictFile(self, name, self.inner.create(name, size))


class _GreedyFile(WrappingFile):
    def abort(self) -> None:
        super().abort()
        inner = self._store.inner
        inner.delete([file.name for file in inner.list(self._name)])


@caught_by("test_abort_takes_nothing_else_along")
class AbortsByPrefix(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        return _GreedyFile(self, name, self.inner.create(name, size))


class _EndlessFile(WrappingFile):
    def close(self) -> None:
        return None

    def abort(self) -> None:
        self._store.inner.delete([self._name])


@caught_by("test_a_closed_file_takes_no_more", "test_a_file_given_up_takes_no_more")
class NeverClosesAFile(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        return _EndlessFile(self, name, self.inner.create(name, size))


class _BlocksOnly(WrappingFile):
    """Past its cache it writes whole blocks, and forgets what is left."""

    bypassing = False

    def bypass_cache(self) -> None:
        self.bypassing = True

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        data = b"".join(buffers)
        nbytes = len(data) // 512 * 512 if self.bypassing else len(data)
        super().write([memoryview(data[:nbytes])], offset)


@caught_by("test_files_that_bypass_a_cache")
class WritesWholeBlocksOnly(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        return _BlocksOnly(self, name, self.inner.create(name, size))


class _TwoFiles(WrappingFile):
    """Past its cache it has a file beside the one that it gives up."""

    def bypass_cache(self) -> None:
        self._store.inner.put(f"{self._name}.direct", b"")


@caught_by("test_files_that_bypass_a_cache_and_are_given_up")
class ForgetsItsOtherFile(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        return _TwoFiles(self, name, self.inner.create(name, size))


@caught_by("test_a_name_that_is_taken")
class WritesOverWhatIsThere(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        old = self.inner.get(name) if [*self.inner.list(name)] else b""
        self.inner.delete([name])
        self.inner.make_directory("")
        file = self.inner.create(name, size)
        file.write([memoryview(old)], 0)
        return WrappingFile(self, name, file)


@caught_by("test_two_files_at_once")
class HasOneFileOpen(Broken):
    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        self.current = getattr(self, "current", file)
        self.current.write(buffers, offset)


class _SyncedOnce(WrappingFile):
    def sync(self) -> None:
        self.close()


@caught_by("test_sync")
class ClosesToSync(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        return _SyncedOnce(self, name, self.inner.create(name, size))


@caught_by("test_another_store_sees_a_closed_file", "test_a_put_is_seen_by_others")
class KeepsToItself(Broken):
    """``test_byte_store_contract`` style stores share ``inner``; this one has its own."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(MemoryStore())
        self.inner.make_directory("")


# Small objects


@caught_by("test_put_appears_at_once")
class PutsInTwoSteps(Broken):
    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self.inner.put(name, data[: len(data) // 2], if_absent=if_absent)
        self.let_look()
        self.inner.put(name, data)


@caught_by("test_put", "test_put_takes_the_place_of_what_is_there")
class LeavesATemporaryFile(Broken):
    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self.inner.put(f"{name}.tmp", data)
        self.inner.put(name, data, if_absent=if_absent)


@caught_by("test_put_takes_the_place_of_what_is_there")
class PutsOverTheBegin(Broken):
    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        old = self.inner.get(name) if [*self.inner.list(name)] else b""
        self.inner.put(name, data + old[len(data) :], if_absent=if_absent)


@caught_by("test_put_if_absent", "test_put_if_absent_lets_one_win")
class IgnoresIfAbsent(Broken):
    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self.inner.put(name, data)


@caught_by("test_put_if_absent_lets_one_win")
class LooksThenPuts(Broken):
    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        if if_absent and [*self.inner.list(name)]:
            raise FileExistsError(name)
        self.meet()
        self.inner.put(name, data)


@caught_by("test_put_over", "test_put_over_lets_one_win")
class ReplacesWhateverTheTag(Broken):
    def put_over(self, name: str, data: bytes, tag: str) -> None:
        self.inner.put(name, data)


@caught_by("test_put_over_lets_one_win")
class LooksAtTheTagThenPuts(Broken):
    def put_over(self, name: str, data: bytes, tag: str) -> None:
        if self.inner.tag(name) != tag:
            raise FileExistsError(name)
        self.meet()
        self.inner.put(name, data)


@caught_by("test_put_over")
class TagsBySize(Broken):
    def tag(self, name: str) -> str:
        return str(self.inner.size(name))

    def put_over(self, name: str, data: bytes, tag: str) -> None:
        if self.tag(name) != tag:
            raise FileExistsError(name)
        self.inner.put(name, data)


@caught_by("test_replace")
class ReplacesByCopying(Broken):
    def replace(self, source: str, target: str) -> None:
        self.inner.put(target, self.inner.get(source))


@caught_by("test_replace_appears_at_once", "test_replace_of_what_is_not_there")
class RemovesThenRenames(Broken):
    def replace(self, source: str, target: str) -> None:
        self.inner.delete([target])
        self.inner.make_directory("")
        if [*self.inner.list(source)]:
            self.let_look()
        self.inner.replace(source, target)


# Reading


@caught_by("test_reading_beyond_the_end", "test_reading_an_empty_file")
class FillsWithZerosBehindTheEnd(Broken):
    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        data = self.inner.get(name)
        for item in ranges:
            part = data[item.offset : item.offset + item.buffer.nbytes]
            item.buffer[:] = part + bytes(item.buffer.nbytes - len(part))


@caught_by("test_ranges[unsorted]")
class SortsOffsetsButNotBuffers(Broken):
    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        offsets = sorted(item.offset for item in ranges)
        self.inner.read(
            name, [ReadRange(o, r.buffer) for o, r in zip(offsets, ranges, strict=True)]
        )


@caught_by("test_ranges[overlapping]", "test_ranges[unsorted]", "test_ranges[repeated]")
class ReadsOnwardsOnly(Broken):
    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        at = 0
        for item in ranges:
            at = max(at, item.offset)
            self.inner.read(name, [ReadRange(at, item.buffer)])
            at += item.buffer.nbytes


@caught_by("test_large_ranges")
class ReadsOnePartOnly(Broken):
    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        self.inner.read(name, [ReadRange(r.offset, r.buffer[: 2 << 20]) for r in ranges])


@caught_by("test_ranges[many]")
class ReadsAsManyRangesAsTheSystem(Broken):
    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        self.inner.read(name, ranges[:1024])


@caught_by("test_only_the_range_is_filled")
class FillsTheWholeMemory(Broken):
    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        self.inner.read(name, ranges)
        for item in ranges:
            whole: Any = item.buffer.obj
            if isinstance(whole, bytearray):
                whole[-1] = 0


@caught_by("test_threads_read")
class SeeksThenReads(Broken):
    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        for item in ranges:
            self.position = item.offset
            self.meet()
            self.inner.read(name, [ReadRange(self.position, item.buffer)])


@caught_by("test_nothing_is_remembered")
class RemembersSizes(Broken):
    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.sizes: dict[str, int] = {}

    def size(self, name: str) -> int:
        return self.sizes.setdefault(name, self.inner.size(name))


@caught_by("test_what_is_not_there", "test_a_put_is_seen_by_others")
class TakesWhatIsMissingForEmpty(Broken):
    def size(self, name: str) -> int:
        try:
            return self.inner.size(name)
        except FileNotFoundError:
            return 0


@caught_by("test_what_is_not_there", "test_a_place_that_is_not_there_yet")
class RaisesKeyErrors(Broken):
    def size(self, name: str) -> int:
        try:
            return self.inner.size(name)
        except FileNotFoundError as error:
            raise KeyError(name) from error


@caught_by("test_a_buffer_that_cannot_be_filled_is_refused")
class ReadsIntoACopy(Broken):
    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        writable = [
            r if not r.buffer.readonly else ReadRange(r.offset, memoryview(bytearray(r.buffer)))
            for r in ranges
        ]
        self.inner.read(name, writable)


@caught_by("test_get_with_a_limit")
class GetsWithoutALimit(Broken):
    def get(self, name: str, *, limit: int | None = None) -> bytes:
        return self.inner.get(name)


# Listings, deletions, directories


@caught_by("test_list_has_no_limit")
class ListsTheFirstPage(Broken):
    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        return list(self.inner.list(prefix))[:1000]


@caught_by("test_list")
class ListsDirectoriesOnly(Broken):
    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        if not prefix or prefix.endswith("/"):
            return self.inner.list(prefix)
        return [f for f in self.inner.list(prefix) if f.name.startswith(f"{prefix}/")]


@caught_by("test_list_is_of_now")
class RemembersListings(Broken):
    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        if not hasattr(self, "seen"):
            self.seen = list(self.inner.list())
        return [file for file in self.seen if file.name.startswith(prefix)]


@caught_by("test_ages")
class SaysWhenInsteadOfHowLongAgo(Broken):
    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        return [StoredFile(f.name, f.size, time.time()) for f in self.inner.list(prefix)]


@caught_by("test_delete_takes_no_prefix")
class DeletesTrees(Broken):
    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            inside = [f.name for f in self.inner.list(name.removesuffix("/") + "/")]
            self.inner.delete([name, *inside])


@caught_by("test_delete_what_is_not_there", "test_a_place_that_is_not_there_yet")
class RefusesToDeleteNothing(Broken):
    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.inner.size(name)
            self.inner.delete([name])


@caught_by("test_delete_of_many")
class DeletesOneBatch(Broken):
    def delete(self, names: Iterable[str]) -> None:
        self.inner.delete(list(names)[:1000])


@caught_by("test_the_root_stays")
class RemovesTheRootToo(Broken):
    def delete(self, names: Iterable[str]) -> None:
        self.inner.delete(names)
        if not [*self.inner.list()]:
            self.inner._directories.clear()


@caught_by("test_make_directory", "test_threads_make_one_directory")
class RefusesADirectoryThatIsThere(Broken):
    def make_directory(self, name: str) -> None:
        if name and name in self.inner._directories:
            raise FileExistsError(name)
        self.inner.make_directory(name)


@caught_by("test_a_missing_directory_is_not_made")
class BringsDirectoriesBack(Broken):
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        self.inner.make_directory(posixpath.dirname(name))
        return super().create(name, size)


@caught_by("test_directories_go_with_their_last_file")
class KeepsEmptyDirectories(Broken):
    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            kept = dict(self.inner._directories)
            self.inner.delete([name])
            if not name.endswith("/"):
                self.inner._directories.update(kept)


@caught_by("test_sync_directory")
class CannotSyncTheRoot(Broken):
    def sync_directory(self, name: str) -> None:
        self.inner.size(f"{name}/.")


# Names, flags, the store itself


@caught_by("test_unusual_names[percent%20sign%]")
class UnquotesNames(Broken):
    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self.inner.put(unquote(name), data, if_absent=if_absent)


@caught_by("test_case_matters")
class FoldsCase(Broken):
    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self.inner.put(name.lower(), data, if_absent=if_absent)


@caught_by("test_names_do_not_leave_the_root[a/../../outside]")
class NormalizesNames(Broken):
    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        clean = posixpath.normpath(f"/{name}").lstrip("/")
        self.inner.make_directory(posixpath.dirname(clean))
        self.inner.put(clean, data, if_absent=if_absent)


@caught_by("test_flags")
class HasNoFlags(Broken):
    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.durable_sync = None  # type: ignore[assignment]


@caught_by("test_url")
class HasNoUrl(Broken):
    @property
    def url(self) -> str:
        return ""


@caught_by("test_local_path")
class SaysItIsLocal(Broken):
    def local_path(self, name: str) -> str | None:
        return f"/nowhere/at/all/{name}"


@caught_by("test_close_twice")
class ClosesOnce(Broken):
    def close(self) -> None:
        del self.inner


# Of several threads, and of nothing at all


@caught_by("test_read_whole")
class CountsInBlocks(Broken):
    def size(self, name: str) -> int:
        return -(-self.inner.size(name) // 512) * 512


@caught_by("test_no_ranges")
class ReadsTheFirstRangeAnyway(Broken):
    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        self.inner.read(name, [ranges[0], *ranges[1:]])


@caught_by("test_delete")
class DeletesInTheRootOnly(Broken):
    def delete(self, names: Iterable[str]) -> None:
        self.inner.delete([name for name in names if "/" not in name])


@caught_by("test_threads_delete")
class LooksThenDeletes(Broken):
    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            if [*self.inner.list(name)]:
                if name == "d/f0":  # what all threads of the check delete
                    self.meet()
                with vars(self.inner).setdefault("deleting", threading.Lock()):
                    self.inner.size(name)
                    self.inner.delete([name])


@caught_by("test_threads_put")
class SharesATemporaryName(Broken):
    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self.inner.put("temporary", data)
        self.meet()
        self.inner.replace("temporary", name)


@caught_by("test_threads_write_files_of_their_own")
class SharesABuffer(Broken):
    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        self.buffer = b"".join(buffers)
        self.meet()
        file.write([memoryview(self.buffer)], offset)
