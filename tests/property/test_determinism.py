"""Same state, same topology: same bytes, but for what names the save and tells the time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from dcp_engine.format.digest import decode_digests
from tests.property.jobs import SharedMemoryStore, save_world
from tests.property.worlds import World, examples, worlds

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

NO_SAVE = "0" * 32


def anonymous(store: SharedMemoryStore) -> dict[str, Any]:
    """All files by name, the save id replaced by zeros wherever it stands; manifest and digest
    files as values, without what depends on save id or time."""
    manifest = store.get("manifest.json")
    save_id = json.loads(manifest)["save_id"]
    files: dict[str, Any] = {}
    for file in store.list():
        data = store.get(file.name).replace(save_id.encode(), NO_SAVE.encode())
        name = file.name.replace(save_id, NO_SAVE)
        if name == "manifest.json":
            files[name] = _without_digests(json.loads(data))
        elif name.endswith(".digests"):
            files[name] = _digests(data)
        elif not name.endswith("owner.json"):
            files[name] = data
    return files


def _without_digests(value: Any) -> Any:
    """The manifest without its time and without digests of bytes that hold the save id."""
    if isinstance(value, dict):
        return {
            key: _without_digests(item)
            for key, item in value.items()
            if key != "time" and "xxh3" not in key
        }
    if isinstance(value, list):
        return [_without_digests(item) for item in value]
    return value


def _digests(data: bytes) -> dict[str, Any]:
    """Headers hold the save id; everything else in a digest file is of the data."""
    table = decode_digests(data)
    return {
        name: column.tolist() if isinstance(column, np.ndarray) else column
        for name, column in vars(table).items()
        if name != "header_digests"
    }


@settings(max_examples=examples(12))
@given(worlds())
def test_two_saves_are_the_same_bytes(world: World) -> None:
    """Ranks are threads here, so messages and writes come in another order every time."""
    images = []
    for _ in range(2):
        store = SharedMemoryStore()
        save_world(world, lambda _, store=store: store)
        images.append(anonymous(store))
    assert images[0] == images[1]
