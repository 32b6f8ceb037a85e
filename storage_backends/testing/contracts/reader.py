"""``StorageReaderContract``: all that a ``StorageReader`` promises, as a pytest class."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from dcp_engine.metadata import BytesStorageMetadata, TensorStorageMetadata
from dcp_engine.plan import LoadItemType, LoadPlan, ReadItem
from dcp_engine.storage import StorageReader
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
    save,
)

__all__ = ["StorageReaderContract"]


class StorageReaderContract(PlaceFixtures):
    """Derive from it, and override the fixtures, for both contracts at once::

    class TestMyStorage(StorageWriterContract, StorageReaderContract):
        @pytest.fixture
        def place(self, tmp_path):
            return tmp_path / "checkpoint"

        @pytest.fixture
        def make_writer(self, place):
            return lambda: MyWriter(place)

        @pytest.fixture
        def make_reader(self, place):
            return lambda: MyReader(place)

        @pytest.fixture
        def medium(self, place):
            return DirectoryMedium(place)
    """

    notices_damage: ClassVar[bool] = True
    """Whether a reader finds out that a bit was flipped. Readers without digests say False."""

    @pytest.fixture
    def stored(self, make_writer: MakeWriter) -> dict[str, Any]:
        """What is there to be read."""
        save(make_writer, full_state())
        return full_state()

    def test_what_it_is_for(self, make_reader: MakeReader, place: CheckpointId) -> None:
        reader = make_reader()
        assert isinstance(reader, StorageReader)
        assert type(reader).validate_checkpoint_id(place) is True
        if self.foreign_place is not None:
            assert type(reader).validate_checkpoint_id(self.foreign_place) is False

    def test_nothing_there(self, make_reader: MakeReader) -> None:
        reader = make_reader()
        reader.reset()
        with pytest.raises((OSError, KeyError)):
            reader.read_metadata()

    def test_metadata(self, make_reader: MakeReader, stored: dict[str, Any]) -> None:
        reader = make_reader()
        reader.reset()
        known = reader.read_metadata().state_dict_metadata
        tensors = {n: m for n, m in known.items() if isinstance(m, TensorStorageMetadata)}
        for name, tensor in stored.items():
            if not isinstance(tensor, torch.Tensor):
                continue
            entry = tensors[name]
            assert entry.size == tensor.size(), name
            assert entry.properties.dtype == tensor.dtype, name
            assert sum(chunk.sizes.numel() for chunk in entry.chunks) == tensor.numel(), name
        assert isinstance(known["nested.count"], BytesStorageMetadata)
        assert known.keys() >= {"nested.list.0", "bytes", "none"}

    def test_everything(self, make_reader: MakeReader, stored: dict[str, Any]) -> None:
        rank = LoadingRank(make_reader(), empty_state())
        places = {n: t.data_ptr() for n, t in rank.state.items() if isinstance(t, torch.Tensor)}
        load_by_hand([rank])
        compare(rank.state, stored)
        assert {n: rank.state[n].data_ptr() for n in places} == places, "not read in place"

    def test_part_of_it(self, make_reader: MakeReader, stored: dict[str, Any]) -> None:
        wanted = ("strided", "bytes")
        rank = LoadingRank(make_reader(), {name: empty_state()[name] for name in wanted})
        load_by_hand([rank])
        compare(rank.state, {name: stored[name] for name in wanted})

    def test_a_destination_with_gaps(self, make_reader: MakeReader, stored: dict[str, Any]) -> None:
        memory = torch.full((8, 12), -1.0)
        rank = LoadingRank(make_reader(), {"matrix": memory[::2, 1:7]})
        load_by_hand([rank])
        wanted = torch.full((8, 12), -1.0)
        wanted[::2, 1:7] = stored["matrix"]
        assert torch.equal(memory, wanted)

    @pytest.mark.parametrize(
        ("begin", "lengths", "target"),
        [
            ((0, 0), (4, 6), (0, 0)),
            ((1, 0), (2, 6), (1, 0)),
            ((1, 2), (2, 3), (0, 1)),
            ((0, 5), (4, 1), (0, 0)),
            ((3, 5), (1, 1), (3, 5)),
        ],
    )
    def test_a_box(
        self,
        make_reader: MakeReader,
        stored: dict[str, Any],
        begin: tuple[int, int],
        lengths: tuple[int, int],
        target: tuple[int, int],
    ) -> None:
        """A load on other ranks than the save's asks for parts of what is stored."""
        rank = LoadingRank(make_reader(), {"matrix": torch.full((4, 6), -1.0)})
        (whole,) = rank.set_up().items
        box = ReadItem(
            LoadItemType.TENSOR,
            whole.dest_index,
            torch.Size(target),
            whole.storage_index,
            torch.Size(begin),
            torch.Size(lengths),
        )
        (plan,) = rank.reader.prepare_global_plan([LoadPlan([box])])
        rank.read(plan)
        wanted = torch.full((4, 6), -1.0)
        rows, columns = (slice(t, t + n) for t, n in zip(target, lengths, strict=True))
        from_rows, from_columns = (slice(b, b + n) for b, n in zip(begin, lengths, strict=True))
        wanted[rows, columns] = stored["matrix"][from_rows, from_columns]
        assert torch.equal(rank.state["matrix"], wanted)

    def test_what_the_planner_is_told(
        self, make_reader: MakeReader, stored: dict[str, Any]
    ) -> None:
        """Every item once: tensors when their data is there, everything else as bytes."""
        rank = LoadingRank(make_reader(), empty_state())
        load_by_hand([rank])
        tensors = [i for i in rank.plan.items if i.type == LoadItemType.TENSOR]
        objects = [i for i in rank.plan.items if i.type == LoadItemType.BYTE_IO]
        by_name = {item.dest_index.fqn: item for item, _ in rank.planner.committed}
        assert len(rank.planner.committed) == len(by_name) == len(tensors)
        assert {i.dest_index.fqn for i in rank.planner.loaded} == {
            i.dest_index.fqn for i in objects
        }
        assert len(rank.planner.loaded) == len(objects)
        for item, content in rank.planner.committed:
            if item.dest_index.fqn == "matrix":
                assert torch.equal(content, stored["matrix"])

    def test_nothing_to_read(self, make_reader: MakeReader, stored: dict[str, Any]) -> None:
        load_by_hand([LoadingRank(make_reader(), {})])

    def test_a_load_planner_that_fails(
        self, make_reader: MakeReader, stored: dict[str, Any]
    ) -> None:
        reader = make_reader()
        rank = LoadingRank(reader, empty_state())
        rank.planner.fail = True
        with pytest.raises(Exception, match="the planner does not take it"):
            load_by_hand([rank])
        again = LoadingRank(reader, empty_state())
        load_by_hand([again])
        compare(again.state, stored)

    def test_again(
        self, make_writer: MakeWriter, make_reader: MakeReader, stored: dict[str, Any]
    ) -> None:
        """The same reader, of what is there now."""
        reader = make_reader()
        for _ in range(2):
            rank = LoadingRank(reader, empty_state())
            load_by_hand([rank])
            compare(rank.state, stored)
        save(make_writer, full_state(5))
        rank = LoadingRank(reader, empty_state())
        load_by_hand([rank])
        compare(rank.state, full_state(5))

    def test_reset_points_the_reader_elsewhere(
        self,
        make_writer: MakeWriter,
        make_reader: MakeReader,
        stored: dict[str, Any],
        other_place: CheckpointId | None,
    ) -> None:
        if other_place is None:
            pytest.skip("no other place: override the fixture other_place")
        save_by_hand([SavingRank(make_writer(), full_state(7))], other_place)
        reader = make_reader()
        for place, wanted in ((None, stored), (other_place, full_state(7))):
            rank = LoadingRank(reader, empty_state())
            load_by_hand([rank], place)
            compare(rank.state, wanted)

    def test_loading_ranks(self, make_reader: MakeReader, stored: dict[str, Any]) -> None:
        if not self.several_ranks:
            pytest.skip("several_ranks is False")
        ranks = [LoadingRank(make_reader(), empty_state(), rank=rank) for rank in range(2)]
        load_by_hand(ranks)
        for rank in ranks:
            compare(rank.state, stored)

    def test_what_several_ranks_wrote(
        self, make_writer: MakeWriter, make_reader: MakeReader
    ) -> None:
        if not self.several_ranks:
            pytest.skip("several_ranks is False")
        save(make_writer, full_state(4), ranks=3)
        check_stored(make_reader, full_state(4))

    def test_a_flipped_bit_is_noticed(
        self, make_reader: MakeReader, medium: Medium, stored: dict[str, Any]
    ) -> None:
        """In the middle of every file: an error, or nothing that counts has changed."""
        if not self.notices_damage:
            pytest.skip("notices_damage is False")
        for name, content in medium.snapshot().items():
            if not content:
                continue
            damaged = bytearray(content)
            damaged[len(content) // 2] ^= 1
            medium.write(name, bytes(damaged))
            rank = LoadingRank(make_reader(), empty_state())
            try:
                load_by_hand([rank])
            except Exception:  # which one is the reader's own business
                medium.write(name, content)
                continue
            medium.write(name, content)
            compare(rank.state, stored)
        check_stored(make_reader, stored)

    def test_load_through_the_engine(
        self, engine: Any, make_reader: MakeReader, stored: dict[str, Any]
    ) -> None:
        reader = make_reader()
        for _ in range(2):
            state = empty_state()
            engine.load(state, storage_reader=reader, no_dist=True)
            compare(state, stored)

    def test_nothing_there_through_the_engine(self, engine: Any, make_reader: MakeReader) -> None:
        with pytest.raises(engine.CheckpointException):
            engine.load(empty_state(), storage_reader=make_reader(), no_dist=True)
