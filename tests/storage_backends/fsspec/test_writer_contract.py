"""Writers and readers over fsspec keep the contracts of writers and readers, on real servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage_backends.fsspec import FsspecReader, FsspecWriter
from storage_backends.testing import StorageReaderContract, StorageWriterContract
from storage_backends.testing.contracts.driving import CheckpointId
from storage_backends.testing.contracts.medium import DirectoryMedium, Medium
from storage_backends.testing.contracts.places import MakeReader, MakeWriter
from tests.servers.s3 import S3Server
from tests.servers.sftp import SftpServer
from tests.storage_backends.fsspec.mediums import BucketMedium


class OverFsspec(StorageWriterContract, StorageReaderContract):
    foreign_place = "no-such-scheme://bucket/run"

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {}

    @pytest.fixture
    def make_writer(self, place: CheckpointId, options: dict[str, Any]) -> MakeWriter:
        return lambda: FsspecWriter(place, **options)

    @pytest.fixture
    def make_reader(self, place: CheckpointId, options: dict[str, Any]) -> MakeReader:
        return lambda: FsspecReader(place, **options)


class TestS3(OverFsspec):
    @pytest.fixture
    def bucket(self, s3: S3Server) -> str:
        return s3.new_bucket()

    @pytest.fixture
    def options(self, s3: S3Server) -> dict[str, Any]:
        return s3.options

    @pytest.fixture
    def place(self, bucket: str) -> CheckpointId:
        return f"s3://{bucket}/runs/one"

    @pytest.fixture
    def other_place(self, s3: S3Server) -> CheckpointId:
        return f"s3://{s3.new_bucket()}/two"

    @pytest.fixture
    def medium(self, s3: S3Server, bucket: str) -> Medium:
        return BucketMedium(s3.client(), bucket, "runs/one")


class TestSftp(OverFsspec):
    @pytest.fixture
    def url(self, sftp: SftpServer, tmp_path: Path) -> Callable[[str], str]:
        return lambda name: sftp.url(tmp_path / "remote" / name)

    @pytest.fixture
    def place(self, url: Callable[[str], str]) -> CheckpointId:
        return url("one")

    @pytest.fixture
    def other_place(self, url: Callable[[str], str]) -> CheckpointId:
        return url("two")

    @pytest.fixture
    def medium(self, tmp_path: Path) -> Medium:
        return DirectoryMedium(tmp_path / "remote" / "one")
