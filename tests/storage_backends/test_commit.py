"""Commit, conflict, clean-up: what is there after every way in which a save can end."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcp_engine.errors import (
    CheckpointError,
    ConflictError,
    InvalidPlanError,
    NotFoundError,
    StorageError,
    UsageError,
)
from dcp_engine.format.names import OwnerRecord, decode_owner
from dcp_engine.native_storage import RankReport
from dcp_engine.storage import ByteStore
from storage_backends import garbage
from storage_backends.filesystem import FileSystemReader, FileSystemWriter
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.memory import MemoryStore
from storage_backends.os_errors import storage_error
from storage_backends.prune import prune
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.faulty import Fail, Fault, FaultyByteStore, LoseReply, ShortWrite
from storage_backends.testing.recording import RecordingByteStore
from storage_backends.testing.wrapping import WrappingByteStore
from tests.storage_backends.conftest import ObjectStoreLike, OpenStore
from tests.storage_backends.hand_plans import (
    IDENTITY,
    HandPlan,
    Shard,
    load_columns,
    load_whole,
    no_check,
    save,
    ticket,
    whole,
    write,
)

A, B, C = "a" * 32, "b" * 32, "c" * 32
OLD = {"w": torch.full((1000,), 1.0)}
NEW = {"w": torch.full((1000,), 2.0)}


def writer_on(store: ByteStore, **options: bool) -> ShardedWriter:
    return ShardedWriter(lambda _: store, "here", **options)


def value(store: ByteStore) -> float:
    """The one number that the checkpoint at ``store`` consists of; fails if it is a mixture."""
    found = load_whole(ShardedReader(lambda _: store, "here"), OLD)["w"].unique()
    assert len(found) == 1
    return float(found[0])


def names(store: ByteStore) -> set[str]:
    return {file.name for file in store.list()}


def two_ranks() -> HandPlan:
    return HandPlan(
        shapes={"w": (8,)},
        shards=[Shard("w", (0,), torch.ones(4), 0), Shard("w", (4,), torch.ones(4), 1)],
        objects={"o": (1, b"o" * 9000)},
        world_size=2,
    )


def test_overwrite_in_place(open_store: OpenStore) -> None:
    save([writer_on(open_store())], whole(OLD), A)
    save([writer_on(open_store())], whole(NEW), B)
    assert value(open_store()) == 2.0
    assert not any(name.startswith(f"data-{A}") for name in names(open_store()))


def test_keep_replaced(open_store: OpenStore) -> None:
    save([writer_on(open_store())], whole(OLD), A)
    save([writer_on(open_store())], whole(NEW), B, keep_replaced=True)
    assert any(name.startswith(f"data-{A}/") for name in names(open_store()))
    assert value(open_store()) == 2.0


def test_a_reader_in_the_middle_of_a_load_is_told(tmp_path: Path) -> None:
    save([FileSystemWriter(tmp_path)], whole(OLD), A)
    opened = FileSystemReader(tmp_path)
    manifest, _ = opened.open_checkpoint(None)
    manifest.tensors["w"].chunks  # noqa: B018 - decoded before it is replaced
    save([FileSystemWriter(tmp_path)], whole(NEW), B)
    columns = load_columns(manifest, [("w", (0,), torch.zeros(1000))])
    with pytest.raises(ConflictError) as caught:
        opened.read_columns(manifest, columns, [torch.zeros(1000)], no_check)
    assert caught.value.kind == "superseded"
    opened.close_checkpoint()


def test_a_stale_handle_is_a_replaced_checkpoint(tmp_path: Path) -> None:
    inner = FileSystemStore(tmp_path)
    save([writer_on(inner)], whole(OLD), A)
    stale = storage_error(OSError(errno.ESTALE, "stale"), "read", checkpoint="", file="")
    store = FaultyByteStore(inner, [Fault(operation="read", name="*tensors", action=Fail(stale))])
    opened = ShardedReader(lambda _: store, "x")
    manifest, _ = opened.open_checkpoint(None)
    columns = load_columns(manifest, [("w", (0,), torch.zeros(1000))])
    with pytest.raises(StorageError):
        opened.read_columns(manifest, columns, [torch.zeros(1000)], no_check)
    save([writer_on(inner)], whole(NEW), B, keep_replaced=True)
    store.add(Fault(operation="read", name="*tensors", action=Fail(stale)))
    with pytest.raises(ConflictError) as caught:
        opened.read_columns(manifest, columns, [torch.zeros(1000)], no_check)
    assert caught.value.kind == "superseded"
    opened.close_checkpoint()


def test_two_saves_to_one_place_conflict(open_store: OpenStore) -> None:
    store = open_store()
    save([writer_on(store)], whole(OLD), A)
    slow = writer_on(store)
    observed = slow.observe(None)
    assert observed == A
    slow.begin_save(None, ticket(B))
    report = write(slow, whole(OLD), 0)
    save([writer_on(store)], whole(NEW), C)
    with pytest.raises(ConflictError) as caught:
        slow.commit_columns(whole(OLD).global_plan(), [report], observed)  # type: ignore[list-item]
    assert caught.value.kind == "conflict"
    slow.abort_save()
    assert value(store) == 2.0
    assert not any(name.startswith(f"data-{B}") for name in names(store))


def test_an_abort_leaves_the_old_checkpoint_and_nothing_else(open_store: OpenStore) -> None:
    store = open_store()
    save([writer_on(store)], whole(OLD), A)
    before = names(store)
    writers = [writer_on(store), writer_on(store)]
    plan = two_ranks()
    for rank, writer in enumerate(writers):
        writer.begin_save(None, ticket(B, rank, 2, extra_files={"deep/x": b"x"}))
        write(writer, plan, rank)
    for writer in writers:
        writer.abort_save()
    assert names(store) == before
    assert value(store) == 1.0


def test_a_first_save_that_fails_leaves_an_empty_place(tmp_path: Path) -> None:
    writers = [FileSystemWriter(tmp_path / "c") for _ in range(2)]
    plan = two_ranks()
    for rank, writer in enumerate(writers):
        writer.begin_save(None, ticket(B, rank, 2))
    write(writers[1], plan, 1)
    for writer in reversed(writers):
        writer.abort_save()
    assert list((tmp_path / "c").iterdir()) == []


def test_a_late_rank_does_not_bring_a_removed_directory_back(tmp_path: Path) -> None:
    writers = [FileSystemWriter(tmp_path) for _ in range(2)]
    for rank, writer in enumerate(writers):
        writer.begin_save(None, ticket(B, rank, 2))
    writers[0].abort_save()
    with pytest.raises(ConflictError, match="removed"):
        write(writers[1], two_ranks(), 1)
    writers[1].abort_save()
    assert list(tmp_path.iterdir()) == []


class _Meanwhile(WrappingByteStore):
    """Something happens right before a file is put."""

    happening: Callable[[], None] | None = None

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        happening, self.happening = self.happening, None
        if happening is not None:
            happening()
        super().put(name, data, if_absent=if_absent)


def test_two_ranks_that_give_up_at_once_are_both_through(tmp_path: Path) -> None:
    """The last one removes the directory while the other is about to mark it."""
    store = _Meanwhile(FileSystemStore(tmp_path))
    writers = [writer_on(store), FileSystemWriter(tmp_path)]
    plan = two_ranks()
    for rank, writer in enumerate(writers):
        writer.begin_save(None, ticket(B, rank, 2))
        write(writer, plan, rank)
    store.happening = writers[1].abort_save
    writers[0].abort_save()
    assert store.happening is None
    assert list(tmp_path.iterdir()) == []


def test_what_a_hung_rank_leaves_is_marked_and_removed_by_the_next_save(tmp_path: Path) -> None:
    identity = replace(IDENTITY, pid=os.getpid())  # lives, so only the mark proves anything
    plan = two_ranks()
    writers = [FileSystemWriter(tmp_path) for _ in range(2)]
    for rank, writer in enumerate(writers):
        writer.begin_save(None, ticket(B, rank, 2, identity=identity))
        write(writer, plan, rank)
    writers[0].abort_save()  # rank 1 hangs
    assert (tmp_path / f"data-{B}" / "rank00001-00.safetensors").exists()
    save([FileSystemWriter(tmp_path)], whole(NEW), C, identity=identity)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"data-{C}", "manifest.json"]


@pytest.mark.parametrize("operation", ["create", "write", "sync", "close", "make_directory"])
def test_a_failing_medium_leaves_the_old_checkpoint(tmp_path: Path, operation: str) -> None:
    inner = FileSystemStore(tmp_path)
    save([writer_on(inner)], whole(OLD), A)
    before = names(inner)
    error = storage_error(
        OSError(errno.EIO, "broken"), "try", checkpoint=inner.url, file="some file"
    )
    for nth in range(1, 4):
        store = FaultyByteStore(
            inner, [Fault(operation=operation, action=Fail(error), nth=nth, times=1)]
        )
        writer = writer_on(store)
        try:
            save([writer], whole(NEW), B)
        except StorageError as caught:
            assert caught.kind == "io_error"
            assert caught.errno == errno.EIO
            writer.abort_save()
            assert store.fired
            assert names(inner) == before
            assert value(inner) == 1.0
        else:
            assert not store.fired  # there are not that many such calls
            break


@pytest.mark.parametrize("capacity", [0, 100, 4000, 5000, 8200, 8400])
def test_disk_full_at_any_byte(tmp_path: Path, capacity: int) -> None:
    inner = FileSystemStore(tmp_path)
    save([writer_on(inner)], whole(OLD), A)
    before = names(inner)
    writer = writer_on(FaultyByteStore(inner, capacity=capacity))
    with pytest.raises(StorageError) as caught:
        save([writer], whole(NEW), B)
    assert caught.value.kind == "disk_full"
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.file is not None
    writer.abort_save()
    assert names(inner) == before
    assert value(inner) == 1.0


def test_a_medium_that_lies_about_a_write_is_found_out(tmp_path: Path) -> None:
    inner = FileSystemStore(tmp_path)
    store = FaultyByteStore(
        inner, [Fault(operation="write", name="*.safetensors", nth=2, action=ShortWrite(10))]
    )
    writer = writer_on(store)
    with pytest.raises(InvalidPlanError) as caught:
        save([writer], whole(NEW), B)
    assert caught.value.kind == "results_mismatch"
    assert caught.value.file == f"data-{B}/rank00000-00.safetensors"
    writer.abort_save()
    assert list(tmp_path.iterdir()) == []


def broken(kind: str = "io_error") -> StorageError:
    return StorageError("broken", kind=kind)


def test_a_rename_whose_reply_is_lost_is_a_commit(tmp_path: Path) -> None:
    inner = FileSystemStore(tmp_path)
    save([writer_on(inner)], whole(OLD), A)
    store = FaultyByteStore(inner, [Fault(operation="replace", action=LoseReply(broken()))])
    save([writer_on(store)], whole(NEW), B)
    assert value(inner) == 2.0


def test_a_rename_that_fails_is_no_commit(tmp_path: Path) -> None:
    inner = FileSystemStore(tmp_path)
    save([writer_on(inner)], whole(OLD), A)
    before = names(inner)
    store = FaultyByteStore(inner, [Fault(operation="replace", action=Fail(broken()))])
    writer = writer_on(store)
    with pytest.raises(StorageError) as caught:
        save([writer], whole(NEW), B)
    assert caught.value.kind == "io_error"
    writer.abort_save()
    assert names(inner) == before


def test_a_directory_sync_that_fails_after_the_rename_is_a_doubt(tmp_path: Path) -> None:
    inner = FileSystemStore(tmp_path)
    store = FaultyByteStore(
        inner, [Fault(operation="sync_directory", name="", action=Fail(broken()))]
    )
    with pytest.raises(ConflictError) as caught:
        save([writer_on(store)], whole(NEW), B)
    assert caught.value.kind == "commit_in_doubt"
    assert value(inner) == 2.0


def test_an_unknown_state_after_a_failed_rename_is_a_doubt(tmp_path: Path) -> None:
    inner = FileSystemStore(tmp_path)
    faults = [
        Fault(operation="replace", action=LoseReply(broken())),
        Fault(operation="size", name="manifest.json", nth=3, times=None, action=Fail(broken())),
    ]
    with pytest.raises(ConflictError) as caught:
        save([writer_on(FaultyByteStore(inner, faults))], whole(NEW), B)
    assert caught.value.kind == "commit_in_doubt"


def object_store() -> ByteStore:
    return ObjectStoreLike(MemoryStore())


def test_a_put_whose_reply_is_lost_is_a_commit() -> None:
    inner = object_store()
    fault = Fault(operation="put", name="manifest.json", action=LoseReply(broken()))
    save([writer_on(FaultyByteStore(inner, [fault]))], whole(NEW), B)
    assert value(inner) == 2.0


def test_a_retried_put_that_loses_against_itself_is_a_commit() -> None:
    inner = object_store()
    taken = FileExistsError(errno.EEXIST, "exists")
    fault = Fault(operation="put", name="manifest.json", action=LoseReply(taken))
    save([writer_on(FaultyByteStore(inner, [fault]))], whole(NEW), B)
    assert value(inner) == 2.0


def test_a_refused_put_is_no_commit_and_a_broken_one_a_doubt() -> None:
    for kind, expected in (
        ("permission_denied", "permission_denied"),
        ("io_error", "commit_in_doubt"),
    ):
        inner = object_store()
        fault = Fault(operation="put", name="manifest.json", action=Fail(broken(kind)))
        with pytest.raises(CheckpointError) as caught:
            save([writer_on(FaultyByteStore(inner, [fault]))], whole(NEW), B)
        assert caught.value.kind == expected


def test_of_two_first_saves_on_an_object_store_one_wins() -> None:
    inner = object_store()
    slow = writer_on(inner)
    observed = slow.observe(None)
    slow.begin_save(None, ticket(B))
    report = write(slow, whole(OLD), 0)

    class Stale(type(inner)):  # type: ignore[misc]
        """Says that nothing is there: a listing that is late."""

        def size(self, name: str) -> int:
            if name == "manifest.json" and not self.tried:
                raise FileNotFoundError(errno.ENOENT, "stale", name)
            return int(super().size(name))

        def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
            self.tried = True
            super().put(name, data, if_absent=if_absent)

    save([writer_on(inner)], whole(NEW), C)
    stale = Stale(inner.inner)  # type: ignore[attr-defined]
    stale.tried = False
    slow._current().store = stale
    with pytest.raises(ConflictError) as caught:
        slow.commit_columns(whole(OLD).global_plan(), [report], observed)  # type: ignore[list-item]
    assert caught.value.kind == "conflict"
    assert value(inner) == 2.0


def test_the_manifest_is_durable_before_it_takes_its_name(tmp_path: Path) -> None:
    store = RecordingByteStore(FileSystemStore(tmp_path))
    save([writer_on(store)], whole(NEW), B, extra_files={"x": b"1"})
    order = [
        (call.operation, call.name)
        for call in store.calls
        if call.operation in ("make_directory", "sync", "sync_directory", "replace", "put")
    ]
    data = f"data-{B}"
    assert order == [
        ("make_directory", data),
        ("make_directory", f"{data}/extra"),
        ("put", f"{data}/owner.json"),
        ("sync", f"{data}/rank00000-00.safetensors"),
        ("sync", f"{data}/rank00000.digests"),
        ("sync", f"{data}/extra/x"),
        ("sync_directory", f"{data}/extra"),
        ("sync_directory", data),
        ("sync", f"{data}/manifest.json.tmp"),
        ("replace", "manifest.json"),
        ("sync_directory", ""),
    ]


def test_overwrite_false(open_store: OpenStore) -> None:
    save([writer_on(open_store(), overwrite=False)], whole(OLD), A)
    with pytest.raises(UsageError):
        writer_on(open_store(), overwrite=False).observe(None)
    with pytest.raises(UsageError):
        writer_on(open_store(), overwrite=False).begin_save(None, ticket(B))
    assert value(open_store()) == 1.0


def test_a_damaged_checkpoint_can_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\0" * 300)
    assert str(FileSystemWriter(tmp_path).observe(None)).startswith("unreadable:")
    save([FileSystemWriter(tmp_path)], whole(NEW), B)
    assert value(FileSystemStore(tmp_path)) == 2.0


# What the ranks report


@pytest.mark.parametrize(
    "change",
    [
        {"chunks": 7},
        {"files": []},
        {"digests_size": 0},
        {"objects": []},
        {"rank": 0},
    ],
)
def test_reports_that_differ_from_the_plan_stop_the_commit(
    tmp_path: Path, change: dict[str, object]
) -> None:
    plan = two_ranks()
    writers = [FileSystemWriter(tmp_path) for _ in range(2)]
    reports: list[RankReport] = []
    for rank, writer in enumerate(writers):
        writer.begin_save(None, ticket(B, rank, 2))
        reports.append(write(writer, plan, rank))  # type: ignore[arg-type]
    fields = {name: getattr(reports[1], name) for name in RankReport.__struct_fields__}
    reports[1] = RankReport(**{**fields, **change})
    with pytest.raises(InvalidPlanError) as caught:
        writers[0].commit_columns(plan.global_plan(), reports, None)
    assert caught.value.kind == "results_mismatch"
    assert caught.value.checkpoint == str(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_file_of_another_size_stops_the_commit(tmp_path: Path) -> None:
    plan = whole(OLD)
    writer = FileSystemWriter(tmp_path)
    writer.begin_save(None, ticket(B))
    report: RankReport = write(writer, plan, 0)  # type: ignore[assignment]
    file = report.files[0]
    fields = {name: getattr(report, name) for name in RankReport.__struct_fields__}
    short = type(file)(file.number, file.data_start, file.size - 1)
    with pytest.raises(InvalidPlanError, match="bytes, planned are"):
        writer.commit_columns(
            plan.global_plan(), [RankReport(**{**fields, "files": [short]})], None
        )


# Orphans


def owner(**changes: object) -> OwnerRecord:
    raw = decode_owner(garbage.owner_record(IDENTITY))
    fields = {name: getattr(raw, name) for name in OwnerRecord.__struct_fields__}
    return OwnerRecord(**{**fields, **changes})


def test_who_is_proved_dead() -> None:
    gone = 2**22 + 1  # above the largest process number
    me = os.getpid()
    assert garbage.is_proved_dead(owner(restart_count=0, host="elsewhere", pid=me), IDENTITY)
    assert garbage.is_proved_dead(owner(pid=gone), IDENTITY)
    assert garbage.is_proved_dead(owner(pid=garbage.GIVEN_UP, host="elsewhere"), IDENTITY)
    assert not garbage.is_proved_dead(owner(pid=me), IDENTITY)
    assert not garbage.is_proved_dead(owner(restart_count=2, host="elsewhere"), IDENTITY)
    assert not garbage.is_proved_dead(owner(pid=gone, host="elsewhere"), IDENTITY)
    assert not garbage.is_proved_dead(owner(pid=gone, boot_id="another boot"), IDENTITY)
    nameless = replace(IDENTITY, run_id="", boot_id="")
    empty = decode_owner(garbage.owner_record(replace(nameless, restart_count=0, pid=gone)))
    assert not garbage.is_proved_dead(empty, nameless)


def test_a_save_removes_orphans_of_the_dead_and_only_those(tmp_path: Path) -> None:
    dead, alive, unknown = "d" * 32, "e" * 32, "f" * 32
    save([FileSystemWriter(tmp_path)], whole(OLD), A)
    for save_id, pid in ((dead, 2**22 + 1), (alive, os.getpid())):
        writer = FileSystemWriter(tmp_path)
        writer.begin_save(None, ticket(save_id, identity=replace(IDENTITY, pid=pid)))
        write(writer, whole(OLD), 0)
    (tmp_path / f"data-{unknown}").mkdir()
    (tmp_path / f"data-{unknown}" / "file").write_bytes(b"")
    for other in ("data-short", f"data-{'D' * 32}", "notes"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "file").write_bytes(b"")
    save([FileSystemWriter(tmp_path)], whole(NEW), B)
    assert {p.name for p in tmp_path.iterdir()} == {
        "manifest.json",
        f"data-{B}",
        f"data-{alive}",
        f"data-{unknown}",
        "data-short",
        f"data-{'D' * 32}",
        "notes",
    }


def test_failing_to_remove_the_old_data_is_no_failed_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = FileSystemStore(tmp_path)
    save([writer_on(inner)], whole(OLD), A)
    store = FaultyByteStore(inner, [Fault(operation="delete", action=Fail(broken()), times=None)])
    save([writer_on(store)], whole(NEW), B)
    assert value(inner) == 2.0
    assert "could not remove old data" in caplog.text


# Without collectives


def save_alone(open_store: OpenStore, rank: int, save_id: str, fill: float = 1.0) -> None:
    """One rank of two, without a word to the other."""
    shard = Shard("w", (500 * rank,), torch.full((500,), fill), rank)
    plan = HandPlan(shapes={"w": (1000,)}, shards=[shard], world_size=2)
    writer = writer_on(open_store())
    writer.begin_save(None, ticket(save_id, rank, 2, use_collectives=False))
    report = write(writer, plan, rank)
    writer.commit_columns(plan.global_plan(), [report], None)  # type: ignore[list-item]
    writer.end_save()


def test_a_set_of_manifests_is_one_checkpoint(open_store: OpenStore) -> None:
    save_alone(open_store, 1, A, 5.0)
    with pytest.raises(NotFoundError) as caught:
        value(open_store())
    assert caught.value.kind == "incomplete"
    assert "0" in caught.value.message
    save_alone(open_store, 0, A, 5.0)
    assert value(open_store()) == 5.0
    assert writer_on(open_store()).observe(None) == A


def test_a_second_token_into_a_complete_set_is_refused(open_store: OpenStore) -> None:
    for rank in (0, 1):
        save_alone(open_store, rank, A)
    with pytest.raises(ConflictError):
        save_alone(open_store, 0, B)
    assert value(open_store()) == 1.0


def test_a_second_token_may_replace_an_incomplete_set(open_store: OpenStore) -> None:
    save_alone(open_store, 0, A)
    save_alone(open_store, 0, B, 7.0)
    save_alone(open_store, 1, B, 7.0)
    assert value(open_store()) == 7.0


def test_without_collectives_a_checkpoint_is_not_replaced(open_store: OpenStore) -> None:
    save([writer_on(open_store())], whole(OLD), A)
    with pytest.raises(ConflictError):
        save_alone(open_store, 0, B)


def test_a_save_with_collectives_replaces_a_set(open_store: OpenStore) -> None:
    for rank in (0, 1):
        save_alone(open_store, rank, A)
    save([writer_on(open_store())], whole(NEW), B)
    assert value(open_store()) == 2.0
    assert {name.partition("/")[0] for name in names(open_store())} == {
        "manifest.json",
        f"data-{B}",
    }


def test_a_save_with_collectives_hides_no_manifest_of_an_incomplete_set(
    open_store: OpenStore,
) -> None:
    """It would keep the data it names from ever being pruned."""
    save_alone(open_store, 0, A)
    save([writer_on(open_store())], whole(NEW), B)
    assert [name for name in names(open_store()) if "/" not in name] == ["manifest.json"]
    prune(open_store(), older_than=-1)
    assert {name.partition("/")[0] for name in names(open_store())} == {
        "manifest.json",
        f"data-{B}",
    }


# The medium itself


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir(mode=0o500)
    with pytest.raises(StorageError) as caught:
        FileSystemWriter(tmp_path / "c").begin_save(None, ticket(A))
    assert caught.value.kind == "permission_denied"


def test_a_directory_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "refused")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StorageError) as caught:
        FileSystemWriter(tmp_path / "c").begin_save(None, ticket(A))
    assert caught.value.kind == "permission_denied"
    assert caught.value.checkpoint == str(tmp_path / "c")
