"""Writers: what is committed, when, and what the hooks and the other ranks see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.checkpointer import (
    Barrier,
    CheckpointWriter,
    CheckpointWriterConfig,
    RankInfo,
    TCPStoreBarrier,
    WriterHook,
)
from dcp_engine.checkpointer.own_leaves import MarkedState, is_shared
from dcp_engine.checkpointer.sessions import WriteTurn
from dcp_engine.errors import CheckpointException, StorageError, UsageError
from dcp_engine.registry import BackendRegistry
from tests.checkpointer.test_barriers import on_ranks, tcp_args
from tests.ports import free_port

ALONE = RankInfo(0, 1)
FAST = CheckpointWriterConfig(write_barrier_timeout_secs=20, stall_timeout_secs=10)


class Hook(WriterHook):
    """Says what it saw."""

    def __init__(self, *, fails: str = "") -> None:
        self.seen: list[tuple[str, dict[str, Any], bool]] = []
        self._fails = fails

    def _look(self, when: str, path: str, kwargs: dict[str, Any]) -> None:
        self.seen.append((when, kwargs, (Path(path) / "manifest.json").exists()))
        if when == self._fails:
            raise ValueError(f"{when} fails")

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        assert list(Path(path).glob("data-*/*.safetensors"))  # this rank has written
        self._look("pre", path, kwargs)

    def post_commit(self, path: str, **kwargs: Any) -> None:
        self._look("post", path, kwargs)


def values(path: Path, *names: str) -> list[Any]:
    state: dict[str, Any] = dict.fromkeys(names)
    dcp.load(state, checkpoint_id=path)
    return list(state.values())


def test_dcp_engine_load_reads_what_a_writer_wrote(tmp_path: Path) -> None:
    state = {
        "w": torch.arange(6.0).reshape(2, 3),
        "nested": {"list": [torch.ones(2), "x"], 7: None},
        "own": dcp.PerRank({"seed": 4}),
        "module": torch.nn.Linear(2, 2, bias=False),
    }
    with CheckpointWriter(CheckpointWriterConfig(), ALONE) as writer:
        assert writer.write(tmp_path / "c", state) is None
    into = {
        "w": torch.zeros(2, 3),
        "nested": {"list": [torch.zeros(2), ""], 7: 1},
        "own": {"seed": 0},
        "module": {"weight": torch.zeros(2, 2)},
    }
    report = dcp.load(into, checkpoint_id=tmp_path / "c")
    assert report.unexpected == ()
    assert torch.equal(into["w"], state["w"])
    assert into["nested"]["list"][1] == "x"
    assert into["nested"][7] is None
    assert into["own"] == {"seed": 4}
    assert torch.equal(into["module"]["weight"], state["module"].weight)


def test_the_hook_is_called_around_the_commit_with_the_callers_arguments(tmp_path: Path) -> None:
    hook = Hook()
    with CheckpointWriter(CheckpointWriterConfig(), ALONE, commit_hook=hook) as writer:
        writer.write(str(tmp_path / "c"), {"w": torch.ones(3)}, step=3, tag="t")
    kwargs = {"step": 3, "tag": "t"}
    assert hook.seen == [("pre", kwargs, False), ("post", kwargs, True)]


def test_a_pre_commit_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with CheckpointWriter(CheckpointWriterConfig(), ALONE) as writer:
        writer.write(path, {"step": 1})
    with CheckpointWriter(CheckpointWriterConfig(), ALONE, commit_hook=Hook(fails="pre")) as writer:
        with pytest.raises(CheckpointException, match="pre fails"):
            writer.write(path, {"step": 2})
        assert values(path, "step") == [1]
        assert len(list(path.glob("data-*"))) == 1


def test_a_post_commit_that_fails_leaves_the_new_checkpoint(tmp_path: Path) -> None:
    writer = CheckpointWriter(CheckpointWriterConfig(), ALONE, commit_hook=Hook(fails="post"))
    with writer, pytest.raises(ValueError, match="post fails"):
        writer.write(tmp_path / "c", {"step": 2})
    assert values(tmp_path / "c", "step") == [2]


def test_a_closed_writer_refuses_and_closes_its_barrier(tmp_path: Path) -> None:
    class Closing(Barrier):
        closed = 0

        def execute_barrier(self) -> None: ...

        def close(self) -> None:
            self.closed += 1

    barrier = Closing()
    writer = CheckpointWriter(CheckpointWriterConfig(), ALONE, barrier=barrier)
    writer.close()
    writer.close()
    assert barrier.closed == 2
    with pytest.raises(UsageError, match="writer is closed"):
        writer.write(tmp_path / "c", {"a": 1})


def test_one_of_several_writers_without_a_way_to_the_others_is_told_the_choices(
    tmp_path: Path,
) -> None:
    writer = CheckpointWriter(FAST, RankInfo(1, 2))
    with writer, pytest.raises(UsageError, match="one of 2 and knows no way") as caught:
        writer.write(tmp_path / "c", {"a": 1})
    for choice in ("tcp_store", "torch.distributed", "subprocess_init_fn", "RankInfo(0, 1)"):
        assert choice in str(caught.value)
    assert not (tmp_path / "c").exists()


class Pair:
    """Two ranks' writers, on threads, over a store of their own."""

    def __init__(self, hooks: dict[int, WriterHook] | None = None, **changes: Any) -> None:
        args = tcp_args(free_port(), **changes)
        self.barriers = on_ranks(2, lambda rank: TCPStoreBarrier(rank, 2, **args))
        self.writers = [
            CheckpointWriter(FAST, RankInfo(rank, 2), self.barriers[rank], (hooks or {}).get(rank))
            for rank in range(2)
        ]

    def write(self, path: Path, *states: dict[str, Any]) -> list[BaseException | None]:
        return on_ranks(2, lambda rank: self.writers[rank].write(path, states[rank]))

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def test_two_ranks_commit_once_and_each_keeps_its_own(tmp_path: Path) -> None:
    pair = Pair()
    for turn in range(2):
        outcomes = pair.write(
            tmp_path / "c",
            {"rank": turn, "all": torch.full((4,), 1.0 + turn)},
            {"rank": turn + 10, "all": torch.full((4,), 1.0 + turn), "only": "here"},
        )
        assert outcomes == [None, None]
        with dcp.open(tmp_path / "c") as checkpoint:
            assert checkpoint.manifest.world_size == 2
            assert set(checkpoint.per_rank_names) == {"rank", "all", "only"}
            assert not len(checkpoint)
            own = checkpoint.per_rank("rank")
            assert [own[rank].load() for rank in range(2)] == [turn, turn + 10]
            assert list(checkpoint.per_rank("only")) == [1]
    # What the ranks agree on, one rank loads as if it were replicated.
    into: dict[str, Any] = {"all": torch.zeros(4), "rank": "kept"}
    report = dcp.load(into, checkpoint_id=tmp_path / "c", per_rank="skip")
    assert into["all"].tolist() == [2.0] * 4
    assert into["rank"] == "kept"
    assert report.skipped == ("rank",)
    pair.close()


def test_a_failure_of_one_rank_fails_all_by_name_and_the_next_write_works(tmp_path: Path) -> None:
    pair = Pair(hooks={1: Hook(fails="pre")})
    for outcome in pair.write(tmp_path / "c", {"a": 1}, {"a": 1}):
        assert isinstance(outcome, CheckpointException)
        assert list(outcome.failures) == [1]
        assert "pre fails" in str(outcome)
    assert not (tmp_path / "c" / "manifest.json").exists()
    for outcome in pair.write(tmp_path / "c", {"a": lambda: 0}, {"a": 1}):
        assert isinstance(outcome, CheckpointException)  # a state that cannot be stored
        assert list(outcome.failures) == [0]
        assert outcome.tensor == "a"
    pair.writers[1]._commit_hook = None
    assert pair.write(tmp_path / "c", {"a": 1}, {"a": 2}) == [None, None]
    pair.close()


def test_a_turn_that_comes_to_no_write_fails_the_others_at_once(tmp_path: Path) -> None:
    pair = Pair()

    def run(rank: int) -> None:
        pair.writers[rank].take_turn(WriteTurn(number=5, session=None))
        if rank == 1:
            pair.writers[rank].give_up_turn(tmp_path / "c", MemoryError("nothing to write"))
        else:
            pair.writers[rank].write(tmp_path / "c", {"a": 1})

    first, second = on_ranks(2, run)
    assert isinstance(first, CheckpointException)
    assert list(first.failures) == [1]
    assert "nothing to write" in str(first)
    assert second is None
    pair.writers[1].give_up_turn(tmp_path / "c", MemoryError("no turn, nothing to do"))
    pair.close()


def test_a_place_that_one_rank_has_no_backend_for_fails_all(tmp_path: Path) -> None:
    pair = Pair()
    usual, pair.writers[0]._registry = pair.writers[0]._registry, BackendRegistry(entry_points=[])
    first, second = pair.write(tmp_path / "c", {"a": 1}, {"a": 2})
    assert isinstance(first, StorageError)
    assert isinstance(second, CheckpointException)
    assert list(second.failures) == [0]
    assert "no storage backend" in str(second)
    pair.writers[0]._registry = usual
    assert pair.write(tmp_path / "c", {"a": 1}, {"a": 2}) == [None, None]
    pair.close()


def test_ranks_that_write_to_different_places_are_told_so(tmp_path: Path) -> None:
    pair = Pair()
    outcomes = on_ranks(2, lambda rank: pair.writers[rank].write(tmp_path / str(rank), {"a": 1}))
    for outcome in outcomes:
        assert isinstance(outcome, CheckpointException)
        assert outcome.kind == "out_of_step"
    pair.close()


def test_a_barrier_of_another_origin_is_executed_after_the_commit(tmp_path: Path) -> None:
    hook = Hook()

    class Recording(Barrier):
        def execute_barrier(self) -> None:
            hook._look("barrier", str(tmp_path / "c"), {})

    with CheckpointWriter(CheckpointWriterConfig(), ALONE, Recording(), hook) as writer:
        writer.write(tmp_path / "c", {"a": torch.ones(1)})
    assert [(when, there) for when, _, there in hook.seen] == [
        ("pre", False),
        ("barrier", True),
        ("post", True),
    ]


def test_what_is_marked_is_asked_for_once_and_only_when_the_save_asks() -> None:
    asked = []

    class Counting:
        def state_dict(self) -> dict[str, Any]:
            asked.append(1)
            return {"w": torch.ones(2), "n": {"step": 3}}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    marked = MarkedState(
        lambda: {"m": Counting(), "own": dcp.PerRank(1), "s": torch.ones(1)}, ["s"]
    )
    assert not asked
    assert len(marked) == 3
    assert isinstance(marked["m"]["w"], dcp.PerRank)
    assert marked["m"]["n"]["step"] == dcp.PerRank(3)
    assert marked["own"] == dcp.PerRank(1)
    assert isinstance(marked["s"], torch.Tensor)  # shared, whatever it looks like
    assert list(marked) == ["m", "own", "s"]
    assert len(asked) == 1


def test_what_describes_itself_is_shared_and_plain_values_are_not() -> None:
    class Described:
        def __create_write_items__(self, fqn: str, obj: Any) -> list[Any]:
            return []

    assert is_shared(Described())
    assert not any(is_shared(value) for value in (torch.ones(1), 1, "x", None, [1]))
