"""A session that another process goes on with: here its two ends are in one process."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dcp_engine.coordination.address import StoreAddress, address_of, connect
from dcp_engine.coordination.identity import identity_here
from dcp_engine.coordination.interface import Deadlines, Decision, RunIdentity, Session
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.simulated import results_of, run_simulated
from dcp_engine.coordination.single import SingleSession
from dcp_engine.coordination.store import StoreSession
from dcp_engine.errors import CheckpointException, CoordinationError, UsageError

DEADLINES = Deadlines(timeout=20.0, stall_timeout=10.0)
RHYTHM = Rhythm(interval=0.1, grace=0.1)
ELSEWHERE = RunIdentity(
    run_id="run", restart_count=2, group="g", host="elsewhere", boot_id="other", pid=1
)
stores: Any = dist


@pytest.fixture
def server() -> Iterator[Any]:
    yield stores.TCPStore("localhost", 0, None, True, wait_for_workers=False)


def sessions(server: Any, prefix: str = "job") -> list[StoreSession]:
    """Both ranks of a group, as ``open_session`` opens them: over a store with a prefix."""
    address = address_of(server)
    assert address is not None

    def open_as(rank: int) -> StoreSession:
        return StoreSession.open(
            lambda: stores.PrefixStore(prefix, connect(address)),
            location=str(address),
            address=address,
            rank=rank,
            world_size=2,
            identity=ELSEWHERE,
            timeout=20.0,
            rhythm=RHYTHM,
        )

    return both(open_as, open_as)


def both(*calls: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as executor:
        return [future.result() for future in [executor.submit(c, r) for r, c in enumerate(calls)]]


def step(session: Session, number: int | None = None) -> bytes:
    with session.begin("save", "c", deadlines=DEADLINES, number=number) as operation:
        return operation.step(
            "s", lambda: str(session.rank).encode(), lambda got: Decision(common=b"".join(got))
        )[0]


def test_ranks_and_those_that_stand_for_them_meet_on_one_number(server: Any) -> None:
    opened = sessions(server)
    numbers = [session.take_number() for session in opened]
    attached = [pickle.loads(pickle.dumps(session.handle())).attach() for session in opened]
    assert numbers == [0, 0]
    assert both(*(lambda rank: step(attached[rank], 0),) * 2) == [b"01", b"01"]
    # The next one is the openers' own, on its next number.
    assert both(*(lambda rank: step(opened[rank]),) * 2) == [b"01", b"01"]
    # And one rank may go on by itself where the other one has a worker.
    numbers = [session.take_number() for session in opened]
    assert numbers == [2, 2]
    mixed = both(lambda _: step(opened[0], 2), lambda _: step(attached[1], 2))
    assert mixed == [b"01", b"01"]
    for session in [*opened, *attached]:
        session.close()


def test_whoever_opened_can_tell_the_others_that_its_worker_is_gone(server: Any) -> None:
    opened = sessions(server)
    attached = [session.handle().attach() for session in opened]
    for session in opened:
        session.take_number()

    def lose(_: int) -> None:
        gone = CoordinationError("the worker is gone", kind="worker_died")
        with (
            pytest.raises(CoordinationError, match="the worker is gone"),
            opened[1].begin("save", "c", deadlines=DEADLINES, number=0),
        ):
            raise gone

    def hear(_: int) -> CheckpointException:
        with pytest.raises(CheckpointException) as caught:
            step(attached[0], 0)
        return caught.value

    heard = both(hear, lose)[0]
    assert list(heard.failures) == [1]
    assert heard.kind == "worker_died"


def test_the_identity_is_the_run_of_one_process_and_the_process_of_the_other(server: Any) -> None:
    session = sessions(server)[0].handle().attach()
    here = session.identity
    assert (here.run_id, here.restart_count, here.group) == ("run", 2, "g")
    assert here.pid == os.getpid()
    assert (here.host, here.boot_id) == (
        identity_here(ELSEWHERE).host,
        identity_here(ELSEWHERE).boot_id,
    )
    assert here.host != "elsewhere"


def test_numbers_are_the_openers(server: Any) -> None:
    opened = sessions(server)[0]
    attached = opened.handle().attach()
    with pytest.raises(UsageError, match="taken in the process that opened it"):
        attached.begin("save", "c", deadlines=DEADLINES)
    with pytest.raises(UsageError, match="taken in the process that opened it"):
        attached.take_number()
    with pytest.raises(UsageError, match="number 0 was not taken"):
        opened.begin("save", "c", deadlines=DEADLINES, number=0)
    with pytest.raises(UsageError, match="number -1 was not taken"):
        attached.begin("save", "c", deadlines=DEADLINES, number=-1)
    assert opened.take_number() == 0
    opened.begin("save", "c", deadlines=DEADLINES, number=0)


def test_two_jobs_on_one_store_stay_apart(server: Any) -> None:
    with ThreadPoolExecutor(2) as executor:
        jobs = list(executor.map(lambda name: sessions(server, name), ["one", "two"]))
    assert jobs[0][0].prefix() != jobs[1][0].prefix()
    assert jobs[0][0].prefix(3) == jobs[0][1].handle().prefix(3)


def test_one_rank() -> None:
    opened = SingleSession(ELSEWHERE)
    number = opened.take_number()
    attached = pickle.loads(pickle.dumps(opened.handle())).attach()
    assert isinstance(attached, SingleSession)
    assert attached.identity.pid == os.getpid()
    with attached.begin("save", "c", deadlines=DEADLINES, number=number) as operation:
        assert operation.number == 0
    assert opened.begin("save", "c", deadlines=DEADLINES).number == 1
    with pytest.raises(UsageError, match="taken in the process that opened it"):
        attached.begin("save", "c", deadlines=DEADLINES)


def test_what_lies_in_memory_cannot_be_attached() -> None:
    def fn(session: StoreSession) -> None:
        with pytest.raises(UsageError, match="cannot be reached from another process") as caught:
            session.handle()
        assert "TCPStore" in str(caught.value)

    results_of(run_simulated(2, fn))


def test_addresses(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    wrapped = stores.PrefixStore("a", stores.PrefixStore("b", server))
    address = address_of(wrapped)
    assert address == StoreAddress(kind="tcp", host="localhost", port=server.port)
    server.set("key", "value")
    assert connect(address).get("key") == b"value"

    file = stores.FileStore(str(tmp_path / "store"), 1)
    file.set("key", "value")
    again = connect(pickle.loads(pickle.dumps(address_of(file))))
    assert again.get("key") == b"value"
    del again
    assert file.get("key") == b"value"  # a visitor that leaves removes nothing

    memory = address_of(stores.HashStore())
    assert memory == StoreAddress(kind="memory")
    assert connect(memory).num_keys() == 0
    assert address_of(object()) is None


def test_a_store_that_is_gone_has_a_name() -> None:
    server = stores.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    address = address_of(server)
    assert address is not None
    del server
    with pytest.raises(CoordinationError, match="cannot be reached") as caught:
        connect(address, timeout=0.5)
    assert caught.value.kind == "store_lost"


def test_attaching_connects_to_nothing() -> None:
    address = StoreAddress(kind="tcp", host="localhost", port=1)
    session = StoreSession.attach(
        address, rank=0, world_size=2, identity=ELSEWHERE, name="n", rhythm=RHYTHM
    )
    assert session.counters.connections == 0
    session.close()
