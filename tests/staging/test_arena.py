"""The memory of an arena: grown, reused, shared, given back."""

from __future__ import annotations

import errno
import logging
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dcp_engine.errors import StagingError, UsageError
from dcp_engine.staging import memory, pages
from dcp_engine.staging.arena import Arena

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena() as arena:
        yield arena


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def in_dev_shm() -> list[str]:
    """What this process has mapped of /dev/shm; other processes may use it meanwhile."""
    maps = Path("/proc/self/maps").read_text()
    return [line.split()[-1] for line in maps.splitlines() if "/dev/shm/" in line]


def test_one_descriptor_and_no_name_anywhere() -> None:
    before, named = descriptors(), in_dev_shm()
    arena = Arena()
    for size in (1, 3 * MIB, 9 * MIB):
        arena.reserve(size)
        assert descriptors() == before + 1
    assert os.readlink(f"/proc/self/fd/{arena.fileno()}").startswith("/memfd:")
    assert in_dev_shm() == named
    arena.close()
    arena.close()
    assert descriptors() == before
    assert arena.closed


def test_reserving_touches_nothing(arena: Arena) -> None:
    assert arena.reserve(50 * MIB)
    assert arena.size >= 50 * MIB
    assert arena.present() == 0


def test_it_grows_only_when_it_must(arena: Arena) -> None:
    assert arena.reserve(3 * MIB)
    size = arena.size
    assert not arena.reserve(size)
    assert not arena.reserve(1)
    assert arena.size == size
    assert arena.reserve(size + 1)


def test_views_outlive_growth_and_close(arena: Arena) -> None:
    arena.reserve(4 * MIB)
    old = arena.view(128, 4)
    old.copy_(torch.tensor([1, 2, 3, 4]))
    arena.reserve(20 * MIB)
    new = arena.view(128, 4)
    assert new.tolist() == [1, 2, 3, 4]
    new[0] = 9  # the same bytes, not a copy
    assert old[0] == 9
    arena.close()
    assert old.tolist() == new.tolist() == [9, 2, 3, 4]


@pytest.mark.parametrize("threads", [None, 2])
def test_touching_keeps_the_content(arena: Arena, threads: int | None) -> None:
    arena.reserve(130 * MIB)
    arena.view(5, 1).fill_(7)
    if threads is None:
        arena.touch(5 * MIB)
        assert arena.present() >= 5 * MIB
        assert arena.present() < 10 * MIB
    else:
        with ThreadPoolExecutor(threads) as executor:
            arena.touch(executor=executor)
        assert arena.present() >= 130 * MIB
    assert arena.view(5, 1).item() == 7


def test_touching_on_kernels_without_populate(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_madvise", lambda *_: 22)
    arena.reserve(2 * MIB)
    arena.view(0, 1).fill_(7)
    arena.touch()
    assert arena.present() >= 2 * MIB
    assert arena.view(0, 2).tolist() == [7, 0]


def test_a_kernel_that_refuses_is_heard(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_madvise", lambda *_: 12)
    arena.reserve(1)
    with pytest.raises(StagingError, match="Cannot allocate") as info:
        arena.touch()
    assert info.value.kind == "out_of_memory"


def test_too_little_memory_is_noticed_before_anything_is_touched(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena.reserve(4 * MIB)
    arena.touch()
    monkeypatch.setattr(memory, "available_memory", lambda: 100 * MIB)
    present, size = arena.present(), arena.size
    with pytest.raises(StagingError, match="host memory") as info:
        arena.reserve(200 * MIB)
    assert info.value.kind == "out_of_memory"
    assert (arena.present(), arena.size) == (present, size)
    # What is there already is not asked for again.
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    assert not arena.reserve(4 * MIB)


def test_bounds(arena: Arena) -> None:
    arena.reserve(1)
    for offset, nbytes in ((-1, 1), (0, -1), (arena.size, 1), (1, arena.size)):
        with pytest.raises(UsageError, match="outside"):
            arena.view(offset, nbytes)
    assert arena.view(arena.size, 0).numel() == 0


def test_offsets_of_tensors(arena: Arena) -> None:
    assert arena.offset_of(torch.ones(3)) is None
    arena.reserve(4096)
    assert arena.offset_of(arena.view(64, 16).view(torch.float32)[2:]) == 72
    assert arena.offset_of(torch.ones(3)) is None
    assert arena.offset_of(torch.ones(3, device="meta")) is None


def test_nothing_works_after_close(arena: Arena) -> None:
    arena.close()
    for use in (arena.fileno, arena.present, arena.touch, lambda: arena.reserve(1)):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_nobody_can_shrink_it(arena: Arena) -> None:
    arena.reserve(4 * MIB)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fileno(), 4096)


def test_attaching(arena: Arena) -> None:
    arena.reserve(3 * MIB)
    with Arena.attach(os.dup(arena.fileno()), arena.size) as other:
        assert other.fileno() != arena.fileno()
        assert other.size == arena.size
        arena.view(100, 1).fill_(3)
        assert other.view(100, 1).item() == 3
        with pytest.raises(UsageError, match="announced"):
            other.extend(arena.size + 1)
        arena.reserve(30 * MIB)
        other.extend(arena.size)
        arena.view(29 * MIB, 1).fill_(4)
        assert other.view(29 * MIB, 1).item() == 4
    assert arena.view(100, 1).item() == 3


def mapped(arena: Arena) -> int:
    """Bytes of it in the page tables of this process."""
    sizes, inside = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.split()[4] == str(os.fstat(arena.fileno()).st_ino)
        elif inside and line.startswith("Rss:"):
            sizes.append(int(line.split()[1]) * 1024)
    return sum(sizes)


def test_what_is_in_memory_is_mapped_at_once(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    arena.reserve(4 * MIB)
    os.pwrite(arena.fileno(), bytes(4 * MIB), 0)
    assert mapped(arena) == 0
    with monkeypatch.context() as patch:  # a kernel before 5.14
        patch.setattr(pages, "_madvise", lambda *args: errno.EINVAL)
        pages.map_present(arena.view(0, arena.size))
    if pages._madvise(arena.view(0, 1).data_ptr(), 0, pages._MADV_POPULATE_READ):
        pytest.skip("this kernel maps nothing ahead")
    pages.map_present(arena.view(0, 0))
    pages.map_present(arena.view(0, 3 * MIB))
    assert 3 * MIB <= mapped(arena) <= 4 * MIB
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    arena.view(0, 3 * MIB).fill_(1)
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults < 100


def test_first_writes(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "has_huge_pages", lambda: False)
    arena.reserve(3 * MIB)
    assert arena.takes_first_writes
    monkeypatch.setattr(pages, "has_huge_pages", lambda: True)
    assert not arena.takes_first_writes
    monkeypatch.setattr(pages, "has_huge_pages", lambda: False)
    arena.view(0, 1).fill_(1)
    assert not arena.takes_first_writes


@pytest.mark.parametrize(
    ("setting", "asked", "possible"),
    [
        ("always within_size [advise] never", True, True),
        ("always advise [never] deny", False, False),
        ("always advise never [deny]", False, False),
        ("[always] advise never", False, True),
        ("always [within_size] never", False, True),
        (None, False, True),
    ],
)
def test_huge_pages_only_where_granted(
    arena: Arena,
    tmp_path: Path,
    setting: str | None,
    asked: bool,
    possible: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(pages, "_madvise", lambda *args: calls.append(args[-1]) or 0)
    granted = tmp_path / "shmem_enabled"
    if setting is not None:
        granted.write_text(setting)
    arena.reserve(1)
    calls.clear()
    with caplog.at_level(logging.DEBUG, "dcp_engine.staging.pages"):
        assert pages.advise_huge_pages(arena.view(0, arena.size), granted) is asked
    assert pages.has_huge_pages(granted) is possible
    assert calls == [14] * asked
    assert "huge pages" in caplog.text


def test_pinning_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[str, int]] = []
    monkeypatch.setattr(pages, "can_pin", lambda: True)
    monkeypatch.setattr(pages, "pin", lambda m: pinned.append(("pin", m.numel())) or True)
    monkeypatch.setattr(pages, "unpin", lambda m: pinned.append(("unpin", m.numel())))
    with Arena(pin=True) as arena:
        arena.reserve(1)
        arena.reserve(3 * MIB)
        assert arena.pinned
    assert pinned == [
        ("pin", 2 * MIB),
        ("unpin", 2 * MIB),
        ("pin", 4 * MIB),
        ("unpin", 4 * MIB),
    ]
    monkeypatch.setattr(pages, "can_pin", lambda: False)
    with Arena(pin=True) as arena:
        arena.reserve(1)
        assert not arena.pinned


def test_memory_that_cannot_be_mapped_leaves_no_descriptor() -> None:
    with Arena() as arena:
        arena.reserve(4096)
        descriptor = os.dup(arena.fileno())
        with pytest.raises(UsageError, match="were announced"):
            Arena.attach(descriptor, 1 << 40)
        with pytest.raises(OSError):
            os.fstat(descriptor)
