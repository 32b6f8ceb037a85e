"""Storage layers in DCP's style keep the kit's contracts, and serve several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_engine as dcp
from storage_backends.testing import StorageReaderContract, StorageWriterContract
from storage_backends.testing.contracts.driving import CheckpointId
from storage_backends.testing.contracts.medium import Medium
from storage_backends.testing.contracts.places import MakeReader, MakeWriter
from tests.compat.dictionary_storage import (
    DictionaryMedium,
    DictionaryReader,
    DictionaryStorage,
    DictionaryWriter,
)
from tests.compat.file_storage import FileReader, FileWriter
from tests.multirank.pool import RankPool
from tests.storage_backends.in_directories import InDirectories


class TestDictionary(StorageWriterContract, StorageReaderContract):
    notices_damage = False
    foreign_place = Path("not a string")

    @pytest.fixture
    def storage(self) -> DictionaryStorage:
        return DictionaryStorage()

    @pytest.fixture
    def place(self) -> CheckpointId:
        return "here"

    @pytest.fixture
    def other_place(self) -> CheckpointId:
        return "there"

    @pytest.fixture
    def make_writer(self, place: CheckpointId, storage: DictionaryStorage) -> MakeWriter:
        return lambda: DictionaryWriter(storage, place)

    @pytest.fixture
    def make_reader(self, place: CheckpointId, storage: DictionaryStorage) -> MakeReader:
        return lambda: DictionaryReader(storage, place)

    @pytest.fixture
    def medium(self, storage: DictionaryStorage) -> Medium:
        return DictionaryMedium(storage, "here")


class TestFiles(InDirectories):
    notices_damage = False
    writer = FileWriter
    reader = FileReader


def _save_and_load(path: str) -> list[Any]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    shard = [torch.distributed.tensor.Shard(0)]

    def state(filled: bool) -> dict[str, Any]:
        whole = torch.arange(35.0).reshape(7, 5) if filled else torch.zeros(7, 5)
        return {
            "w": torch.distributed.tensor.distribute_tensor(whole, mesh, shard),
            "step": 5 if filled else 0,
        }

    dcp.save(state(True), storage_writer=FileWriter(path))
    target = state(False)
    dcp.load(target, storage_reader=FileReader(path))
    return [target["w"].full_tensor().tolist(), target["step"]]


@pytest.mark.multirank
def test_files_of_several_ranks(ranks: RankPool, tmp_path: Path) -> None:
    wanted = [torch.arange(35.0).reshape(7, 5).tolist(), 5]
    assert ranks.run(2, _save_and_load, str(tmp_path / "c")) == [wanted, wanted]
    assert len(list((tmp_path / "c").glob("*.pt"))) == 2
