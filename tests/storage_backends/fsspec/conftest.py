"""Servers for the tests of fsspec's backends."""

from tests.servers.fixtures import s3, s3_server, sftp

__all__ = ["s3", "s3_server", "sftp"]
