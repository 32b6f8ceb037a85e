"""Readers: whole and in part, of both layers' checkpoints."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import dcp_engine as dcp
from dcp_engine.checkpointer import (
    CheckpointReader,
    CheckpointWriter,
    CheckpointWriterConfig,
    RankInfo,
    TCPStoreBarrier,
    make_sync_checkpointer,
)
from dcp_engine.errors import (
    DamagedCheckpointError,
    NotFoundError,
    StateMismatchError,
    UnsafeContentError,
    UsageError,
)
from tests.checkpointer.test_barriers import on_ranks, tcp_args
from tests.ports import free_port

ALONE = RankInfo(0, 1)


def state() -> dict[str, Any]:
    return {
        "w": torch.arange(6.0).reshape(2, 3),
        "empty": torch.zeros(0, 2),
        "step": 3,
        "layers": [{"weight": torch.full((4,), float(n)), "name": f"l{n}"} for n in range(3)],
        "pair": (torch.ones(1), "two"),
        "betas": (0.9, 0.99),
        "nothing": None,
        "holes": {},
        7: {"in": torch.tensor(True)},
    }


def written_by_writer(path: Path) -> None:
    with CheckpointWriter(CheckpointWriterConfig(), ALONE) as writer:
        writer.write(path, state())


def saved_by_the_engine(path: Path) -> None:
    dcp.save(state(), checkpoint_id=path)


@pytest.fixture(scope="module", params=[written_by_writer, saved_by_the_engine])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("read") / "c"
    request.param(made)
    return made


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return type(found) is torch.Tensor and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, list | tuple):
        return (
            type(found) is type(expected)
            and len(found) == len(expected)
            and all(map(same, found, expected))
        )
    return bool(found == expected)


def read(path: Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
    with CheckpointReader(ALONE) as reader:
        return reader.read(path, *args, **kwargs)


def test_everything_comes_back_nested_as_it_was(path: Path) -> None:
    found, missing = read(path)
    assert missing == []
    assert same(found, state()), found


def test_a_part_is_read_into_the_callers_memory(path: Path) -> None:
    into: dict[str, Any] = {
        "w": torch.zeros(2, 3),
        "layers": [{"weight": torch.zeros(4)}, {"name": "old"}],
        "step": 0,
    }
    tensors = [into["w"], into["layers"][0]["weight"]]
    first, second = into["layers"]
    found, missing = read(path, into)
    assert found is into
    assert missing == []
    assert [into["w"], into["layers"][0]["weight"]] == tensors  # the very same
    assert torch.equal(tensors[0], state()["w"])
    assert into["layers"][0] is first
    assert into["layers"][1] is second
    assert second == {"name": "l1"}
    # As long as it was stored: what the caller has no place for is new.
    assert same(into["layers"][2], state()["layers"][2])
    assert into["step"] == 3


def test_none_stands_for_whatever_is_there(path: Path) -> None:
    found, missing = read(path, {"w": None, "layers": None, "pair": [None], 7: {"in": None}})
    assert missing == []
    expected = {key: state()[key] for key in ("w", "layers", "pair", 7)}
    assert same(found, expected), found


def test_marks_of_per_rank_values_stay(path: Path) -> None:
    tensor = torch.zeros(2, 3)
    found, missing = read(path, {"w": dcp.PerRank(tensor), "layers": dcp.PerRank([None])})
    assert missing == []
    assert found["w"].value is tensor
    assert same(tensor, state()["w"])
    assert same(found["layers"].value, state()["layers"])


def test_only_what_is_asked_for_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dcp_engine.checkpointer import checkpoint_reader

    reports = []

    def load(*args: Any, **kwargs: Any) -> Any:
        reports.append(real(*args, **kwargs))
        return reports[-1]

    real = checkpoint_reader.load
    monkeypatch.setattr(checkpoint_reader, "load", load)
    read(path, {"w": None, "nope": 1})
    assert reports[0].bytes_read == 6 * 4


def test_what_is_not_stored_is_missing_and_stays(path: Path) -> None:
    kept = torch.ones(5)
    into = {
        "extra": kept,
        "w": None,
        "layers": [{"bias": kept, "weight": None}, None, None, "fourth"],
        "holes": {"filled": 1},
        True: "a bool is no key",
    }
    found, missing = read(path, into)
    assert missing == ["extra", "layers[0].bias", "layers[3]", "True", "holes.filled"]
    assert found["extra"] is kept
    assert found["layers"][0]["bias"] is kept
    assert found["layers"][3] == "fourth"
    assert found["holes"] == {"filled": 1}
    assert found[True] == "a bool is no key"
    assert same(found["w"], state()["w"])


@pytest.mark.parametrize(
    ("into", "kind", "key"),
    [
        ({"w": torch.zeros(3, 2)}, "shape_mismatch", "w"),
        ({"w": torch.zeros(2, 3, dtype=torch.float64)}, "dtype_mismatch", "w"),
        ({"w": 5}, "type_mismatch", "w"),
        ({"step": torch.zeros(1)}, "type_mismatch", "step"),
        ({"step": "three"}, "type_mismatch", "step"),
        ({"layers": {"0": None}}, "type_mismatch", "layers"),
        ({"layers": [torch.zeros(1)]}, "type_mismatch", "layers[0]"),
        ({7: [None]}, "type_mismatch", "[7]"),
    ],
)
def test_a_destination_that_does_not_fit_is_refused_by_key(
    path: Path, into: dict[Any, Any], kind: str, key: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        read(path, into)
    assert isinstance(caught.value, StateMismatchError)
    assert (caught.value.kind, caught.value.tensor) == (kind, key)


def test_no_checkpoint_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint here") as caught:
        read(tmp_path / "nowhere")
    assert isinstance(caught.value, NotFoundError)
    assert caught.value.checkpoint == str(tmp_path / "nowhere")


def test_new_tensors_go_where_map_location_says(path: Path) -> None:
    meta = torch.device("meta")
    for where in ("cpu", torch.device("cpu"), {"cpu": "cpu"}, {"cuda:0": "cuda:1"}, None):
        assert same(read(path, map_location=where)[0], state())
    asked = []

    def moved(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        asked.append((storage.nbytes(), location))
        return storage.clone()

    into = {"w": None, "layers": [{"weight": torch.zeros(4)}]}
    found, _ = read(path, into, map_location=moved)
    # Not the one that has a destination.
    assert sorted(asked) == [(16, "cpu"), (16, "cpu"), (24, "cpu")]
    assert same(found["w"], state()["w"])
    assert read(path, {"w": None}, map_location=lambda s, _: None)[0]["w"].device != meta


def test_a_map_location_that_is_none_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="map_location='nowhere'"):
        read(path, map_location="nowhere")


def test_unknown_options_are_refused_with_those_there_are(path: Path) -> None:
    with pytest.raises(UsageError, match=r"no options mmap.*per_rank, allow_pickle"):
        read(path, mmap=True)
    with pytest.raises(UsageError, match="per_rank is 'first'"):
        read(path, per_rank="first")


def test_a_stateful_target_is_handed_its_state(path: Path) -> None:
    class Layer:
        def __init__(self) -> None:
            self.weight, self.loaded = torch.zeros(4), {}

        def state_dict(self) -> dict[str, Any]:
            return {"weight": self.weight, "unknown": 1}

        def load_state_dict(self, loaded: dict[str, Any]) -> None:
            self.loaded = loaded

    layer = Layer()
    found, missing = read(path, {"layers": [layer]})
    assert found["layers"][0] is layer
    assert layer.loaded["weight"] is layer.weight
    assert layer.weight.tolist() == [0.0] * 4
    assert missing == ["layers.0.unknown"]
    assert layer.loaded["unknown"] == 1


class Strange:
    """Stored as a pickle."""


def test_pickles_are_executed_by_name_only(tmp_path: Path) -> None:
    with CheckpointWriter(CheckpointWriterConfig(), ALONE) as writer:
        writer.write(tmp_path / "c", {"odd": Strange(), "step": 1})
    with pytest.raises(UnsafeContentError) as caught:
        read(tmp_path / "c")
    assert caught.value.kind in ("pickle_refused", "import_refused")
    assert read(tmp_path / "c", {"step": None})[0] == {"step": 1}
    assert isinstance(read(tmp_path / "c", allow_pickle=True)[0]["odd"], Strange)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote: things of their own, some the same, one on rank 1 alone."""
    made = tmp_path_factory.mktemp("two") / "c"
    args = tcp_args(free_port())

    def write(rank: int) -> None:
        barrier = TCPStoreBarrier(rank, 2, **args)
        with CheckpointWriter(CheckpointWriterConfig(), RankInfo(rank, 2), barrier) as writer:
            own: dict[str, Any] = {"seed": rank, "rng": torch.full((2,), rank), "same": [1, 2]}
            own["list"] = [torch.full((1 + rank,), float(n)) for n in range(1 + rank)]
            if rank:
                own["only"] = {"here": "x"}
            writer.write(made, own)

    assert on_ranks(2, write) == [None, None]
    return made


def test_each_rank_gets_its_own(of_two: Path) -> None:
    found = [CheckpointReader(RankInfo(rank, 2)).read(of_two)[0] for rank in range(2)]
    assert same(
        found[0],
        {"seed": 0, "rng": torch.zeros(2, dtype=torch.int64), "same": [1, 2]}
        | {"list": [torch.zeros(1)]},
    ), found[0]
    assert same(found[1]["list"], [torch.zeros(2), torch.ones(2)])
    assert found[1]["only"] == {"here": "x"}
    asked, missing = CheckpointReader(RankInfo(0, 2)).read(of_two, {"only": None, "seed": None})
    assert missing == ["only"]
    assert asked == {"only": None, "seed": 0}


def test_another_number_of_ranks_gets_what_is_the_same_and_the_rest_by_policy(of_two: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        read(of_two)
    assert isinstance(caught.value, StateMismatchError)
    assert caught.value.kind == "world_size_mismatch"
    assert read(of_two, {"same": None})[0] == {"same": [1, 2]}
    assert read(of_two, per_rank="skip")[0]["same"] == [1, 2]
    kept = torch.full((2,), 9)
    into = {"rng": kept, "seed": "old", "same": [0], "list": [torch.zeros(7)], "only": None}
    found, missing = read(of_two, into, per_rank="skip")
    assert missing == []
    assert found["rng"] is kept
    assert kept.tolist() == [9, 9]
    assert (found["seed"], found["same"], found["only"]) == ("old", [1, 2], None)
    found, _ = read(of_two, {"rng": None, "seed": 0, "only": None}, per_rank="list")
    assert [tensor.tolist() for tensor in found["rng"]] == [[0, 0], [1, 1]]
    assert (found["seed"], found["only"]) == ([0, 1], {"here": ["x"]})


def test_damage_is_told_of_the_rank_that_met_it(of_two: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(of_two, damaged)
    (file,) = damaged.glob("data-*/rank00001-00.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    reader = CheckpointReader(RankInfo(1, 2))
    with pytest.raises(DamagedCheckpointError) as caught:
        reader.read(damaged)
    assert (caught.value.kind, caught.value.rank) == ("digest_mismatch", 1)
    assert "partly filled" in str(caught.value)
    assert CheckpointReader(RankInfo(0, 2)).read(damaged)[0]["seed"] == 0


def test_names_that_were_never_nested_lie_at_the_top(tmp_path: Path) -> None:
    class Renaming(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> dcp.SavePlan:
            plan = super().create_local_plan()
            return dataclasses.replace(plan, planner_data=None)

    state = {"a": {"b": torch.ones(2)}, "l": [torch.zeros(1)], "c": 3}
    dcp.save(state, checkpoint_id=tmp_path / "c", planner=Renaming())
    found, _ = read(tmp_path / "c")
    assert same(found, {"a.b": torch.ones(2), "l.0": torch.zeros(1), "c": 3}), found
    # A destination tells how they are nested.
    into: dict[str, Any] = {"a": {"b": torch.zeros(2), "x": 1}, "l": [None], "c": None, "d": {}}
    found, missing = read(tmp_path / "c", into)
    assert missing == ["a.x", "d"]
    assert same(found["a"]["b"], torch.ones(2))
    assert same(found["l"], [torch.zeros(1)])
    assert found["c"] == 3


def test_a_subclass_of_tensor_takes_its_own_kind_only(path: Path) -> None:
    pair = TwoTensor(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="TwoTensor, what is stored a plain tensor"):
        read(path, {"w": pair})


def test_a_subclass_of_tensor_is_filled_part_by_part(tmp_path: Path) -> None:
    with CheckpointWriter(CheckpointWriterConfig(), ALONE) as writer:
        writer.write(tmp_path / "c", {"p": TwoTensor(torch.ones(2), torch.full((2,), 2.0))})
    pair = TwoTensor(torch.zeros(2), torch.zeros(2))
    found, missing = read(tmp_path / "c", {"p": pair})
    assert missing == []
    assert found["p"] is pair
    assert (pair.a.tolist(), pair.b.tolist()) == ([1.0, 1.0], [2.0, 2.0])
    assert same(read(tmp_path / "c")[0], {"p": {"a": torch.ones(2), "b": torch.full((2,), 2.0)}})


def test_a_checkpointer_finds_what_it_put_into_memory() -> None:
    with make_sync_checkpointer() as checkpointer:
        checkpointer.save("memory://checkpointer/c", state())
        assert same(checkpointer.load("memory://checkpointer/c"), state())
