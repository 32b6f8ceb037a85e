"""The default planners in DCP's life cycle, and the planners of torch's docstrings on top."""

from __future__ import annotations

import datetime
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine import default_planner
from dcp_engine.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_load_plan,
    create_default_global_save_plan,
    create_default_local_load_plan,
    create_default_local_save_plan,
    is_default_load_planner,
    is_default_save_planner,
)
from dcp_engine.errors import (
    InvalidPlanError,
    StateMismatchError,
    UnsafeContentError,
    UnsupportedStateError,
    UsageError,
)
from dcp_engine.metadata import (
    STATE_DICT_TYPE,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from dcp_engine.plan import LoadItemType, ReadItem, SavePlan, WriteItemType
from dcp_engine.planner import LoadPlanner, SavePlanner, TensorWriteData, WriteItem
from dcp_engine.planning.item_bytes import from_item_bytes, to_item_bytes
from dcp_engine.planning.items import own_write_item, write_items
from dcp_engine.state.per_rank import PerRank
from tests.compat.planners import (
    DDPLoadBalancingPlanner,
    FP16Planner,
    MetaModelMaterialize,
    RenameLoadPlanner,
    RenameSavePlanner,
    SaveExtraDataPlanner,
)
from tests.planning.layouts import obj, replicated, sharded, source

Stored = dict[MetadataIndex, Any]


class Shards:
    """A tensor that describes itself through torch's ``_Checkpointable`` methods, with item and
    chunk objects of a foreign class."""

    def __init__(self, size: Sequence[int], parts: Mapping[tuple[int, ...], torch.Tensor]) -> None:
        self.shape = torch.Size(size)
        self.parts = dict(parts)

    def size(self) -> torch.Size:
        return self.shape

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        return [
            SimpleNamespace(
                index=SimpleNamespace(fqn=fqn, offset=torch.Size(at), index=None),
                type=SimpleNamespace(name="SHARD"),
                bytes_io_data=None,
                tensor_data=SimpleNamespace(
                    chunk=SimpleNamespace(offsets=torch.Size(at), sizes=part.shape),
                    properties=TensorProperties(dtype=part.dtype),
                    size=self.shape,
                ),
            )
            for at, part in self.parts.items()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        return [
            SimpleNamespace(offsets=torch.Size(at), sizes=part.shape)
            for at, part in self.parts.items()
        ]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        return self.parts[tuple(index.offset)]


def save(
    planners: Sequence[SavePlanner], state_dicts: Sequence[STATE_DICT_TYPE]
) -> tuple[Metadata, Stored, list[SavePlan]]:
    """DCP's life cycle of a save, on as many ranks as there are state dicts."""
    plans = []
    for rank, (planner, state_dict) in enumerate(zip(planners, state_dicts, strict=True)):
        planner.set_up_planner(state_dict, StorageMeta(), rank == 0)
        plans.append(planner.create_local_plan())
    plans, metadata = planners[0].create_global_plan(plans)
    stored: Stored = {}
    final = []
    for planner, plan in zip(planners, plans, strict=True):
        final.append(planner.finish_plan(plan))
        for item in final[-1].items:
            assert item.index not in stored
            data = planner.resolve_data(item)
            if isinstance(data, io.BytesIO):
                stored[item.index] = data.getvalue()
            else:
                assert item.tensor_data is not None
                assert data.shape == item.tensor_data.chunk.sizes
                assert data.dtype == item.tensor_data.properties.dtype
                stored[item.index] = data.detach().clone()
    return metadata, stored, final


def load(
    planners: Sequence[LoadPlanner],
    state_dicts: Sequence[STATE_DICT_TYPE],
    metadata: Metadata,
    stored: Stored,
) -> None:
    """DCP's life cycle of a load."""
    plans = []
    for rank, (planner, state_dict) in enumerate(zip(planners, state_dicts, strict=True)):
        planner.set_up_planner(state_dict, metadata, rank == 0)
        plans.append(planner.create_local_plan())
    plans = planners[0].create_global_plan(plans)
    for planner, plan in zip(planners, plans, strict=True):
        for item in planner.finish_plan(plan).items:
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(stored[item.storage_index]))
                continue
            data = stored[item.storage_index]
            for dim, (offset, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                data = data.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(data)
            planner.commit_tensor(item, target)


def state() -> dict[str, Any]:
    return {
        "model": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(2.5)},
        "empty": torch.zeros(0, 3),
        "steps": [torch.tensor([1, 2]), {"at": 7}],
        "when": datetime.datetime(2026, 1, 2),
        "where": pathlib.PurePosixPath("a/b"),
        "text": "hello",
        "none": None,
    }


def blank() -> dict[str, Any]:
    return {
        "model": {"w": torch.zeros(3, 4), "b": torch.tensor(0.0)},
        "empty": torch.zeros(0, 3),
        "steps": [torch.tensor([0, 0]), {"at": 0}],
        "when": None,
        "where": 0,
        "text": "",
        "none": 1,
    }


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


@pytest.mark.parametrize("world", [1, 3])
def test_round_trip_of_nested_state(world: int) -> None:
    planners = [DefaultSavePlanner() for _ in range(world)]
    metadata, stored, plans = save(planners, [state() for _ in range(world)])
    assert isinstance(metadata.state_dict_metadata["model.w"], TensorStorageMetadata)
    assert isinstance(metadata.state_dict_metadata["text"], BytesStorageMetadata)
    assert metadata.planner_data["steps.1.at"] == ("steps", 1, "at")
    assert sum(len(plan.items) for plan in plans) == len(metadata.state_dict_metadata)
    target = blank()
    load([DefaultLoadPlanner()], [target], metadata, stored)
    assert equal(target, state())


def test_tensors_are_filled_in_place() -> None:
    metadata, stored, _ = save([DefaultSavePlanner()], [state()])
    target = blank()
    memory = target["model"]["w"]
    load([DefaultLoadPlanner()], [target], metadata, stored)
    assert target["model"]["w"] is memory


def test_without_flattening_containers_are_objects() -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    metadata, stored, _ = save([planner], [{"t": torch.ones(2), "nested": {"a": [1, 2]}}])
    assert set(metadata.state_dict_metadata) == {"t", "nested"}
    assert planner.mappings == {}
    target: dict[str, Any] = {"t": torch.zeros(2), "nested": None}
    load([DefaultLoadPlanner(flatten_state_dict=False)], [target], metadata, stored)
    assert equal(target, {"t": torch.ones(2), "nested": {"a": [1, 2]}})


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.data())
def test_shards_that_describe_themselves_reshard(
    rows: int, savers: int, loaders: int, columns: bool, data: st.DataObject
) -> None:
    whole = torch.arange(float(rows * 4)).reshape(rows, 4)

    def cut(count: int, source: torch.Tensor, dim: int) -> list[dict[str, Any]]:
        result = []
        for rank in range(count):
            full = -(-source.shape[dim] // count)
            begin = min(source.shape[dim], rank * full)
            part = source.narrow(dim, begin, min(full, source.shape[dim] - begin)).clone()
            at = (begin, 0) if dim == 0 else (0, begin)
            result.append({"w": Shards(source.shape, {at: part} if part.numel() else {})})
        return result

    metadata, stored, _ = save(
        [DefaultSavePlanner() for _ in range(savers)], cut(savers, whole, int(columns))
    )
    targets = cut(loaders, torch.zeros(rows, 4), data.draw(st.integers(0, 1)))
    load([DefaultLoadPlanner() for _ in range(loaders)], targets, metadata, stored)
    for target in targets:
        for at, part in target["w"].parts.items():
            expected = whole[at[0] : at[0] + part.shape[0], at[1] : at[1] + part.shape[1]]
            assert torch.equal(part, expected)


def test_replicated_items_are_shared_out_by_size() -> None:
    big = {f"t{i}": torch.zeros(100) for i in range(4)} | {"u": torch.zeros(10)}
    _, _, plans = save([DefaultSavePlanner() for _ in range(4)], [dict(big) for _ in range(4)])
    sizes = [sum(i.tensor_data.chunk.sizes[0] for i in p.items if i.tensor_data) for p in plans]
    assert sorted(sizes) == [100, 100, 100, 110]


def test_dedup_to_the_lowest_rank() -> None:
    planners = [DefaultSavePlanner(dedup_save_to_lowest_rank=True) for _ in range(3)]
    states: list[dict[str, Any]] = [{"a": torch.ones(2), "o": 1} for _ in range(3)]
    states[1]["b"] = states[2]["b"] = torch.ones(3)
    _, _, plans = save(planners, states)
    assert [[i.index.fqn for i in plan.items] for plan in plans] == [["a", "o"], ["b"], []]


@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        (torch.ones(2), torch.ones(3), r"\[2\].*rank 0.*\[3\].*rank 1"),
        (torch.ones(2), torch.ones(2, dtype=torch.int8), "float32.*int8"),
        (torch.ones(2), 5, "object"),
    ],
)
def test_divergence_is_refused(one: Any, two: Any, told: str) -> None:
    with pytest.raises(InvalidPlanError, match=told) as caught:
        save([DefaultSavePlanner() for _ in range(2)], [{"x": one}, {"x": two}])
    assert caught.value.tensor == "x"


def test_gap_and_overlap_are_refused() -> None:
    half = {"w": Shards((4, 2), {(0, 0): torch.ones(2, 2)})}
    with pytest.raises(InvalidPlanError) as caught:
        save([DefaultSavePlanner()], [half])
    assert (caught.value.kind, caught.value.tensor) == ("plan_gap", "w")
    over = {"w": Shards((4, 2), {(0, 0): torch.ones(3, 2), (2, 0): torch.ones(2, 2)})}
    with pytest.raises(InvalidPlanError) as caught:
        save([DefaultSavePlanner()], [over])
    assert caught.value.kind == "plan_overlap"
    outside = {"w": Shards((4, 2), {(0, 0): torch.ones(5, 2)})}
    with pytest.raises(InvalidPlanError, match="outside"):
        save([DefaultSavePlanner()], [outside])


def test_a_whole_value_left_on_two_ranks_is_refused() -> None:
    plans = [create_default_local_save_plan({"a": torch.ones(2)}, True) for _ in range(2)]
    with pytest.raises(InvalidPlanError, match="rank 0 and by rank 1"):
        create_default_global_save_plan(plans)


def test_index_hints_count_chunks() -> None:
    plans = [
        create_default_local_save_plan({"w": Shards((4,), {(2 * r,): torch.ones(2)})}, r == 0)
        for r in range(2)
    ]
    new, _ = create_default_global_save_plan(plans)
    assert [plan.items[0].index.index for plan in new] == [0, 1]
    plain, metadata = create_default_global_save_plan(plans, rewrite_index_hints=False)
    assert [plan.items[0].index.index for plan in plain] == [None, None]
    entry = metadata.state_dict_metadata["w"]
    assert isinstance(entry, TensorStorageMetadata)
    assert [tuple(chunk.offsets) for chunk in entry.chunks] == [(0,), (2,)]


def described(**entries: torch.Tensor | None) -> Metadata:
    return Metadata(
        {
            name: BytesStorageMetadata()
            if value is None
            else TensorStorageMetadata(
                properties=TensorProperties(dtype=value.dtype),
                size=value.shape,
                chunks=[
                    ChunkStorageMetadata(torch.Size([0] * value.ndim), torch.Size(value.shape))
                ],
            )
            for name, value in entries.items()
        }
    )


@pytest.mark.parametrize(
    ("wanted", "metadata", "kind"),
    [
        ({"a": torch.ones(2)}, described(), "missing_key"),
        ({"a": torch.ones(2)}, described(a=torch.ones(3)), "shape_mismatch"),
        ({"a": torch.ones(2)}, described(a=None), "type_mismatch"),
        ({"a": 1}, described(a=torch.ones(2)), "type_mismatch"),
        ({"a": torch.ones(2)}, described(a=torch.ones(2).half()), "dtype_mismatch"),
    ],
)
def test_a_destination_that_does_not_fit(
    wanted: dict[str, Any], metadata: Metadata, kind: str
) -> None:
    planner = DefaultLoadPlanner()
    planner.set_up_planner(wanted, metadata, True)
    with pytest.raises(StateMismatchError) as caught:
        planner.create_local_plan()
    assert (caught.value.kind, caught.value.tensor) == (kind, "a")


def test_partial_load_leaves_missing_keys_alone() -> None:
    planner = DefaultLoadPlanner(allow_partial_load=True)
    planner.set_up_planner({"a": torch.ones(2), "b": 5}, described(c=None), True)
    assert planner.create_local_plan().items == []
    plan = create_default_local_load_plan({"a": torch.ones(2)}, described(), strict=False)
    assert create_default_global_load_plan([plan]) == [plan]


def test_a_planner_that_converts_may_load_another_dtype() -> None:
    class Casting(DefaultLoadPlanner):
        def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
            return super().resolve_tensor(read_item).half()

        def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
            super().resolve_tensor(read_item).copy_(tensor)

    metadata, stored, _ = save([DefaultSavePlanner()], [{"a": torch.ones(3).half()}])
    target = {"a": torch.zeros(3)}
    load([Casting()], [target], metadata, stored)
    assert torch.equal(target["a"], torch.ones(3))


def test_meta_tensors_of_a_destination_get_memory() -> None:
    metadata, stored, _ = save([DefaultSavePlanner()], [{"m": {"a": torch.ones(3)}}])
    target = {"m": {"a": torch.empty(3, device="meta")}}
    load([DefaultLoadPlanner()], [target], metadata, stored)
    assert torch.equal(target["m"]["a"], torch.ones(3))


def test_per_rank_values_need_the_engines_own_path() -> None:
    with pytest.raises(UnsupportedStateError, match="PerRank"):
        DefaultSavePlanner().set_up_planner({"r": PerRank(torch.ones(1))})


def test_what_is_not_there_cannot_be_looked_up() -> None:
    planner = DefaultSavePlanner()
    planner.set_up_planner({"w": torch.ones(2)})
    with pytest.raises(UsageError):
        planner.lookup_object(MetadataIndex("nope"))
    with pytest.raises(UsageError):
        planner.lookup_object(MetadataIndex("w", (1,)))
    assert torch.equal(planner.lookup_object(MetadataIndex("w")), torch.ones(2))
    with pytest.raises(UsageError):
        DefaultLoadPlanner().create_local_plan()


class Runs:
    """Something that only a pickle can hold."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Runs)

    __hash__ = None  # type: ignore[assignment]


def test_no_pickle_runs_unasked() -> None:
    metadata, stored, _ = save([DefaultSavePlanner()], [{"x": Runs()}])
    with pytest.raises(UnsafeContentError, match="allow_pickle"):
        load([DefaultLoadPlanner()], [{"x": None}], metadata, stored)
    target: dict[str, Any] = {"x": None}
    load([DefaultLoadPlanner(allow_pickle=True)], [target], metadata, stored)
    assert target["x"] == Runs()


@pytest.mark.parametrize("value", [5, {"a": [1, "x"]}, torch.arange(3), None])
def test_bytes_of_items_can_be_read_by_torch_load(value: Any) -> None:
    planner = DefaultSavePlanner()
    item = WriteItem(index=MetadataIndex("x"), type=WriteItemType.BYTE_IO)
    assert equal(torch.load(planner.transform_object(item, value), weights_only=True), value)


@pytest.mark.parametrize("value", [5, datetime.date(2026, 1, 1), Runs()])
def test_items_bytes_and_stored_objects(value: Any) -> None:
    item = WriteItem(index=MetadataIndex("x"), type=WriteItemType.BYTE_IO)
    raw = DefaultSavePlanner().transform_object(item, value).getvalue()
    back = to_item_bytes(from_item_bytes(raw), fqn="x")
    planner = DefaultLoadPlanner(allow_pickle=True)
    planner.set_up_planner({"x": None}, described(x=None))
    planner.load_bytes(planner.create_local_plan().items[0], back)
    assert planner.original_state_dict["x"] == value


@pytest.mark.parametrize("raw", [b"", b"{}", b"anything", b"PK\x03\x04"])
def test_bytes_that_a_planner_made_up_come_back_unchanged(raw: bytes) -> None:
    assert to_item_bytes(from_item_bytes(raw), fqn="x").getvalue() == raw


# --- the planners in the docstrings of torch's planner module


def test_rename_planners() -> None:
    metadata, stored, _ = save([RenameSavePlanner()], [{"w": torch.ones(2), "n": 3}])
    assert set(metadata.state_dict_metadata) == {"foo_w", "foo_n"}
    target: dict[str, Any] = {"w": torch.zeros(2), "n": 0}
    load([RenameLoadPlanner()], [target], metadata, stored)
    assert equal(target, {"w": torch.ones(2), "n": 3})


def test_fp16_planner() -> None:
    metadata, stored, _ = save(
        [FP16Planner(), FP16Planner()], [{"w": torch.ones(2), "n": 3} for _ in range(2)]
    )
    entry = metadata.state_dict_metadata["w"]
    assert isinstance(entry, TensorStorageMetadata)
    assert entry.properties.dtype == torch.float16
    target = {"w": torch.zeros(2, dtype=torch.float16), "n": 0}
    load([DefaultLoadPlanner()], [target], metadata, stored)
    assert torch.equal(target["w"], torch.ones(2).half())  # type: ignore[arg-type]


def test_load_balancing_planner() -> None:
    states = [{f"t{i}": torch.full((2,), float(i)) for i in range(5)} for _ in range(2)]
    metadata, stored, plans = save([DDPLoadBalancingPlanner() for _ in range(2)], states)
    assert [[i.index.fqn for i in p.items] for p in plans] == [["t0", "t2", "t4"], ["t1", "t3"]]
    target = {f"t{i}": torch.zeros(2) for i in range(5)}
    load([DefaultLoadPlanner()], [target], metadata, stored)
    assert equal(target, states[0])


def test_extra_data_planner() -> None:
    planners = [SaveExtraDataPlanner() for _ in range(3)]
    metadata, _, _ = save(planners, [{"w": torch.ones(2)} for _ in range(3)])
    assert metadata.planner_data == ["per-rank-data"] * 3


def test_materializing_planner() -> None:
    metadata, stored, _ = save([DefaultSavePlanner()], [{"w": torch.ones(2)}])
    planner = MetaModelMaterialize()
    load([planner], [{"w": torch.empty(2, device="meta")}], metadata, stored)
    assert torch.equal(planner.state_dict["w"], torch.ones(2))


# --- which planners take the column path


def test_default_planners_are_recognised() -> None:
    class Configured(DefaultSavePlanner):
        def __init__(self) -> None:
            super().__init__(dedup_save_to_lowest_rank=True)

    assert is_default_save_planner(DefaultSavePlanner(strict_replicas=True))
    assert is_default_save_planner(Configured())
    assert is_default_load_planner(DefaultLoadPlanner(allow_partial_load=True))
    assert not is_default_save_planner(DefaultLoadPlanner())  # type: ignore[arg-type]


SAVE_HOOKS = [
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "resolve_data",
    "lookup_object",
    "transform_object",
    "_dedup_save_plans",
]
LOAD_HOOKS = [
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "load_bytes",
    "resolve_bytes",
    "resolve_tensor",
    "commit_tensor",
    "lookup_tensor",
    "transform_tensor",
]


@pytest.mark.parametrize(
    ("default", "check", "hook"),
    [(DefaultSavePlanner, is_default_save_planner, hook) for hook in SAVE_HOOKS]
    + [(DefaultLoadPlanner, is_default_load_planner, hook) for hook in LOAD_HOOKS],
)
def test_any_overridden_method_is_noticed(
    default: type, check: Callable[[Any], bool], hook: str
) -> None:
    derived = type("Derived", (default,), {hook: lambda self, *args: None})
    assert not check(derived())
    patched = default()
    setattr(patched, hook, lambda *args: None)
    assert not check(patched)
    assert check(default())


def test_a_class_that_is_no_default_planner() -> None:
    @dataclass
    class Mine:
        mappings: Any = None

    assert not is_default_save_planner(Mine())  # type: ignore[arg-type]


def test_deprecated_argument_is_taken_with_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    DefaultSavePlanner(dedup_replicated_tensors=True)
    assert "no effect" in caplog.text
    assert caplog.records[0].name == default_planner.__name__


# --- conversions


def test_items_of_another_class_become_ours() -> None:
    foreign = Shards((4,), {(2,): torch.ones(2)}).__create_write_items__("w", None)[0]
    item = own_write_item(foreign)
    assert item == WriteItem(
        index=MetadataIndex("w", (2,)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size((2,)), torch.Size((2,))),
            properties=TensorProperties(dtype=torch.float32),
            size=torch.Size((4,)),
        ),
    )
    assert own_write_item(item) is item


def test_columns_become_the_items_that_values_would() -> None:
    values = [sharded("w", (8, 4), 1, [4], [0]), replicated("b", (), dtype=torch.int64), obj("o")]
    items = write_items(source(values, 1).plan)
    assert [(i.index, i.type) for i in items] == [
        (MetadataIndex("w", (2, 0)), WriteItemType.SHARD),
        (MetadataIndex("b", ()), WriteItemType.TENSOR),
        (MetadataIndex("o"), WriteItemType.BYTE_IO),
    ]
    assert items[0].tensor_data is not None
    assert items[0].tensor_data.chunk.sizes == (2, 4)
    assert items[0].tensor_data.size == (8, 4)
