"""What the rank processes run in the tests of coordination."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist

from dcp_engine.coordination.collective import CollectiveSession
from dcp_engine.coordination.group import describe_group
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Deadlines, Decision, Operation, Session
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.store import StoreSession
from dcp_engine.errors import CheckpointError, CheckpointException, UsageError

RHYTHM = Rhythm(interval=0.1, grace=0.3, idle_poll=0.02)
PATIENT = Rhythm(interval=0.1, grace=10.0, idle_poll=0.02)
"""Where all ranks answer: that ends the grace, however busy the machine is."""
DEADLINES = Deadlines(timeout=30.0, stall_timeout=10.0)
SHORT_STALL = Deadlines(timeout=30.0, stall_timeout=0.8)


class Unpicklable(Exception):
    """Holds something that cannot be sent."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Poisoned(Exception):
    """Can be pickled, but not made again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class Outrage(BaseException):
    """Not an Exception."""


ERRORS: dict[str, Callable[[], BaseException]] = {
    "plain": lambda: ValueError("plain boom"),
    "unpicklable": lambda: Unpicklable("unpicklable boom"),
    "poisoned": lambda: Poisoned("poisoned", "boom"),
    "base": lambda: Outrage("base boom"),
    "huge": lambda: ValueError("huge boom", b"x" * (3 << 20)),
    "interrupt": lambda: KeyboardInterrupt("interrupt boom"),
    "exit": lambda: SystemExit("exit boom"),
}


def add_up(value: int) -> int:
    """A collective on the training group."""
    tensor = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(tensor)
    return int(tensor)


def outcome(run: Callable[[], Any]) -> dict[str, Any]:
    """What ``run`` raised, as plain values."""
    began = time.monotonic()
    try:
        value = run()
    except BaseException as error:
        failures = error.failures if isinstance(error, CheckpointException) else {}
        return {
            "type": type(error).__name__,
            "kind": error.kind if isinstance(error, CheckpointError) else None,
            "ranks": list(failures),
            "texts": {rank: str(failure[0]) for rank, failure in failures.items()},
            "types": {rank: type(failure[0]).__name__ for rank, failure in failures.items()},
            "frames": {
                rank: [frame.name for frame in stack] for rank, (_, stack) in failures.items()
            },
            "kinds": {
                rank: failure[0].kind
                for rank, failure in failures.items()
                if isinstance(failure[0], CheckpointError)
            },
            "text": str(error),
            "seconds": time.monotonic() - began,
        }
    return {"type": None, "value": value, "seconds": time.monotonic() - began}


def echo(reports: list[bytes]) -> Decision:
    """A ``decide`` that gives everybody everything, and each rank its own."""
    return Decision(common=b"|".join(reports), per_rank=[b"to " + report for report in reports])


def one_step(
    session: Session,
    local: Callable[[Operation], bytes],
    decide: Callable[[list[bytes]], Decision] = echo,
    *,
    deadlines: Deadlines = DEADLINES,
    coordinator: int = 0,
    phase: str = "write",
    kind: Literal["save", "load"] = "save",
    checkpoint: str = "ckpt",
) -> tuple[bytes, bytes]:
    """An operation of one step."""
    with session.begin(
        kind, checkpoint, deadlines=deadlines, coordinator_rank=coordinator
    ) as operation:
        return operation.step(phase, lambda: local(operation), decide, decide_phase="commit")


def fail_in_local(
    session: Session,
    failing: list[int],
    how: str,
    coordinator: int = 0,
    meet: Callable[[], object] = dist.barrier,
) -> Any:
    """The ranks that are told to raise do so, in the second step; afterwards all is well. They
    meet before, for a rank that was late would be stopped before it could fail."""

    def raise_here() -> bytes:
        meet()
        if session.rank in failing:
            raise ERRORS[how]()
        return b"ok"

    def failing_operation() -> Any:
        with session.begin(
            "save", "ckpt", deadlines=DEADLINES, coordinator_rank=coordinator
        ) as operation:
            operation.step("plan", lambda: b"ok", echo)
            return operation.step("write", raise_here, echo)

    first = outcome(failing_operation)
    after = one_step(session, lambda _: str(session.rank).encode())
    return {**first, "after": after[0]}


def fail_in_decide(session: Session, how: str, coordinator: int = 0) -> Any:
    """The coordinator raises in ``decide``."""

    def decide(reports: list[bytes]) -> Decision:
        raise ERRORS[how]()

    first = outcome(lambda: one_step(session, lambda _: b"ok", decide, coordinator=coordinator))
    after = one_step(session, lambda _: str(session.rank).encode())
    return {**first, "after": after[0]}


# -- for real ranks ----------------------------------------------------------------------------


def opened(group: Any = None, rhythm: Rhythm = RHYTHM) -> StoreSession:
    session = open_session(group, connect_timeout=30.0, rhythm=rhythm)
    assert isinstance(session, StoreSession)
    return session


def run_with_session(name: str, *args: Any) -> Any:
    """Any of the functions above, on real ranks."""
    with opened(rhythm=PATIENT) as session:
        return globals()[name](session, *args)


def echo_bytes(size: int) -> tuple[int, int, bool]:
    """Reports, common bytes and answers of ``size`` bytes each."""
    with opened() as session:
        payload = bytes([session.rank]) * size
        common, own = one_step(session, lambda _: payload)
        return len(common), len(own), own == b"to " + payload


def strike(victim: int, how: str, coordinator: int, phase: str) -> Any:
    """One rank is killed, stopped, or hangs, in ``local`` or in ``decide``."""
    session = opened()

    def struck() -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(600)

    def local(operation: Operation) -> bytes:
        if phase == "write" and session.rank == victim:
            struck()
        return b"ok"

    def decide(reports: list[bytes]) -> Decision:
        if phase == "commit":
            struck()
        return Decision()

    deadlines = (
        Deadlines(timeout=30.0, stall_timeout=20.0, phases={phase: 1.0})
        if how == "hang"
        else SHORT_STALL
    )
    return outcome(
        lambda: one_step(session, local, decide, deadlines=deadlines, coordinator=coordinator)
    )


def strike_store_host(how: str, in_local: bool) -> Any:
    """Rank 0 hosts the store, and is killed or stopped, while rank 1 waits or works."""
    session = opened()

    def local(operation: Operation) -> bytes:
        if session.rank == 0:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        if in_local:
            while True:
                operation.check()
                time.sleep(0.01)
        return b"ok"

    def run() -> Any:
        with session.begin("save", "ckpt", deadlines=SHORT_STALL) as operation:
            try:
                return operation.step("write", lambda: local(operation), echo)
            finally:
                decided.update(outcome(lambda: operation.decide_once("abort")))

    decided: dict[str, Any] = {}
    return {**outcome(run), "decided": decided["kind"]}


def out_of_step(what: str) -> Any:
    """Ranks are in different operations."""
    with opened() as session:
        odd = session.rank == 1
        return outcome(
            lambda: one_step(
                session,
                lambda _: b"ok",
                kind="load" if odd and what == "kind" else "save",
                checkpoint="other" if odd and what == "checkpoint" else "ckpt",
                phase="read" if odd and what == "phase" else "write",
            )
        )


def with_stale_keys() -> Any:
    """An earlier run left its handshake behind, for rank 1 and as an answer to it."""
    store = dist.distributed_c10d._get_default_store()
    group = describe_group(None).name
    if dist.get_rank() == 0:
        store.set(f"dcp_engine/{group}/hello/1", pickle.dumps("not even a greeting"))
        store.set(f"dcp_engine/{group}/welcome/0123", "feed")
        store.set(f"dcp_engine/{group}/feed/go", "+")
        dist.barrier()
        time.sleep(0.1)
    else:
        dist.barrier()
        time.sleep(0.3)  # the leader finds the old greeting first
    names = []
    for _ in range(2):
        with opened() as session:
            names.append(session.name)
            one_step(session, lambda _: b"ok")
    return names


def alarm_a_long_write() -> Any:
    """Rank 1 fails while the others, the coordinator too, are in a long ``local``."""
    with opened() as session:
        seen = threading.Event()

        def local(operation: Operation) -> bytes:
            dist.barrier()  # all are in it
            if session.rank == 1:
                raise ValueError("early boom")
            end = time.monotonic() + 20
            while time.monotonic() < end:
                try:
                    operation.check()
                except CheckpointError as error:
                    if error.kind == "interrupted":
                        seen.set()
                    raise
                time.sleep(0.005)
            return b"finished"

        return {**outcome(lambda: one_step(session, local)), "interrupted": seen.is_set()}


def on_two_groups(rounds: int) -> Any:
    """Sessions of the whole group and of a half, used at once from two threads."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = halves[dist.get_rank() // 2]
    refused = outcome(lambda: open_session(halves[1 - dist.get_rank() // 2]))
    with opened() as world, opened(mine) as half:
        results: dict[str, list[bytes]] = {"world": [], "half": []}

        def repeat(name: str, session: StoreSession, coordinator: int) -> None:
            for index in range(rounds):
                text = f"{index}.{session.rank}".encode()
                common, _ = one_step(session, lambda _, t=text: t, coordinator=coordinator)
                results[name].append(common)

        thread = threading.Thread(target=repeat, args=("half", half, 1))
        thread.start()
        repeat("world", world, 2)
        thread.join()
    return results, refused


def beside_training(rounds: int) -> Any:
    """Two operations at once on one session, in background threads, beside collectives."""
    with opened() as session:
        operations = [
            session.begin("save", "a", deadlines=DEADLINES),
            session.begin("load", "b", deadlines=DEADLINES),
        ]
        results: list[list[bytes]] = [[], []]

        def repeat(index: int) -> None:
            with operations[index] as operation:
                for step in range(rounds):
                    text = f"{index}.{step}.{session.rank}".encode()
                    results[index].append(operation.step("s", lambda t=text: t, echo)[0])

        threads = [threading.Thread(target=repeat, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        sums = [add_up(step) for step in range(50)]
        for thread in threads:
            thread.join()
        return results, sums, session.counters.connections


def race_to_decide(rounds: int) -> list[str]:
    """Every rank proposes, half of them commit."""
    decided = []
    with opened() as session:
        for index in range(rounds):
            with session.begin("save", "ckpt", deadlines=DEADLINES) as operation:
                operation.step("plan", lambda: b"", lambda _: Decision())
                mine: Literal["commit", "abort"] = (
                    "commit" if (session.rank + index) % 2 else "abort"
                )
                decided.append(operation.decide_once(mine))
                again = operation.decide_once("abort" if mine == "commit" else "commit")
                assert again == decided[-1]
                operation.step("end", lambda: b"", lambda _: Decision())
    return decided


def keys_after(operations: int) -> tuple[list[int], int]:
    """Number of keys in the store after each batch of operations."""
    store = dist.distributed_c10d._get_default_store()
    counts = []
    with opened() as session:
        for _ in range(3):
            for index in range(operations):
                size = (5 << 20) if index == 0 else 10
                one_step(session, lambda _, size=size: b"x" * size)
                outcome(lambda: fail_in_decide(session, "plain"))
            dist.barrier()
            counts.append(store.num_keys())
            dist.barrier()
        return counts, session.counters.connections


def quiet_wait() -> Any:
    """All ranks wait for one slow rank, through many ticks."""
    print("quiet wait begins", flush=True)
    with opened() as session:

        def local(operation: Operation) -> bytes:
            if session.rank == 1:
                time.sleep(1.5)
            return b"ok"

        one_step(session, lambda _: b"all are here")
        before = session.counters
        one_step(session, local)
        return session.counters.total - before.total


def leave_early(how: str) -> Any:
    """Rank 1 leaves the operation between two steps, by an error of its own."""
    with opened() as session:

        def run() -> Any:
            with session.begin("save", "ckpt", deadlines=DEADLINES) as operation:
                operation.step("plan", lambda: b"", echo)
                if session.rank == 1:
                    raise ERRORS[how]()
                return operation.step("write", lambda: b"", echo)

        return {**outcome(run), "after": one_step(session, lambda _: b"x")[0]}


def missing_from_handshake() -> Any:
    """Rank 1 does not come."""
    if dist.get_rank() == 1:
        return {"type": None}
    return outcome(lambda: open_session(connect_timeout=1.0))


def over_file_store(path: str) -> Any:
    """The job came together over a file."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    with opened() as session:
        failed = fail_in_local(session, [1], "plain")
        result = one_step(session, lambda _: b"x" * (9 << 20))
    return failed["ranks"], failed["after"], len(result[0])


def without_cpu_backend() -> Any:
    """The group's backend cannot move a byte; only its store is used."""
    assert dist.get_backend() == "fake"
    with opened() as session:
        return one_step(session, lambda _: str(session.rank).encode())


def fake_store() -> Any:
    """A fake group with a fake store: there is nobody to talk to."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        open_session()
    except UsageError as error:
        return str(error)
    return "no error"


def over_collectives(name: str, *args: Any) -> Any:
    """Any of the functions above, without a store."""
    info = describe_group(None)
    with CollectiveSession(None, info, run_identity(info.name)) as session:
        return globals()[name](session, *args)


def collective_decisions() -> Any:
    """What each rank knows of how the save ends."""
    info = describe_group(None)
    with CollectiveSession(None, info, run_identity(info.name)) as session:

        def commit(reports: list[bytes]) -> Decision:
            operation.decide_once("commit")
            return Decision()

        with session.begin("save", "ckpt", deadlines=DEADLINES) as operation:
            unknown = outcome(lambda: operation.decide_once("commit")) if session.rank else {}
            operation.step("write", lambda: b"", commit if session.rank == 0 else echo)
            known = operation.decide_once("abort")
    return unknown.get("kind"), known


def collective_hang() -> Any:
    """Rank 1 does not come to the step."""
    info = describe_group(None)
    with CollectiveSession(None, info, run_identity(info.name)) as session:

        def local(operation: Operation) -> bytes:
            if session.rank == 1:
                time.sleep(600)
            return b""

        return outcome(
            lambda: one_step(session, local, deadlines=Deadlines(timeout=1.5, stall_timeout=1.0))
        )
