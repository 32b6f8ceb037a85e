"""What the properties beside this module once found, each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from dcp_engine.coordination.simulated import results_of, run_simulated
from dcp_engine.errors import CheckpointException
from dcp_engine.format.dtypes import DTYPES
from dcp_engine.loader import LoadOptions, load
from dcp_engine.state.per_rank import PerRank
from storage_backends.sharded_reader import ShardedReader
from tests.property.bytes_of import flipped, place, raw_of
from tests.property.jobs import DEADLINES, SharedMemoryStore, group_of, save_job

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def load_job(states: list[dict[str, Any]], store: SharedMemoryStore, **options: Any) -> None:
    """Load into ``states[rank]`` on every rank."""
    results_of(
        run_simulated(
            len(states),
            lambda session: load(
                session,
                states[session.rank],
                checkpoint_id=None,
                reader=ShardedReader(lambda _: store, store.url),
                planner=None,
                group=group_of(session.rank, len(states)),
                options=LoadOptions(deadlines=DEADLINES, **options),
            ),
        )
    )


def test_strided_tensors_of_dtypes_without_a_copy_kernel() -> None:
    dtypes = [entry.dtype for entry in DTYPES.values()]
    raws = {str(dtype): raw_of(str(dtype), (3, 4), dtype) for dtype in dtypes}
    store = SharedMemoryStore()
    state = {str(d): place(raws[str(d)], d, "permuted").tensor for d in dtypes}
    save_job(2, lambda _: state, lambda _: store)
    places = {str(d): place(flipped(raws[str(d)]), d, "window") for d in dtypes}
    load_job([{name: at.tensor for name, at in places.items()}], store)
    assert all(torch.equal(at.raw, raws[name]) for name, at in places.items())


def test_a_replicated_tensor_of_one_element_and_any_stride() -> None:
    store = SharedMemoryStore()
    save_job(2, lambda _: {"t": torch.arange(9.0)[5::7]}, lambda _: store)
    state = {"t": torch.zeros(1)}
    load_job([state], store)
    assert state["t"].item() == 5


def test_lists_are_for_another_world_size_only() -> None:
    store = SharedMemoryStore()
    save_job(2, lambda rank: {"own": PerRank({"seed": rank})}, lambda _: store)
    states: list[dict[str, Any]] = [{"own": PerRank({"seed": None})} for _ in range(3)]
    load_job(states[:2], store, per_rank="list")
    load_job(states[2:], store, per_rank="list")
    assert [state["own"].value["seed"] for state in states] == [0, 1, [0, 1]]


def test_parts_of_a_tensor_subclass_cannot_be_listed() -> None:
    def state(rank: int = 0) -> dict[str, Any]:
        return {"own": PerRank({"pair": TwoTensor(torch.full((2,), float(rank)), torch.ones(2))})}

    store = SharedMemoryStore()
    save_job(2, state, lambda _: store)
    with pytest.raises(CheckpointException, match=r"own\.pair\.a") as caught:
        load_job([state()], store, per_rank="list")
    assert caught.value.kind == "world_size_mismatch"
    load_job([state()], store, per_rank="skip")
