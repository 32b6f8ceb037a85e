"""Backends by URL scheme, through entry points."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dcp_engine.errors import StorageError, UsageError
from dcp_engine.registry import ENTRY_POINT_GROUP, BackendRegistry, is_chained, scheme_of
from storage_backends.filesystem import FileSystemBackend, FileSystemReader, FileSystemWriter
from storage_backends.fsspec import FsspecBackend, FsspecReader, FsspecWriter
from storage_backends.memory import MemoryBackend, MemoryStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, ENTRY_POINT_GROUP)


FILE = point("file", "storage_backends.filesystem:backend")
MEMORY = point("memory", "storage_backends.memory:MemoryBackend")
BOTH = [FILE, MEMORY]
OTHER = point("any_other", "storage_backends.fsspec:backend")


@pytest.mark.parametrize(
    ("checkpoint_id", "scheme"),
    [
        ("relative/path", "file"),
        ("/abs/path", "file"),
        (Path("/abs"), "file"),
        ("file:///abs", "file"),
        ("file:/abs", "file"),
        ("S3://bucket/key", "s3"),
        ("memory://x", "memory"),
        ("simplecache::s3://bucket/key", "s3"),
        ("gs+x.y-z://b", "gs+x.y-z"),
        ("with:colon", "file"),
        ("/dir/a://b", "file"),
    ],
)
def test_schemes(checkpoint_id: str | Path, scheme: str) -> None:
    assert scheme_of(checkpoint_id) == scheme


def test_built_in_backends_come_in_by_entry_points(tmp_path: Path) -> None:
    registry = BackendRegistry(entry_points=BOTH)
    assert registry.schemes() == ["file", "memory"]
    assert isinstance(registry.backend(tmp_path), FileSystemBackend)
    assert isinstance(registry.writer(tmp_path, thread_count=2), FileSystemWriter)
    assert isinstance(registry.reader(str(tmp_path), verify_digests=False), FileSystemReader)
    store = registry.open_store(f"file://{tmp_path}/x", sync_files=False)
    assert store.url == f"{tmp_path}/x"
    assert not store.durable_sync
    with pytest.raises(UsageError, match="nonsense"):
        registry.open_store(tmp_path, nonsense=1)


def test_a_class_is_made_once_per_registry() -> None:
    registry = BackendRegistry(entry_points=BOTH)
    store = registry.open_store("memory://a")
    store.make_directory("")
    store.put("x", b"1")
    assert registry.open_store("memory://a").get("x") == b"1"
    assert list(registry.open_store("memory://b").list()) == []
    assert list(BackendRegistry(entry_points=BOTH).open_store("memory://a").list()) == []
    writer = registry.writer("memory://a", thread_count=3)
    assert isinstance(writer, ShardedWriter)
    assert isinstance(registry.reader("memory://a"), ShardedReader)
    assert isinstance(registry.backend("memory://c"), MemoryBackend)


def test_given_backends_go_first() -> None:
    mine = MemoryBackend()
    registry = BackendRegistry({"FILE": mine}, entry_points=BOTH)
    assert registry.backend("/x") is mine
    assert isinstance(registry.open_store("/x"), MemoryStore)


def test_a_scheme_that_nobody_offers() -> None:
    with pytest.raises(StorageError) as caught:
        BackendRegistry(entry_points=BOTH).writer("s3://bucket/x")
    assert caught.value.kind == "unsupported_storage"
    assert caught.value.checkpoint == "s3://bucket/x"
    assert "file, memory" in str(caught.value)
    assert "pip install 'dcp_engine[s3]'" in str(caught.value)
    with pytest.raises(StorageError, match="no scheme at all"):
        BackendRegistry(entry_points=[]).writer("/x")
    with pytest.raises(StorageError, match=ENTRY_POINT_GROUP):
        BackendRegistry(entry_points=BOTH).writer("ftp://x")


def test_one_backend_serves_all_schemes_that_nobody_names() -> None:
    registry = BackendRegistry(entry_points=[*BOTH, OTHER])
    assert isinstance(registry.backend("sftp://host/x"), FsspecBackend)
    assert isinstance(registry.backend("s3://bucket/x"), FsspecBackend)
    assert isinstance(registry.backend("memory://x"), MemoryBackend)
    assert isinstance(registry.backend("/x"), FileSystemBackend)
    mine = point("S3", "storage_backends.memory:MemoryBackend")
    registry = BackendRegistry(entry_points=[*BOTH, OTHER, mine])
    assert isinstance(registry.backend("s3://bucket/x"), MemoryBackend)
    assert isinstance(registry.backend("gs://bucket/x"), FsspecBackend)


@pytest.mark.parametrize(
    "url", ["simplecache::memory://x", "dir::file:///x", "zip://a::file:///b.zip"]
)
def test_chained_urls_are_fsspec_s(url: str) -> None:
    """Whatever scheme the last link has: its own backend would not understand the chain."""
    assert is_chained(url)
    registry = BackendRegistry(entry_points=[*BOTH, OTHER])
    assert isinstance(registry.backend(url), FsspecBackend)


@pytest.mark.parametrize(
    "path",
    ["/data/a::b", "/data/a::b://c", "a::b", "s3://bucket/x", Path("a::b://c"), "./a::s3://b"],
)
def test_paths_that_are_no_chains(path: str | Path) -> None:
    assert not is_chained(path)


def test_a_scheme_that_even_fsspec_does_not_know() -> None:
    for open_it in (BackendRegistry().writer, BackendRegistry().reader):
        with pytest.raises(StorageError) as caught:
            open_it("no-such-thing://user:secret@host/x")
        assert caught.value.kind == "unsupported_storage"
        assert "can be used here: file, " in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_scheme_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError) as caught:
        BackendRegistry().writer("gs://bucket/x")
    assert caught.value.kind == "unsupported_storage"
    assert "pip install 'dcp_engine[gcs]'" in str(caught.value)


def test_options_in_the_query() -> None:
    registry = BackendRegistry()
    writer = registry.writer("dir::memory://x?overwrite=false&block_size=4096&streams=2")
    assert isinstance(writer, FsspecWriter)
    assert isinstance(
        registry.reader("dir::memory://x?overwrite=false&thread_count=1"), FsspecReader
    )
    with pytest.raises(UsageError, match="block_size"):
        registry.writer("dir::memory://x?block_size=5")
    # A keyword goes before the query.
    registry.writer("dir::memory://x?block_size=5", block_size=4096)
    with pytest.raises(UsageError, match="streams"):
        registry.open_store("dir::memory://x?streams=none-of-that")
    with registry.open_store("dir::memory://x?streams=3&overwrite=true") as store:
        assert store.url == "dir::memory://x"


@pytest.mark.parametrize("value", ["no_such_module:backend", "storage_backends.memory:missing"])
def test_a_backend_that_cannot_be_imported(value: str) -> None:
    with pytest.raises(StorageError) as caught:
        BackendRegistry(entry_points=[point("s3", value)]).backend("s3://x")
    assert caught.value.kind == "unsupported_storage"
    assert value in str(caught.value)


def test_an_object_that_is_no_backend() -> None:
    with pytest.raises(StorageError, match="Backend"):
        BackendRegistry(entry_points=[point("x1", "sys:path")]).backend("x1://")
    assert sys.path


def test_two_packages_for_one_scheme() -> None:
    other = point("file", "storage_backends.memory:MemoryBackend")
    with pytest.raises(UsageError, match="several packages"):
        BackendRegistry(entry_points=[FILE, other]).backend("/x")
    # One package seen twice, as an editable install is, is no conflict.
    assert BackendRegistry(entry_points=[FILE, FILE]).backend("/x")
