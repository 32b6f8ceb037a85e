"""The contract on every broken store. Not collected: ``test_broken_stores`` runs what must fail."""

from __future__ import annotations

import pytest

from storage_backends.memory import MemoryStore
from storage_backends.testing import ByteStoreContract, WrappingByteStore
from storage_backends.testing.contracts.fixtures import OpenStore
from storage_backends.testing.contracts.medium import Medium
from tests.storage_backends.broken.stores import CAUGHT_BY
from tests.storage_backends.mediums import MemoryMedium


class OfBroken(ByteStoreContract):
    broken: type[WrappingByteStore] = WrappingByteStore
    ROUNDS = 10

    @pytest.fixture
    def memory(self) -> MemoryStore:
        return MemoryStore()

    @pytest.fixture
    def open_store(self, memory: MemoryStore) -> OpenStore:
        return lambda: self.broken(memory)

    @pytest.fixture
    def medium(self, memory: MemoryStore) -> Medium:
        return MemoryMedium(memory)


class TestSound(OfBroken):
    pass


for store in CAUGHT_BY:
    globals()[f"Test{store.__name__}"] = type(
        f"Test{store.__name__}", (OfBroken,), {"broken": store}
    )
