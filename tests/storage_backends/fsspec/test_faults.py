"""Servers that throttle, break connections and lose replies; writers that die or meet."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import dcp_engine as dcp
from dcp_engine.errors import ConflictError, StorageError
from dcp_engine.storage import ByteStore, ReadRange
from storage_backends.commit import commit_manifest
from storage_backends.fsspec import FsspecReader, FsspecWriter, RetryPolicy, open_fsspec_store
from tests.servers.s3 import S3Server
from tests.servers.sftp import SftpServer
from tests.storage_backends.fsspec.mediums import BucketMedium
from tests.storage_backends.fsspec.states import differences, empty, state

PART = 5 << 20
AT_ONCE = RetryPolicy(attempts=4, sleep=lambda _: None)


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.new_bucket()


@pytest.fixture
def store(s3: S3Server, bucket: str) -> Any:
    with open_fsspec_store(
        f"s3://{bucket}/run", retries=AT_ONCE, part_bytes=PART, **s3.options
    ) as opened:
        yield opened


@pytest.fixture
def medium(s3: S3Server, bucket: str) -> BucketMedium:
    return BucketMedium(s3.client(), bucket, "run")


def write(store: ByteStore, name: str, data: bytes) -> None:
    file = store.create(name, len(data))
    try:
        file.write([memoryview(data)], 0)
        file.close()
    except BaseException:
        file.abort()
        raise


LARGE = bytes(range(256)) * 4096 * 12
"""12 MiB: three parts."""


# Faults that pass


@pytest.mark.parametrize("action", ["throttle", "fail", "reset", "lose reply"])
@pytest.mark.parametrize(
    "match",
    [["PUT", "partNumber=2"], ["POST", "uploads"], ["POST", "uploadId"]],
    ids=["a part", "the beginning", "the end"],
)
def test_a_multipart_upload_survives(
    s3: S3Server, store: ByteStore, medium: BucketMedium, action: str, match: list[str]
) -> None:
    s3.tell({"match": match, "action": action, "times": 2})
    write(store, "data", LARGE)
    assert sum(entry["fault"] == action for entry in s3.log()) in (1, 2)
    s3.tell()
    assert medium.read("data") == LARGE


@pytest.mark.parametrize("action", ["throttle", "fail", "reset", "lose reply"])
def test_all_other_requests_survive(
    s3: S3Server, store: ByteStore, medium: BucketMedium, action: str
) -> None:
    s3.tell({"match": [], "action": action, "times": 1})
    store.put("f", b"content")
    for call in (
        lambda: store.get("f"),
        lambda: store.size("f"),
        lambda: list(store.list()),
        lambda: store.read("f", [ReadRange(0, memoryview(bytearray(7)))]),
        lambda: store.delete(["f"]),
    ):
        s3.tell({"match": [], "action": action, "times": 1})
        call()
        assert s3.log()[0]["fault"] == action
    assert medium.names() == set()


@pytest.mark.parametrize("action", ["throttle", "reset"])
def test_of_many_ranges_only_those_that_failed_are_read_again(
    s3: S3Server, store: ByteStore, action: str
) -> None:
    write(store, "data", LARGE)
    s3.tell({"match": ["GET"], "action": action, "times": 1, "after": 1})
    memory = bytearray(len(LARGE))
    with open_fsspec_store(
        store.url, retries=AT_ONCE, request_bytes=3 << 20, **s3.options
    ) as reader:
        reader.read("data", [ReadRange(0, memoryview(memory))])
    assert bytes(memory) == LARGE
    assert len([entry for entry in s3.log() if entry["method"] == "GET"]) == 4 + 1


def test_a_whole_save_and_load_through_a_bad_network(s3: S3Server, bucket: str) -> None:
    s3.tell(
        {"match": ["PUT"], "action": "reset", "times": 1, "after": 1},
        {"match": ["manifest.json"], "action": "lose reply", "times": 2, "after": 1},
        {"match": ["GET", "list-type"], "action": "throttle", "times": 1},
    )
    options = {"retries": AT_ONCE, **s3.options}
    dcp.save(state(), storage_writer=FsspecWriter(f"s3://{bucket}/run", **options))
    s3.tell(*({"match": ["GET"], "action": "reset", "times": 1, "after": n} for n in (1, 4)))
    found = empty()
    dcp.load(found, storage_reader=FsspecReader(f"s3://{bucket}/run", **options))
    assert differences(found, state()) == []


def test_connections_that_break_are_made_again_over_sftp(sftp: SftpServer, tmp_path: Path) -> None:
    with open_fsspec_store(sftp.url(tmp_path / "run"), retries=AT_ONCE) as store:
        store.make_directory("")

        def cut() -> None:
            """As a server that is started again: every connection of this store is gone."""
            for fs in store._fs._free:
                fs.client.get_transport().sock.close()

        cut()
        write(store, "f", b"content")
        cut()
        store.put("g", b"content")
        cut()
        memory = bytearray(7)
        store.read("f", [ReadRange(0, memoryview(memory))])
        assert memory == b"content"
        cut()
        assert {file.name for file in store.list()} == {"f", "g"}
        cut()
        store.delete(["f", "g"])
    assert list((tmp_path / "run").iterdir()) == []


# Faults that stay


@pytest.mark.parametrize("action", ["throttle", "reset"])
def test_attempts_are_counted(s3: S3Server, store: ByteStore, action: str) -> None:
    s3.tell({"match": ["PUT"], "action": action, "times": 1000})
    with pytest.raises(StorageError) as caught:
        store.put("f", b"x")
    assert caught.value.kind == "io_error"
    assert caught.value.file == "f"
    # Where a connection breaks, aiohttp repeats a request once by itself.
    attempts = AT_ONCE.attempts * (2 if action == "reset" else 1)
    assert AT_ONCE.attempts <= len(s3.log()) <= attempts


def test_what_is_refused_is_not_tried_again(s3: S3Server, store: ByteStore) -> None:
    s3.tell({"match": [], "action": "deny", "times": 1000})
    for call in (
        lambda: store.put("f", b"x"),
        lambda: store.get("f"),
        lambda: list(store.list()),
        lambda: store.delete(["f"]),
        lambda: write(store, "f", b"x"),
    ):
        s3.tell({"match": [], "action": "deny", "times": 1000})
        with pytest.raises(StorageError) as caught:
            call()
        assert caught.value.kind == "permission_denied"
        assert "credentials" in str(caught.value)
        assert len({entry["method"] + entry["path"] for entry in s3.log()}) == len(s3.log())


def test_an_upload_that_fails_is_taken_back(
    s3: S3Server, store: ByteStore, medium: BucketMedium
) -> None:
    s3.tell({"match": ["PUT", "partNumber=3"], "action": "fail", "times": 1000})
    with pytest.raises(StorageError):
        write(store, "data", LARGE)
    s3.tell()
    assert medium.names() == set()
    assert medium.unfinished_uploads() == 0


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(
    s3: S3Server, bucket: str
) -> None:
    url, options = f"s3://{bucket}/run", {"retries": AT_ONCE, **s3.options}
    dcp.save(state(), storage_writer=FsspecWriter(url, **options))
    medium = BucketMedium(s3.client(), bucket, "run")
    before = medium.snapshot()
    s3.tell({"match": ["PUT", ".digests"], "action": "fail", "times": 1000})
    with pytest.raises(dcp.CheckpointException):
        dcp.save(state(2.0), storage_writer=FsspecWriter(url, **options))
    s3.tell()
    assert medium.snapshot() == before


# The commit


def commit(store: ByteStore, save_id: str, observed: str | None = None) -> None:
    directory = f"data-{save_id}"
    data = (
        f'{{"format":"dcp_engine","version":"1.0","save_id":"{save_id}","world_size":1,"rest":0}}\n'
    ).encode()
    commit_manifest(
        store,
        data,
        directory=directory,
        name="manifest.json",
        save_id=save_id,
        observed=observed,
    )


ONE, TWO = "1" * 32, "2" * 32


@pytest.mark.parametrize("times", [1, 2, 4], ids=["then right", "twice", "always"])
@pytest.mark.parametrize("observed", [None, TWO], ids=["first save", "overwrite"])
def test_a_lost_reply_to_the_manifest_is_recognised(
    s3: S3Server,
    store: ByteStore,
    medium: BucketMedium,
    times: int,
    observed: str | None,
) -> None:
    """The PUT came through, and its conditional repetition loses against it."""
    if observed is not None:
        commit(store, observed)
    s3.tell({"match": ["PUT", "manifest.json"], "action": "lose reply", "times": times})
    commit(store, ONE, observed)
    assert ONE.encode() in medium.read("manifest.json")


def test_a_manifest_that_never_arrived_is_in_doubt(
    s3: S3Server, store: ByteStore, medium: BucketMedium
) -> None:
    """Each attempt may still be on its way, so nobody says that there is no commit."""
    s3.tell({"match": ["PUT", "manifest.json"], "action": "reset", "times": 1000})
    with pytest.raises(ConflictError) as caught:
        commit(store, ONE)
    assert caught.value.kind == "commit_in_doubt"
    assert medium.names() == set()


def test_a_manifest_that_is_refused_is_no_commit(s3: S3Server, store: ByteStore) -> None:
    s3.tell({"match": ["PUT", "manifest.json"], "action": "deny", "times": 1000})
    with pytest.raises(StorageError) as caught:
        commit(store, ONE)
    assert caught.value.kind == "permission_denied"


def both_win(open_store: Callable[[], ByteStore], save: Callable[[ByteStore, str], None]) -> int:
    """How many of two savers, neither of whom saw the other, are told that they won."""
    barrier = threading.Barrier(2)
    won: list[str] = []
    lost: list[BaseException] = []

    def one(save_id: str) -> None:
        with open_store() as store:
            barrier.wait(30)
            try:
                save(store, save_id)
            except ConflictError as error:
                lost.append(error)
            else:
                won.append(save_id)

    threads = [threading.Thread(target=one, args=(each,)) for each in (ONE, TWO)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(won) + len(lost) == 2
    return len(won)


def test_of_two_savers_one_wins(
    s3: S3Server, sftp: SftpServer, bucket: str, tmp_path: Path
) -> None:
    for number in range(3):
        places: list[Callable[[], ByteStore]] = [
            lambda n=number: open_fsspec_store(f"s3://{bucket}/run{n}", **s3.options),
            lambda n=number: open_fsspec_store(f"memory://{bucket}/run{n}"),
            lambda n=number: open_fsspec_store(sftp.url(tmp_path / f"run{n}")),
        ]
        for open_store in places:
            with open_store() as store:
                store.make_directory("")
            assert both_win(open_store, commit) == 1


@pytest.mark.parametrize("client", ["s3fs", "obstore"])
def test_of_two_savers_who_replace_a_checkpoint_one_wins(
    s3: S3Server, bucket: str, client: str
) -> None:
    options = s3.options if client == "s3fs" else {"fs": s3.obstore()}
    for number in range(5):

        def open_store(number: int = number) -> ByteStore:
            return open_fsspec_store(f"s3://{bucket}/run{number}", **options)

        with open_store() as store:
            commit(store, "0" * 32)
        assert both_win(open_store, partial(commit, observed="0" * 32)) == 1


@pytest.mark.parametrize("observed", [None, TWO], ids=["first save", "overwrite"])
def test_a_store_that_takes_no_conditions(
    s3: S3Server, store: ByteStore, medium: BucketMedium, observed: str | None
) -> None:
    """Then the look before the PUT is all there is."""
    if observed is not None:
        commit(store, observed)
    s3.tell({"match": ["PUT", "manifest.json", "If-"], "action": "refuse", "times": 1000})
    commit(store, ONE, observed)
    assert [entry["fault"] for entry in s3.log() if entry["method"] == "PUT"] == ["refuse", None]
    assert ONE.encode() in medium.read("manifest.json")


def test_a_saver_who_looked_too_early_is_told(s3: S3Server, bucket: str) -> None:
    """Another save commits between the look and the PUT; the store itself refuses."""

    class Late(FsspecWriter):
        def commit_columns(self, *args: Any, **kwargs: Any) -> Any:
            s3.tell()
            dcp.save(state(), storage_writer=FsspecWriter(url, **s3.options), no_dist=True)
            return super().commit_columns(*args, **kwargs)

    url = f"s3://{bucket}/run"
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save(state(2.0), storage_writer=Late(url, **s3.options))
    assert caught.value.kind == "conflict"
    found = empty()
    dcp.load(found, storage_reader=FsspecReader(url, **s3.options))
    assert differences(found, state()) == []


# Death

_SAVER = """
import sys
import dcp_engine as dcp
from tests.storage_backends.fsspec.states import state
print("saving", flush=True)
dcp.save(state(2.0, 4_000_000), checkpoint_id=sys.argv[1])
"""


def test_a_saver_that_is_killed_in_an_upload(s3: S3Server, bucket: str) -> None:
    """The old checkpoint stays readable; the next save is not in its way, prune cleans up."""
    url = s3.url(f"{bucket}/run", part_bytes=PART)
    dcp.save(state(), checkpoint_id=url)
    s3.tell({"match": ["POST", "uploadId"], "action": "hang", "times": 1000})
    with subprocess.Popen(
        [sys.executable, "-c", _SAVER, url],
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parents[3],
    ) as saver:
        s3.wait_for("hang")
        saver.kill()
    s3.tell()
    medium = BucketMedium(s3.client(), bucket, "run")
    assert medium.unfinished_uploads() == 1
    found = empty()
    dcp.load(found, checkpoint_id=url)
    assert differences(found, state()) == []
    # On this host it is known that the saver is dead.
    dcp.save(state(3.0), checkpoint_id=url)
    found = empty()
    dcp.load(found, checkpoint_id=url)
    assert differences(found, state(3.0)) == []
    assert len({name.partition("/")[0] for name in medium.names()}) == 2
