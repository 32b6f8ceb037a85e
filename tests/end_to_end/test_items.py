"""The promises of a commit in DCP's life cycle too: a planner of another origin, our own writer."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import dcp_engine as dcp
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.testing.faulty import Fail, Fault, FaultyByteStore
from tests.end_to_end.checkpoints import EXTRA, save, snapshot, state, value_at

CALLS = [
    "make_directory",
    "put",
    "create",
    "write",
    "sync",
    "close",
    "sync_directory",
    "replace",
]


class Planner(dcp.DefaultSavePlanner):
    """Overrides something, so that plans travel as items."""

    def create_local_plan(self) -> dcp.SavePlan:
        return super().create_local_plan()


@pytest.fixture(params=["first save", "overwrite"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    place = tmp_path / "c"
    place.mkdir()
    if request.param == "overwrite":
        save(place, state(1.0))
    return place


@pytest.mark.parametrize("operation", CALLS)
def test_every_call_of_a_save_fails_in_turn(root: Path, operation: str) -> None:
    """The old one stays and nothing else, or the new one is there, in doubt; and the next save
    leaves nothing but its own."""
    in_doubt = 0
    for nth in range(1, 30):
        before = snapshot(root)
        fault = Fault(operation=operation, nth=nth, action=Fail(OSError(errno.EIO, "broken")))
        store = FaultyByteStore(FileSystemStore(root), [fault])
        try:
            save(store, state(2.0), planner=Planner(), extra_files=EXTRA)
        except dcp.CheckpointException as error:
            cause = error.failures[0][0]
            assert isinstance(cause, dcp.CheckpointError), repr(cause)
            assert cause.checkpoint == str(root) and cause.hint
            if error.kind == "commit_in_doubt":
                in_doubt += 1
                assert value_at(root) == 2.0
                save(root, state(1.0), planner=Planner())
                assert value_at(root) == 1.0
                assert len(list(root.iterdir())) == 2
            else:
                assert error.kind == "io_error"
                assert snapshot(root) == before
        else:
            assert not store.fired
            assert nth > 1
            assert value_at(root) == 2.0
            assert in_doubt == (operation == "sync_directory")
            return
    raise AssertionError("the save calls it more often than was thought")
