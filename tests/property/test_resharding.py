"""What N ranks saved, in any forms, is what M ranks load, in any other forms."""

from __future__ import annotations

import tempfile

import pytest
from hypothesis import given, settings

from storage_backends.filesystem_store import FileSystemStore
from tests.property.jobs import SharedMemoryStore, load_world, save_world
from tests.property.worlds import World, worlds

# torch says so once, whenever something touches a complex32 tensor.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@settings(max_examples=120)
@given(worlds())
def test_what_was_saved_is_what_is_loaded(world: World) -> None:
    store = SharedMemoryStore()
    save_world(world, lambda _: store)
    _, wrong = load_world(world, lambda _: store)
    assert not wrong


@settings(max_examples=12)
@given(worlds())
def test_on_the_file_system(world: World) -> None:
    """Every rank with a store of its own."""
    with tempfile.TemporaryDirectory() as path:
        save_world(world, lambda _: FileSystemStore(path, sync=False))
        _, wrong = load_world(world, lambda _: FileSystemStore(path, sync=False))
    assert not wrong
