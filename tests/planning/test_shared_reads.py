"""Shared reads, carried out on arrays that stand for chunks, against what was wanted."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import CoordinationError
from dcp_engine.planning.shared_interests import Interests
from dcp_engine.planning.shared_reads import ALONE, RankShare, plan_shared_reads, slab_bytes_for
from dcp_engine.planning.shared_wire import (
    decode_interests,
    decode_share,
    encode_interests,
    encode_share,
)

BLOCK = 16
Box = tuple[tuple[int, ...], tuple[int, ...]]
Want = tuple[int, Box]
"""A chunk and a box of it."""


def interests(shapes: list[tuple[int, ...]], wants: list[Want], itemsize: int = 4) -> Interests:
    width = max([1, *(len(shape) for shape in shapes)])

    def padded(values: list[tuple[int, ...]], fill: int) -> np.ndarray:
        rows = [[*value, *([fill] * (width - len(value)))] for value in values]
        return np.array(rows, np.int64).reshape(len(values), width)

    starts = np.cumsum([0, *(math.prod(shape) * itemsize for shape in shapes)])
    return Interests(
        file=np.array([chunk % 2 for chunk, _ in wants], np.int64),
        chunk_start=np.array([starts[chunk] for chunk, _ in wants], np.int64),
        itemsize=np.full(len(wants), itemsize, np.int64),
        chunk_sizes=padded([shapes[chunk] for chunk, _ in wants], 1),
        within=padded([box[0] for _, box in wants], 0),
        lengths=padded([box[1] for _, box in wants], 1),
    )


class Job:
    """Carries the shares of all ranks out, and keeps count."""

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        wants: list[list[Want]],
        slab_bytes: int = 2 * BLOCK,
        round_bytes: int = 1 << 30,
    ) -> None:
        self.shapes = shapes
        self.wants = wants
        self.interests = [interests(shapes, own) for own in wants]
        self.chunks = [np.arange(math.prod(shape)).reshape(shape) for shape in shapes]
        self.shares = plan_shared_reads(
            self.interests, block_size=BLOCK, slab_bytes=slab_bytes, round_bytes=round_bytes
        )
        self.slab_bytes = slab_bytes
        self.read: dict[int, Counter[int]] = defaultdict(Counter)
        """By chunk, how often each byte is read through slabs."""
        self.load = Counter[int]()

    def mask(self, rank: int, row: int, begin: int, end: int) -> np.ndarray:
        chunk, (within, lengths) = self.wants[rank][row]
        array = self.chunks[chunk]
        box = tuple(slice(w, w + n) for w, n in zip(within, lengths, strict=True))
        inside = np.zeros(array.shape, np.bool_)
        inside[box] = True
        flat = inside.reshape(-1)
        flat[: begin // 4] = False
        flat[end // 4 :] = False
        return np.flatnonzero(flat)

    def run(self) -> None:
        delivered: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        sent: dict[tuple[int, int, int], list[tuple[int, int, int]]] = defaultdict(list)
        received: dict[tuple[int, int, int], list[tuple[int, int, int]]] = defaultdict(list)
        for rank, share in enumerate(self.shares):
            for row, begin, end in zip(
                share.slab_row, share.slab_begin, share.slab_end, strict=True
            ):
                chunk = self.wants[rank][row][0]
                nbytes = self.chunks[chunk].nbytes // 2
                assert begin % BLOCK == 0
                assert end % BLOCK == 0 or end == nbytes
                assert begin < end <= nbytes
                assert end - begin <= self.slab_bytes
                self.read[chunk].update(range(begin, end))
                self.load[rank] += int(end - begin)
            for slab, to, row, within, lengths in zip(
                share.send_slab,
                share.send_to,
                share.send_row,
                share.send_within,
                share.send_lengths,
                strict=True,
            ):
                begin, end = int(share.slab_begin[slab]), int(share.slab_end[slab])
                chunk, box = self.wants[to][row]
                assert self.wants[rank][share.slab_row[slab]][0] == chunk
                ndim = len(box[0])
                assert (tuple(within[:ndim]), tuple(lengths[:ndim])) == box
                if to == rank:
                    delivered[rank, int(row)].update(self.mask(rank, row, begin, end))
                else:
                    assert share.slab_round[slab] != ALONE
                    sent[rank, int(to), int(share.slab_round[slab])].append((row, begin, end))
            for k, source, row, begin, end in zip(
                share.receive_round,
                share.receive_from,
                share.receive_row,
                share.receive_begin,
                share.receive_end,
                strict=True,
            ):
                received[int(source), rank, int(k)].append((row, begin, end))
                got = self.mask(rank, row, begin, end)
                assert len(got), "an empty piece"
                delivered[rank, int(row)].update(got)
        assert sent == received
        for rank, share in enumerate(self.shares):
            for row in range(len(self.wants[rank])):
                expected = self.mask(rank, row, 0, 1 << 60) if row in share.rows else []
                assert delivered[rank, row] == Counter(list(expected))
        for counts in self.read.values():
            assert set(counts.values()) == {1}

    def most_memory(self) -> int:
        """The most bytes that a rank reads, packs and receives in a round."""
        most = 0
        for share in self.shares:
            held = Counter[int]()
            for k, begin, end in zip(
                share.slab_round, share.slab_begin, share.slab_end, strict=True
            ):
                held[int(k)] += int(end - begin)
            for k, begin, end in zip(
                share.receive_round, share.receive_begin, share.receive_end, strict=True
            ):
                held[int(k)] += int(end - begin)
            for slab, to in zip(share.send_slab, share.send_to, strict=True):
                if to != self.shares.index(share):
                    k = int(share.slab_round[slab])
                    held[k] += int(share.slab_end[slab] - share.slab_begin[slab])
            held.pop(ALONE, None)
            most = max([most, *held.values()])
        return most

    def loads(self) -> Counter[int]:
        """By rank, what it reads through slabs."""
        sizes = [int((s.slab_end - s.slab_begin).sum()) for s in self.shares]
        return Counter({rank: size for rank, size in enumerate(sizes) if size})

    def held_for_a_round(self) -> int:
        """The most that the exchange takes for a round: messages of whole slabs are not packed."""
        held = Counter[tuple[int, int]]()
        for rank, share in enumerate(self.shares):
            slabs: dict[int, list[int]] = defaultdict(list)
            for slab, k in enumerate(share.slab_round.tolist()):
                if k != ALONE:
                    slabs[k].append(slab)
                    held[rank, k] += int(share.slab_end[slab] - share.slab_begin[slab])
            messages: dict[tuple[int, int], list[tuple[int, int, bool]]] = defaultdict(list)
            for slab, to, row in zip(
                share.send_slab.tolist(), share.send_to.tolist(), share.send_row, strict=True
            ):
                if to != rank:
                    begin, end = int(share.slab_begin[slab]), int(share.slab_end[slab])
                    nbytes = 4 * len(self.mask(to, int(row), begin, end))
                    k = int(share.slab_round[slab])
                    messages[to, k].append((slab, nbytes, nbytes == end - begin))
            for (to, k), pieces in messages.items():
                total = sum(nbytes for _, nbytes, _ in pieces)
                held[to, k] += total
                if [p[0] for p in pieces] != slabs[k] or not all(p[2] for p in pieces):
                    held[rank, k] += total
        return max(held.values(), default=0)

    def most_in_a_round(self) -> int:
        most = 0
        for share in self.shares:
            rounds = share.slab_round[share.slab_round != ALONE]
            size = (share.slab_end - share.slab_begin)[share.slab_round != ALONE]
            most = max([most, *np.bincount(rounds, size).astype(int).tolist()])
        return most


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    shapes = draw(
        st.lists(st.lists(st.integers(1, 12), max_size=3).map(tuple), min_size=1, max_size=4)
    )
    wants: list[list[Want]] = []
    for _ in range(draw(st.integers(1, 4))):
        own: list[Want] = []
        for chunk, shape in enumerate(shapes):
            for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
                if draw(st.booleans()):
                    own.append((chunk, ((0,) * len(shape), shape)))
                    continue
                within = tuple(draw(st.integers(0, n - 1)) for n in shape)
                lengths = tuple(
                    draw(st.integers(1, n - w)) for n, w in zip(shape, within, strict=True)
                )
                own.append((chunk, (within, lengths)))
        wants.append(own)
    return Job(shapes, wants, slab_bytes=BLOCK * draw(st.integers(1, 4)))


@settings(max_examples=120, deadline=None)
@given(jobs())
def test_every_wanted_element_arrives_once_and_every_byte_is_read_once(job: Job) -> None:
    job.run()
    assert job.most_in_a_round() <= 2 * job.slab_bytes
    # What slab_bytes_for reckons with; a block is the least there is.
    if job.slab_bytes >= 2 * BLOCK:
        assert job.most_memory() <= 2 * job.slab_bytes * (2 * len(job.wants) + 1)


@settings(max_examples=80, deadline=None)
@given(jobs(), st.integers(1, 40))
def test_no_rank_holds_more_than_it_may(job: Job, blocks: int) -> None:
    """Ranks read by turns, or each for itself."""
    tight = Job(job.shapes, job.wants, job.slab_bytes, round_bytes=blocks * BLOCK)
    assert tight.held_for_a_round() <= blocks * BLOCK
    tight.run()
    if any(len(share.rows) for share in tight.shares):
        assert [s.rows.tolist() for s in tight.shares] == [s.rows.tolist() for s in job.shares]
        assert tight.load == job.loads()


def test_replicas_are_read_by_turns_where_that_is_enough() -> None:
    shapes = [(64,)]
    sizes = {}
    for blocks in (0, 1, 2, 3, 4, 5):
        job = Job(shapes, [whole(shapes)] * 4, BLOCK, round_bytes=blocks * BLOCK)
        sizes[blocks] = max(share.slab_round.max(initial=ALONE) + 1 for share in job.shares)
    # 16 blocks: not at all; one reader at a time, two, four.
    assert sizes == {0: 0, 1: 16, 2: 8, 3: 8, 4: 4, 5: 4}


@settings(max_examples=40, deadline=None)
@given(jobs())
def test_what_travels_arrives_as_it_was(job: Job) -> None:
    for one in job.interests:
        other = decode_interests(encode_interests(one))
        assert all(
            np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)
        )
    for share in job.shares:
        again = decode_share(encode_share(share))
        assert all(
            np.array_equal(getattr(share, f.name), getattr(again, f.name)) for f in fields(share)
        )


@pytest.mark.parametrize("data", [b"", b"\x00", encode_interests(interests([()], []))[:-4]])
def test_a_message_of_another_version_is_refused(data: bytes) -> None:
    for decode in (decode_interests, decode_share):
        with pytest.raises(CoordinationError, match="cannot be read"):
            decode(data)


def test_a_message_of_the_wrong_kind_is_refused() -> None:
    data = encode_interests(interests([(4,)], [(0, ((0,), (4,)))]))
    with pytest.raises(CoordinationError, match="arrays where"):
        decode_share(data)


def whole(shapes: list[tuple[int, ...]]) -> list[Want]:
    return [(chunk, ((0,) * len(shape), shape)) for chunk, shape in enumerate(shapes)]


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_what_all_need_is_read_in_equal_parts(world_size: int) -> None:
    shapes = [(40, 10), (7,), (100,), (), (3, 5, 20)]
    job = Job(shapes, [whole(shapes)] * world_size, slab_bytes=BLOCK)
    job.run()
    total = sum(math.prod(shape) for shape in shapes) * 4
    assert sum(job.load.values()) == total
    assert max(job.load.values()) <= total / world_size + BLOCK


def test_what_one_rank_reads_alone_counts_when_the_rest_is_given_out() -> None:
    shapes = [(64,)]
    box = ((0,), (32,))
    job = Job(shapes, [whole(shapes), [(0, box)], [(0, box)]], slab_bytes=BLOCK)
    job.run()
    # 128 bytes only rank 0 needs, 128 bytes all three need: 0 has its fill already.
    assert dict(job.load) == {0: 128, 1: 64, 2: 64}


def test_rows_for_columns_are_read_once() -> None:
    shapes = [(8, 16), (8, 16)]
    halves = [((0, 0), (8, 8)), ((0, 8), (8, 8))]
    job = Job(shapes, [[(0, half), (1, half)] for half in halves])
    job.run()
    assert sum(job.load.values()) == 2 * 8 * 16 * 4
    assert job.load[0] == job.load[1]


def test_a_block_that_two_ranks_touch_is_read_once() -> None:
    shapes = [(10,)]
    job = Job(shapes, [[(0, ((0,), (5,)))], [(0, ((5,), (5,)))]])
    job.run()
    assert sum(job.load.values()) == 40


def test_chunks_of_one_rank_are_left_alone() -> None:
    shapes = [(10,), (10,)]
    job = Job(shapes, [[(0, ((0,), (10,)))], [(1, ((0,), (10,)))], []])
    assert all(len(share.rows) == len(share.slab_row) == 0 for share in job.shares)


def test_parts_that_end_at_block_borders_are_left_alone() -> None:
    shapes = [(16,)]
    job = Job(shapes, [[(0, ((0,), (8,)))], [(0, ((8,), (8,)))]])
    assert all(len(share.rows) == 0 for share in job.shares)


def test_elements_that_do_not_fit_into_blocks_are_left_alone() -> None:
    one = interests([(9,)], whole([(9,)]), itemsize=12)
    shares = plan_shared_reads([one, one], block_size=BLOCK, slab_bytes=BLOCK, round_bytes=1 << 20)
    assert all(len(share.rows) == 0 for share in shares)


def test_one_place_with_two_shapes_is_left_alone() -> None:
    one, two = interests([(4, 4)], whole([(4, 4)])), interests([(16,)], whole([(16,)]))
    shares = plan_shared_reads([one, two], block_size=BLOCK, slab_bytes=BLOCK, round_bytes=1 << 20)
    assert all(len(share.rows) == 0 for share in shares)


def test_too_much_to_plan_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcp_engine.planning.shared_slabs.MAX_PAIRS", 3)
    shapes = [(16,)]
    job = Job(shapes, [whole(shapes)] * 2, slab_bytes=BLOCK)
    assert all(len(share.rows) == len(share.slab_row) == 0 for share in job.shares)


def test_nothing_at_all() -> None:
    shares = plan_shared_reads(
        [interests([], [])] * 3, block_size=BLOCK, slab_bytes=BLOCK, round_bytes=1 << 20
    )
    assert [len(share.rows) for share in shares] == [0, 0, 0]
    assert all(isinstance(share, RankShare) for share in shares)


@pytest.mark.parametrize("world_size", [1, 2, 64, 4096])
def test_slabs_are_blocks_within_the_budget(world_size: int) -> None:
    size = slab_bytes_for(world_size=world_size, block_size=1 << 16, budget=128 << 20)
    assert size % (1 << 16) == 0
    assert size == 1 << 16 or 4 * size * (2 * world_size + 1) <= 128 << 20
