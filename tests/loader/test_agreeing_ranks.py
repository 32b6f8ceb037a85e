"""Per-rank values that are the same on all ranks, loaded on another number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dcp_engine.coordination.interface import Session
from dcp_engine.coordination.simulated import results_of, run_simulated
from dcp_engine.errors import CheckpointException
from dcp_engine.loader import LoadOptions, LoadReport, load
from dcp_engine.loader.options import PerRankPolicy
from dcp_engine.saver import PlanMemory, SaveOptions, save
from dcp_engine.state.per_rank import PerRank
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from tests.property.jobs import DEADLINES, SharedMemoryStore, group_of

POLICIES: tuple[PerRankPolicy, ...] = ("error", "skip", "list")


class Unusual:
    """Stored as a pickle."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unusual) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


class CountingStore(SharedMemoryStore):
    """Counts what is read of files of digests."""

    def __init__(self) -> None:
        super().__init__("memory://own")
        self.digests_read: list[str] = []

    def read(self, name: str, ranges: Any) -> None:
        if name.endswith(".digests"):
            self.digests_read.append(name.rpartition("/")[2])
        super().read(name, ranges)


@dataclass
class Saved:
    """A checkpoint that each of a few ranks wrote its own values to."""

    store: CountingStore

    def load(
        self, into: Callable[[], dict[str, Any]], world_size: int, policy: PerRankPolicy
    ) -> list[tuple[dict[str, Any], LoadReport]]:
        def on_rank(session: Session) -> tuple[dict[str, Any], LoadReport]:
            state = into()
            report = load(
                session,
                state,
                checkpoint_id=None,
                reader=ShardedReader(lambda _: self.store, self.store.url),
                planner=None,
                group=group_of(session.rank, world_size),
                options=LoadOptions(deadlines=DEADLINES, per_rank=policy, allow_pickle=True),
            )
            return state, report

        return results_of(run_simulated(world_size, on_rank))


def saved(world_size: int, state: Callable[[int], dict[str, Any]]) -> Saved:
    store = CountingStore()

    def on_rank(session: Session) -> None:
        save(
            session,
            {name: PerRank(value) for name, value in state(session.rank).items()},
            checkpoint_id=None,
            writer=ShardedWriter(lambda _: store, store.url),
            planner=None,
            group=group_of(session.rank, world_size),
            world_size=world_size,
            memory=PlanMemory(),
            options=SaveOptions(deadlines=DEADLINES),
        )

    results_of(run_simulated(world_size, on_rank))
    store.digests_read.clear()
    return Saved(store)


def same_everywhere(rank: int) -> dict[str, Any]:
    return {
        "w": torch.arange(40_000, dtype=torch.float32),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "step": 12,
        "text": "x" * 100_000,
        "unusual": Unusual(3),
    }


def blank() -> dict[str, Any]:
    return {
        "w": torch.zeros(40_000),
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(0.0),
        "step": None,
        "text": None,
        "unusual": None,
    }


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("savers", "loaders"), [(2, 1), (2, 3), (1, 2)])
def test_what_all_ranks_agree_on_is_read_as_replicated(
    savers: int, loaders: int, policy: PerRankPolicy
) -> None:
    checkpoint = saved(savers, same_everywhere)
    for state, report in checkpoint.load(blank, loaders, policy):
        for name, value in same_everywhere(0).items():
            found = state[name]
            equal = (
                torch.equal(found, value) if name in ("w", "empty", "scalar") else found == value
            )
            assert equal, (name, found)
        assert report.missing == report.unexpected == ()


def test_the_destination_is_filled_in_place() -> None:
    checkpoint = saved(2, same_everywhere)
    into = blank()
    before = into["w"]
    checkpoint.load(lambda: into, 1, "error")
    assert into["w"] is before
    assert torch.equal(before, same_everywhere(0)["w"])


def last_block_differs(rank: int) -> dict[str, Any]:
    state = same_everywhere(rank)
    state["w"][-1] = rank
    state["step"] = 12 + rank
    return state


def test_what_differs_goes_by_the_policy_and_the_rest_is_read() -> None:
    checkpoint = saved(2, last_block_differs)
    with pytest.raises(CheckpointException) as caught:
        checkpoint.load(blank, 1, "error")
    assert caught.value.kind == "world_size_mismatch"
    assert caught.value.tensor in ("w", "step")
    for state, _ in checkpoint.load(blank, 3, "skip"):
        assert not state["w"].any()
        assert state["step"] is None
        assert (state["text"], float(state["scalar"])) == ("x" * 100_000, 2.5)
    for state, _ in checkpoint.load(blank, 3, "list"):
        assert [float(tensor[-1]) for tensor in state["w"]] == [0.0, 1.0]
        assert state["step"] == [12, 13]
        assert (state["text"], float(state["scalar"])) == ("x" * 100_000, 2.5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(0, 2), torch.zeros(2, 0)),
        (torch.zeros(4), torch.zeros(5)),
        ("ab", "abc"),
        (1, 1.0),
        (Unusual(1), Unusual(2)),
    ],
    ids=["dtype", "shape", "empty", "length", "text", "type", "pickle"],
)
def test_same_bytes_are_not_enough(one: Any, other: Any) -> None:
    checkpoint = saved(2, lambda rank: {"v": other if rank else one})
    target = torch.zeros_like(one) if isinstance(one, torch.Tensor) else None
    with pytest.raises(CheckpointException) as caught:
        checkpoint.load(lambda: {"v": target}, 1, "error")
    assert caught.value.kind == "world_size_mismatch"


@pytest.mark.parametrize("value", [torch.ones(3), 7], ids=["tensor", "object"])
def test_what_one_rank_does_not_hold_is_not_agreed_on(value: Any) -> None:
    checkpoint = saved(2, lambda rank: {"v": value, "all": 1} if rank else {"all": 1})
    target = torch.zeros(3) if isinstance(value, torch.Tensor) else None
    with pytest.raises(CheckpointException) as caught:
        checkpoint.load(lambda: {"v": target, "all": 0}, 1, "error")
    assert (caught.value.kind, caught.value.tensor) == ("world_size_mismatch", "v")


def test_at_the_same_number_of_ranks_every_rank_gets_its_own_and_no_digest_is_compared() -> None:
    checkpoint = saved(2, lambda rank: {"seed": rank, "big": "x" * (5_000 + rank)})
    found = checkpoint.load(lambda: {"seed": None}, 2, "error")
    assert [state["seed"] for state, _ in found] == [0, 1]
    assert sorted(set(checkpoint.store.digests_read)) == ["rank00000.digests", "rank00001.digests"]
    assert len(checkpoint.store.digests_read) == 2  # its own, to verify what it reads


def test_no_more_digests_are_read_than_it_takes_to_find_a_difference() -> None:
    checkpoint = saved(4, lambda rank: {"seed": rank, "kept": torch.full((8,), float(rank))})
    checkpoint.load(lambda: {"seed": "old", "kept": torch.zeros(8)}, 1, "skip")
    assert checkpoint.store.digests_read == ["rank00000.digests", "rank00001.digests"]
