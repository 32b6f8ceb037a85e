"""Planners written for torch's DCP through ``save`` and ``load``, on one rank."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.planner_helpers import create_read_items_for_chunk_list
from tests.compat import planners


def state() -> dict[str, Any]:
    return {"w": torch.arange(12.0).reshape(4, 3), "b": torch.arange(5), "n": {"lr": 0.5}, "s": 3}


def empty() -> dict[str, Any]:
    return {"w": torch.zeros(4, 3), "b": torch.zeros(5, dtype=torch.int64), "n": {"lr": 0}, "s": 0}


def save(path: Path, value: dict[str, Any], planner: Any = None, **options: Any) -> dcp.Metadata:
    return dcp.save(
        value, storage_writer=dcp.FileSystemWriter(path), planner=planner, no_dist=True, **options
    )


def load(path: Path, into: dict[str, Any], planner: Any = None, **options: Any) -> dcp.LoadReport:
    return dcp.load(
        into, storage_reader=dcp.FileSystemReader(path), planner=planner, no_dist=True, **options
    )


def check(found: dict[str, Any], wanted: dict[str, Any] | None = None) -> None:
    wanted = state() if wanted is None else wanted
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("load_planner", [None, planners.RenameLoadPlanner()])
@pytest.mark.parametrize("save_planner", [None, planners.RenameSavePlanner()])
def test_rename(tmp_path: Path, save_planner: Any, load_planner: Any) -> None:
    """Each side alone too: renamed keys are then asked for by their new names."""
    flat = {key: value for key, value in state().items() if key != "n"}
    metadata = save(tmp_path, flat, save_planner)
    prefix = "foo_" if save_planner else ""
    assert set(metadata.state_dict_metadata) == {prefix + key for key in flat}
    target = {key: value for key, value in empty().items() if key != "n"}
    if load_planner is None:
        target = {prefix + key: value for key, value in target.items()}
        load(tmp_path, target)
        check(target, {prefix + key: value for key, value in flat.items()})
    elif save_planner is None:
        with pytest.raises(dcp.CheckpointException) as caught:
            load(tmp_path, target, load_planner)
        assert caught.value.kind == "missing_key"
    else:
        load(tmp_path, target, load_planner)
        check(target, flat)


def test_a_renaming_loader_reads_what_the_default_planner_stored(tmp_path: Path) -> None:
    """``load_bytes`` calls ``torch.load`` on what another planner's save encoded."""
    flat = {key: value for key, value in state().items() if key != "n"}
    save(tmp_path, {"foo_" + key: value for key, value in flat.items()})
    target = {key: value for key, value in empty().items() if key != "n"}
    load(tmp_path, target, planners.RenameLoadPlanner())
    check(target, flat)


def test_fp16(tmp_path: Path) -> None:
    metadata = save(tmp_path, state(), planners.FP16Planner())
    stored = metadata.state_dict_metadata["w"]
    assert isinstance(stored, dcp.TensorStorageMetadata)
    assert stored.properties.dtype == torch.float16
    with pytest.raises(dcp.CheckpointException) as caught:
        load(tmp_path, empty())
    assert caught.value.kind == "dtype_mismatch"
    halves = {**empty(), "w": torch.zeros(4, 3).half(), "b": torch.zeros(5).half()}
    load(tmp_path, halves)
    check(halves, {**state(), "w": state()["w"].half(), "b": state()["b"].half()})
    target = empty()
    load(tmp_path, target, planners.CastingLoadPlanner())
    check(target)


def test_load_balancing(tmp_path: Path) -> None:
    save(tmp_path, state(), planners.DDPLoadBalancingPlanner())
    target = empty()
    load(tmp_path, target)
    check(target)


def test_extra_data_reaches_the_loading_planner(tmp_path: Path) -> None:
    metadata = save(tmp_path, state(), planners.SaveExtraDataPlanner())
    assert metadata.planner_data == ["per-rank-data"]
    target = empty()
    planner = planners.ExtraDataLoadPlanner()
    load(tmp_path, target, planner)
    assert planner.seen == ["per-rank-data"]
    check(target)


@pytest.mark.parametrize("flatten", [True, False])
def test_materialize(tmp_path: Path, flatten: bool) -> None:
    value: dict[str, Any] = {"top": torch.arange(3)}
    if flatten:
        value["m"] = {"w": torch.arange(6.0)}
    save(tmp_path, value)
    target: dict[str, Any] = {"top": torch.empty(3, dtype=torch.int64, device="meta")}
    if flatten:
        target["m"] = {"w": torch.empty(6, device="meta")}
    load(tmp_path, target, planners.MetaModelMaterialize(flatten_state_dict=flatten))
    assert torch.equal(target["top"], torch.arange(3))
    if flatten:
        assert torch.equal(target["m"]["w"], torch.arange(6.0))


def test_meta_destinations_need_no_planner_of_their_own(tmp_path: Path) -> None:
    save(tmp_path, {"m": {"w": torch.arange(6.0)}, "n": 1})
    target: dict[str, Any] = {"m": {"w": torch.empty(6, device="meta")}, "n": 0}
    load(tmp_path, target)
    check(target["m"], {"w": torch.arange(6.0)})
    model = torch.nn.Linear(6, 2, device="meta")
    save(tmp_path, torch.nn.Linear(6, 2).state_dict())
    weights = model.state_dict()
    load(tmp_path, weights)
    model.load_state_dict(weights, assign=True)
    assert model(torch.ones(1, 6)).shape == (1, 2)


def test_a_meta_destination_is_left_alone_by_a_load_that_fails(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.arange(6.0)})
    target = {"w": torch.empty(6, device="meta"), "missing": torch.zeros(1)}
    with pytest.raises(dcp.CheckpointException):
        load(tmp_path, target)
    assert target["w"].is_meta


def test_a_planner_may_fill_an_empty_state_dict(tmp_path: Path) -> None:
    save(tmp_path, state())
    target: dict[str, Any] = {}
    load(tmp_path, target, planners.EverythingLoadPlanner())
    assert target.pop("n.lr") == 0.5
    check(target, {key: value for key, value in state().items() if key != "n"})


def test_lookup_and_transform_hooks(tmp_path: Path) -> None:
    flat = {"w": torch.arange(4.0), "note": [1, "x"]}
    save(tmp_path, flat, planners.LookupSavePlanner())
    raw = {"w": torch.zeros(4), "note": None}
    with pytest.raises(dcp.CheckpointException):
        load(tmp_path, raw)  # only the planner that made the bytes can read them
    target = {"w": torch.zeros(4), "note": None}
    load(tmp_path, target, planners.LookupLoadPlanner())
    assert torch.equal(target["w"], flat["w"])  # type: ignore[arg-type]
    assert target["note"] == ("decoded", "[1, 'x']")


@pytest.mark.parametrize("load_planner", [None, planners.OwnLoadPlanner()])
def test_planners_derived_from_the_interfaces(tmp_path: Path, load_planner: Any) -> None:
    flat = {"w": torch.arange(10.0).reshape(5, 2), "n": {"lr": 0.5}, "s": (1, 2)}
    metadata = save(tmp_path, flat, planners.OwnSavePlanner())
    stored = metadata.state_dict_metadata["w"]
    assert [list(c.sizes) for c in stored.chunks] == [[2, 2], [3, 2]]  # type: ignore[union-attr]
    target: dict[str, Any] = {"w": torch.zeros(5, 2), "s": None}
    if load_planner is not None:
        target["n"] = None
    load(tmp_path, target, load_planner)
    assert torch.equal(target["w"], flat["w"])  # type: ignore[arg-type]
    assert target["s"] == (1, 2)
    assert target.get("n", flat["n"]) == flat["n"]


class TensorsOnly(dcp.LoadPlanner):
    """Leaves out what a load of tensors does not call."""

    set_up_planner = planners.OwnLoadPlanner.set_up_planner  # type: ignore[assignment]
    create_local_plan = planners.OwnLoadPlanner.create_local_plan  # type: ignore[assignment]
    create_global_plan = planners.OwnLoadPlanner.create_global_plan  # type: ignore[assignment]
    finish_plan = planners.OwnLoadPlanner.finish_plan  # type: ignore[assignment]
    resolve_tensor = planners.OwnLoadPlanner.resolve_tensor  # type: ignore[assignment]
    commit_tensor = planners.OwnLoadPlanner.commit_tensor  # type: ignore[assignment]


def test_a_load_planner_need_not_define_what_is_not_called(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.arange(4.0), "s": 1})
    target: dict[str, Any] = {"w": torch.zeros(4)}
    load(tmp_path, target, TensorsOnly())
    assert torch.equal(target["w"], torch.arange(4.0))
    with pytest.raises(dcp.CheckpointException, match="does not define load_bytes"):
        load(tmp_path, {"w": torch.zeros(4), "s": None}, TensorsOnly())


@pytest.mark.parametrize("custom", [True, False])
def test_allow_partial_load(tmp_path: Path, custom: bool) -> None:
    cls = planners.ExtraDataLoadPlanner if custom else dcp.DefaultLoadPlanner
    save(tmp_path, {"w": torch.arange(3.0)})
    target: dict[str, Any] = {"w": torch.zeros(3), "new": torch.full((2,), 7.0), "obj": "kept"}
    with pytest.raises(dcp.CheckpointException) as caught:
        load(tmp_path, target, cls())
    assert caught.value.kind == "missing_key"
    assert caught.value.tensor in ("new", "obj")
    report = load(tmp_path, target, cls(allow_partial_load=True))
    check(target, {"w": torch.arange(3.0), "new": torch.full((2,), 7.0), "obj": "kept"})
    assert set(report.missing) == {"new", "obj"}
    assert report.unexpected == ()
    report = load(tmp_path, {}, cls())
    assert (report.missing, report.unexpected) == ((), ("w",))
    assert report.save_id is not None


@pytest.mark.parametrize("custom", [True, False])
def test_without_flattening(tmp_path: Path, custom: bool) -> None:
    class Save(dcp.DefaultSavePlanner):
        def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
            return super().finish_plan(new_plan)

    saver = Save if custom else dcp.DefaultSavePlanner
    loader = planners.ExtraDataLoadPlanner if custom else dcp.DefaultLoadPlanner
    nested = {"w": torch.arange(3.0), "opt": {"state": {0: torch.ones(2)}, "lr": 0.1}}
    metadata = save(tmp_path, nested, saver(flatten_state_dict=False))
    assert set(metadata.state_dict_metadata) == {"w", "opt"}
    assert isinstance(metadata.state_dict_metadata["opt"], dcp.BytesStorageMetadata)
    target: dict[str, Any] = {"w": torch.zeros(3), "opt": None}
    load(tmp_path, target, loader(flatten_state_dict=False))
    assert torch.equal(target["w"], torch.arange(3.0))
    assert target["opt"]["lr"] == 0.1
    assert torch.equal(target["opt"]["state"][0], torch.ones(2))


def test_dedup_to_lowest_rank_is_accepted_by_both_paths(tmp_path: Path) -> None:
    for planner in (dcp.DefaultSavePlanner, planners.FP16Planner):
        save(tmp_path, state(), planner(dedup_save_to_lowest_rank=True))
        load(tmp_path, {"s": None})


class Opaque:
    """Not JSON, not safe to unpickle."""

    def __init__(self, word: str) -> None:
        self.word = word


@pytest.mark.parametrize("custom", [True, False])
def test_allow_pickle(tmp_path: Path, custom: bool) -> None:
    planner = planners.ExtraDataLoadPlanner() if custom else dcp.DefaultLoadPlanner()
    save(tmp_path, {"o": Opaque("a")}, planners.FP16Planner() if custom else None)
    target: dict[str, Any] = {"o": None}
    for _ in range(2):
        with pytest.raises(dcp.CheckpointException) as caught:
            load(tmp_path, target, planner)
        assert caught.value.kind == "pickle_refused"
        assert target["o"] is None
        load(tmp_path, target, planner, allow_pickle=True)
        assert target["o"].word == "a"
        target["o"] = None  # the option held for that load only


def test_per_rank_policies_need_the_default_planner(tmp_path: Path) -> None:
    save(tmp_path, {"r": dcp.PerRank(torch.ones(2)), "o": dcp.PerRank(5)})
    target = {"r": torch.zeros(2), "o": None}
    load(tmp_path, target, planners.ExtraDataLoadPlanner())
    assert torch.equal(target["r"], torch.ones(2))  # type: ignore[arg-type]
    assert target["o"] == 5
    with pytest.raises(dcp.UsageError, match="per_rank"):
        load(tmp_path, target, planners.ExtraDataLoadPlanner(), per_rank="skip")


def test_errors_of_a_planner_come_with_their_traceback(tmp_path: Path) -> None:
    class Failing(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> dcp.SavePlan:
            raise LookupError("my own mistake")

    with pytest.raises(dcp.CheckpointException) as caught:
        save(tmp_path / "c", state(), Failing())
    assert caught.value.kind == "rank_failed"
    exception, stack = caught.value.failures[0]
    assert isinstance(exception, LookupError)
    assert any(frame.name == "create_local_plan" for frame in stack)
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_strict_replicas_needs_a_planner_that_knows_it(tmp_path: Path) -> None:
    with pytest.raises(dcp.UsageError, match="strict_replicas"):
        save(tmp_path, {"w": torch.ones(2)}, planners.OwnSavePlanner(), strict_replicas=True)


def test_the_helper_for_chunk_lists_plans_what_torchs_does() -> None:
    theirs = importlib.import_module("torch.distributed.checkpoint.planner_helpers")
    metadata = importlib.import_module("torch.distributed.checkpoint.metadata")

    def chunks(module: Any, boxes: list[tuple[list[int], list[int]]]) -> list[Any]:
        return [
            module.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in boxes
        ]

    stored = [([0, 0], [3, 4]), ([3, 0], [5, 2]), ([3, 2], [5, 2])]
    wanted = [([0, 0], [8, 1]), ([2, 1], [4, 3])]

    def planned(function: Any, module: Any) -> list[Any]:
        entry = module.TensorStorageMetadata(
            module.TensorProperties(dtype=torch.float32), torch.Size([8, 4]), chunks(module, stored)
        )
        return sorted(
            (
                i.dest_index.fqn,
                i.dest_index.index,
                *map(tuple, (i.dest_index.offset, i.dest_offsets, i.storage_index.offset)),
                *map(tuple, (i.storage_offsets, i.lengths)),
            )
            for i in function("w", entry, chunks(module, wanted))
        )

    ours = planned(create_read_items_for_chunk_list, importlib.import_module("dcp_engine.metadata"))
    assert ours == planned(theirs.create_read_items_for_chunk_list, metadata)
    assert len(ours) == 5
