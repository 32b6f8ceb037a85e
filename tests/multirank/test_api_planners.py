"""Planners written for torch's DCP, on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import dcp_engine as dcp
from storage_backends.testing.faulty_calls import CallFault, faulty_reader, faulty_writer
from tests.compat import planners, storages
from tests.multirank import states

pytestmark = pytest.mark.multirank


def state(filled: bool) -> dict[str, Any]:
    line, _ = states.meshes(dist.get_world_size())
    whole = states.whole("w", (7, 4))
    make: Callable[[torch.Tensor], torch.Tensor] = (lambda t: t) if filled else torch.zeros_like
    return {
        "sharded": distribute_tensor(make(whole), line, [Shard(0)]),
        "replicated": distribute_tensor(make(whole), line, [Replicate()]),
        "plain": make(whole.clone()),
        "more": make(torch.arange(9.0)),
        "n": 5 if filled else 0,
    }


def differences(found: dict[str, Any], only: set[str] | None = None) -> list[str]:
    whole = states.whole("w", (7, 4))
    wrong = []
    for key in only or {"sharded", "replicated", "plain", "more", "n"}:
        value = found[key]
        if key in ("sharded", "replicated"):
            value = value.full_tensor()
        expected: Any = {"n": 5, "more": torch.arange(9.0)}.get(key, whole)
        equal = torch.equal(value, expected) if key != "n" else value == expected
        if not equal:
            wrong.append(f"{key}: {value}")
    return wrong


def save(path: str, value: dict[str, Any], planner: Any = None, **options: Any) -> dcp.Metadata:
    writer = dcp.FileSystemWriter(path)
    return dcp.save(value, storage_writer=writer, planner=planner, timeout=60, **options)


def load(path: str, into: dict[str, Any], planner: Any = None) -> dcp.LoadReport:
    reader = dcp.FileSystemReader(path)
    return dcp.load(into, storage_reader=reader, planner=planner, timeout=60)


def rename(path: str) -> list[str]:
    metadata = save(path, state(True), planners.RenameSavePlanner())
    target = state(False)
    load(path, target, planners.RenameLoadPlanner())
    wrong = differences(target)
    found = {"foo_" + key: value for key, value in state(False).items()}
    load(path, found)
    wrong += differences({key[4:]: value for key, value in found.items()})
    if set(metadata.state_dict_metadata) != set(found):
        wrong.append(str(set(metadata.state_dict_metadata)))
    return wrong


def half(path: str) -> list[str]:
    save(path, state(True), planners.FP16Planner())
    target = state(False)
    try:
        load(path, target)
    except dcp.CheckpointException as error:
        wrong = [] if error.kind == "dtype_mismatch" else [error.kind]
    else:
        wrong = ["a cast was not refused"]
    load(path, target, planners.CastingLoadPlanner())
    return wrong + differences(target)


def balance(path: str) -> list[str]:
    keys = {"plain", "more", "n"}
    only = {key: value for key, value in state(True).items() if key in keys}
    save(path, only, planners.DDPLoadBalancingPlanner())
    sizes = [file.stat().st_size for file in Path(path).rglob("*.safetensors")]
    target = {key: value for key, value in state(False).items() if key in keys}
    load(path, target)
    wrong = differences(target, keys)
    return wrong + ([] if len(sizes) == dist.get_world_size() else [f"files: {sizes}"])


def extra_data(path: str) -> list[str]:
    planner = planners.ExtraDataLoadPlanner()
    metadata = save(path, state(True), planners.SaveExtraDataPlanner())
    target = state(False)
    load(path, target, planner)
    expected = ["per-rank-data"] * dist.get_world_size()
    wrong = [] if planner.seen == metadata.planner_data == expected else [str(planner.seen)]
    return wrong + differences(target)


def materialize(path: str) -> list[str]:
    save(path, state(True))
    target = state(False)
    target["plain"] = target["plain"].to("meta")
    load(path, target, planners.MetaModelMaterialize())
    wrong = differences(target, {"plain"})
    line, _ = states.meshes(dist.get_world_size())
    meta = torch.empty(7, 4, device="meta")
    sharded = {"sharded": distribute_tensor(meta, line, [Shard(1)])}
    load(path, sharded)
    return wrong + differences(sharded, {"sharded"})


def hooks(path: str) -> list[str]:
    keys = {"sharded", "plain"}
    only = {key: value for key, value in state(True).items() if key in keys}
    save(path, only, planners.LookupSavePlanner())
    target = {key: value for key, value in state(False).items() if key in keys}
    load(path, target, planners.LookupLoadPlanner())
    return differences(target, keys)


def own(path: str) -> list[str]:
    keys = {"plain", "more", "n"}
    only = {key: value for key, value in state(True).items() if key in keys}
    save(path, only, planners.OwnSavePlanner(), coordinator_rank=0)
    target = {key: value for key, value in state(False).items() if key in keys}
    load(path, target, planners.OwnLoadPlanner())
    wrong = differences(target, keys)
    target = {key: value for key, value in state(False).items() if key in keys}
    load(path, target)
    return wrong + differences(target, keys)


def lowest_rank(path: str) -> list[str]:
    """``dedup_save_to_lowest_rank`` by columns and by items: rank 0 writes what all hold."""
    wrong = []
    keys = {"replicated", "plain", "more", "n"}
    for planner in (dcp.DefaultSavePlanner, planners.FP16Planner):
        only = {key: value for key, value in state(True).items() if key in keys}
        save(path, only, planner(dedup_save_to_lowest_rank=True))
        dist.barrier()
        files = sorted(file.name for file in Path(path).rglob("*.safetensors"))
        if files != ["rank00000-00.safetensors"]:
            wrong.append(f"{planner.__name__}: {files}")
        dist.barrier()
    return wrong


def partial(path: str) -> list[str]:
    wrong = []
    save(path, {"plain": state(True)["plain"]})
    for planner in (dcp.DefaultLoadPlanner, planners.ExtraDataLoadPlanner):
        target = {**state(False), "n": "kept"}
        report = load(path, target, planner(allow_partial_load=True))
        wrong += differences(target, {"plain"})
        if set(report.missing) != {"sharded", "replicated", "more", "n"} or target["n"] != "kept":
            wrong.append(f"{planner.__name__}: {report.missing}")
    return wrong


def nested_whole(path: str) -> list[str]:
    save(
        path,
        {"opt": {"lr": 0.5, "t": torch.ones(2)}},
        dcp.DefaultSavePlanner(flatten_state_dict=False),
    )
    target: dict[str, Any] = {"opt": None}
    load(path, target, dcp.DefaultLoadPlanner(flatten_state_dict=False))
    found = target["opt"]
    return [] if found["lr"] == 0.5 and torch.equal(found["t"], torch.ones(2)) else [str(found)]


EXAMPLES = [
    rename, half, balance, extra_data, materialize, hooks, own, lowest_rank, partial, nested_whole,
]  # fmt: skip


def all_examples(path: str) -> dict[str, list[str]]:
    return {example.__name__: example(f"{path}/{example.__name__}") for example in EXAMPLES}


def test_planners_on_two_ranks(ranks: Any, tmp_path: Path) -> None:
    nothing_wrong = {example.__name__: [] for example in EXAMPLES}
    assert ranks.run(2, all_examples, str(tmp_path)) == [nothing_wrong] * 2


def save_renamed(path: str) -> None:
    save(path, state(True), planners.RenameSavePlanner())


def load_renamed(path: str) -> list[str]:
    target = state(False)
    load(path, target, planners.RenameLoadPlanner())
    return differences(target)


def test_a_custom_planner_reshards(ranks: Any, tmp_path: Path) -> None:
    ranks.run(4, save_renamed, str(tmp_path / "c"))
    assert ranks.run(2, load_renamed, str(tmp_path / "c")) == [[], []]


def storage(path: str, step: str) -> list[str]:
    """A file-backed storage of other origin, with each kind of planner."""
    wrong = []
    for name, planner, loader in (
        ("default", None, None),
        ("renamed", planners.RenameSavePlanner(), planners.RenameLoadPlanner()),
    ):
        place = f"{path}/{name}"
        if step == "save":
            writer = storages.FileWriter(place)
            metadata = dcp.save(state(True), storage_writer=writer, planner=planner, timeout=60)
            if writer.rank != dist.get_rank() or metadata.storage_meta is None:
                wrong.append("the writer was not told its rank")
            continue
        target = state(False)
        dcp.load(target, storage_reader=storages.FileReader(place), planner=loader, timeout=60)
        wrong += [f"{name} {what}" for what in differences(target)]
    return wrong


@pytest.mark.parametrize(("savers", "loaders"), [(2, 4), (4, 2)])
def test_storage_of_other_origin_reshards(
    ranks: Any, tmp_path: Path, savers: int, loaders: int
) -> None:
    assert ranks.run(savers, storage, str(tmp_path), "save") == [[]] * savers
    assert ranks.run(loaders, storage, str(tmp_path), "load") == [[]] * loaders


def our_writer_overridden(path: str) -> list[str]:
    wrong = []
    for planner in (None, planners.FP16Planner()):
        writer = storages.TidyWriter(path)
        dcp.save(
            state(True),
            storage_writer=writer,
            planner=planner,
            extra_files={"config.json": f"rank {dist.get_rank()}"},
            user_metadata={"by": dist.get_rank()},
            coordinator_rank=1,
            timeout=60,
        )
        target = state(False)
        load(path, target, planners.CastingLoadPlanner() if planner else None)
        wrong += differences(target)
        log = ["set_up True", "prepare_local_plan", "finish 2"]
        expected = log if dist.get_rank() == 1 else ["set_up False", "prepare_local_plan"]
        if writer.log != expected:
            wrong.append(f"{writer.log}")
        if dcp.read_extra(path, "config.json") != b"rank 1":
            wrong.append("extra file")
        dist.barrier()
    wrapped = storages.WrappingWriter(dcp.FileSystemWriter(path))
    dcp.save(state(True), storage_writer=wrapped, timeout=60)
    target = state(False)
    reader = storages.WrappingReader(dcp.FileSystemReader(path))
    dcp.load(target, storage_reader=reader, timeout=60)
    return wrong + differences(target)


def test_our_writer_overridden_and_wrapped(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, our_writer_overridden, str(tmp_path / "c")) == [[], []]
    assert sorted(p.name for p in (tmp_path / "c").iterdir())[1:] == ["manifest.json"]
    assert len(list((tmp_path / "c").iterdir())) == 2


def losing(path: str) -> tuple[str, list[int]]:
    try:
        dcp.save(state(True), storage_writer=storages.LosingWriter(path), timeout=60)
    except dcp.CheckpointException as error:
        return error.kind, sorted(error.failures)
    return "", []


def test_a_writer_that_loses_items_is_named_on_all_ranks(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, losing, str(tmp_path)) == [("results_mismatch", [0, 1])] * 2
    assert not (tmp_path / ".metadata").exists()


def save_everything(path: str, way: str) -> None:
    """Every layout, through items: our writer, or one of other origin."""
    everything = states.state(dist.get_world_size(), filled=True)
    del everything["own"]  # PerRank needs the default planner and our own writer
    writer: Any = (storages.FileWriter if way == "foreign" else dcp.FileSystemWriter)(path)
    planner = planners.SaveExtraDataPlanner() if way == "items" else None
    dcp.save(everything, storage_writer=writer, planner=planner, timeout=60)


def load_everything(path: str, way: str, turned: bool) -> list[str]:
    world_size = dist.get_world_size()
    found = states.state(world_size, filled=False, turned=turned, own=not turned)
    own = found.pop("own", None)
    reader: Any = (storages.FileReader if way == "foreign" else dcp.FileSystemReader)(path)
    planner = planners.ExtraDataLoadPlanner() if way == "items" else None
    dcp.load(found, storage_reader=reader, planner=planner, timeout=60)
    if own is None:
        return states.differences(found, world_size, own=False)
    rank = dist.get_rank()
    found["own"] = dcp.PerRank({"seed": rank, "rng": torch.full((4,), rank)})
    return states.differences(found, world_size)


@pytest.mark.parametrize("way", ["items", "foreign"])
def test_every_layout_by_items(ranks: Any, tmp_path: Path, way: str) -> None:
    path = str(tmp_path / "c")
    ranks.run(4, save_everything, path, way)
    assert ranks.run(4, load_everything, path, way, False) == [[]] * 4
    assert ranks.run(2, load_everything, path, way, True) == [[]] * 2
    if way == "items":
        assert ranks.run(2, load_everything, path, "columns", True) == [[]] * 2


class Boom(Exception):
    """What an injected fault raises."""


WRITER_CALLS = [
    ("reset", 1), ("set_up_storage_writer", 0), ("prepare_local_plan", 1),
    ("prepare_global_plan", 0), ("write_data", 1), ("write_data", 0), ("finish", 0),
]  # fmt: skip
PLANNER_CALLS = [
    ("set_up_planner", 1), ("create_local_plan", 0), ("create_global_plan", 0),
    ("finish_plan", 1), ("resolve_data", 1),
]  # fmt: skip
READER_CALLS = [
    ("read_metadata", 1), ("set_up_storage_reader", 0), ("prepare_local_plan", 1),
    ("prepare_global_plan", 0), ("read_data", 1),
]  # fmt: skip


class FailingPlanner(planners.SaveExtraDataPlanner):
    """Raises in one method on one rank."""

    def __init__(self, method: str, rank: int) -> None:
        super().__init__()
        if dist.get_rank() == rank:
            setattr(self, method, self._fail)

    def _fail(self, *args: Any, **kwargs: Any) -> Any:
        raise Boom("injected")


def failure(call: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    try:
        call(*args, timeout=60, **options)
    except dcp.CheckpointException as error:
        return [sorted(error.failures), "injected" in str(error)]
    return []


def item_failures(path: str) -> list[str]:
    rank, wrong = dist.get_rank(), []
    save(path, state(True), planners.SaveExtraDataPlanner())

    def expect(name: str, failing: int, found: list[Any]) -> None:
        if found != [[failing], True]:
            wrong.append(f"{name} on rank {failing}: {found}")
        dist.barrier()
        if len(list(Path(path).iterdir())) != 2:
            left = sorted(str(p.relative_to(path)) for p in Path(path).rglob("*"))
            wrong.append(f"{name} on rank {failing} leaves {left}")
        dist.barrier()

    for method, failing in WRITER_CALLS:
        # An error that is not the engine's would leave a failed commit in doubt.
        error = dcp.StorageError("injected") if method == "finish" else Boom("injected")
        fault = CallFault(method=method, error=error, ranks=frozenset([failing]))
        writer = faulty_writer(dcp.FileSystemWriter(path), [fault], rank=rank)
        planner = planners.SaveExtraDataPlanner()
        found = failure(dcp.save, {}, storage_writer=writer, planner=planner)
        expect(method, failing, found)
    for method, failing in PLANNER_CALLS:
        writer = dcp.FileSystemWriter(path)
        planner = FailingPlanner(method, failing)
        found = failure(dcp.save, state(True), storage_writer=writer, planner=planner)
        expect(method, failing, found)
    for method, failing in READER_CALLS:
        fault = CallFault(method=method, error=Boom("injected"), ranks=frozenset([failing]))
        reader = faulty_reader(dcp.FileSystemReader(path), [fault], rank=rank)
        planner = planners.ExtraDataLoadPlanner()
        found = failure(dcp.load, state(False), storage_reader=reader, planner=planner)
        expect(method, failing, found)
    target = state(False)
    load(path, target)
    return wrong + differences(target)


def test_every_call_of_the_life_cycle_can_fail(ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    assert ranks.run(2, item_failures, str(path)) == [[], []]
    assert len(list(path.iterdir())) == 2
