"""Writers and readers that break one promise each, and the check that has to notice."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.futures import Future

from dcp_engine.metadata import Metadata
from dcp_engine.plan import LoadItemType, LoadPlan, ReadItem, SavePlan, WriteItem
from dcp_engine.planner import LoadPlanner, SavePlanner
from dcp_engine.storage import WriteResult
from tests.compat.file_storage import CheckpointId, FileReader, FileWriter

C = TypeVar("C", bound=type)

WRITERS_CAUGHT_BY: dict[type[FileWriter], tuple[str, ...]] = {}
READERS_CAUGHT_BY: dict[type[FileReader], tuple[str, ...]] = {}


def caught_by(*checks: str) -> Callable[[C], C]:
    def note(broken: C) -> C:
        where: Any = WRITERS_CAUGHT_BY if issubclass(broken, FileWriter) else READERS_CAUGHT_BY
        where[broken] = checks
        return broken

    return note


class _Around:
    """A planner that hands on, for a writer or a reader to change what it says."""

    def __init__(self, planner: Any) -> None:
        self._planner = planner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@caught_by("test_abort_leaves_nothing")
class AbortsNothing(FileWriter):
    def abort(self) -> None:
        return None


@caught_by("test_abort_without_a_save")
class AbortsOnlyWhatItBegan(FileWriter):
    def abort(self) -> None:
        if self.part is None:
            raise RuntimeError("nothing to abort")
        super().abort()


@caught_by("test_a_result_for_every_item")
class LosesAResult(FileWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        return _done(super().write_data(plan, planner).wait()[1:])


@caught_by("test_there_is_no_checkpoint_before_finish")
class CommitsTooEarly(FileWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future = super().write_data(plan, planner)
        (self.path / ".metadata").write_bytes(pickle.dumps(Metadata({})))
        return future


@caught_by("test_a_failed_save_leaves_the_old_checkpoint")
class RemovesTheOldOneFirst(FileWriter):
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        (self.path / ".metadata").unlink(missing_ok=True)


@caught_by("test_a_second_save_leaves_no_more_behind")
class NeverTidiesUp(FileWriter):
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.part = None
        super().finish(metadata, results)


@caught_by("test_a_save_in_doubt_deletes_nothing")
class DeletesInDoubt(FileWriter):
    def leave_in_doubt(self) -> None:
        self.abort()


@caught_by("test_reset_points_elsewhere")
class StaysWhereItIs(FileWriter):
    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        super().reset(None)


@caught_by("test_reset_begins_anew", "test_a_second_save")
class IsUsedUp(FileWriter):
    used = False

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if self.used:
            raise RuntimeError("this writer has written already")
        self.used = True
        return super().write_data(plan, planner)


class _WithoutStrides(_Around):
    def resolve_data(self, item: WriteItem) -> Any:
        data = self._planner.resolve_data(item)
        if isinstance(data, torch.Tensor) and not data.is_contiguous():
            strides = torch.empty(data.shape).stride()
            return data.as_strided(data.size(), strides)
        return data


@caught_by("test_what_was_written_is_there", "test_through_the_engine")
class IgnoresStrides(FileWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        around: Any = _WithoutStrides(planner)
        return super().write_data(plan, around)


@caught_by("test_ranks")
class GivesAllRanksOneFile(FileWriter):
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [SavePlan(plan.items, "all.pt", plan.planner_data) for plan in plans]


class _WithoutErrors(_Around):
    def resolve_data(self, item: WriteItem) -> Any:
        try:
            return self._planner.resolve_data(item)
        except RuntimeError:
            return torch.zeros(1)

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        try:
            self._planner.load_bytes(item, value)
        except RuntimeError:
            return

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        try:
            self._planner.commit_tensor(item, tensor)
        except RuntimeError:
            return


@caught_by("test_a_planner_that_fails", "test_a_failure_through_the_engine")
class SwallowsErrors(FileWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        around: Any = _WithoutErrors(planner)
        return super().write_data(plan, around)


@caught_by("test_what_it_is")
class UnderstandsEverything(FileWriter):
    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return True


@caught_by("test_data_is_asked_for_in_write_data")
class AsksForTensorsOnly(FileWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = [item for item in plan.items if item.tensor_data is not None]
        plan = SavePlan(items, plan.storage_data, plan.planner_data)
        return super().write_data(plan, planner)


# Readers


@caught_by("test_nothing_there")
class TakesNothingForEmpty(FileReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            return super().read_metadata()
        except FileNotFoundError:
            return Metadata({}, planner_data={}, storage_data={})


@caught_by("test_again")
class RemembersMetadata(FileReader):
    known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.known = self.known or super().read_metadata()
        return self.known


@caught_by("test_reset_points_the_reader_elsewhere")
class ReadsWhereItWas(FileReader):
    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        return None


class _Narrowed(FileReader):
    """``read_data`` item by item, for subclasses that change one thing."""

    def give(self, item: ReadItem, source: torch.Tensor, planner: LoadPlanner) -> None:
        for dim, begin in enumerate(item.storage_offsets):
            source = source.narrow(dim, begin, item.lengths[dim])
        target = planner.resolve_tensor(item).detach()
        target.copy_(source)
        planner.commit_tensor(item, target)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name, at = self.where[item.storage_index]
            source = torch.load(self.path / name, weights_only=True)[at]
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(source.numpy().tobytes()))
            else:
                self.give(item, source, planner)
        return _done(None)


@caught_by("test_a_box")
class TakesTheFirstRows(_Narrowed):
    def give(self, item: ReadItem, source: torch.Tensor, planner: LoadPlanner) -> None:
        origin = torch.Size([0] * len(item.lengths))
        moved = ReadItem(
            item.type, item.dest_index, item.dest_offsets, item.storage_index, origin, item.lengths
        )
        super().give(moved, source, planner)


@caught_by("test_what_the_planner_is_told")
class CommitsBeforeTheDataIsThere(_Narrowed):
    def give(self, item: ReadItem, source: torch.Tensor, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(item).detach()
        planner.commit_tensor(item, target)
        for dim, begin in enumerate(item.storage_offsets):
            source = source.narrow(dim, begin, item.lengths[dim])
        target.copy_(source)


@caught_by("test_what_the_planner_is_told")
class CommitsTwice(_Narrowed):
    def give(self, item: ReadItem, source: torch.Tensor, planner: LoadPlanner) -> None:
        super().give(item, source, planner)
        super().give(item, source, planner)


@caught_by("test_a_destination_with_gaps")
class FillsFlatMemory(_Narrowed):
    def give(self, item: ReadItem, source: torch.Tensor, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(item).detach()
        strides = torch.empty(target.shape).stride()
        target.as_strided(target.size(), strides).copy_(source)
        planner.commit_tensor(item, target)


@caught_by("test_a_load_planner_that_fails")
class SwallowsReadErrors(FileReader):
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        around: Any = _WithoutErrors(planner)
        return super().read_data(plan, around)


@caught_by("test_metadata")
class SaysFloat32(FileReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = super().read_metadata()
        for entry in metadata.state_dict_metadata.values():
            if hasattr(entry, "properties"):
                entry.properties.dtype = torch.float32
        return metadata


@caught_by("test_a_flipped_bit_is_noticed")
class HasNoDigests(FileReader):
    pass


@caught_by("test_what_it_is_for")
class ReadsEverything(FileReader):
    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return bool(str(Path(checkpoint_id)))


@caught_by("test_everything", "test_part_of_it")
class SetsInsteadOfCopying(_Narrowed):
    def give(self, item: ReadItem, source: torch.Tensor, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(item).detach()
        target.set_(source)  # type: ignore[call-overload]
        planner.commit_tensor(item, target)


@caught_by("test_load_through_the_engine", "test_again")
class ReadsOnce(FileReader):
    used = False

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if self.used:
            raise RuntimeError("this reader has read already")
        self.used = True
        return super().read_data(plan, planner)


@caught_by("test_loading_ranks")
class ReadsOnTheCoordinatorOnly(FileReader):
    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.where = metadata.storage_data if is_coordinator else {}


@caught_by("test_nothing_to_read")
class LooksAtTheFirstItem(FileReader):
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if plan.items[0].storage_index not in self.where:
            raise KeyError(plan.items[0].storage_index)
        return super().read_data(plan, planner)


@caught_by("test_part_of_it")
class ReadsAllOrNothing(FileReader):
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if len(plan.items) != len(self.where):
            raise ValueError("the plan is of another checkpoint")
        return super().read_data(plan, planner)


@caught_by("test_what_several_ranks_wrote")
class ReadsTheFirstFile(FileReader):
    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        first = min((name for name, _ in metadata.storage_data.values()), default="")
        self.where = {index: (first, at) for index, (_, at) in metadata.storage_data.items()}


@caught_by("test_nothing_to_write")
class LooksAtTheFirstResult(FileWriter):
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        if results[0][0].storage_data is None:
            raise ValueError("a result without its place")
        super().finish(metadata, results)


@caught_by("test_storage_meta")
class DescribesItselfByADictionary(FileWriter):
    def storage_meta(self) -> Any:
        return {"path": self.path}
