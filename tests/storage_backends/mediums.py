"""What lies in the stores of these tests, looked at without them."""

from __future__ import annotations

from storage_backends.memory import MemoryStore
from storage_backends.testing.contracts.medium import Medium


class MemoryMedium(Medium):
    """The dictionaries of a ``MemoryStore``."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def read(self, name: str) -> bytes:
        try:
            return bytes(self._store._files[name].data)
        except KeyError:
            raise FileNotFoundError(name) from None

    def write(self, name: str, data: bytes) -> None:
        self._store.make_directory(name.rpartition("/")[0])
        self._store._files.pop(name, None)
        self._store.put(name, data)

    def names(self) -> set[str]:
        return set(self._store._files)
