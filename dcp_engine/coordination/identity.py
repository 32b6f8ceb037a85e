"""Who this process is.

Belongs here: reading it from the machine and from torchrun's environment. Does not belong here:
judging whether some other process still lives.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

from dcp_engine.coordination.interface import RunIdentity

__all__ = ["identity_here", "restart_count", "run_id", "run_identity"]


def run_identity(group: str) -> RunIdentity:
    """Who this process is. ``run_id`` is empty where nothing names the run: two empty run ids
    do not mean the same run."""
    return RunIdentity(
        run_id=run_id(),
        restart_count=restart_count(),
        group=group,
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid=os.getpid(),
    )


def identity_here(of: RunIdentity) -> RunIdentity:
    """Who this process is as a worker of ``of``: the run is that one's, the process this one.

    What a worker writes must not look alive because its parent is, nor the other way round.
    """
    here = run_identity(of.group)
    return dataclasses.replace(here, run_id=of.run_id, restart_count=of.restart_count)


def run_id() -> str:
    """The name that torchrun was given for the run, or nothing."""
    value = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # torchrun calls every run "none" that was started without --rdzv-id
    return "" if value == "none" else value


def restart_count() -> int:
    """How often torchrun has restarted the run."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isdigit() else 0


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""  # not Linux: no process can then be proved dead
