"""Checks of names, of flags, and of the store itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dcp_engine.errors import CheckpointError
from dcp_engine.storage import ByteStore, ReadRange
from storage_backends.testing.contracts.fixtures import OpenStore, StoreFixtures, write_file
from storage_backends.testing.contracts.medium import Medium

__all__ = ["NameChecks"]

_UNUSUAL = [
    "with space",
    "ümläut-ß",
    "漢字",
    "emoji-🙂",
    "percent%20sign%",
    "plus+sign",
    "a&b=c",
    "hash#tag",
    "question?mark",
    "semi;colon,comma",
    "quote'double\"",
    "brackets[0]{1}(2)<3>",
    "star*",
    "tilde~at@dollar$",
    "exclaim!caret^bar|",
    ".hidden",
    "-dash",
    "trailing.",
    "x" * 200,
]
_UNSAFE = ["../outside", "a/../../outside", "/absolute", "a//b", "./a", "a/./b", "..", "a\0b"]


class NameChecks(StoreFixtures):
    """A name is a name, and leads nowhere else."""

    FLAGS = (
        "random_write",
        "concurrent_writes",
        "atomic_replace",
        "create_if_absent",
        "replace_if_same",
        "durable_sync",
        "shared_between_processes",
    )

    def test_flags(self, store: ByteStore) -> None:
        assert {type(getattr(store, flag)) for flag in self.FLAGS} == {bool}
        assert type(store.preferred_read) is int
        assert store.preferred_read > 0

    def test_url(self, store: ByteStore) -> None:
        assert isinstance(store.url, str)
        assert store.url

    def test_close_twice(self, open_store: OpenStore) -> None:
        with open_store() as store:
            store.make_directory("")
            store.put("f", b"x")
        store.close()
        store.close()

    def test_local_path(self, store: ByteStore) -> None:
        """Either it is where the bytes lie, or there is none."""
        store.make_directory("data")
        store.put("data/f", b"abc")
        path = store.local_path("data/f")
        assert path is None or Path(path).read_bytes() == b"abc"

    @pytest.mark.parametrize("name", _UNUSUAL)
    def test_unusual_names(self, store: ByteStore, medium: Medium, name: str) -> None:
        directory = "extra " + name
        full = f"{directory}/{name}"
        store.make_directory(directory)
        write_file(store, full, b"abc")
        store.put(name, b"de")
        assert medium.snapshot() == {full: b"abc", name: b"de"}
        assert {file.name: file.size for file in store.list()} == {full: 3, name: 2}
        assert [file.name for file in store.list(f"{directory}/")] == [full]
        assert (store.size(full), store.get(full), store.get(name)) == (3, b"abc", b"de")
        if store.atomic_replace:
            store.replace(name, full)
            assert medium.snapshot() == {full: b"de"}
        store.delete([full, name])
        assert medium.names() == set()

    def test_case_matters(self, store: ByteStore, medium: Medium) -> None:
        store.put("name", b"lower")
        store.put("NAME", b"upper")
        assert medium.snapshot() == {"name": b"lower", "NAME": b"upper"}

    @pytest.mark.parametrize("name", _UNSAFE)
    def test_names_do_not_leave_the_root(self, store: ByteStore, medium: Medium, name: str) -> None:
        """Names come from manifests, and manifests may come from anybody."""
        store.put("f", b"x")
        calls: list[Callable[[], object]] = [
            lambda: store.create(name),
            lambda: store.put(name, b"bad"),
            lambda: store.size(name),
            lambda: store.read(name, [ReadRange(0, memoryview(bytearray(1)))]),
            lambda: store.delete([name]),
            lambda: store.make_directory(name),
        ]
        if store.atomic_replace:
            calls.append(lambda: store.replace("f", name))
        if store.replace_if_same:
            calls += [lambda: store.tag(name), lambda: store.put_over(name, b"bad", store.tag("f"))]
        for call in calls:
            with pytest.raises((CheckpointError, OSError, ValueError)):
                call()
        assert medium.snapshot() == {"f": b"x"}
