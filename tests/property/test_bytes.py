"""What moves: every distinct byte of the state is written once, and a load reads what it needs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from dcp_engine.format.manifest import Manifest, StoredTensor
from dcp_engine.storage import ByteStore
from storage_backends.open_manifest import read_manifest
from storage_backends.read_files import MAX_GAP
from storage_backends.testing.recording import RecordingByteStore
from tests.property.bytes_of import raw_of
from tests.property.forms import Form, Sharded, Whole
from tests.property.jobs import SharedMemoryStore, load_world, save_job, save_world
from tests.property.worlds import Entry, World, examples, one_tensor, worlds

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

GRAIN_SHARE = 1.05


class Recorders:
    """One recording store a rank, over one and the same content."""

    def __init__(self, inner: ByteStore, ranks: int) -> None:
        self.of = [RecordingByteStore(inner) for _ in range(ranks)]

    def written(self) -> list[int]:
        """Bytes that each rank wrote to data files, headers included."""
        return [
            sum(c.nbytes for c in store.calls if c.operation == "write" and _is_data(c.name))
            for store in self.of
        ]

    def data_read(self, manifest: Manifest) -> list[int]:
        """Bytes that each rank read from the data sections of data files."""
        begins = {
            f"data-{manifest.save_id}/{file.name}": file.data_start for file in manifest.data_files
        }
        return [
            sum(
                call.nbytes
                for call in store.calls
                if call.operation == "read"
                and call.offset is not None
                and call.offset >= begins.get(call.name, 1 << 62)
            )
            for store in self.of
        ]


def _is_data(name: str) -> bool:
    return name.endswith(".safetensors")


def manifest_of(store: ByteStore) -> Manifest:
    return read_manifest(store)[0]


def object_bytes(manifest: Manifest) -> int:
    """Bytes of all objects that are not inline."""
    per_rank = [
        stored for by_rank in manifest.per_rank_objects.values() for stored in by_rank.values()
    ]
    return sum(o.nbytes for o in (*manifest.objects.values(), *per_rank) if o.inline is None)


@settings(max_examples=examples(15))
@given(worlds())
def test_every_distinct_byte_is_written_once(world: World) -> None:
    """Replicas once, aliases once, boxes that several ranks hold once; nothing between them."""
    store = SharedMemoryStore()
    recorders = Recorders(store, world.savers)
    save_world(world, lambda rank: recorders.of[rank])
    manifest = manifest_of(store)
    state = sum(raw_of(e.name, e.shape, e.dtype).numel() for e in world.entries)
    for own in world.own:
        state += sum(raw_of("", *kind).numel() for kind in own.by_rank if kind is not None)
    stored = sum(file.size - file.data_start for file in manifest.data_files)
    assert stored == state + object_bytes(manifest)
    assert sum(recorders.written()) == sum(file.size for file in manifest.data_files)
    assert sum(f.size for f in store.list() if _is_data(f.name)) == sum(recorders.written())


@st.composite
def replicated(draw: st.DrawFn) -> tuple[int, dict[str, tuple[tuple[int, ...], Form]]]:
    """About 2 MB a rank, in rows of at most 4 KiB: replicated everywhere, or sharded over some
    ranks and replicated over the others (as hybrid sharding does)."""
    ranks = draw(st.sampled_from([2, 3, 4, 6, 8]))
    tensors: dict[str, tuple[tuple[int, ...], Form]] = {}
    left = ranks * (1 << 19)
    while left > 1000:
        columns = draw(st.sampled_from([16, 256, 1000]))
        rows = min(draw(st.integers(1, 3000)), max(1, left // columns))
        left -= rows * columns
        form: Form = Whole(holders=frozenset(range(ranks)))
        if ranks % 2 == 0 and draw(st.booleans()):
            form = Sharded(
                mesh=(2, ranks // 2),
                ranks=tuple(range(ranks)),
                placements=(Replicate(), Shard(0)),
                order=(0, 1),
            )
        tensors[f"t{len(tensors)}"] = ((rows, columns), form)
        if len(tensors) == 60:
            break
    return ranks, tensors


@settings(max_examples=examples(6))
@given(replicated())
def test_replicas_are_shared_out_evenly(
    case: tuple[int, dict[str, tuple[tuple[int, ...], Form]]],
) -> None:
    ranks, tensors = case
    recorders = Recorders(SharedMemoryStore(), ranks)
    raws = {
        name: torch.zeros((*shape, 4), dtype=torch.uint8) for name, (shape, _) in tensors.items()
    }

    def state_of(rank: int) -> dict[str, object]:
        state = {}
        for name, (_, form) in tensors.items():
            held = form.on(rank, 0, raws[name], torch.float32, lambda raw: raw)
            assert held is not None
            state[name] = held.value
        return state

    save_job(ranks, state_of, lambda rank: recorders.of[rank])
    written = recorders.written()
    total = sum(raw.numel() for raw in raws.values())
    if total / ranks > 1.5e6:
        assert max(written) <= GRAIN_SHARE * sum(written) / ranks


def needed(form: Form, rank: int, entry: Entry, stored: StoredTensor, block_size: int) -> int:
    """Bytes that ``rank`` needs for one destination, box by box, widened to whole blocks; runs of
    one box that lie close together are read with what is between them."""
    count = torch.Size(entry.shape).numel()
    if not count:
        return 0
    numbers = torch.arange(count).reshape(*entry.shape, 1).view(torch.uint8)
    held = form.on(rank, 0, numbers, torch.int64, lambda raw: raw)
    total = 0
    for part in held.expected if held is not None else ():
        for box in _boxes_of(part, entry.shape):
            wanted = np.zeros(entry.shape, bool)
            wanted[box] = True
            total += _blocks_bytes(wanted, stored, entry.dtype.itemsize, block_size)
    return total


def _boxes_of(part: torch.Tensor, shape: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """A part, given by the numbers of its elements, is a product of runs along each dimension."""
    if not part.numel():
        return []
    indices = part.contiguous().view(torch.int64).reshape(-1).numpy()
    runs = []
    for along in np.unravel_index(indices, shape) if shape else ():
        where = np.unique(along)
        runs.append(np.split(where, np.flatnonzero(np.diff(where) > 1) + 1))
    return [np.ix_(*run) if run else () for run in itertools.product(*runs)]


def _blocks_bytes(
    wanted: np.ndarray[Any, Any], stored: StoredTensor, itemsize: int, block_size: int
) -> int:
    chunks = stored.chunks
    total = 0
    for offsets, sizes, nbytes in zip(
        chunks.offsets.tolist(), chunks.sizes.tolist(), chunks.nbytes.tolist(), strict=True
    ):
        box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        starts = np.flatnonzero(wanted[box].reshape(-1)) * itemsize
        total += _widened(starts, itemsize, nbytes, block_size)
    return total


def _widened(starts: np.ndarray[Any, Any], itemsize: int, nbytes: int, block_size: int) -> int:
    if not len(starts):
        return 0
    gap = max(MAX_GAP, block_size)
    ends = np.flatnonzero(np.diff(starts) > gap + itemsize)
    blocks: set[int] = set()
    for run in np.split(starts, ends + 1):
        blocks.update(range(int(run[0]) // block_size, -(-int(run[-1] + itemsize) // block_size)))
    return sum(min(block_size, nbytes - block * block_size) for block in blocks)


@settings(max_examples=examples(18))
@given(worlds())
def test_a_load_reads_the_blocks_it_needs(world: World) -> None:
    store = SharedMemoryStore()
    save_world(world, lambda _: store)
    recorders = Recorders(store, world.loaders)
    reports, wrong = load_world(world, lambda rank: recorders.of[rank])
    assert not wrong
    manifest = manifest_of(store)
    limits = [_limit(world, rank, manifest) for rank in range(world.loaders)]
    read = recorders.data_read(manifest)
    for rank, (nbytes, limit) in enumerate(zip(read, limits, strict=True)):
        assert nbytes <= limit, f"rank {rank} read {nbytes} bytes and needs {limit}"
    assert reports[0].bytes_read is not None
    assert reports[0].bytes_read <= sum(read)


def _limit(world: World, rank: int, manifest: Manifest) -> int:
    total = 0
    for entry in world.entries:
        for name, form in ((entry.name, entry.load), (f"{entry.name}_twin", entry.twin_load)):
            if form is not None:
                stored = manifest.tensors[f"tensors.{name}"]
                total += needed(form, rank, entry, stored, world.block_size)
    total += sum(o.nbytes for o in manifest.objects.values() if o.inline is None)
    same = world.savers == world.loaders
    if not same and world.per_rank == "error":
        return total
    # With "skip" those that all ranks agree on are read, which is what one rank saved at least.
    for by_rank in (*manifest.per_rank_objects.values(), *manifest.per_rank_tensors.values()):
        for owner, stored in by_rank.items():
            if not same or owner == rank:
                total += _stored_bytes(stored)
    return total


def _stored_bytes(stored: object) -> int:
    if isinstance(stored, StoredTensor):
        return int(stored.chunks.nbytes.sum())
    return int(getattr(stored, "nbytes", 0))


def _rows(ranks: int, dim: int = 0) -> Sharded:
    return Sharded(mesh=(ranks,), ranks=tuple(range(ranks)), placements=(Shard(dim),), order=(0,))


def _read_by_each(
    savers: int, shape: tuple[int, ...], save: Form, load: Form, **options: Any
) -> list[int]:
    loaders = 8
    world = one_tensor(shape, save, load, savers=savers, loaders=loaders, **options)
    store = SharedMemoryStore()
    save_world(world, lambda _: store)
    recorders = Recorders(store, loaders)
    _, wrong = load_world(world, lambda rank: recorders.of[rank])
    assert not wrong
    return recorders.data_read(manifest_of(store))


@pytest.mark.parametrize("savers", [1, 3, 4])
def test_rows_of_whole_blocks_are_read_once(savers: int) -> None:
    """Resharded by rows: no byte is read in vain."""
    read = _read_by_each(savers, (96, 256), _rows(savers), _rows(8), block_size=512)
    assert read == [96 // 8 * 1024] * 8


@pytest.mark.parametrize("block_size", [1 << 16, 1 << 20])
def test_columns_read_each_block_once(block_size: int) -> None:
    """16 KiB of every 128 KiB: where several of them lie in one block, it is read for all."""
    shape = (16, 32768)
    read = _read_by_each(1, shape, _rows(1), _rows(8, 1), block_size=block_size)
    whole = 16 * 32768 * 4
    assert read == [whole if block_size > 1 << 17 else whole // 2] * 8
