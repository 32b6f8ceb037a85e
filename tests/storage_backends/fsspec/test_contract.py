"""fsspec's file systems keep the contract of a byte store, on real servers where they have one."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from storage_backends.filesystem_store import FileSystemStore
from storage_backends.fsspec import FsspecByteStore, open_fsspec_store
from storage_backends.testing import ByteStoreContract
from storage_backends.testing.contracts.fixtures import OpenStore
from storage_backends.testing.contracts.medium import DirectoryMedium, Medium
from tests.servers.s3 import S3Server
from tests.servers.s3_server import PAGE
from tests.servers.sftp import SftpServer
from tests.storage_backends.fsspec.mediums import BucketMedium

PART = 5 << 20
"""The smallest part that S3 takes: a large file of the contract is two."""


class TestMemory(ByteStoreContract):
    MANY_FILES = 50

    @pytest.fixture
    def place(self) -> str:
        return f"memory://{uuid4().hex}/run"

    @pytest.fixture
    def open_store(self, place: str) -> OpenStore:
        return lambda: open_fsspec_store(place, part_bytes=1 << 20, request_bytes=1 << 20)

    @pytest.fixture
    def medium(self, place: str) -> Medium:
        return MemoryMedium(place.removeprefix("memory:/"))


class MemoryMedium(Medium):
    """The dictionary that all of fsspec's memory file systems share."""

    def __init__(self, root: str) -> None:
        from fsspec.implementations.memory import MemoryFileSystem

        self._files = MemoryFileSystem.store
        self._root = root

    def read(self, name: str) -> bytes:
        try:
            return bytes(self._files[f"{self._root}/{name}"].getvalue())
        except KeyError:
            raise FileNotFoundError(name) from None

    def write(self, name: str, data: bytes) -> None:
        from fsspec.implementations.memory import MemoryFile

        path = f"{self._root}/{name}"
        self._files[path] = MemoryFile(None, path, data)

    def names(self) -> set[str]:
        inside = [path for path in list(self._files) if path.startswith(f"{self._root}/")]
        return {path.removeprefix(f"{self._root}/") for path in inside}


class TestLocal(ByteStoreContract):
    """fsspec's own way to local files, which users get only by passing the file system object."""

    MANY_FILES = 50

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenStore:
        from fsspec.implementations.local import LocalFileSystem

        root = str(tmp_path / "root" / "run")
        fs = LocalFileSystem()
        return lambda: open_fsspec_store(root, fs=fs, part_bytes=1 << 20, request_bytes=1 << 20)

    @pytest.fixture
    def medium(self, tmp_path: Path) -> Medium:
        return DirectoryMedium(tmp_path / "root" / "run")


class TestS3(ByteStoreContract):
    MANY_FILES = PAGE + 20
    ROUNDS = 10

    @pytest.fixture
    def bucket(self, s3: S3Server) -> str:
        return s3.new_bucket()

    @pytest.fixture
    def open_store(self, s3: S3Server, bucket: str) -> OpenStore:
        return lambda: open_fsspec_store(
            f"s3://{bucket}/runs/one", part_bytes=PART, request_bytes=1 << 20, **s3.options
        )

    @pytest.fixture
    def medium(self, s3: S3Server, bucket: str) -> Medium:
        return BucketMedium(s3.client(), bucket, "runs/one")

    @pytest.fixture
    def url(self, s3: S3Server, bucket: str) -> str | None:
        return s3.url(f"{bucket}/runs/one")


class TestS3ByObstore(ByteStoreContract):
    """A second client, in Rust, through its fsspec face."""

    MANY_FILES = PAGE + 20
    ROUNDS = 10

    @pytest.fixture
    def bucket(self, s3: S3Server) -> str:
        return s3.new_bucket()

    @pytest.fixture
    def medium(self, s3: S3Server, bucket: str) -> Medium:
        return BucketMedium(s3.client(), bucket, "runs/one")

    @pytest.fixture
    def open_store(self, s3: S3Server, bucket: str) -> OpenStore:
        fs = s3.obstore()
        return lambda: open_fsspec_store(
            f"s3://{bucket}/runs/one", fs=fs, part_bytes=PART, request_bytes=1 << 20
        )


class TestSftp(ByteStoreContract):
    MANY_FILES = 50
    ROUNDS = 10

    @pytest.fixture
    def open_store(self, sftp: SftpServer, tmp_path: Path) -> OpenStore:
        url = sftp.url(tmp_path / "root" / "run")
        return lambda: open_fsspec_store(url, part_bytes=1 << 20, request_bytes=1 << 20)

    @pytest.fixture
    def medium(self, sftp: SftpServer, tmp_path: Path) -> Medium:
        return DirectoryMedium(tmp_path / "root" / "run")

    @pytest.fixture
    def url(self, sftp: SftpServer, tmp_path: Path) -> str | None:
        return sftp.url(tmp_path / "root" / "run")


def test_a_local_url_comes_as_the_engine_s_own_store(tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/run", f"local://{tmp_path}/run", f"dir::file://{tmp_path}/run"):
        with open_fsspec_store(url) as store:
            assert isinstance(store, FileSystemStore)
            assert store.url == f"{tmp_path}/run"
    with open_fsspec_store("memory://x") as store:
        assert isinstance(store, FsspecByteStore)
