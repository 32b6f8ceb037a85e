"""Tensors staged: whole, reused, failing, in the background."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable

import pytest
import torch

from dcp_engine.errors import StagingError, UsageError
from dcp_engine.format.dtypes import DTYPES
from dcp_engine.staging import copier, memory, pages
from dcp_engine.staging.arena_stager import ArenaStager, Sources, Staging
from dcp_engine.staging.layout import SMALL
from tests.staging.states import bytes_of, numbered


def sources(*tensors: torch.Tensor) -> Sources:
    return Sources(tensors=tensors, names=[f"t{i}" for i in range(len(tensors))])


def of_every_kind() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    kinds = [
        random(48).view(torch.uint8)[: 6 * entry.itemsize].clone().view(entry.dtype).view(2, 3)
        for entry in DTYPES.values()
    ]
    whole = random(300, 200)
    kinds += [
        random(),
        torch.empty(0, 3),
        whole,
        whole.T,
        whole[::2, 1::3],
        whole[5:7],
        whole.view(-1)[100:110],
        random(1).expand(7, 5),
        random(3, 4, 5).permute(2, 0, 1),
        random(2, 3).to(torch.bfloat16).T,
        whole.view(torch.int32),
        torch.nn.Parameter(random(4)).detach(),
        random(1, 1, 9)[:, :, ::2],
        random(5000).to(torch.complex128),
    ]
    return kinds


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_kind_of_tensor(threads: int, background: bool) -> None:
    tensors = of_every_kind()
    expected = [bytes_of(tensor) for tensor in tensors]
    with ArenaStager(threads=threads) as stager:
        staging = stager.begin(sources(*tensors), background=background)
        staging.wait()
        # Freed under their feet, at once: storages do not come back for a staged copy.
        for tensor in tensors:
            tensor.untyped_storage().fill_(0)
            tensor.untyped_storage().resize_(0)
        staged = staging.tensors()
        assert [(t.shape, t.dtype) for t in staged] == [(t.shape, t.dtype) for t in tensors]
        assert [bytes_of(tensor) for tensor in staged] == expected
        assert staging.bytes_done == staging.bytes_total
        assert all(tensor.is_contiguous() for tensor in staged)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_tensors_in_slices(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(copier, "_SLICE", 1000)
    big = numbered(100, 90)
    looks = []
    with ArenaStager(threads=threads) as stager:
        tensors = (big, big.T, big[None, ::2, ::3], big.reshape(-1)[:: 90 * 99])
        staging = stager.begin(sources(*tensors), check=lambda: looks.append(0))
        for source, staged in zip(tensors, staging.tensors(), strict=True):
            assert torch.equal(source, staged)
    # Several threads share the slices out; only the calling one looks.
    assert len(looks) > (36 + 36 if threads == 1 else 0)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No huge pages, whatever this machine has; the sizes of what is mapped ahead."""
    mapped: list[int] = []
    monkeypatch.setattr(pages, "has_huge_pages", lambda: False)
    monkeypatch.setattr(pages, "map_present", lambda memory: mapped.append(memory.numel()))
    return mapped


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_copy_is_written_and_mapped_later(
    monkeypatch: pytest.MonkeyPatch, small_pages: list[int], threads: int, background: bool
) -> None:
    written: list[int] = []
    write = copier._pwrite

    def interrupted(fd: int, source: int, nbytes: int, offset: int) -> int:
        """As by a signal."""
        done: int = write(fd, source, min(nbytes, 9000), offset)
        written.append(done)
        return done

    monkeypatch.setattr(copier, "_pwrite", interrupted)
    monkeypatch.setattr(copier, "_SLICE", 20_000)
    tensors = [numbered(100_000), numbered(3), numbered(300, 200).T, numbered(SMALL + 1)]
    with ArenaStager(threads=threads) as stager:
        for turn in range(3):
            staging = stager.begin(sources(*tensors), background=background)
            staging.wait()
            for source, staged in zip(tensors, staging.tensors(), strict=True):
                assert torch.equal(source, staged)
                source.add_(1)
            staging.release()
            if turn == 0:
                large = sum(tensor.nbytes for tensor in (tensors[0], tensors[3]))
                # One thread writes at a time; others move theirs meanwhile.
                assert sum(written) == large if threads == 1 else 0 < sum(written) <= large
                written.clear()
        stager._background.submit(lambda: None).result()
        assert small_pages == [staging.layout.size]
    assert written == []


def test_huge_pages_are_for_mappings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "has_huge_pages", lambda: True)
    monkeypatch.setattr(copier, "_pwrite", None)
    with ArenaStager(threads=1) as stager:
        assert torch.equal(stager.begin(sources(numbered(9000))).tensors()[0], numbered(9000))


@pytest.mark.parametrize("result", [0, -1])
def test_no_memory_for_the_first_copy(
    monkeypatch: pytest.MonkeyPatch, small_pages: list[int], result: int
) -> None:
    def fail(*args: int) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return result

    with ArenaStager(threads=1) as stager:
        with monkeypatch.context() as patch:
            patch.setattr(copier, "_pwrite", fail)
            with pytest.raises(StagingError, match="failed") as caught:
                stager.begin(sources(numbered(9000)))
        assert caught.value.kind == "out_of_memory"
        assert torch.equal(stager.begin(sources(numbered(9000))).tensors()[0], numbered(9000))


def test_small_ones_of_all_sizes_and_strides(arenas: ArenaStager) -> None:
    tensors = [numbered(n) for n in range(1, 700)] + [numbered(n, 3).T for n in range(1, 50)]
    tensors.insert(300, numbered(SMALL))
    tensors += [numbered(n, dtype=torch.uint8) for n in range(1, 1500)]
    staging = arenas.begin(sources(*tensors))
    for source, staged in zip(tensors, staging.tensors(), strict=True):
        assert torch.equal(source, staged)


def test_the_same_memory_a_hundred_times(arenas: ArenaStager) -> None:
    tensors = [numbered(1000), numbered(40, 50).T, *(numbered(3) for _ in range(100))]
    places: set[tuple[int, int]] = set()
    counts: set[int] = set()
    present: set[int] = set()
    for turn in range(100):
        tensors[0].fill_(turn)
        staging = arenas.begin(sources(*tensors), background=bool(turn % 2))
        staging.wait()
        staged = staging.tensors()[0]
        assert staged[-1] == turn
        places.add((staging.arena.fileno(), staged.data_ptr()))
        if turn:  # the background thread has its own, once
            counts.add(len(os.listdir("/proc/self/fd")))
            present.add(arenas.present())
        staging.release()
        staging.release()
    assert [len(places), len(counts), len(present)] == [1, 1, 1]


def test_a_larger_state_grows_the_arena(arenas: ArenaStager) -> None:
    first = arenas.begin(sources(numbered(10)))
    fd, kept = first.arena.fileno(), first.tensors()
    first.release()
    second = arenas.begin(sources(numbered(3_000_000)))
    assert second.arena.fileno() == fd
    assert torch.equal(second.tensors()[0], numbered(3_000_000))
    assert kept[0].tolist() == second.tensors()[0][:10].tolist()  # the same bytes


def test_an_arena_has_one_user(arenas: ArenaStager) -> None:
    first = arenas.begin(sources(numbered(10)))

    def give_up() -> None:
        raise RuntimeError("deadline")

    with pytest.raises(RuntimeError, match="deadline"):
        arenas.begin(sources(numbered(10)), check=give_up)
    done: list[Staging] = []
    thread = threading.Thread(target=lambda: done.append(arenas.begin(sources(numbered(5)))))
    thread.start()
    first.release()
    thread.join(60)
    assert done[0].arena is first.arena


def test_two_arenas_two_users() -> None:
    with ArenaStager(arenas=2, threads=1) as stager:
        a = stager.begin(sources(numbered(10)))
        b = stager.begin(sources(numbered(10) + 1))
        assert a.arena is not b.arena
        assert a.tensors()[0].tolist() == [x - 1 for x in b.tensors()[0].tolist()]
        b.release()
        assert stager.begin(sources(numbered(10))).arena is b.arena


def test_a_release_in_the_middle_waits_for_the_copy(arenas: ArenaStager) -> None:
    go = threading.Event()
    first = arenas.begin(sources(numbered(10)), background=True, check=lambda: go.wait(60) and None)
    first.release()
    stop = iter([None, None])

    def look() -> None:
        if next(stop, "no arena") is not None:
            raise RuntimeError("no arena")

    with pytest.raises(RuntimeError, match="no arena"):
        arenas.begin(sources(numbered(10)), check=look)
    go.set()
    first.wait()
    arenas.begin(sources(numbered(10)))


@pytest.mark.parametrize("background", [False, True])
def test_what_check_raises_ends_the_staging(arenas: ArenaStager, background: bool) -> None:
    def check() -> None:
        raise KeyError("another rank failed")

    if background:
        staging = arenas.begin(sources(numbered(10)), background=True, check=check)
        with pytest.raises(KeyError, match="another"):
            staging.wait()
        staging.release()
    else:
        with pytest.raises(KeyError, match="another"):
            arenas.begin(sources(numbered(10)), check=check)
    assert arenas.begin(sources(numbered(10))).tensors()[0].tolist() == list(range(10))


def test_a_failing_thread_fails_the_staging(
    arenas: ArenaStager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "_pwritev", lambda *_: 5)
    with pytest.raises(StagingError, match="Cannot allocate") as info:
        arenas.begin(sources(*(numbered(3) for _ in range(2000))))
    assert info.value.kind == "out_of_memory"


def test_too_little_memory(arenas: ArenaStager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(StagingError) as info:
        arenas.begin(sources(numbered(1_000_000)))
    assert info.value.kind == "out_of_memory"
    assert arenas.present() == 0
    monkeypatch.undo()
    arenas.begin(sources(numbered(10)))  # the arena was given back


def held(check: Callable[[], None]) -> tuple[Callable[[], None], threading.Event]:
    """``check`` that first waits for the event."""
    go = threading.Event()

    def waiting() -> None:
        assert go.wait(60)
        check()

    return waiting, go


def test_a_change_before_completion_is_an_alarm(arenas: ArenaStager) -> None:
    tensor, other = numbered(10), numbered(10)
    check, go = held(lambda: None)
    staging = arenas.begin(sources(other, tensor), background=True, check=check)
    tensor.add_(1)
    go.set()
    with pytest.raises(StagingError, match="t1") as info:
        staging.wait()
    assert (info.value.kind, info.value.tensor) == ("staging_torn", "t1")
    staging.release()
    # What changed before, or did not, or has no counter, is none.
    with torch.inference_mode():
        inference = torch.ones(3)
    tensor.add_(1)
    arenas.begin(sources(tensor, inference), background=True).wait()


def test_outer_tensors_are_watched_too(arenas: ArenaStager) -> None:
    outer, local = numbered(3), numbered(3)
    check, go = held(lambda: None)
    watched = Sources(tensors=[local], names=["w"], watched=[("w", outer)])
    staging = arenas.begin(watched, background=True, check=check)
    outer.zero_()
    go.set()
    assert isinstance(staging.completion.exception(60), StagingError)


def test_waiting_with_a_timeout(arenas: ArenaStager) -> None:
    check, go = held(lambda: None)
    staging = arenas.begin(sources(numbered(10)), background=True, check=check)
    with pytest.raises(StagingError, match="0 of 40 bytes") as info:
        staging.wait(0)
    assert info.value.kind == "timeout"
    assert not staging.completion.cancel()
    go.set()
    staging.wait()


def test_warmup(arenas: ArenaStager) -> None:
    tensors = [numbered(1_000_000)]
    arenas.warmup(tensors)
    assert arenas.present() >= 4_000_000
    present = arenas.present()
    arenas.begin(sources(*tensors))
    assert arenas.present() == present


def test_nothing_to_stage(arenas: ArenaStager) -> None:
    staging = arenas.begin(sources())
    assert (staging.bytes_total, staging.tensors()) == (0, [])


def test_close_gives_memory_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    stager = ArenaStager(threads=2)
    staging = stager.begin(sources(numbered(10)), background=True)
    stager.close()
    stager.close()
    assert staging.completion.done()
    assert staging.tensors()[0].tolist() == list(range(10))
    staging.release()
    assert staging.arena.closed
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(UsageError, match="closed"):
        stager.begin(sources(numbered(1)))


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"),
    [(2, None, 2), (2, "2", 1), (2, "8", 1), (64, "4", 8), (16, "4", 4), (16, "0", 8), (2, "x", 2)],
)
def test_threads_are_shared_by_the_ranks_of_a_host(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: str | None, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert copier.default_threads() == threads


def test_arguments() -> None:
    for arguments in ({"threads": 0}, {"arenas": 0}):
        with pytest.raises(UsageError, match="at least one"):
            ArenaStager(**arguments)
