"""``StorageWriterContract``: all that a ``StorageWriter`` promises, as a pytest class."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest

from dcp_engine.metadata import StorageMeta
from dcp_engine.storage import StorageWriter, WriteResult
from storage_backends.testing.contracts.driving import (
    CheckpointId,
    LoadingRank,
    SavingRank,
    compare,
    empty_state,
    full_state,
    load_by_hand,
    save_by_hand,
)
from storage_backends.testing.contracts.medium import Medium
from storage_backends.testing.contracts.places import (
    MakeReader,
    MakeWriter,
    PlaceFixtures,
    check_stored,
    is_there,
    save,
)

__all__ = ["StorageWriterContract"]


class StorageWriterContract(PlaceFixtures):
    """Derive from it, and override the fixtures ``place``, ``make_writer``, ``make_reader`` and
    ``medium``; see ``StorageReaderContract`` for an example."""

    replaces_at_once: ClassVar[bool] = True
    """Whether a save that fails leaves the checkpoint whole that was there before. Writers that
    were made for DCP and write over it say False."""

    def test_what_it_is(self, make_writer: MakeWriter, place: CheckpointId) -> None:
        writer = make_writer()
        assert isinstance(writer, StorageWriter)
        assert type(writer).validate_checkpoint_id(place) is True
        if self.foreign_place is not None:
            assert type(writer).validate_checkpoint_id(self.foreign_place) is False

    def test_storage_meta(self, make_writer: MakeWriter) -> None:
        writer = make_writer()
        writer.reset()
        meta = writer.storage_meta()
        assert meta is None or isinstance(meta, StorageMeta)

    def test_what_was_written_is_there(
        self, make_writer: MakeWriter, make_reader: MakeReader, medium: Medium
    ) -> None:
        assert medium.names() == set()
        save(make_writer, full_state())
        assert medium.names() != set()
        check_stored(make_reader, full_state())

    def test_a_result_for_every_item(self, make_writer: MakeWriter) -> None:
        rank = SavingRank(make_writer(), full_state())
        save_by_hand([rank])
        assert all(isinstance(result, WriteResult) for result in rank.results)
        assert Counter(result.index for result in rank.results) == Counter(
            item.index for item in rank.plan.items
        )
        assert all(result.size_in_bytes >= 0 for result in rank.results)

    def test_data_is_asked_for_in_write_data(self, make_writer: MakeWriter) -> None:
        """Of every item that has bytes, and not before (which the driver checks)."""
        rank = SavingRank(make_writer(), full_state())
        save_by_hand([rank])
        asked = {item.index for item in rank.planner.resolved}
        assert asked | {i.index for i in rank.plan.items if i.tensor_storage_size() == 0} == {
            item.index for item in rank.plan.items
        }

    def test_nothing_to_write(self, make_writer: MakeWriter, make_reader: MakeReader) -> None:
        rank = SavingRank(make_writer(), {})
        save_by_hand([rank])
        assert rank.results == []
        assert is_there(make_reader)

    def test_there_is_no_checkpoint_before_finish(
        self, make_writer: MakeWriter, make_reader: MakeReader
    ) -> None:
        def look() -> None:
            assert not is_there(make_reader), "a reader finds a checkpoint that is not committed"

        save_by_hand([SavingRank(make_writer(), full_state())], before_finish=look)
        assert is_there(make_reader)

    def test_ranks(self, make_writer: MakeWriter, make_reader: MakeReader) -> None:
        """Each writes its part of what all hold; the first one commits."""
        if not self.several_ranks:
            pytest.skip("several_ranks is False")
        ranks = [SavingRank(make_writer(), full_state(), rank=rank) for rank in range(3)]
        save_by_hand(ranks)
        check_stored(make_reader, full_state())
        for rank in ranks:
            assert Counter(r.index for r in rank.results) == Counter(
                i.index for i in rank.plan.items
            )
        assert sum(bool(rank.results) for rank in ranks) > 1

    def test_a_second_save(self, make_writer: MakeWriter, make_reader: MakeReader) -> None:
        """Takes the place of the first, by another writer and by the same one."""
        writer = make_writer()
        for seed in (1, 2):
            save_by_hand([SavingRank(writer, full_state(seed))])
            check_stored(make_reader, full_state(seed))
        save(make_writer, full_state(3))
        check_stored(make_reader, full_state(3))

    def test_a_second_save_leaves_no_more_behind(
        self, make_writer: MakeWriter, medium: Medium
    ) -> None:
        save(make_writer, full_state(1))
        first = len(medium.names())
        for seed in (2, 3):
            save(make_writer, full_state(seed))
        assert len(medium.names()) == first

    def test_reset_points_elsewhere(
        self,
        make_writer: MakeWriter,
        make_reader: MakeReader,
        medium: Medium,
        other_place: CheckpointId | None,
    ) -> None:
        if other_place is None:
            pytest.skip("no other place: override the fixture other_place")
        writer = make_writer()
        save_by_hand([SavingRank(writer, full_state(1))], other_place)
        assert medium.names() == set()
        rank = LoadingRank(make_reader(), empty_state())
        load_by_hand([rank], other_place)
        compare(rank.state, full_state(1))

    @pytest.mark.parametrize("step", ["set up", "plan locally", "plan globally", "write"])
    @pytest.mark.parametrize("count", [1, 2])
    def test_abort_leaves_nothing(
        self,
        make_writer: MakeWriter,
        make_reader: MakeReader,
        medium: Medium,
        step: str,
        count: int,
    ) -> None:
        """After any step, on every rank; and the writers can be used again."""
        if count > 1 and not self.several_ranks:
            pytest.skip("several_ranks is False")
        writers = [make_writer() for _ in range(count)]

        def ranks() -> list[SavingRank]:
            return [SavingRank(w, full_state(), rank=at) for at, w in enumerate(writers)]

        save_by_hand(ranks(), until=step)
        for writer in reversed(writers):
            writer.abort()
        assert medium.names() == set()
        assert not is_there(make_reader)
        save_by_hand(ranks())
        check_stored(make_reader, full_state())

    def test_abort_without_a_save(self, make_writer: MakeWriter, medium: Medium) -> None:
        """A save may fail before it comes to the writer."""
        writer = make_writer()
        writer.abort()
        writer.reset()
        writer.abort()
        writer.abort()
        assert medium.names() == set()

    @pytest.mark.parametrize("fail_at", [0, 3])
    def test_a_planner_that_fails(
        self, make_writer: MakeWriter, make_reader: MakeReader, medium: Medium, fail_at: int
    ) -> None:
        writer = make_writer()
        with pytest.raises(Exception, match="the planner has no data"):
            save_by_hand([SavingRank(writer, full_state(), fail_at=fail_at)])
        writer.abort()
        assert medium.names() == set()
        assert not is_there(make_reader)

    @pytest.mark.parametrize("step", ["plan globally", "write"])
    def test_a_failed_save_leaves_the_old_checkpoint(
        self, make_writer: MakeWriter, make_reader: MakeReader, medium: Medium, step: str
    ) -> None:
        if not self.replaces_at_once:
            pytest.skip("replaces_at_once is False")
        save(make_writer, full_state(1))
        before = medium.snapshot()
        writer = make_writer()
        save_by_hand([SavingRank(writer, full_state(2))], until=step)
        check_stored(make_reader, full_state(1))
        writer.abort()
        assert medium.snapshot() == before
        check_stored(make_reader, full_state(1))

    def test_a_save_in_doubt_deletes_nothing(
        self, make_writer: MakeWriter, make_reader: MakeReader, medium: Medium
    ) -> None:
        """Its manifest may arrive still. The next save works."""
        writer = make_writer()
        save_by_hand([SavingRank(writer, full_state(1))], until="write")
        before = medium.names()
        writer.leave_in_doubt()
        assert medium.names() >= before
        save_by_hand([SavingRank(writer, full_state(2))])
        check_stored(make_reader, full_state(2))

    def test_reset_begins_anew(self, make_writer: MakeWriter, make_reader: MakeReader) -> None:
        """Whatever became of the save before."""
        writer = make_writer()
        for step in ("set up", "plan globally", "write"):
            save_by_hand([SavingRank(writer, full_state(1))], until=step)
        save_by_hand([SavingRank(writer, full_state(2))])
        check_stored(make_reader, full_state(2))

    def test_through_the_engine(
        self, engine: Any, make_writer: MakeWriter, make_reader: MakeReader
    ) -> None:
        for seed in (1, 2):
            writer = make_writer()
            metadata = engine.save(full_state(seed), storage_writer=writer, no_dist=True)
            assert "matrix" in metadata.state_dict_metadata
            state = empty_state()
            engine.load(state, storage_reader=make_reader(), no_dist=True)
            compare(state, full_state(seed))
            check_stored(make_reader, full_state(seed))

    def test_a_failure_through_the_engine(
        self, engine: Any, make_writer: MakeWriter, make_reader: MakeReader, medium: Medium
    ) -> None:
        planner = SavingRank(make_writer(), {}, fail_at=2).planner
        planner.may_resolve = True
        with pytest.raises(engine.CheckpointException, match="the planner has no data"):
            engine.save(full_state(), storage_writer=make_writer(), planner=planner, no_dist=True)
        assert medium.names() == set()
        assert not is_there(make_reader)
