"""Checks of ``list``, ``delete`` and directories."""

from __future__ import annotations

import pytest

from dcp_engine.storage import ByteStore
from storage_backends.testing.contracts.fixtures import (
    OpenStore,
    StoreFixtures,
    in_parallel,
    write_file,
)
from storage_backends.testing.contracts.medium import Medium

__all__ = ["DirectoryChecks"]


def _files(store: ByteStore, prefix: str = "") -> dict[str, int]:
    """Listed files and their sizes; each name once, no directories."""
    found = [file for file in store.list(prefix) if not file.name.endswith("/")]
    sizes = {file.name: file.size for file in found}
    assert len(sizes) == len(found), "a name is listed twice"
    return sizes


class DirectoryChecks(StoreFixtures):
    """What is there, and how it goes."""

    def test_a_place_that_is_not_there_yet(self, open_store: OpenStore) -> None:
        with open_store() as store:
            assert [*store.list()] == []
            assert [*store.list("data-")] == []
            with pytest.raises(FileNotFoundError):
                store.get("manifest.json")
            store.delete(["manifest.json", "data-1/f"])

    def test_list(self, store: ByteStore, medium: Medium) -> None:
        content = {"a": b"1", "ab": b"22", "a/b": b"", "a/c/d": b"333", "b": b"4444"}
        del content["a"]  # no medium needs to have a file and a directory of one name
        for name, data in content.items():
            medium.write(name, data)
        assert _files(store) == {name: len(data) for name, data in content.items()}
        assert _files(store, "a") == {"ab": 2, "a/b": 0, "a/c/d": 3}
        assert _files(store, "a/") == {"a/b": 0, "a/c/d": 3}
        assert _files(store, "a/c") == {"a/c/d": 3}
        assert _files(store, "a/c/d") == {"a/c/d": 3}
        assert _files(store, "nothing/like/it") == {}

    def test_list_has_no_limit(self, store: ByteStore, medium: Medium) -> None:
        """A listing that comes in pages is read to its end."""
        names = {f"many/f{number:05}" for number in range(self.MANY_FILES)}
        for name in names:
            medium.write(name, b"")
        assert set(_files(store, "many/")) == names

    def test_ages(self, store: ByteStore) -> None:
        """Since the last change, by the medium's clock, or None where it has none."""
        store.put("f", b"")
        (file,) = store.list("f")
        assert file.age is None or 0 <= file.age < 3600

    def test_list_is_of_now(self, store: ByteStore, medium: Medium) -> None:
        medium.write("f", b"1")
        assert _files(store) == {"f": 1}
        medium.write("g", b"22")
        medium.write("f", b"333")
        assert _files(store) == {"f": 3, "g": 2}
        store.delete(["f"])
        assert _files(store) == {"g": 2}

    def test_delete(self, store: ByteStore, medium: Medium) -> None:
        for name in ("a", "ab", "b", "d/a", "d/b"):
            medium.write(name, b"x")
        store.delete(["a", "d/a"])
        assert medium.names() == {"ab", "b", "d/b"}
        store.delete(["ab", "b", "d/b"])
        assert medium.names() == set()

    def test_delete_what_is_not_there(self, store: ByteStore, medium: Medium) -> None:
        medium.write("f", b"x")
        store.delete([])
        store.delete(["missing", "nowhere/missing", "f", "f", "missing"])
        store.delete(["f"])
        assert medium.names() == set()

    def test_delete_takes_no_prefix(self, store: ByteStore, medium: Medium) -> None:
        """A directory that holds something stays, with all that is in it."""
        medium.write("d/f", b"x")
        medium.write("d2/f", b"x")
        store.delete(["d"])
        store.delete(["d/"])
        assert medium.names() == {"d/f", "d2/f"}

    def test_delete_of_many(self, store: ByteStore, medium: Medium) -> None:
        names = [f"many/f{number:05}" for number in range(self.MANY_FILES)]
        for name in names:
            medium.write(name, b"")
        medium.write("stays", b"")
        store.delete(iter(names))
        assert medium.names() == {"stays"}

    def test_threads_delete(self, store: ByteStore, medium: Medium) -> None:
        """As the ranks of a failed save do."""
        for number in range(16):
            medium.write(f"d/f{number}", b"x")
        in_parallel(8, lambda n: store.delete([f"d/f{n}", f"d/f{n + 8}", "d/f0"]))
        assert medium.names() == set()
        assert [*store.list()] == []

    def test_the_root_stays(self, store: ByteStore, medium: Medium) -> None:
        store.put("f", b"x")
        store.delete(["f"])
        store.put("f", b"again")
        assert medium.snapshot() == {"f": b"again"}

    def test_make_directory(self, store: ByteStore, medium: Medium) -> None:
        """Parents too, and again."""
        store.make_directory("data/extra/deep")
        store.make_directory("data/extra/deep")
        store.make_directory("data")
        store.make_directory("")
        write_file(store, "data/extra/deep/f", b"x")
        store.put("data/g", b"y")
        assert medium.snapshot() == {"data/extra/deep/f": b"x", "data/g": b"y"}
        assert _files(store, "data/extra") == {"data/extra/deep/f": 1}

    def test_threads_make_one_directory(self, store: ByteStore, medium: Medium) -> None:
        """As all ranks of a save do."""

        def one(number: int) -> None:
            store.make_directory("data/extra")
            write_file(store, f"data/extra/f{number}", b"x")

        in_parallel(8, one)
        assert medium.names() == {f"data/extra/f{n}" for n in range(8)}

    def test_a_missing_directory_is_not_made(
        self, store: ByteStore, medium: Medium, has_directories: bool
    ) -> None:
        """A rank that wakes late must not bring back a directory that the others removed."""
        if not has_directories:
            pytest.skip("the medium has no directories")
        for call in (
            lambda: store.create("gone/f"),
            lambda: store.put("gone/f", b"x"),
            lambda: store.create("gone/deeper/f"),
        ):
            with pytest.raises(FileNotFoundError):
                call()
        assert medium.names() == set()
        assert [*store.list()] == []

    def test_directories_go_with_their_last_file(
        self, store: ByteStore, has_directories: bool
    ) -> None:
        if not has_directories:
            pytest.skip("the medium has no directories")
        store.make_directory("a/b")
        store.make_directory("a/empty")
        store.put("a/b/f", b"x")
        assert {file.name for file in store.list()} == {"a/b/f", "a/empty/"}
        store.delete(["a/b/f"])
        assert {file.name: file.size for file in store.list()} == {"a/empty/": 0}
        store.delete(["a/empty/"])
        assert [*store.list()] == []
        with pytest.raises(FileNotFoundError):
            store.put("a/f", b"x")

    def test_sync_directory(self, store: ByteStore, medium: Medium) -> None:
        store.make_directory("data")
        store.put("data/f", b"x")
        store.sync_directory("data")
        store.sync_directory("")
        assert medium.snapshot() == {"data/f": b"x"}
