"""Checkpoints go to servers and come back, by every way that users have to name a place."""

from __future__ import annotations

import inspect
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch.distributed.checkpoint._fsspec_filesystem as _fsspec_filesystem  # noqa: TID251

import dcp_engine as dcp
from dcp_engine.errors import NotFoundError
from storage_backends.fsspec import FsspecReader, FsspecWriter, open_fsspec_store
from storage_backends.prune import prune
from tests.servers.s3 import KEY, SECRET, S3Server
from tests.servers.sftp import SftpServer
from tests.storage_backends.fsspec.mediums import BucketMedium
from tests.storage_backends.fsspec.states import differences, empty, state

Place = tuple[str, dict[str, Any]]
"""A URL and the options to open it with."""


def chained(s3: S3Server, tmp_path: Path) -> Place:
    url = f"simplecache::s3://{s3.new_bucket()}/run"
    return url, {"simplecache": {"cache_storage": str(tmp_path / "cache")}, "s3": s3.options}


PLACES: dict[str, Callable[[S3Server, Path], Place]] = {
    "s3": lambda s3, _: (f"s3://{s3.new_bucket()}/team/run", s3.options),
    "s3 by its query": lambda s3, _: (s3.url(f"{s3.new_bucket()}/run"), {}),
    "s3 by obstore": lambda s3, _: (f"s3://{s3.new_bucket()}/run", {"fs": s3.obstore()}),
    "a cache before s3": chained,
    "memory": lambda _, __: (f"memory://{uuid4().hex}/run", {}),
    "a directory of memory": lambda _, __: (f"dir::memory://{uuid4().hex}/run", {}),
    "file": lambda _, tmp_path: (f"file://{tmp_path}/run", {}),
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, s3: S3Server, tmp_path: Path) -> Place:
    return PLACES[request.param](s3, tmp_path)


@pytest.fixture
def sftp_place(sftp: SftpServer, tmp_path: Path) -> Place:
    return sftp.url(tmp_path / "remote" / "run"), {}


def round_trip(place: Place) -> None:
    url, options = place
    writer, reader = FsspecWriter(url, **options), FsspecReader(url, **options)
    for seed in (1.0, 2.0):
        dcp.save(state(seed), storage_writer=writer)
        found = empty()
        dcp.load(found, storage_reader=reader)
        assert differences(found, state(seed)) == []
    names = {file.name for file in open_fsspec_store(url, **options).list()}
    assert len({name.partition("/")[0] for name in names}) == 2, "the replaced data is gone"


def test_save_overwrite_and_load(place: Place) -> None:
    round_trip(place)


def test_save_overwrite_and_load_over_sftp(sftp_place: Place) -> None:
    round_trip(sftp_place)


def test_the_registry_finds_a_server_by_the_url_alone(
    s3: S3Server, sftp: SftpServer, tmp_path: Path
) -> None:
    for url in (s3.url(f"{s3.new_bucket()}/run"), sftp.url(tmp_path / "run")):
        dcp.save(state(), checkpoint_id=url, extra_files={"config.json": b"{}"})
        found = empty()
        dcp.load(found, checkpoint_id=url)
        assert differences(found, state()) == []
        assert dcp.read_extra(url, "config.json") == b"{}"
        with dcp.open(url) as checkpoint:
            assert checkpoint["model.weight"][100:103].tolist() == [100.0, 101.0, 102.0]


def test_options_from_the_library_s_environment(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    # A new instance: fsspec keeps those of the same arguments, whatever the environment.
    url = f"s3://{s3.new_bucket()}/run?default_block_size={5 << 20}"
    dcp.save(state(), checkpoint_id=url)
    found = empty()
    dcp.load(found, checkpoint_id=url)
    assert differences(found, state()) == []


def test_a_part_of_a_checkpoint(s3: S3Server) -> None:
    """Only what is asked for is fetched."""
    url, options = f"s3://{s3.new_bucket()}/run", s3.options
    dcp.save(state(numel=2_000_000), storage_writer=FsspecWriter(url, **options))
    s3.tell()
    found = {"model": {"small": empty()["model"]["small"]}}
    dcp.load(found, storage_reader=FsspecReader(url, **options))
    assert found["model"]["small"].tolist() == [1.0, 1.0, 1.0]
    # The manifest is asked for by a range that is sure to be long enough.
    asked = [entry for entry in s3.log() if not entry["path"].endswith("manifest.json")]
    ranges = [entry["range"] for entry in asked if entry["range"]]
    fetched = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in ranges]
    assert sum(end - begin + 1 for begin, end in fetched) < 100_000


def test_a_cache_serves_data_but_never_the_manifest(s3: S3Server, tmp_path: Path) -> None:
    url, options = chained(s3, tmp_path)
    writer, reader = FsspecWriter(url, **options), FsspecReader(url, **options)
    dcp.save(state(), storage_writer=writer)
    dcp.load(empty(), storage_reader=reader)
    s3.tell()
    dcp.load(empty(), storage_reader=reader)
    gets = [e["path"] for e in s3.log() if e["method"] == "GET" and "/data-" in e["path"]]
    assert gets == []
    # Somebody else replaces the checkpoint: the cache must not hide it.
    bucket = url.removeprefix("simplecache::s3://").partition("/")[0]
    dcp.save(state(3.0), storage_writer=FsspecWriter(f"s3://{bucket}/run", **s3.options))
    found = empty()
    dcp.load(found, storage_reader=reader)
    assert differences(found, state(3.0)) == []


def test_a_zip_file_can_be_read_not_written(tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path / "run"))
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        for path in sorted((tmp_path / "run").rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    shutil.rmtree(tmp_path / "run")
    url = f"zip://run::file://{tmp_path}/run.zip"
    found = empty()
    dcp.load(found, checkpoint_id=url)
    assert differences(found, state()) == []
    with pytest.raises(dcp.CheckpointException, match="not written to it") as caught:
        dcp.save(state(), checkpoint_id=url)
    assert caught.value.kind == "unsupported_storage"


def test_over_http_a_checkpoint_can_be_read_not_written(s3: S3Server) -> None:
    bucket = s3.new_bucket()
    dcp.save(state(), checkpoint_id=s3.url(f"{bucket}/run"))
    url = f"{s3.endpoint}/{bucket}/run"
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(empty(), checkpoint_id=url)
    assert caught.value.kind == "permission_denied"
    for name in BucketMedium(s3.client(), bucket, "run").names():
        s3.client().put_object_acl(Bucket=bucket, Key=f"run/{name}", ACL="public-read")
    found = empty()
    dcp.load(found, checkpoint_id=url)
    assert differences(found, state()) == []
    with pytest.raises(dcp.CheckpointException, match="not written to it"):
        dcp.save(state(), checkpoint_id=url)


def test_dcp_s_arguments(tmp_path: Path) -> None:
    """In its order; what is new comes behind, by keyword."""
    theirs = list(inspect.signature(_fsspec_filesystem.FsspecWriter).parameters)
    ours = list(inspect.signature(FsspecWriter).parameters)
    positional = theirs[: theirs.index("kwargs")]
    assert ours[: len(positional)] == positional
    url = f"dir::memory://{uuid4().hex}"
    dcp.save(state(), storage_writer=FsspecWriter(url, True, False, 2, 1000, True, None, "any"))
    with pytest.raises(dcp.UsageError, match="_extensions"):
        FsspecWriter(url, _extensions=[object()])
    writer = pickle.loads(pickle.dumps(FsspecWriter(url, part_bytes=5 << 20)))
    dcp.save(state(), storage_writer=writer)


def test_nothing_there(place: Place) -> None:
    url, options = place
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(empty(), storage_reader=FsspecReader(url, **options))
    assert caught.value.kind == "not_found"
    assert isinstance(caught.value.failures[0][0], NotFoundError)


def test_a_bucket_that_is_not_there(s3: S3Server) -> None:
    with pytest.raises(dcp.CheckpointException, match="bucket") as caught:
        dcp.save(state(), storage_writer=FsspecWriter("s3://no-such-bucket/run", **s3.options))
    assert caught.value.kind == "io_error"


def test_prune(s3: S3Server, sftp_place: Place) -> None:
    """What a save left that nobody finished goes; the checkpoint stays."""
    bucket = s3.new_bucket()
    orphan = f"data-{'0' * 32}"
    for url, options in ((f"s3://{bucket}/runs", s3.options), sftp_place):
        with open_fsspec_store(url, **options) as store:
            store.make_directory(orphan)
            store.put(f"{orphan}/owner.json", b"{}")
            store.put(f"{orphan}/rank00000-00.safetensors", b"half")
        dcp.save(state(), storage_writer=FsspecWriter(url, **options))
        with open_fsspec_store(url, **options) as store:
            kept = prune(store)
            assert kept.removed == ()
            assert {entry.reason for entry in kept.kept} == {"committed", "too young"}
            assert [entry.name for entry in prune(store, older_than=-1).removed] == [orphan]
            assert not any(file.name.startswith(orphan) for file in store.list())
        found = empty()
        dcp.load(found, storage_reader=FsspecReader(url, **options))
        assert differences(found, state()) == []
    left = BucketMedium(s3.client(), bucket, "runs").names()
    assert not any(orphan in name for name in left)


def test_which_checkpoint_ids_are_possible(tmp_path: Path) -> None:
    """As DCP's classes have it: text, of a scheme that fsspec knows."""
    for kind in (FsspecWriter, FsspecReader):
        assert kind.validate_checkpoint_id("s3://bucket/run")
        assert kind.validate_checkpoint_id("simplecache::s3://bucket/run")
        assert kind.validate_checkpoint_id(str(tmp_path))
        assert not kind.validate_checkpoint_id(tmp_path)
        assert not kind.validate_checkpoint_id("no-such-scheme://bucket/run")
