"""Staged state dicts for another process: places in the arena instead of bytes."""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.staging.arena import Arena
from dcp_engine.staging.layout import ArenaLayout
from dcp_engine.staging.staged_pickle import dump_staged, load_staged
from dcp_engine.staging.stagers import DefaultStager
from dcp_engine.staging.stand_in import StagedShards
from tests.staging.states import Halves, Opaque, bytes_of, dtensor, numbered
from tests.wrapper_tensors import Scaled


def state() -> dict[str, Any]:
    return {
        "big": numbered(500, 500),
        "strided": numbered(5, 4).T,
        "parameter": torch.nn.Parameter(numbered(3)),
        "scalar": torch.tensor(7, dtype=torch.int16),
        "empty": torch.empty(0, 2),
        "complex": torch.tensor([1 + 2j]).conj(),
        "sharded": dtensor(numbered(300, 3), (600, 3), Shard(0)),
        "halves": Halves((".a", ".b")),
        "wrapper": Scaled(numbered(4, 2), numbered(4), 8),
        "object": Opaque(),
        "nested": [{"x": numbered(2)}, (1, "text")],
    }


def test_offsets_travel_not_bytes(stager: DefaultStager) -> None:
    staged = stager.begin(state())
    data = dump_staged(staged.state_dict, staged.staging.arena)
    assert len(data) < 6000
    loaded = load_staged(data, staged.staging.arena)
    assert loaded["big"].data_ptr() == staged.state_dict["big"].data_ptr()
    assert isinstance(loaded["sharded"], StagedShards)
    (shard,) = loaded["sharded"].local_tensors
    assert torch.equal(shard, numbered(300, 3))
    assert loaded["parameter"].requires_grad
    assert loaded["complex"].tolist() == [1 - 2j]
    assert tuple(loaded["empty"].shape) == (0, 2)
    assert loaded["object"].tensor.tolist() == [0, 1, 2]
    assert loaded["nested"][1] == (1, "text")


def test_views_of_staged_tensors(stager: DefaultStager) -> None:
    staged = stager.begin({"w": numbered(6, 4)})
    arena = staged.staging.arena
    views = [staged.state_dict["w"].T[1:, ::2], staged.state_dict["w"][2:, 1], numbered(2)]
    for view, loaded in zip(views, load_staged(dump_staged(views, arena), arena), strict=True):
        assert torch.equal(view, loaded)
        assert view.stride() == loaded.stride()


def test_what_cannot_be_pickled_is_named(stager: DefaultStager) -> None:
    staged = stager.begin({"ok": numbered(2), "deep": [{"f": numbered(1)}]})
    staged.state_dict["deep"][0]["g"] = lambda: 0
    with pytest.raises(UnsupportedStateError, match=r"function.*worker") as info:
        dump_staged(staged.state_dict, staged.staging.arena)
    assert info.value.tensor == "deep.0.g"
    with pytest.raises(UnsupportedStateError, match="function"):
        dump_staged(lambda: 0, staged.staging.arena)


def _other_process(connection: Connection) -> None:
    arena = Arena.attach(recv_handle(connection), connection.recv())
    while (message := connection.recv()) is not None:
        layout, size, data = message
        arena.extend(size)
        loaded = load_staged(data, arena)
        shards = [bytes_of(t) for t in loaded["sharded"].local_tensors]
        answer = [bytes_of(tensor) for tensor in layout.views(arena)], shards
        loaded["big"][0, 0] = 77
        connection.send(answer)
    arena.close()


def test_a_spawned_process_sees_the_same_memory(stager: DefaultStager) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=True)
    process = context.Process(target=_other_process, args=(there,), daemon=True)
    process.start()
    there.close()

    def ask(staged: Any) -> Any:
        staging = staged.staging
        layout: ArenaLayout = staging.layout
        here.send((layout, staging.arena.size, dump_staged(staged.state_dict, staging.arena)))
        assert here.poll(60)
        return here.recv()

    with here:
        staged = stager.begin(state())
        arena: Arena = staged.staging.arena
        send_handle(here, arena.fileno(), None)
        here.send(arena.size)
        views, shards = ask(staged)
        expected = [bytes_of(tensor) for tensor in staged.staging.tensors()]
        assert staged.state_dict["big"][0, 0] == 77  # written over there
        staged.state_dict["big"][0, 0] = 0
        assert views == [bytes_of(tensor) for tensor in staged.staging.tensors()] != expected
        assert shards == [bytes_of(numbered(300, 3))]
        # A larger state in the same arena: no new descriptor is sent.
        staged.release()
        large = {**state(), "more": numbered(2_000_000)}
        again = stager.begin(large)
        assert again.staging.arena is arena
        views, _ = ask(again)
        again.state_dict["big"][0, 0] = 0
        assert views == [bytes_of(tensor) for tensor in again.staging.tensors()]
        here.send(None)
        process.join(60)
    assert process.exitcode == 0


def test_layouts_are_small_on_the_wire(stager: DefaultStager) -> None:
    staged = stager.begin({f"w{i}": numbered(4) for i in range(360)})
    assert len(pickle.dumps(staged.staging.layout)) < 16_000
