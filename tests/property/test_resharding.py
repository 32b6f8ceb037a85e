"""What N ranks saved, in any forms, is what M ranks load, in any other forms."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.saver import PlanMemory
from storage_backends.filesystem_store import FileSystemStore
from tests.property.forms import Sharded, Whole
from tests.property.jobs import SharedMemoryStore, load_world, save_world
from tests.property.worlds import MAX_RANKS, World, examples, one_tensor, strided, worlds

# torch says so once, whenever something touches a complex32 tensor.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@settings(max_examples=examples(45))
@given(worlds())
def test_what_was_saved_is_what_is_loaded(world: World) -> None:
    store = SharedMemoryStore()
    save_world(world, lambda _: store)
    _, wrong = load_world(world, lambda _: store)
    assert not wrong


@settings(max_examples=examples(10))
@given(strided(), strided())
def test_uneven_strided_shards(
    saved: tuple[tuple[int, ...], Sharded], wanted: tuple[tuple[int, ...], Sharded]
) -> None:
    """Each saved on 8 ranks and loaded on one, and the other way round."""
    whole = Whole(holders=frozenset({0}))
    worlds = (
        one_tensor(saved[0], saved[1], whole, savers=MAX_RANKS, loaders=1),
        one_tensor(wanted[0], whole, wanted[1], savers=1, loaders=MAX_RANKS),
    )
    for world in worlds:
        store = SharedMemoryStore()
        save_world(world, lambda _, store=store: store)
        assert not load_world(world, lambda _, store=store: store)[1]


@settings(max_examples=examples(15))
@given(worlds(), st.integers(0, 2 * MAX_RANKS))
def test_a_remembered_plan_stores_the_new_values(world: World, forgetful: int) -> None:
    """The second save goes by digest, unless a rank has lost its memory; the third, of other
    tensors, must not."""
    store = SharedMemoryStore()
    memories = [PlanMemory() for _ in range(world.savers)]
    save_world(world, lambda _: store, memories, "old")
    if forgetful < world.savers:
        memories[forgetful].clear()
    save_world(world, lambda _: store, memories)
    assert not load_world(world, lambda _: store)[1]
    smaller = replace(world, entries=world.entries[1:], to_lowest_rank=not world.to_lowest_rank)
    save_world(smaller, lambda _: store, memories)
    assert not load_world(smaller, lambda _: store)[1]


@settings(max_examples=examples(8))
@given(worlds())
def test_on_the_file_system(world: World) -> None:
    """Every rank with a store of its own."""
    with tempfile.TemporaryDirectory() as path:
        save_world(world, lambda _: FileSystemStore(path, sync=False))
        _, wrong = load_world(world, lambda _: FileSystemStore(path, sync=False))
    assert not wrong
