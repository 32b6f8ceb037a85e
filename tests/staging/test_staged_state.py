"""State dicts staged whole: every kind of value, nothing shared, the same checkpoint."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import dcp_engine as dcp
from dcp_engine.errors import StagingError, UnsupportedStateError, UsageError
from dcp_engine.metadata import MetadataIndex
from dcp_engine.plan import WriteItemType
from dcp_engine.planning.items import value_items
from dcp_engine.staging.staged_pickle import dump_staged, load_staged
from dcp_engine.staging.stagers import DefaultStager
from dcp_engine.staging.stand_in import StagedShards
from dcp_engine.state.adapters import GroupRanks, describe_leaves
from dcp_engine.state.adapters.wrapper import OpenedWrapper
from dcp_engine.state.flatten import flatten, resolve_stateful
from dcp_engine.state.per_rank import PerRank
from dcp_engine.state.values import TensorValue, Value
from tests.staging.states import (
    Counter,
    Halves,
    Opaque,
    bytes_of,
    dtensor,
    mesh_of,
    numbered,
    sharded_tensor,
)
from tests.wrapper_tensors import Scaled

GROUP = GroupRanks(ranks=(0, 1), rank=1)


def described(state: Any) -> dict[str, Value]:
    leaves = flatten(resolve_stateful(state)[0]).leaves
    pairs = describe_leaves(leaves, group=GROUP)
    return {value.fqn: value for _, values in pairs for value in values}


def content(value: Value) -> Any:
    if isinstance(value, TensorValue):
        boxes = zip(value.boxes, map(bytes_of, value.tensors), strict=True)
        return value.dtype, value.shape, value.requires_grad, list(boxes)
    if isinstance(value.value, Opaque):
        return value.value.tensor.tolist(), list(value.value.items)
    return str(value.value)


def contents(state: Any) -> dict[str, Any]:
    """Without tensors that lie on other ranks only: a stand-in says nothing of those."""
    return {
        name: content(value)
        for name, value in described(state).items()
        if not isinstance(value, TensorValue) or value.boxes or 0 in value.shape
    }


def items(state: Any) -> list[Any]:
    """What a planner of items would offer, in a form that can be compared."""
    return [
        (i.index, i.type, i.tensor_data and (i.tensor_data.chunk, i.tensor_data.size))
        for value in described(state).values()
        for i in value_items(value)
    ]


def of_every_kind() -> dict[str, Any]:
    weight = torch.nn.Parameter(numbered(8, 4))
    whole = numbered(64, 64)
    return {
        "plain": numbered(3, 2),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "transposed": numbered(4, 5).T,
        "view": whole[3:5, ::7],
        "expanded": numbered(1, 3).expand(4, 3),
        "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "bits": numbered(8, dtype=torch.uint8).view(torch.bits8),
        "parameter": weight,
        "tied": weight,
        "tied_view": weight.detach(),
        "sharded": dtensor(numbered(2, 3), (4, 3), Shard(0)),
        "columns": dtensor(numbered(4, 1).T.contiguous().T, (4, 2), Shard(1)),
        "grid": dtensor(numbered(4, 3), (4, 6), Replicate(), Shard(1), ranks=[[0, 1]]),
        "nothing_here": dtensor(torch.empty(0, 2), (1, 2), Shard(0)),
        "no_elements": dtensor(torch.empty(0, 2), (0, 2), Shard(0)),
        "replicated": dtensor(numbered(2, 2), (2, 2), Replicate()),
        "replicated_empty": dtensor(torch.empty(0, 2), (0, 2), Replicate()),
        "trained": dtensor(numbered(2, 3), (4, 3), Shard(0)).requires_grad_(),
        "elsewhere": dtensor(torch.empty(0), (4, 3), Shard(0), ranks=(0,)),
        "replicated_elsewhere": dtensor(torch.empty(0), (4, 3), Replicate(), ranks=(0,)),
        "halves": Halves(),
        "named_halves": Halves((".a", ".b")),
        "wrapper": Scaled(numbered(4, 2, dtype=torch.int8), numbered(4), 8),
        "nested_wrapper": Scaled(Scaled(numbered(4, 2), numbered(4), 8), numbered(4), 8),
        "sharded_wrapper": Scaled(dtensor(numbered(2), (4,), Shard(0)), numbered(4), 8),
        "stateful": Counter(),
        "own": PerRank({"rng": numbered(3), "step": 5}),
        "list": [dtensor(numbered(2, 3), (4, 3), Shard(0)), {"x": numbered(2)}, "text"],
        "tuple": (numbered(1), 3),
        "ordered": OrderedDict(b=numbered(2), a=1),
        "numbers": {0: numbered(2), 1: {"lr": 0.1, "betas": (0.9, 0.95)}},
        "object": Opaque(),
        "plain_list": [1, [2, 3]],
        "nothing": {},
        "history": {"leaf": (numbered(2).requires_grad_() * 2,)},
    }


def change_everything(state: Any) -> None:
    """Overwrite and free all tensors; change objects in place."""
    for value in described(state).values():
        for tensor in value.tensors if isinstance(value, TensorValue) else ():
            storage = tensor.untyped_storage()
            storage.fill_(0xEE)
            storage.resize_(0)
    state["object"].tensor.zero_()
    state["object"].items.append(9)
    state["plain_list"][1].append(4)
    state["numbers"][1]["lr"] = 9.0
    state["nothing"]["key"] = 1


@pytest.mark.parametrize("background", [False, True])
def test_after_staging_nothing_reaches_the_copy(stager: DefaultStager, background: bool) -> None:
    state = of_every_kind()
    expected, expected_items = contents(state), items(state)
    staged = stager.begin(state, background=background)
    staged.wait()
    change_everything(state)
    assert contents(staged.state_dict) == expected
    assert items(staged.state_dict) == expected_items


def test_every_staged_tensor_lies_in_the_arena(stager: DefaultStager) -> None:
    staged = stager.begin(of_every_kind())
    for value in described(staged.state_dict).values():
        if isinstance(value, TensorValue):
            for tensor in value.tensors:
                assert staged.staging.arena.offset_of(tensor) is not None
                assert tensor.is_contiguous()


def test_the_nesting_stays(stager: DefaultStager) -> None:
    state = of_every_kind()
    staged = stager.begin(state).state_dict
    assert list(staged) == list(state)
    assert [type(v) for v in staged["list"]] == [StagedShards, dict, str]
    assert isinstance(staged["tuple"], tuple)
    assert list(staged["ordered"]) == ["b", "a"]
    assert list(staged["numbers"]) == [0, 1]
    assert staged["numbers"][1] == {"lr": 0.1, "betas": (0.9, 0.95)}
    assert staged["own"]["step"] == PerRank(5)
    assert staged["nothing"] == {}
    assert isinstance(staged["wrapper"], OpenedWrapper)
    assert type(staged["replicated"]) is torch.Tensor
    assert staged["parameter"].requires_grad


def test_the_original_is_not_touched(stager: DefaultStager) -> None:
    state = of_every_kind()
    before, values = contents(state), list(state.values())
    stager.begin(state)
    assert contents(state) == before
    assert all(a is b for a, b in zip(state.values(), values, strict=True))
    assert state["parameter"].requires_grad


def test_tied_tensors_are_staged_once(stager: DefaultStager) -> None:
    weight = numbered(100, 100)
    staged = stager.begin({"a": weight, "b": weight, "c": weight.view(-1)})
    assert staged.staging.bytes_total == 40_000
    places = {t.data_ptr() for t in staged.state_dict.values()}
    assert len(places) == 1


def test_a_view_costs_its_own_bytes(stager: DefaultStager) -> None:
    assert stager.begin({"v": torch.empty(1 << 22)[:10]}).staging.bytes_total == 40


def test_sharded_tensors(stager: DefaultStager, fake_group: None) -> None:
    def state() -> dict[str, Any]:
        a, b = numbered(2, 3), numbered(1, 3)
        nested = sharded_tensor({4: numbered(4, 3)}, {0: 4}, 8)
        nested._local_shards[0].tensor = sharded_tensor({2: numbered(2, 3)}, {0: 2}, 4)
        return {
            "two": sharded_tensor({2: a, 7: b}, {0: 2, 4: 3}, 8),
            "none": sharded_tensor({}, {0: 8}, 8),
            "nested": nested,
        }

    original = state()
    expected, expected_items = contents(original), items(original)
    staged = stager.begin(original, background=True)
    staged.wait()
    for value in described(original).values():
        for tensor in value.tensors:
            tensor.fill_(-1)
    assert contents(staged.state_dict) == expected
    assert items(staged.state_dict) == expected_items
    assert [tuple(v.shape) for v in staged.state_dict.values()] == [(8, 3)] * 3


class Custom(dcp.DefaultSavePlanner):
    """Overrides a method, and so plans in items."""

    def create_local_plan(self) -> dcp.SavePlan:
        return super().create_local_plan()


@pytest.mark.parametrize("planner", [dcp.DefaultSavePlanner, Custom])
def test_the_checkpoint_is_the_same(
    stager: DefaultStager, tmp_path: Path, planner: type[dcp.DefaultSavePlanner]
) -> None:
    mesh = mesh_of([0], rank=0)

    def state() -> dict[str, Any]:
        def sharded(value: torch.Tensor) -> Any:
            return torch.distributed.tensor.DTensor.from_local(
                value, mesh, [Shard(0)], run_check=False
            )

        weight = torch.nn.Parameter(numbered(8, 4))
        return {
            "model": {"w": weight, "tied": weight, "s": sharded(numbered(6, 2))},
            "halves": Halves(),
            "quantized": Scaled(numbered(4, 2), numbered(4), 8),
            "rng": numbered(5, dtype=torch.uint8),
            **({"own": PerRank({"r": numbered(2)})} if planner is not Custom else {}),
            "list": [sharded(numbered(3)), {"lr": 0.5}],
            "epoch": 3,
        }

    staged = stager.begin(state())
    arena = staged.staging.arena
    sent = load_staged(dump_staged(staged.state_dict, arena), arena)
    with dcp.Engine() as engine:
        metas = [
            engine.save(
                values, storage_writer=dcp.FileSystemWriter(tmp_path / name), planner=planner()
            )
            for name, values in (("live", state()), ("staged", staged.state_dict), ("sent", sent))
        ]
    for meta in metas[1:]:
        assert dict(meta.state_dict_metadata) == dict(metas[0].state_dict_metadata)
        assert meta.planner_data == metas[0].planner_data
    data = [
        sorted(
            (path.name, path.read_bytes()[4096:])
            for path in (tmp_path / name).rglob("*.safetensors")
        )
        for name in ("live", "staged", "sent")
    ]
    assert data[0] == data[1] == data[2]


@pytest.mark.parametrize("key", ["plain", "sharded", "parameter", "wrapper"])
def test_changes_during_background_staging_are_an_alarm(stager: DefaultStager, key: str) -> None:
    plain = numbered(3)
    local = numbered(2, 3)
    parameter = torch.nn.Parameter(numbered(3))
    inner = numbered(4, 2)
    state = {
        "plain": plain,
        "sharded": dtensor(local, (4, 3), Shard(0)),
        "parameter": parameter,
        "wrapper": Scaled(inner, numbered(4), 8),
    }
    changed = {"plain": plain, "sharded": local, "wrapper": inner}
    go = threading.Event()
    staged = stager.begin(state, background=True, check=lambda: go.wait(60) and None)
    with torch.no_grad():
        changed.get(key, parameter).add_(1)
    go.set()
    with pytest.raises(StagingError, match=key) as info:
        staged.wait()
    assert info.value.kind == "staging_torn"


def test_stand_ins_under_another_name() -> None:
    with DefaultStager() as stager:
        state = stager.begin(
            {"w": dtensor(numbered(2, 3), (4, 3), Shard(0)), "h": Halves((".a", ".b"))}
        )
        sharded, halves = state.state_dict["w"], state.state_dict["h"]
        (item,) = sharded.__create_write_items__("renamed", None)
        assert item.index == MetadataIndex("renamed", torch.Size([2, 0]))
        assert item.type is WriteItemType.SHARD
        assert torch.equal(sharded.__get_tensor_shard__(item.index), numbered(2, 3))
        assert torch.equal(sharded.__get_tensor_shard__(MetadataIndex("w")), numbered(2, 3))
        (chunk,) = sharded.__create_chunk_list__()
        assert (chunk.offsets, chunk.sizes) == (torch.Size([2, 0]), torch.Size([2, 3]))
        a, b = halves.__create_write_items__("new", None)
        assert (a.index.fqn, b.index.fqn) == ("new.a", "new.b")
        assert halves.__get_tensor_shard__(b.index).tolist() == [10, 11]
        with pytest.raises(UsageError, match=r"\[9, 0\]"):
            sharded.__get_tensor_shard__(MetadataIndex("w", torch.Size([9, 0])))


def test_stand_ins_have_no_operations(stager: DefaultStager) -> None:
    state = stager.begin({"w": dtensor(numbered(2, 3), (4, 3), Shard(0)).bfloat16()})
    stand_in = state.state_dict["w"]
    assert isinstance(stand_in, torch.Tensor)
    assert (tuple(stand_in.shape), stand_in.dtype) == ((4, 3), torch.bfloat16)
    assert "(4, 3)" in repr(stand_in)
    with pytest.raises(UsageError, match="staged sharded tensor"):
        stand_in + 1


def test_what_a_save_refuses_staging_refuses(stager: DefaultStager) -> None:
    cases: list[tuple[Any, str]] = [
        (torch.empty(2, device="meta"), "meta"),
        ({1.5: 2}, "1.5"),
        (threading.Lock(), "pickle"),
        (PerRank(dtensor(numbered(2, 3), (4, 3), Shard(0))), "sharded"),
    ]
    for value, words in cases:
        with pytest.raises(UnsupportedStateError, match=words):
            stager.begin({"bad": value})
    stager.begin({"good": numbered(1)})  # nothing was left taken


def test_the_group_is_checked_if_given(stager: DefaultStager) -> None:
    state = {"w": dtensor(numbered(2, 3), (4, 3), Shard(0))}
    with pytest.raises(UnsupportedStateError, match="process group"):
        stager.begin(state, group=GroupRanks(ranks=(1, 2), rank=0))


def test_without_flattening_containers_are_objects(stager: DefaultStager) -> None:
    state = {"model": {"w": numbered(3)}, "x": numbered(2)}
    staged = stager.begin(state, flatten_state_dict=False)
    state["model"]["w"].zero_()
    assert staged.state_dict["model"]["w"].tolist() == [0, 1, 2]
    assert staged.staging.bytes_total == 8
