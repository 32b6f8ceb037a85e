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
        rounds = max(3, self.ROUNDS // 10)
        self._race(
            open_store,
            medium,
            [f"f{number}" for number in range(rounds)],
            lambda each, name, data, _: each.put(name, data, if_absent=True),
        )
        assert len(medium.names()) == rounds

    def _race(
        self,
        open_store: OpenStore,
        medium: Medium,
        names: list[str],
        put: Callable[[ByteStore, str, bytes, str], None],
        tag: Callable[[str], str] = lambda _: "",
    ) -> None:
        """One of eight callers wins each round, and what it put is there."""
        stores = [open_store() for _ in range(8)]
        for number, name in enumerate(names):
            won: list[bytes] = []

            def one(
                caller: int,
                number: int = number,
                name: str = name,
                known: str = tag(name),
                won: list[bytes] = won,
            ) -> None:
                # Never the same twice: a tag may be a digest of the content.
                data = b"caller %d, round %d " % (caller, number) * 100
                try:
                    put(stores[caller], name, data, known)
                except FileExistsError:
                    return
                won.append(data)

            in_parallel(8, one)
            assert len(won) == 1
            assert medium.read(name) == won[0]
        for each in stores:
            each.close()

    def test_put_over(self, store: ByteStore, medium: Medium) -> None:
        """What is there is replaced if it is what the caller knows, whoever changed it."""
        if not store.replace_if_same:
            pytest.skip("replace_if_same is false")
        store.put("f", b"1st")
        first = store.tag("f")
        assert store.tag("f") == first
        store.put_over("f", b"2nd", first)
        assert medium.snapshot() == {"f": b"2nd"}
        second = store.tag("f")
        assert second != first
        with pytest.raises(FileExistsError):
            store.put_over("f", b"by its old tag", first)
        assert medium.snapshot() == {"f": b"2nd"}
        medium.write("f", b"3rd")
        with pytest.raises(FileExistsError):
            store.put_over("f", b"over what nobody looked at", second)
        assert medium.snapshot() == {"f": b"3rd"}
        third = store.tag("f")
        store.delete(["f"])
        with pytest.raises(FileNotFoundError):
            store.tag("f")
        with pytest.raises(FileExistsError):
            store.put_over("f", b"over nothing", third)
        assert medium.names() == set()

    def test_put_over_lets_one_win(
        self, open_store: OpenStore, store: ByteStore, medium: Medium
    ) -> None:
        if not store.replace_if_same:
            pytest.skip("replace_if_same is false")
        store.put("f", b"what all know")
        self._race(
            open_store,
            medium,
            ["f"] * max(3, self.ROUNDS // 10),
            lambda each, name, data, tag: each.put_over(name, data, tag),
            store.tag,
        )

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
