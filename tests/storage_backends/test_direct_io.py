"""Writes past the page cache: every byte arrives whatever its alignment, the disk is asked for
what it takes only, and the cache stays as it was."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dcp_engine as dcp
from dcp_engine.format.names import data_file_name
from storage_backends import direct_io, filesystem_file
from storage_backends.direct_io import (
    BOUNCE_BYTES,
    ZERO_COPY_BYTES,
    DirectAlignment,
    DirectWriter,
    direct_alignment,
)
from storage_backends.filesystem import FileSystemStore, FileSystemWriter
from storage_backends.vectored_io import pwrite_all

MEMORY = np.random.default_rng(0).integers(0, 256, 24 << 20, np.uint8)


def has_direct_io(directory: Path) -> bool:
    descriptor = os.open(directory / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        return direct_alignment(descriptor) is not None
    finally:
        os.close(descriptor)
        os.unlink(directory / "probe")


@pytest.fixture
def direct_path(tmp_path: Path) -> Path:
    if not has_direct_io(tmp_path):
        pytest.skip("the temporary directory's file system has no direct I/O")
    return tmp_path


class Disk:
    """Stands in for the system: takes what ``alignment`` allows, and refuses the rest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, alignment: DirectAlignment) -> None:
        self.alignment = alignment
        self.direct: dict[int, bool] = {}
        self.written_directly = 0
        self.in_place = 0
        monkeypatch.setattr(direct_io, "direct_alignment", lambda descriptor: self.alignment)
        monkeypatch.setattr(direct_io, "pwrite_all", self.pwrite_all)
        monkeypatch.setattr(
            DirectWriter,
            "_set_direct",
            lambda writer, direct: self.direct.__setitem__(writer._descriptor, direct),
        )

    def pwrite_all(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
        if self.direct[descriptor]:
            assert offset % self.alignment.offset == 0
            for buffer in buffers:
                address = np.frombuffer(buffer, np.uint8).ctypes.data
                assert address % self.alignment.memory == 0
                assert buffer.nbytes % self.alignment.offset == 0
                self.written_directly += buffer.nbytes
                begin = address - MEMORY.ctypes.data
                self.in_place += buffer.nbytes if 0 <= begin < MEMORY.nbytes else 0
        pwrite_all(descriptor, buffers, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch, DirectAlignment(512, 4096))


def pieces(*sizes: tuple[int, int]) -> list[memoryview]:
    """Parts of ``MEMORY``: begin and size."""
    return [memoryview(MEMORY)[begin : begin + size] for begin, size in sizes]


def write_in_order(store: FileSystemStore, name: str, calls: list[list[memoryview]]) -> bytes:
    """Write, and return what should be there."""
    expected = b"".join(b"".join(call) for call in calls)
    file = store.create(name, len(expected))
    file.bypass_cache()
    offset = 0
    for call in calls:
        file.write(call, offset)
        offset += sum(part.nbytes for part in call)
    file.sync()
    file.close()
    return expected


SIZES = st.one_of(
    st.integers(0, 5000),
    st.integers(ZERO_COPY_BYTES - 2, ZERO_COPY_BYTES + 9000),
    st.sampled_from([4096, 1 << 20, BOUNCE_BYTES - 1, BOUNCE_BYTES, BOUNCE_BYTES + 4096, 5 << 20]),
)
PIECES = st.tuples(st.one_of(st.integers(0, 9000), st.sampled_from([0, 512, 4096])), SIZES)


class TestWriter:
    @given(
        calls=st.lists(st.lists(PIECES, max_size=4), max_size=6),
        memory=st.sampled_from([4, 512, 4096]),
        offset=st.sampled_from([4096, 16384]),
    )
    def test_every_byte_arrives(
        self,
        calls: list[list[tuple[int, int]]],
        memory: int,
        offset: int,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        root = tmp_path_factory.mktemp("direct")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(filesystem_file, "_DIRECT_BYTES", 0)
            disk = Disk(monkeypatch, DirectAlignment(memory, offset))
            expected = write_in_order(FileSystemStore(root), "f", [pieces(*call) for call in calls])
        assert (root / "f").read_bytes() == expected
        assert disk.written_directly == len(expected) - len(expected) % offset
        (root / "f").unlink()

    def test_what_lies_well_is_not_copied(self, tmp_path: Path, disk: Disk) -> None:
        shift = -MEMORY.ctypes.data % 4096
        calls = [pieces((shift, 4096)), pieces((shift + 4096, 8 << 20))]
        expected = write_in_order(FileSystemStore(tmp_path), "f", calls)
        assert (tmp_path / "f").read_bytes() == expected
        assert disk.in_place == 8 << 20

    def test_a_small_piece_ahead_leaves_the_next_in_place(self, tmp_path: Path, disk: Disk) -> None:
        shift = -MEMORY.ctypes.data % 4096
        calls = [pieces((0, 512)), pieces((shift + 512, (8 << 20) - 512))]
        write_in_order(FileSystemStore(tmp_path), "f", calls)
        assert disk.in_place == (8 << 20) - 4096

    def test_a_write_out_of_order_ends_it(self, tmp_path: Path, disk: Disk) -> None:
        size = 4 << 20
        view = memoryview(MEMORY)[:size]
        file = FileSystemStore(tmp_path).create("f", size)
        file.bypass_cache()
        file.write([view[:1000]], 0)
        file.write([view[2_000_000:]], 2_000_000)
        file.write([view[1000:2_000_000]], 1000)
        file.close()
        assert (tmp_path / "f").read_bytes() == bytes(view)
        assert not any(disk.direct.values())

    @pytest.mark.parametrize("hint", [2 << 20, 8 << 20])
    def test_the_size_given_is_a_hint(self, tmp_path: Path, disk: Disk, hint: int) -> None:
        view = memoryview(MEMORY)[: (4 << 20) + 5]
        file = FileSystemStore(tmp_path).create("f", hint)
        file.bypass_cache()
        for begin in range(0, len(view), 1 << 20):
            file.write([view[begin : begin + (1 << 20)]], begin)
        file.close()
        assert (tmp_path / "f").read_bytes() == bytes(view)

    def test_a_refusal_is_no_failure(
        self, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of file systems that take the flag and then refuse the write."""

        def refuse(descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
            if disk.direct[descriptor]:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            pwrite_all(descriptor, buffers, offset)

        monkeypatch.setattr(direct_io, "pwrite_all", refuse)
        calls = [pieces((1, 3 << 20)), pieces((0, 6 << 20), (5, 17))]
        expected = write_in_order(FileSystemStore(tmp_path), "f", calls)
        assert (tmp_path / "f").read_bytes() == expected

    def test_a_flag_that_is_refused_is_no_failure(
        self, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(writer: DirectWriter, direct: bool) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        monkeypatch.setattr(DirectWriter, "_set_direct", refuse)
        expected = write_in_order(FileSystemStore(tmp_path), "f", [pieces((0, 2 << 20))])
        assert (tmp_path / "f").read_bytes() == expected

    def test_a_failed_write_is_raised(
        self, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(direct_io, "pwrite_all", fail)
        file = FileSystemStore(tmp_path).create("f", 8 << 20)
        file.bypass_cache()
        with pytest.raises(OSError, match=f"'f'|/f|{os.strerror(errno.ENOSPC)}") as raised:
            file.write(pieces((0, 8 << 20)), 0)
        assert raised.value.errno == errno.ENOSPC
        file.abort()
        assert not (tmp_path / "f").exists()

    def test_a_held_back_rest_that_fails_is_raised_by_close(
        self, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = FileSystemStore(tmp_path).create("f", 8 << 20)
        file.bypass_cache()
        file.write(pieces((0, 100)), 0)

        def fail(*args: Any) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(direct_io, "pwrite_all", fail)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            file.close()
        file.abort()
        assert not (tmp_path / "f").exists()

    def test_abort_forgets_what_is_held_back(self, tmp_path: Path, disk: Disk) -> None:
        file = FileSystemStore(tmp_path).create("f", 8 << 20)
        file.bypass_cache()
        file.write(pieces((0, 100)), 0)
        file.abort()
        assert list(tmp_path.iterdir()) == []

    def test_a_close_after_abort_writes_nowhere(self, tmp_path: Path, disk: Disk) -> None:
        """Least of all to the next file, which has the descriptor's number now."""
        file = FileSystemStore(tmp_path).create("f", 8 << 20)
        file.bypass_cache()
        file.write(pieces((0, 100)), 0)
        file.abort()
        (number,) = disk.direct
        with open(tmp_path / "other", "wb") as other:
            os.dup2(other.fileno(), number)
            file.close()
            os.close(number)
        assert (tmp_path / "other").stat().st_size == 0

    @pytest.mark.parametrize(("sync", "size"), [(False, 8 << 20), (True, 1000), (True, None)])
    def test_where_it_is_not_worth_it(
        self, tmp_path: Path, disk: Disk, sync: bool, size: int | None
    ) -> None:
        file = FileSystemStore(tmp_path, sync=sync).create("f", size)
        file.bypass_cache()
        file.write(pieces((0, 1000)), 0)
        file.close()
        assert disk.direct == {}


class TestAlignment:
    def test_not_in_memory(self) -> None:
        memory = Path("/dev/shm")
        if not memory.is_dir() or os.major(memory.stat().st_dev):
            pytest.skip("no file system in memory")
        descriptor = os.open(memory, os.O_TMPFILE | os.O_WRONLY)
        try:
            assert direct_alignment(descriptor) is None
        finally:
            os.close(descriptor)

    @pytest.mark.parametrize(
        ("told", "expected"),
        [
            (None, DirectAlignment(4096, 4096)),
            ((0, 0), None),
            ((4, 512), DirectAlignment(4, 4096)),
            ((512, 16384), DirectAlignment(512, 16384)),
            ((65536, 4096), None),
            ((512, 1 << 20), None),
        ],
    )
    def test_as_the_system_tells(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        told: tuple[int, int] | None,
        expected: DirectAlignment | None,
    ) -> None:
        monkeypatch.setattr(direct_io, "_told", lambda descriptor: told)
        monkeypatch.setattr(os, "major", lambda device: 8)
        with open(tmp_path / "f", "wb") as file:
            assert direct_alignment(file.fileno()) == expected

    def test_without_the_flag(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(direct_io, "O_DIRECT", 0)
        with open(tmp_path / "f", "wb") as file:
            assert direct_alignment(file.fileno()) is None


class OwnPlanner(dcp.DefaultSavePlanner):
    """A planner with a method of its own: the save goes item by item."""

    def create_local_plan(self) -> dcp.SavePlan:
        return super().create_local_plan()


def cached_bytes(path: Path) -> int:
    """Bytes of the file that the page cache holds, in whole pages."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        memory = np.frombuffer(mapped, np.uint8)
        call = ctypes.CDLL(None, use_errno=True).mincore
        call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        assert call(memory.ctypes.data, len(mapped), ctypes.addressof(found)) == 0
        del memory
        return sum(byte & 1 for byte in found) * mmap.PAGESIZE


def data_file(checkpoint: Path) -> Path:
    (found,) = checkpoint.glob(f"data-*/{data_file_name(0, 0)}")
    return found


@pytest.fixture
def state() -> Iterator[dict[str, torch.Tensor]]:
    """Sizes of whole pages and others, slices, and elements of several sizes."""
    generator = torch.Generator().manual_seed(0)
    yield {
        "pages": torch.randn(1024, 1024, generator=generator),
        "odd": torch.randn(1001, 333, generator=generator),
        "bytes": torch.randint(0, 256, (1_000_003,), dtype=torch.uint8, generator=generator),
        "slice": torch.randn(999, 777, generator=generator)[:, ::2],
        **{f"small{i}": torch.full((i,), float(i)) for i in range(50)},
    }


class TestSaves:
    """On the real file system, where that takes direct I/O."""

    @pytest.mark.parametrize("kind", list(dcp.AsyncCheckpointerType))
    @pytest.mark.parametrize("planner", [None, OwnPlanner()])
    def test_asynchronous_saves_leave_the_cache_alone(
        self,
        direct_path: Path,
        state: dict[str, torch.Tensor],
        kind: dcp.AsyncCheckpointerType,
        planner: dcp.SavePlanner | None,
    ) -> None:
        path = direct_path / "c"
        dcp.async_save(
            state, checkpoint_id=path, planner=planner, async_checkpointer_type=kind
        ).result(60)
        file = data_file(path)
        assert cached_bytes(file) <= 64 << 10
        assert file.stat().st_size > 6 << 20
        self.assert_holds(path, state)

    @pytest.mark.parametrize(("direct_io", "whole"), [(None, True), (True, False), (False, True)])
    def test_synchronous_saves_if_asked(
        self,
        direct_path: Path,
        state: dict[str, torch.Tensor],
        direct_io: bool | None,
        whole: bool,
    ) -> None:
        writer = FileSystemWriter(direct_path / "c", direct_io=direct_io, thread_count=1)
        dcp.save(state, storage_writer=writer)
        file = data_file(direct_path / "c")
        assert (cached_bytes(file) >= file.stat().st_size) is whole
        assert whole or cached_bytes(file) <= 64 << 10
        self.assert_holds(direct_path / "c", state)

    def test_asynchronous_saves_not_if_asked(
        self, direct_path: Path, state: dict[str, torch.Tensor]
    ) -> None:
        writer = FileSystemWriter(direct_path / "c", direct_io=False)
        dcp.async_save(state, storage_writer=writer).result(60)
        file = data_file(direct_path / "c")
        assert cached_bytes(file) >= file.stat().st_size

    def test_a_file_that_may_not_grow(
        self, direct_path: Path, state: dict[str, torch.Tensor]
    ) -> None:
        """The limit cuts a direct write short: the save fails, and nothing of it stays."""
        dcp.save({"before": torch.ones(3)}, checkpoint_id=direct_path / "c")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_001, limits[1]))
        try:
            response = dcp.async_save(state, checkpoint_id=direct_path / "c")
            with pytest.raises(dcp.CheckpointException, match="File too large"):
                response.result(60)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        loaded = {"before": torch.zeros(3)}
        dcp.load(loaded, checkpoint_id=direct_path / "c")
        assert torch.equal(loaded["before"], torch.ones(3))
        assert len(list((direct_path / "c").glob("data-*"))) == 1

    def assert_holds(self, path: Path, state: dict[str, torch.Tensor]) -> None:
        loaded = {name: torch.zeros_like(value) for name, value in state.items()}
        dcp.load(loaded, checkpoint_id=path)
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
