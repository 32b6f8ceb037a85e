"""Arguments of a save that cannot be meant: refused before anything is written."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

import dcp_engine as dcp
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.testing.recording import RecordingByteStore
from tests.end_to_end.checkpoints import save, snapshot, state, value_at

LOOP: list[Any] = []
LOOP.append(LOOP)

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "an extra file above": ({"extra_files": {"../x": b""}}, "'../x'"),
    "an absolute extra file": ({"extra_files": {"/etc/x": b""}}, "'/etc/x'"),
    "an extra file without a name": ({"extra_files": {"": b""}}, "''"),
    "an extra file that is not there": ({"extra_files": {"x": Path("/no/such")}}, "'x'"),
    "an extra file that is a directory": ({"extra_files": {"x": Path("/")}}, "'x'"),
    "an extra file that is a number": ({"extra_files": {"x": 3}}, "'x'"),
    "a file and a directory of one name": (
        {"extra_files": {"a": b"", "a/b": b""}},
        "'a'",
    ),
    "metadata that is no JSON": ({"user_metadata": {"x": object()}}, "user_metadata"),
    "metadata that would come back changed": ({"user_metadata": {1: "x"}}, "user_metadata"),
    "metadata that holds itself": ({"user_metadata": {"x": LOOP}}, "user_metadata"),
    "metadata that is not finite": ({"user_metadata": {"x": float("nan")}}, "user_metadata"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_be_meant(tmp_path: Path, name: str) -> None:
    options, named = OPTIONS[name]
    save(tmp_path, state(1.0))
    before = snapshot(tmp_path)
    store = RecordingByteStore(FileSystemStore(tmp_path))
    with pytest.raises(dcp.CheckpointException) as caught:
        save(store, state(2.0), **options)
    cause = caught.value.failures[0][0]
    assert isinstance(cause, dcp.UsageError), repr(cause)
    assert (caught.value.kind, cause.checkpoint) == ("usage", str(tmp_path))
    assert named in str(cause)
    assert cause.hint
    assert snapshot(tmp_path) == before
    written = {"make_directory", "create", "put", "write"}
    assert not written & {operation for operation, _ in store.operations()}


@pytest.mark.parametrize("url", ["s3://bucket/step-1", "gs://b/c", "https://host/x", "a::s3://b/c"])
def test_a_url_is_no_path(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be a directory called "s3:" below the working directory."""
    monkeypatch.chdir(tmp_path)
    for attempt in (
        lambda: dcp.save(state(), storage_writer=dcp.FileSystemWriter(url), no_dist=True),
        lambda: dcp.load(state(), storage_reader=dcp.FileSystemReader(url), no_dist=True),
    ):
        with pytest.raises(dcp.CheckpointError) as caught:
            attempt()
        assert caught.value.kind == "usage"
        assert url in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    dcp.save(state(4.0), storage_writer=dcp.FileSystemWriter(f"file://{tmp_path}/a%20b"))
    assert value_at(tmp_path / "a b") == 4.0


def test_too_long_a_path(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 300)
    with pytest.raises(dcp.CheckpointException) as caught:
        save(place, state())
    cause = caught.value.failures[0][0]
    assert isinstance(cause, dcp.StorageError)
    assert cause.errno == errno.ENAMETOOLONG
    assert "shorter path" in str(cause)
    assert list(tmp_path.iterdir()) == []
