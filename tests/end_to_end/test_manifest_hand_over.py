"""Ranks that do not see the manifest which the coordinator reads: they wait a little, then get it.

A network file system may show a rank an older state of the medium for a while. Ranks are threads
here, each with a view of its own of one directory.
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.coordination.interface import Deadlines
from dcp_engine.coordination.simulated import results_of, run_simulated, simulated_identity
from dcp_engine.coordination.single import SingleSession
from dcp_engine.coordination.store import StoreSession
from dcp_engine.errors import CheckpointError
from dcp_engine.format.manifest import Manifest
from dcp_engine.loader import LoadOptions, LoadReport, agreed_manifest
from dcp_engine.loader import load as load_on_session
from dcp_engine.native_storage import CommitRecord
from dcp_engine.saver import PlanMemory, SaveOptions
from dcp_engine.saver import save as save_on_session
from dcp_engine.state.adapters import GroupRanks
from dcp_engine.storage import ReadRange
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.testing.wrapping import WrappingByteStore
from tests.coordination.cases import PATIENT
from tests.end_to_end.checkpoints import empty, save, state

MANIFEST = "manifest.json"


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreed_manifest, "PATIENCE_S", 0.1)
    monkeypatch.setattr(agreed_manifest, "LONG_PATIENCE_S", 0.1)


class StaleView(WrappingByteStore):
    """Shows ``before`` (a copy of the manifest as it was, or None: no manifest) for the first
    ``looks`` looks at the manifest."""

    def __init__(self, root: Path, before: bytes | None, looks: int = 1 << 30) -> None:
        super().__init__(FileSystemStore(root))
        self._before = before
        self._left = looks
        self._open = False

    def size(self, name: str) -> int:
        if name == MANIFEST:
            self._open = self._left > 0
            self._left -= 1
            if self._open:
                if self._before is None:
                    raise FileNotFoundError(errno.ENOENT, "stale", name)
                return len(self._before)
        return super().size(name)

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        if name == MANIFEST and self._open and self._before is not None:
            for item in ranges:
                end = item.offset + item.buffer.nbytes
                item.buffer[:] = self._before[item.offset : end]
            return
        super().read(name, ranges)


class CountingReader(ShardedReader):
    """Counts what was handed over and adopted."""

    def __init__(self, store: dcp.ByteStore) -> None:
        super().__init__(lambda _: store, "checkpoint")
        self.handed = 0
        self.adopted = 0

    def manifest_bytes(self, record: CommitRecord) -> bytes:
        self.handed += 1
        return super().manifest_bytes(record)

    def adopt_manifest(self, checkpoint_id: Any, data: bytes, record: CommitRecord) -> Manifest:
        self.adopted += 1
        return super().adopt_manifest(checkpoint_id, data, record)


class Planner(dcp.DefaultLoadPlanner):
    """Overrides something, so that DCP's life cycle runs."""

    def create_local_plan(self) -> dcp.LoadPlan:
        return super().create_local_plan()


def load_on_ranks(
    readers: Sequence[ShardedReader], coordinator: int = 0, *, items: bool = False
) -> list[tuple[LoadReport, float] | BaseException]:
    """Load ``state`` on as many ranks as there are readers; by rank the report and the value."""
    world_size = len(readers)

    def rank(session: StoreSession) -> tuple[LoadReport, float]:
        into = empty()
        report = load_on_session(
            session,
            into,
            checkpoint_id=None,
            reader=readers[session.rank],
            planner=Planner() if items else None,
            group=GroupRanks(ranks=tuple(range(world_size)), rank=session.rank),
            options=LoadOptions(deadlines=Deadlines(timeout=60.0), coordinator_rank=coordinator),
        )
        for name, tensor in state(into["step"])["model"].items():
            assert torch.equal(into["model"][name], tensor), name
        assert float(into["large"].min()) == float(into["large"].max()) == into["step"]
        return report, float(into["step"])

    return run_simulated(world_size, rank, rhythm=PATIENT)


@pytest.fixture
def replaced(tmp_path: Path) -> tuple[Path, bytes]:
    """A checkpoint of value 2.0, and the manifest of the one of value 1.0 that it replaced."""
    root = tmp_path / "c"
    save(root, state(1.0))
    before = (root / MANIFEST).read_bytes()
    save(root, state(2.0))
    return root, before


class CountingStore(WrappingByteStore):
    """Counts how often the manifest was read."""

    def __init__(self, root: Path) -> None:
        super().__init__(FileSystemStore(root))
        self.manifests = 0

    def get(self, name: str, *, limit: int | None = None) -> bytes:
        self.manifests += name == MANIFEST
        return super().get(name, limit=limit)


def test_ranks_that_see_the_same_manifest_read_it_once(replaced: tuple[Path, bytes]) -> None:
    stores = [CountingStore(replaced[0]) for _ in range(3)]
    results_of(load_on_ranks([CountingReader(store) for store in stores]))
    assert [store.manifests for store in stores] == [1, 1, 1]


@pytest.mark.parametrize("coordinator", [0, 2])
@pytest.mark.parametrize("sees", ["the one before", "none"])
def test_a_rank_with_a_stale_view_gets_the_manifest(
    replaced: tuple[Path, bytes], sees: str, coordinator: int
) -> None:
    root, before = replaced
    stale = StaleView(root, before if sees == "the one before" else None)
    readers = [CountingReader(FileSystemStore(root)) for _ in range(3)]
    readers[1] = CountingReader(stale)
    results = results_of(load_on_ranks(readers, coordinator))
    assert [value for _, value in results] == [2.0] * 3
    assert len({report.save_id for report, _ in results}) == 1
    assert [reader.adopted for reader in readers] == [0, 1, 0]
    assert sum(reader.handed for reader in readers) == readers[coordinator].handed == 1


def test_many_ranks_get_one_copy(
    replaced: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, before = replaced
    size = (root / MANIFEST).stat().st_size
    monkeypatch.setattr(agreed_manifest, "HAND_OVER_BYTES", size)
    readers = [CountingReader(FileSystemStore(root))]
    readers += [CountingReader(StaleView(root, before)) for _ in range(3)]
    assert [value for _, value in results_of(load_on_ranks(readers))] == [2.0] * 4
    assert [reader.adopted for reader in readers] == [0, 1, 1, 1]
    assert readers[0].handed == 1


def test_what_comes_into_sight_in_time_is_not_handed_over(replaced: tuple[Path, bytes]) -> None:
    root, before = replaced
    readers = [CountingReader(FileSystemStore(root))]
    readers += [CountingReader(StaleView(root, before, looks=2))]
    assert [value for _, value in results_of(load_on_ranks(readers))] == [2.0] * 2
    assert [reader.handed + reader.adopted for reader in readers] == [0, 0]


def test_too_large_a_manifest_is_refused_by_rank(
    replaced: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = replaced
    monkeypatch.setattr(agreed_manifest, "HAND_OVER_BYTES", 100)
    readers = [CountingReader(FileSystemStore(root)) for _ in range(4)]
    for rank in (1, 3):
        readers[rank] = CountingReader(StaleView(root, None))
    for outcome in load_on_ranks(readers):
        assert isinstance(outcome, dcp.CheckpointException)
        cause = next(iter(outcome.failures.values()))[0]
        assert isinstance(cause, dcp.StorageError)
        assert (cause.kind, cause.file, cause.checkpoint) == ("io_error", MANIFEST, str(root))
        assert "ranks [1, 3] see another manifest" in str(outcome)
        assert "not_committed" in str(outcome)
        assert "mount the same storage" in str(outcome)


def test_a_manifest_that_was_replaced_meanwhile_makes_all_start_over(tmp_path: Path) -> None:
    """The rank that sees another manifest is right: it is the newer one."""
    root = tmp_path / "c"
    save(root, state(1.0))
    looked = threading.Event()

    class Overwriting(WrappingByteStore):
        def size(self, name: str) -> int:
            if name == MANIFEST and not looked.is_set():
                looked.set()
                save(root, state(2.0))
            return super().size(name)

    readers = [
        CountingReader(FileSystemStore(root)),
        CountingReader(Overwriting(FileSystemStore(root))),
    ]
    results = results_of(load_on_ranks(readers))
    assert [value for _, value in results] == [2.0] * 2
    assert [reader.adopted for reader in readers] == [0, 0]
    assert readers[0].handed == 1


def test_a_rank_without_the_storage_is_told_so(
    replaced: tuple[Path, bytes], tmp_path: Path
) -> None:
    root, _ = replaced
    readers = [CountingReader(FileSystemStore(root))]
    readers += [CountingReader(FileSystemStore(tmp_path / "elsewhere"))]
    for outcome in load_on_ranks(readers):
        assert isinstance(outcome, dcp.CheckpointException)
        assert list(outcome.failures) == [1]
        cause = outcome.failures[1][0]
        assert isinstance(cause, dcp.NotFoundError)
        assert (cause.rank, cause.checkpoint) == (1, str(tmp_path / "elsewhere"))
        assert "all hosts mount the same storage" in str(outcome)


def test_what_is_no_stale_view_is_not_waited_for(replaced: tuple[Path, bytes]) -> None:
    root, _ = replaced

    class Refusing(WrappingByteStore):
        looks = 0

        def size(self, name: str) -> int:
            if name == MANIFEST:
                self.looks += 1
                raise PermissionError(errno.EACCES, "refused")
            return super().size(name)

    refusing = Refusing(FileSystemStore(root))
    readers = [CountingReader(FileSystemStore(root)), CountingReader(refusing)]
    for outcome in load_on_ranks(readers):
        assert isinstance(outcome, dcp.CheckpointException)
        assert (list(outcome.failures), outcome.kind) == ([1], "permission_denied")
    assert refusing.looks == 1


def save_collective_free(root: Path, value: float, token: str, ranks: Sequence[int]) -> None:
    """As two ranks would, without a word between them: each saves values of its own."""
    for rank in ranks:
        session = SingleSession(simulated_identity())
        save_on_session(
            session,
            {**state(value), "own": dcp.PerRank(rank)},
            checkpoint_id=None,
            writer=dcp.FileSystemWriter(root),
            planner=None,
            group=GroupRanks(ranks=(0, 1), rank=rank),
            world_size=2,
            options=SaveOptions(use_collectives=False, save_id=token),
            memory=PlanMemory(),
        )


def test_the_manifests_of_a_collective_free_save_are_handed_over_together(tmp_path: Path) -> None:
    root = tmp_path / "c"
    save_collective_free(root, 3.0, "a" * 32, [0, 1])

    class Blind(WrappingByteStore):
        """Does not list the second rank's manifest yet."""

        def list(self, prefix: str = "") -> Any:
            return [f for f in super().list(prefix) if f.name != "manifest-rank00001.json"]

    readers = [
        CountingReader(FileSystemStore(root)),
        CountingReader(Blind(FileSystemStore(root))),
    ]
    results = results_of(load_on_ranks(readers))
    assert [value for _, value in results] == [3.0] * 2
    assert [reader.adopted for reader in readers] == [0, 1]


@pytest.mark.parametrize("how", ["another manifest", "a changed byte", "one byte less", "nothing"])
def test_only_what_was_announced_is_adopted(replaced: tuple[Path, bytes], how: str) -> None:
    root, before = replaced
    reader = dcp.FileSystemReader(root)
    _, record = reader.open_checkpoint(None)
    data = reader.manifest_bytes(record)
    assert data == (root / MANIFEST).read_bytes()
    changed = bytearray(data)
    changed[100] ^= 1
    wrong = {
        "another manifest": before,
        "a changed byte": bytes(changed),
        "one byte less": data[:-1],
        "nothing": b"",
    }[how]
    with pytest.raises(dcp.DamagedCheckpointError) as caught:
        reader.adopt_manifest(None, wrong, record)
    assert (caught.value.kind, caught.value.file) == ("digest_mismatch", MANIFEST)
    assert reader.adopt_manifest(None, data, record).save_id == record.save_id
    reader.close_checkpoint()


def test_manifest_bytes_of_what_is_no_longer_there(replaced: tuple[Path, bytes]) -> None:
    root, _ = replaced
    reader = dcp.FileSystemReader(root)
    _, record = reader.open_checkpoint(None)
    save(root, state(3.0))
    with pytest.raises(dcp.ConflictError) as caught:
        reader.manifest_bytes(record)
    assert caught.value.kind == "superseded"
    shutil.rmtree(root)
    with pytest.raises(dcp.NotFoundError):
        reader.manifest_bytes(record)
    reader.close_checkpoint()
    with pytest.raises(dcp.UsageError):
        reader.manifest_bytes(record)


def look(errors: Sequence[CheckpointError], size: int) -> tuple[object, list[float]]:
    """``look_for_manifest`` over a reader that raises ``errors``, the last one for ever."""
    clock = [0.0]
    looks = [0]

    class Reader(CountingReader):
        def open_checkpoint(self, *_: object, **__: object) -> Any:
            looks[0] += 1
            raise errors[min(looks[0], len(errors)) - 1]

    def pause(seconds: float) -> None:
        clock[0] += seconds
        pauses.append(seconds)

    pauses: list[float] = []
    with SingleSession(simulated_identity()).begin("load", "c", deadlines=Deadlines()) as operation:
        found = agreed_manifest.look_for_manifest(
            operation,
            Reader(FileSystemStore("/nowhere")),
            None,
            CommitRecord(save_id="a" * 32, manifest_size=size, manifest_xxh3=""),
            now=lambda: clock[0],
            pause=pause,
        )
    return found, pauses


def test_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreed_manifest, "PATIENCE_S", 2.0)
    monkeypatch.setattr(agreed_manifest, "LONG_PATIENCE_S", 65.0)
    stale = dcp.ConflictError("another", kind="superseded")
    gone = dcp.StorageError("gone")
    gone.errno = errno.ESTALE
    for error in (stale, gone, dcp.NotFoundError("none"), dcp.NotFoundError("", kind="incomplete")):
        found, pauses = look([error], 1000)
        assert found is error
        assert 2.0 <= sum(pauses) < 3.0
        assert max(pauses) <= 0.5
    # What cannot be handed over is waited for as long as NFS caches live.
    _, pauses = look([stale], agreed_manifest.HAND_OVER_BYTES + 1)
    assert 65.0 <= sum(pauses) < 66.0
    with pytest.raises(dcp.StorageError, match="broken"):
        look([stale, dcp.StorageError("broken")], 1000)


def test_ranks_never_load_items_of_different_checkpoints(tmp_path: Path) -> None:
    """A planner of another origin: every rank reads the manifest for itself. The data of the old
    checkpoint is still there, so that nothing else would tell."""
    root = tmp_path / "c"
    save(root, state(1.0))
    before = (root / MANIFEST).read_bytes()
    save(root, state(2.0), keep_replaced=True)
    for outcome in load_on_ranks(
        [CountingReader(FileSystemStore(root)), CountingReader(StaleView(root, before))],
        items=True,
    ):
        assert isinstance(outcome, dcp.CheckpointException)
        assert outcome.kind == "superseded"
        assert "rank 1" in str(outcome) and outcome.checkpoint is not None
    # One that comes into sight meanwhile.
    stale = StaleView(root, before, looks=1)
    readers = [CountingReader(FileSystemStore(root)), CountingReader(stale)]
    assert [v for _, v in results_of(load_on_ranks(readers, items=True))] == [2.0] * 2
