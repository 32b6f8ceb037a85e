"""One checkpoint's place through any sequence of saves, faults, loads and clean-ups.

The model is the last committed state. Whatever happened, a load gives exactly that, or says that
nothing is there; and nothing else lies there but what a fault excuses.
"""

from __future__ import annotations

import errno
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dcp_engine.engine import Engine
from dcp_engine.errors import CheckpointError, NotFoundError
from dcp_engine.format.names import new_save_id
from dcp_engine.storage import ByteStore
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.memory import MemoryStore
from storage_backends.prune import prune
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.faulty import (
    Action,
    Fail,
    Fault,
    FaultyByteStore,
    FlipBit,
    LoseReply,
    TornWrite,
)
from storage_backends.testing.faulty_calls import CallFault, faulty_writer
from storage_backends.testing.wrapping import WrappingByteStore
from tests.property.bytes_of import flipped, place, raw_of
from tests.property.worlds import examples

State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a save stores: one of a few shapes of state, with values of its own."""

    shape: int
    seed: int
    extra: bool

    def state(self, *, filled: bool = True) -> State:
        """The state dict; not ``filled``: a destination, other everywhere."""
        tensors = {
            name: self._tensor(name, filled)
            for name in (["w", "b"], ["w", "b", "more"], [], ["w"])[self.shape]
        }
        number = self.seed if filled else -1
        inside: State = {} if self.shape == 2 else {"step": number, "blob": bytes([number % 256])}
        if self.shape == 1:
            inside["blob"] *= 5000
        return {**tensors, **inside}

    def _tensor(self, name: str, filled: bool) -> torch.Tensor:
        raw = raw_of(
            f"{name}{self.seed}", {"w": (6, 3), "b": (7,), "more": (40, 30)}[name], torch.float32
        )
        return place(raw if filled else flipped(raw), torch.float32, "contiguous").tensor

    @property
    def files(self) -> dict[str, bytes]:
        """The caller's extra files."""
        return {"a.txt": b"%d" % self.seed, "deep/er.bin": bytes(self.seed)} if self.extra else {}


contents = st.builds(
    Content, shape=st.integers(0, 3), seed=st.integers(0, 200), extra=st.booleans()
)


class Broken(Exception):
    """Not an error of the engine's."""


_OPERATIONS = [
    "make_directory", "put", "create", "write", "sync", "close", "abort", "sync_directory",
    "replace", "delete", "list", "size", "read", "*",
]  # fmt: skip


_OF_REMOVAL = frozenset({"delete", "list", "size", "read", "*"})


def _io_error() -> OSError:
    return OSError(errno.EIO, "the medium failed")


@st.composite
def store_faults(draw: st.DrawFn) -> Fault:
    operation = draw(st.sampled_from(_OPERATIONS))
    error = draw(st.sampled_from([_io_error, _io_error, KeyboardInterrupt, Broken]))()
    actions: list[Action] = [Fail(error), LoseReply(error)]
    if operation == "write":
        actions.append(TornWrite(draw(st.integers(0, 100)), error))
    return Fault(
        operation=operation,
        action=draw(st.sampled_from(actions)),
        nth=draw(st.integers(1, 25 if operation == "*" else 3)),
        times=draw(st.sampled_from([1, 1, None])),
    )


call_faults = st.builds(
    CallFault,
    method=st.sampled_from(["reset", "observe", "begin_save", "write_columns", "commit_columns"]),
    error=st.sampled_from([Broken, KeyboardInterrupt]).map(lambda error: error()),
    when=st.sampled_from(["before", "after"]),
)


class ObjectStoreLike(WrappingByteStore):
    """Without rename, as an object store is."""

    def __init__(self, inner: ByteStore) -> None:
        super().__init__(inner)
        self.atomic_replace = False
        self.random_write = False


class OnePlace(RuleBasedStateMachine):
    """The place, and what must be there."""

    def __init__(self, make_store: Callable[[str], ByteStore]) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.store = make_store(self.directory.name)
        self.engine = Engine()
        self.committed: Content | None = None
        self.collective = True
        self.attempts = 0
        self.littered = False
        """Something else may lie there, which the next ``prune`` removes."""

    def teardown(self) -> None:
        self.engine.close()
        self.directory.cleanup()

    # -- saves ---------------------------------------------------------------------------------

    def _save(self, content: Content, store: ByteStore, **options: Any) -> None:
        wrap = options.pop("wrap", lambda writer: writer)
        self.attempts += 1
        self.engine.save(
            content.state(),
            storage_writer=wrap(ShardedWriter(lambda _: store, "place", block_size=512)),
            extra_files=content.files,
            user_metadata={"attempt": self.attempts},
            **options,
        )

    @rule(content=contents, keep=st.sampled_from([False, False, True]))
    def save(self, content: Content, keep: bool) -> None:
        self._save(content, self.store, keep_replaced=keep)
        self.littered |= keep and self.committed is not None
        self.committed, self.collective = content, True

    @rule(content=contents, fault=store_faults())
    def save_to_a_faulty_store(self, content: Content, fault: Fault) -> None:
        faulty = FaultyByteStore(self.store, [fault])
        self._save_or_fail(
            content,
            faulty,
            lambda: bool(faulty.fired),
            cleans_up=fault.times == 1,
            removes=fault.times == 1 and fault.operation not in _OF_REMOVAL,
        )

    @rule(content=contents, fault=call_faults)
    def save_with_a_faulty_writer(self, content: Content, fault: CallFault) -> None:
        doubles: list[Any] = []

        def wrap(writer: ShardedWriter) -> Any:
            doubles.append(faulty_writer(writer, [fault]))
            return doubles[0]

        self._save_or_fail(
            content,
            self.store,
            lambda: bool(doubles[0].schedule.fired),
            cleans_up=True,
            removes=True,
            wrap=wrap,
        )

    def _save_or_fail(
        self,
        content: Content,
        store: ByteStore,
        fired: Callable[[], bool],
        *,
        cleans_up: bool,
        removes: bool,
        **options: Any,
    ) -> None:
        """``cleans_up``: the fault cannot hit the clean-up of a save that failed. ``removes``: it
        cannot hit the removal of what a save that succeeded has replaced."""
        try:
            self._save(content, store, **options)
        except (CheckpointError, KeyboardInterrupt, Broken) as error:
            assert fired()
            in_doubt = isinstance(error, CheckpointError) and error.kind == "commit_in_doubt"
            # An interrupt may come after the commit, in the clean-up.
            if in_doubt or isinstance(error, KeyboardInterrupt):
                self._find_out(content)
                self.littered = True
            self.littered |= not cleans_up
        else:
            self.committed, self.collective = content, True
            self.littered |= fired() and not removes

    def _find_out(self, content: Content) -> None:
        """In doubt: the manifest decides."""
        if self._attempt_there() == self.attempts:
            self.committed, self.collective = content, True

    def _attempt_there(self) -> int | None:
        """Which save is there, by what it said of itself."""
        reader = ShardedReader(lambda _: self.store, "place")
        try:
            manifest, _ = reader.open_checkpoint(None)
        except NotFoundError:
            return None
        reader.close_checkpoint()
        return int(manifest.user_metadata["attempt"])

    @precondition(lambda self: self.committed is None or self.attempts % 4 == 0)
    @rule(content=contents)
    def save_without_collectives(self, content: Content) -> None:
        """Cannot replace a checkpoint, only make one where there is none."""
        save_id = new_save_id()
        if self.committed is not None:
            with pytest.raises(CheckpointError) as caught:
                self._save(content, self.store, use_collectives=False, save_id=save_id)
            assert caught.value.kind == "conflict"
            return
        self._save(content, self.store, use_collectives=False, save_id=save_id)
        self.committed, self.collective = content, False

    # -- loads ---------------------------------------------------------------------------------

    def _load(self, content: Content, store: ByteStore) -> State:
        state = content.state(filled=False)
        self.engine.load(state, storage_reader=ShardedReader(lambda _: store, "place"))
        return state

    @invariant()
    def a_load_gives_what_was_committed(self) -> None:
        if self.committed is not None:
            assert equal(self._load(self.committed, self.store), self.committed.state())
            return
        with pytest.raises(CheckpointError) as caught:
            self._load(Content(shape=0, seed=0, extra=False), self.store)
        assert caught.value.kind == ("not_committed" if self._names() else "not_found")

    @precondition(lambda self: self.committed is not None)
    @rule(
        action=st.sampled_from([*map(FlipBit, [0, 77, 300, 500, 790, 4444]), Fail(_io_error())]),
        name=st.sampled_from(["*.safetensors", "*.safetensors", "*.digests", "manifest*"]),
        nth=st.sampled_from([1, 3, 3, 3]),
    )
    def load_from_a_faulty_store(self, action: Action, name: str, nth: int) -> None:
        assert self.committed is not None
        fault = Fault(operation="read", action=action, name=name, nth=nth)
        faulty = FaultyByteStore(self.store, [fault])
        try:
            state = self._load(self.committed, faulty)
        except CheckpointError:
            assert faulty.fired
        else:
            assert equal(state, self.committed.state())

    @rule()
    def read_extra_files(self) -> None:
        reader = ShardedReader(lambda _: self.store, "place")
        files = self.committed.files if self.committed is not None else {}
        if self.committed is None:
            with pytest.raises(NotFoundError):
                reader.open_checkpoint(None)
            return
        manifest, _ = reader.open_checkpoint(None)
        assert {name: reader.read_extra(manifest, name) for name in files} == files
        with pytest.raises(NotFoundError):
            reader.read_extra(manifest, "other")
        reader.close_checkpoint()

    # -- what lies there -----------------------------------------------------------------------

    @rule()
    def prune(self) -> None:
        prune(self.store, older_than=-1)
        self.littered = False

    def _names(self) -> set[str]:
        return {file.name for file in self.store.list()}

    @invariant()
    def nothing_else_lies_there(self) -> None:
        names = self._names()
        manifests = {name for name in names if "/" not in name}
        directories = {name.partition("/")[0] for name in names - manifests}
        assert all(re.fullmatch("data-[0-9a-f]{32}", name) for name in directories), names
        if self.littered:
            return
        if self.committed is None:
            assert not names
            return
        assert manifests == {"manifest.json" if self.collective else "manifest-rank00000.json"}, (
            names
        )
        reader = ShardedReader(lambda _: self.store, "place")
        manifest, _ = reader.open_checkpoint(None)
        reader.close_checkpoint()
        owned = {
            file.name
            for file in (*manifest.data_files, *manifest.digest_files, *manifest.extra_files)
        }
        expected = {f"data-{manifest.save_id}/{name}" for name in owned | {"owner.json"}}
        assert names - manifests == expected


def equal(one: State, other: State) -> bool:
    """Same keys, same values; NaNs too."""
    return one.keys() == other.keys() and all(
        torch.equal(value.view(torch.uint8), other[name].view(torch.uint8))
        if isinstance(value, torch.Tensor)
        else value == other[name]
        for name, value in one.items()
    )


@pytest.mark.parametrize(
    ("make_store", "runs"),
    [
        (lambda path: FileSystemStore(f"{path}/c", sync=False), 10),
        (lambda _: MemoryStore(), 18),
        (lambda _: ObjectStoreLike(MemoryStore()), 10),
    ],
    ids=["filesystem", "memory", "object store"],
)
def test_one_place(make_store: Callable[[str], ByteStore], runs: int) -> None:
    run_state_machine_as_test(
        lambda: OnePlace(make_store),
        settings=settings(max_examples=examples(runs), stateful_step_count=20),
    )
