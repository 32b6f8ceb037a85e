"""Small checkpoints, told apart by a word: writing them, and reading what is there.

Belongs here: states, saves and loads through the public interfaces, on one rank or on ranks that
are threads. Does not belong here: recording and crashing (``scenarios``).
"""

from __future__ import annotations

import secrets
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dcp_engine.async_saver import AsyncCheckpointerType
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Deadlines, Session
from dcp_engine.coordination.simulated import run_simulated
from dcp_engine.coordination.single import SingleSession
from dcp_engine.default_planner import DefaultSavePlanner
from dcp_engine.engine import Engine
from dcp_engine.errors import CheckpointError
from dcp_engine.plan import SavePlan
from dcp_engine.saver import PlanMemory, SaveOptions, save
from dcp_engine.state.adapters import GroupRanks
from dcp_engine.state.per_rank import PerRank
from dcp_engine.storage import ByteStore
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter

__all__ = [
    "CHECKPOINT",
    "LABELS",
    "NONE",
    "async_saver",
    "content",
    "frozen",
    "label_of",
    "outcome_of",
    "read",
    "save_alone",
    "save_share",
    "save_together",
    "worker_saver",
]

CHECKPOINT = "runs/step-1"
"""Where checkpoints lie below the recorded directory; made by the save itself, parents too."""
LABELS = ("old", "new", "other", "next")
"""The words; each has values of its own."""
NONE = "none"
"""What a reader says where nothing was committed."""
_MIXED = "a mixture"
_NOT_THERE = {"not_found", "not_committed", "incomplete"}
_DEADLINES = Deadlines(timeout=60.0, stall_timeout=30.0)
_NOTE = {"note": "n" * 5000}
"""Makes the manifest longer than a block, so that it can be torn."""


def _filled(label: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{label} {name}".encode()))
    return torch.rand(shape, generator=generator)


def content(label: str | None, rank: int | None = None) -> dict[str, Any]:
    """The state called ``label``, some 30 kB: tensors over several blocks, an object that is
    stored as a file's bytes and one that stands in the manifest, and on a rank of several its own
    values. ``None`` is a destination to load into."""
    word = "nothing" if label is None else label
    state: dict[str, Any] = {
        "w": _filled(word, "w", (2500,)),
        "v": _filled(word, "v", (40, 25)),
        "long": word * 1500,
        "step": word,
    }
    if rank is not None:
        state["own"] = PerRank(_filled(word, f"own {rank}", (1500,)))
    return state


def label_of(state: dict[str, Any]) -> str:
    """Which of ``LABELS`` the values are of, all of them; else that it is a mixture."""
    for label in LABELS:
        expected = content(label)
        same = all(
            torch.equal(state[name], value)
            if isinstance(value, torch.Tensor)
            else state[name] == value
            for name, value in expected.items()
        )
        if same and _own_values_are(state, label):
            return label
    return _MIXED


def _own_values_are(state: dict[str, Any], label: str) -> bool:
    own = state.get("own")
    if own is None:
        return True
    values = own.value if isinstance(own.value, list) else [own.value]
    return all(
        torch.equal(value, _filled(label, f"own {rank}", (1500,)))
        for rank, value in enumerate(values)
    )


def outcome_of(load: Callable[[], str]) -> str:
    """What ``load`` returns, or in a word what it raised."""
    try:
        return load()
    except CheckpointError as error:
        return NONE if error.kind in _NOT_THERE else f"error {error.kind}"


def read(root: Path, *, ranks: bool = False, store: ByteStore | None = None) -> str:
    """What a load from the checkpoint below ``root`` gets: a label, ``NONE``, or what is wrong.

    ``ranks``: also the values that each rank has of its own; ``store``: read through this one.
    """
    path = root / CHECKPOINT
    reader = ShardedReader(lambda _: store or FileSystemStore(path), path, thread_count=1)

    def load() -> str:
        state = content(None, 0 if ranks else None)
        with Engine() as engine:
            engine.load(state, storage_reader=reader, no_dist=True, per_rank="list")
        return label_of(state)

    return outcome_of(load)


def _writer(
    root: Path,
    store: Callable[[Path], ByteStore] | None = None,
    place: str = CHECKPOINT,
) -> ShardedWriter:
    path = root / place
    # One thread: the order of operations does not depend on the machine.
    return ShardedWriter(
        lambda _: FileSystemStore(path) if store is None else store(path), path, thread_count=1
    )


class _ItemPlanner(DefaultSavePlanner):
    """Another planner than the default one: the save goes DCP's way, item by item."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return super().finish_plan(new_plan)


def save_alone(
    root: Path,
    label: str,
    *,
    store: Callable[[Path], ByteStore] | None = None,
    keep_replaced: bool = False,
    items: bool = False,
    place: str = CHECKPOINT,
) -> None:
    """Save from this thread; ``items``: in DCP's life cycle."""
    with Engine() as engine:
        engine.save(
            content(label),
            storage_writer=_writer(root, store, place),
            planner=_ItemPlanner() if items else None,
            no_dist=True,
            user_metadata=_NOTE,
            extra_files={"notes/config.json": label.encode() * 100},
            keep_replaced=keep_replaced,
        )


@contextmanager
def async_saver(root: Path) -> Iterator[Callable[[dict[str, Any]], Future[Any]]]:
    """Starts asynchronous saves of states, one after the other, in a thread."""
    with _async_saver(lambda: _writer(root), AsyncCheckpointerType.THREAD) as start:
        yield start


@contextmanager
def worker_saver(writer: ShardedWriter) -> Iterator[Callable[[dict[str, Any]], Future[Any]]]:
    """The same by a worker process, which ``writer`` is sent to."""
    with _async_saver(lambda: writer, AsyncCheckpointerType.PROCESS) as start:
        yield start


@contextmanager
def _async_saver(
    writer: Callable[[], ShardedWriter], executor: AsyncCheckpointerType
) -> Iterator[Callable[[dict[str, Any]], Future[Any]]]:
    with Engine() as engine:

        def start(state: dict[str, Any]) -> Future[Any]:
            return engine.async_save(
                state,
                storage_writer=writer(),
                async_checkpointer_type=executor,
                no_dist=True,
                user_metadata=_NOTE,
                extra_files={"notes/config.json": str(state["step"]).encode() * 100},
            )

        yield start


def save_share(root: Path, label: str, rank: int, world_size: int, token: str) -> None:
    """Save what one rank has to, without a word to the others."""
    with SingleSession(run_identity("")) as session:
        _save_on(
            session,
            _writer(root),
            content(label, rank),
            rank,
            world_size,
            SaveOptions(
                deadlines=_DEADLINES, use_collectives=False, save_id=token, user_metadata=_NOTE
            ),
        )


def save_together(
    root: Path,
    label: str,
    *,
    mark: Callable[[str], None],
    world_size: int = 2,
    deadlines: Deadlines = _DEADLINES,
    store: Callable[[Path, int], ByteStore] | None = None,
    on_rank: Callable[[int, Callable[[], None]], None] | None = None,
) -> None:
    """Save on ranks that are threads of this process, called ``rank-<n>``, which agree as real
    ones do. ``mark`` is told when a rank goes on and what it waits for; ``on_rank`` is given each
    rank's work to do, and may do more."""

    def life(session: Session) -> None:
        rank = session.rank
        writer = _MarkingWriter(
            lambda _: (
                FileSystemStore(root / CHECKPOINT)
                if store is None
                else store(root / CHECKPOINT, rank)
            ),
            root / CHECKPOINT,
            rank,
            world_size,
            mark,
        )

        def work() -> None:
            options = SaveOptions(deadlines=deadlines, user_metadata=_NOTE)
            _save_on(session, writer, content(label, rank), rank, world_size, options)

        if on_rank is None:
            work()
        else:
            on_rank(rank, work)

    for outcome in run_simulated(world_size, life):
        if isinstance(outcome, BaseException):
            raise outcome


def _save_on(
    session: Session,
    writer: ShardedWriter,
    state: dict[str, Any],
    rank: int,
    world_size: int,
    options: SaveOptions,
) -> None:
    save(
        session,
        state,
        checkpoint_id=None,
        writer=writer,
        planner=None,
        group=GroupRanks(ranks=tuple(range(world_size)), rank=rank),
        world_size=world_size,
        memory=PlanMemory(),
        options=options,
    )


class _MarkingWriter(ShardedWriter):
    """Says which of its steps wait for which of the other ranks' (``turns.interleavings``)."""

    def __init__(
        self,
        open_store: Callable[[Any], ByteStore],
        path: Path,
        rank: int,
        world_size: int,
        mark: Callable[[str], None],
    ) -> None:
        super().__init__(open_store, path, thread_count=1)
        self._number = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._mark = mark

    def begin_save(self, *args: Any, **kwargs: Any) -> None:
        if self._number != 0:
            self._mark("await:begun")
        super().begin_save(*args, **kwargs)
        if self._number == 0:
            self._mark("signal:begun")

    def write_columns(self, *args: Any, **kwargs: Any) -> Any:
        report = super().write_columns(*args, **kwargs)
        self._mark(f"signal:written-{self._number}")
        return report

    def commit_columns(self, *args: Any, **kwargs: Any) -> Any:
        for other in self._others:
            self._mark(f"await:written-{other}")
        record = super().commit_columns(*args, **kwargs)
        self._mark("signal:committed")
        return record

    def abort_save(self) -> None:
        self._mark("await:gave-up")  # whoever failed goes first
        super().abort_save()

    def end_save(self) -> None:
        if self._number != 0:
            self._mark("await:committed")
        super().end_save()


@contextmanager
def frozen(seed: int = 0) -> Iterator[None]:
    """While this is open, names and times that are drawn or read are the same in every run, so
    that two runs that do the same leave the same bytes."""
    lock = threading.Lock()
    drawn: Counter[str] = Counter()

    def draw(nbytes: int) -> bytes:
        with lock:
            name = threading.current_thread().name
            drawn[name] += 1
            words = f"{seed} {name} {drawn[name]}"
        return b"".join(
            zlib.crc32(f"{words} {part}".encode()).to_bytes(4, "big")
            for part in range(-(-nbytes // 4))
        )[:nbytes]

    originals: Sequence[tuple[Any, str, Callable[..., Any]]] = [
        (secrets, "token_hex", lambda nbytes=32: draw(nbytes).hex()),
        (uuid, "uuid4", lambda: uuid.UUID(bytes=draw(16))),
        (time, "time", lambda: 1_700_000_000.5),
    ]
    saved = [(module, name, getattr(module, name)) for module, name, _ in originals]
    for module, name, replacement in originals:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name, original in saved:
            setattr(module, name, original)
