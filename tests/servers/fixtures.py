"""Fixtures of servers; import them into a ``conftest.py``.

A server that cannot be started because it is not installed skips the tests that need it, with the
reason; ``make servers`` installs what can be.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.servers.s3 import S3Server, run_s3
from tests.servers.sftp import SftpServer, find_sshd, run_sftp


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 endpoint, for all tests of the session."""
    for package in ("moto", "s3fs"):
        pytest.importorskip(package)
    with run_s3(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def s3(s3_server: S3Server) -> Iterator[S3Server]:
    """The endpoint, which works as it should until it is told otherwise."""
    s3_server.tell()
    yield s3_server
    s3_server.tell()


@pytest.fixture(scope="session")
def sftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    """An SFTP server, for all tests of the session."""
    pytest.importorskip("paramiko")
    sshd = find_sshd()
    if sshd is None or shutil.which("ssh-keygen") is None:
        pytest.skip("OpenSSH's sshd is not installed; as root, make servers installs it")
    with run_sftp(tmp_path_factory.mktemp("sftp"), sshd) as running:
        yield running
