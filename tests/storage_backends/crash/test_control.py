"""The control: the same explorer, model and reader's question over torch's DCP.

Its known holes (an overwrite that leaves neither the old nor the new checkpoint, metadata that is
synced before it is flushed, names that no directory ``fsync`` makes durable) must be found;
otherwise that none are found here would prove nothing.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as torch_dcp  # noqa: TID251

from storage_backends.testing.crash import Bounds, Explorer, Recorder, Report, one_save
from storage_backends.testing.crash.jobs import CHECKPOINT, content, label_of
from storage_backends.testing.crash.runs import nothing, record_of

# torch warns of no_dist, and of the overwrite.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.checkpoint")

UNREADABLE = "none"


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """torch logs a traceback for each checkpoint that it cannot read: there are hundreds."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


# torch 2.6 does not ask: without a process group it is alone.
ALONE: dict[str, Any] = (
    {"no_dist": True} if "no_dist" in inspect.signature(torch_dcp.save).parameters else {}
)


def save(root: Path, label: str) -> None:
    writer = torch_dcp.FileSystemWriter(root / CHECKPOINT)
    torch_dcp.save(content(label), storage_writer=writer, **ALONE)


def save_old(root: Path) -> None:
    save(root, "old")


def save_new(root: Path, recorder: Recorder) -> None:
    save(root, "new")
    recorder.mark("returned:new")


def read(root: Path) -> str:
    state = content(None)
    reader = torch_dcp.FileSystemReader(root / CHECKPOINT)
    try:
        torch_dcp.load(state, storage_reader=reader, **ALONE)
    except BaseException as error:  # its CheckpointException is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return UNREADABLE
    return label_of(state)


def explored(before: str, bounds: Bounds | None = None) -> Report:
    record = record_of(nothing if before == UNREADABLE else save_old, save_new)
    explorer = Explorer("torch", reader=read, allowed=one_save(before, "new"), bounds=bounds)
    explorer.explore(record)
    report = explorer.report()
    print(f"\n{report.heading()}\n{report.row()}")
    return report


def test_an_overwrite_loses_both_checkpoints() -> None:
    report = explored("old")
    found = {violation.found for violation in report.violations}
    assert "a mixture" in found, "old and new tensors in one checkpoint"
    assert UNREADABLE in found, "neither can be read"


def test_an_overwrite_that_is_killed_loses_both() -> None:
    """No power failure is needed."""
    report = explored("old", Bounds(power_fails=False))
    assert UNREADABLE in {violation.found for violation in report.violations}


def test_a_save_that_returned_is_lost_with_the_power() -> None:
    for before in (UNREADABLE, "old"):
        returned = [v for v in explored(before).violations if "returned:new" in v.marks]
        assert UNREADABLE in {violation.found for violation in returned}
