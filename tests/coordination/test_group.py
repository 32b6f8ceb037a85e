"""What is known of a process without asking anybody."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from dcp_engine.coordination.address import StoreAddress, address_of
from dcp_engine.coordination.clock import OperationClock
from dcp_engine.coordination.group import _connections, describe_group, store_access
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Deadlines
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.single import SingleSession
from dcp_engine.errors import CoordinationError, UsageError


def test_the_identity_comes_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    identity = run_identity("g")
    assert (identity.run_id, identity.restart_count, identity.group) == ("job-7", 3, "g")
    assert identity.pid == os.getpid()
    assert identity.host


@pytest.mark.parametrize("run_id", ["", "none"])
def test_a_run_without_a_name_of_its_own_has_none(
    monkeypatch: pytest.MonkeyPatch, run_id: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "x")
    assert (run_identity("").run_id, run_identity("").restart_count) == ("", 0)


def test_without_torch_distributed_there_is_one_rank() -> None:
    assert isinstance(open_session(), SingleSession)
    assert isinstance(open_session(no_dist=True), SingleSession)
    assert store_access(None) is None
    with pytest.raises(UsageError, match="not initialized"):
        describe_group(None)


class Uncopied:
    """A store of torch 2.6, which has no ``clone``."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return bytes(self._store.compare_set(key, expected, desired))


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_connections_keep_to_the_prefixes_of_the_store(
    kind: str, copied: bool, tmp_path: Path
) -> None:
    stores: Any = torch.distributed
    if copied and not hasattr(stores.Store, "clone"):
        pytest.skip("this torch copies no store")
    base = (
        stores.TCPStore("localhost", 0, None, True, wait_for_workers=False)
        if kind == "tcp"
        else stores.FileStore(str(tmp_path / "store"))
    )
    address = address_of(base)
    assert address is not None

    def rank_of(job: str) -> Any:
        store = stores.PrefixStore("default", stores.PrefixStore(job, base))
        return _connections(store if copied else Uncopied(store), address)()

    one, other, stranger = rank_of("a"), rank_of("a"), rank_of("b")
    one.set("key", b"1")
    assert other.get("key") == b"1"
    assert not stranger.check(["key"])
    stranger.set("key", b"2")
    assert one.get("key") == b"1"


def test_a_store_that_is_gone_is_named() -> None:
    class Gone:
        def compare_set(self, key: str, expected: str, desired: str) -> bytes:
            raise RuntimeError("Broken pipe\nException raised from somewhere")

    address = StoreAddress(kind="tcp", host="there", port=29500)
    with pytest.raises(CoordinationError, match=r"there:29500.*Broken pipe") as info:
        _connections(Gone(), address)()
    assert info.value.kind == "store_lost"


def test_the_limits_of_a_phase_and_of_the_verdict_after_it() -> None:
    time = [0.0]
    deadlines = Deadlines(timeout=100.0, phases={"write": 10.0, "commit": 5.0})
    clock = OperationClock(deadlines, "save", "c", now=lambda: time[0])
    assert clock.remaining() == 100.0
    time[0] = 20.0
    clock.enter("write")
    time[0] = 24.0
    assert clock.remaining() == 6.0
    assert clock.remaining_for_verdict("commit") == 11.0
    assert clock.remaining_for_verdict("write") == 6.0
    assert clock.remaining_for_verdict("elsewhere") == 76.0
    clock.enter("other")
    assert clock.remaining() == clock.remaining_for_verdict("commit") == 76.0
