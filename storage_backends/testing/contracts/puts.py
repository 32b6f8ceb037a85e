"""Checks of ``put`` and ``replace``: what appears at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from dcp_engine.storage import ByteStore, ReadRange
from storage_backends.testing.contracts.fixtures import (
    OpenStore,
    StoreFixtures,
    in_parallel,
    write_file,
)
from storage_backends.testing.contracts.medium import Medium

__all__ = ["PutChecks"]

_SIZE = 40_000


class PutChecks(StoreFixtures):
    """Small objects, whole or not at all."""

    def test_put(self, store: ByteStore, medium: Medium) -> None:
        store.put("f", b"abc")
        store.put("empty", b"")
        assert medium.snapshot() == {"f": b"abc", "empty": b""}

    def test_put_takes_the_place_of_what_is_there(self, store: ByteStore, medium: Medium) -> None:
        for content in (b"a long first content", b"short", b"", b"and a longer one again"):
            store.put("f", content)
            assert medium.snapshot() == {"f": content}
            assert store.get("f") == content

    def test_put_appears_at_once(
        self, open_store: OpenStore, store: ByteStore, medium: Medium
    ) -> None:
        """Whoever looks while it is replaced sees the old content or the new one."""
        contents = [bytes([1]) * _SIZE, bytes([2]) * _SIZE]
        store.put("f", contents[0])
        self._watch(
            open_store,
            medium,
            store,
            contents,
            lambda writer, content: writer.put("f", content),
        )
        assert medium.names() == {"f"}

    def test_replace_appears_at_once(
        self, open_store: OpenStore, store: ByteStore, medium: Medium
    ) -> None:
        if not store.atomic_replace:
            pytest.skip("atomic_replace is false")
        contents = [bytes([1]) * _SIZE, bytes([2]) * _SIZE]
        store.put("f", contents[0])

        def replace(writer: ByteStore, content: bytes) -> None:
            write_file(writer, "temporary", content)
            writer.replace("temporary", "f")

        self._watch(open_store, medium, store, contents, replace)
        assert medium.names() == {"f"}

    def _watch(
        self,
        open_store: OpenStore,
        medium: Medium,
        store: ByteStore,
        contents: list[bytes],
        change: Callable[[ByteStore, bytes], None],
    ) -> None:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                with open_store() as writer:
                    for number in range(1, self.ROUNDS + 1):
                        change(writer, contents[number % 2])
            except BaseException as error:  # to be raised in the test's own thread
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        buffer = bytearray(_SIZE)
        while True:
            is_last = not thread.is_alive()
            assert medium.read("f") in contents
            store.read("f", [ReadRange(0, memoryview(buffer))])
            assert bytes(buffer) in contents
            if is_last:
                break
        if errors:
            raise errors[0]

    def test_put_if_absent(self, store: ByteStore, medium: Medium) -> None:
        if not store.create_if_absent:
            pytest.skip("create_if_absent is false")
        store.put("f", b"first", if_absent=True)
        with pytest.raises(FileExistsError):
            store.put("f", b"second", if_absent=True)
        assert medium.snapshot() == {"f": b"first"}
        write_file(store, "g", b"by another way")
        with pytest.raises(FileExistsError):
            store.put("g", b"second", if_absent=True)
        store.delete(["f"])
        store.put("f", b"third", if_absent=True)
        assert medium.snapshot() == {"f": b"third", "g": b"by another way"}

    def test_put_if_absent_lets_one_win(
        self, open_store: OpenStore, store: ByteStore, medium: Medium
    ) -> None:
        if not store.create_if_absent:
            pytest.skip("create_if_absent is false")
        stores = [open_store() for _ in range(8)]
        for number in range(max(3, self.ROUNDS // 10)):
            name = f"f{number}"
            winners: list[int] = []

            def one(caller: int, name: str = name, winners: list[int] = winners) -> None:
                try:
                    stores[caller].put(name, b"%d" % caller * 1000, if_absent=True)
                except FileExistsError:
                    return
                winners.append(caller)

            in_parallel(8, one)
            assert len(winners) == 1
            assert medium.read(name) == b"%d" % winners[0] * 1000
        for each in stores:
            each.close()
        assert len(medium.names()) == max(3, self.ROUNDS // 10)

    def test_a_put_is_seen_by_others(self, store: ByteStore, other: ByteStore) -> None:
        store.put("f", b"one")
        assert other.get("f") == b"one"
        store.put("f", b"the second")
        assert other.get("f") == b"the second"
        assert other.size("f") == 10
        store.delete(["f"])
        with pytest.raises(FileNotFoundError):
            other.get("f")

    def test_threads_put(self, store: ByteStore, medium: Medium) -> None:
        in_parallel(8, lambda n: store.put(f"f{n}", b"%d" % n))
        assert medium.snapshot() == {f"f{n}": b"%d" % n for n in range(8)}

    def test_replace(self, store: ByteStore, medium: Medium) -> None:
        if not store.atomic_replace:
            pytest.skip("atomic_replace is false")
        store.put("target", b"old")
        write_file(store, "source", b"new content")
        store.replace("source", "target")
        assert medium.snapshot() == {"target": b"new content"}
        store.replace("target", "elsewhere")
        assert medium.snapshot() == {"elsewhere": b"new content"}

    def test_replace_of_what_is_not_there(self, store: ByteStore, medium: Medium) -> None:
        if not store.atomic_replace:
            pytest.skip("atomic_replace is false")
        store.put("target", b"old")
        with pytest.raises(FileNotFoundError):
            store.replace("missing", "target")
        assert medium.snapshot() == {"target": b"old"}
