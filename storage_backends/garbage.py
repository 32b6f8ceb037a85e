"""Data directories that no manifest names: whose they are, and whether that process is gone.

Belongs here: the owner record of a save, and the rules by which its owner is proved dead. Does
not belong here: deleting (``commit`` after a save, ``prune`` on demand).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dcp_engine.coordination.interface import RunIdentity
from dcp_engine.errors import DamagedCheckpointError
from dcp_engine.format.names import (
    OWNER_NAME,
    OwnerRecord,
    data_directory,
    decode_owner,
    encode_owner,
    parse_data_directory,
)
from dcp_engine.storage import ByteStore, StoredFile

__all__ = [
    "GIVEN_UP",
    "DataDirectory",
    "data_directories",
    "is_proved_dead",
    "owner_record",
    "read_owner",
]

GIVEN_UP = 0
"""The pid in the owner record of a save that its coordinator gave up while files of other ranks
were still there: no process is ever 0, so anybody may remove them."""

_MAX_OWNER_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class DataDirectory:
    """A ``data-<save id>`` directory as a listing shows it."""

    save_id: str
    files: tuple[StoredFile, ...]

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""
        return data_directory(self.save_id)

    @property
    def nbytes(self) -> int:
        """Size of its files."""
        return sum(file.size for file in self.files)

    @property
    def age(self) -> float | None:
        """Seconds since anything in it changed, by the medium's clock, if it has one."""
        ages = [file.age for file in self.files]
        known = [age for age in ages if age is not None]
        return min(known) if len(known) == len(ages) and known else None

    @property
    def unreadable(self) -> bool:
        """Whether it, or a directory in it, may not be read: what lies there is not known."""
        return any(file.unreadable for file in self.files)


def data_directories(files: Iterable[StoredFile]) -> list[DataDirectory]:
    """The data directories that the names in ``files`` (relative to a checkpoint) lie in.

    A name that is not exactly ``data-<32 hex>`` is nobody's of ours and never appears here.
    """
    found: dict[str, list[StoredFile]] = defaultdict(list)
    for file in files:
        head, slash, _ = file.name.partition("/")
        save_id = parse_data_directory(head)
        if slash and save_id is not None:
            found[save_id].append(file)
    return [
        DataDirectory(save_id=save_id, files=tuple(inside))
        for save_id, inside in sorted(found.items())
    ]


def owner_record(identity: RunIdentity, *, given_up: bool = False) -> bytes:
    """The content of ``owner.json`` for a save of ``identity``."""
    return encode_owner(
        OwnerRecord(
            run_id=identity.run_id,
            restart_count=identity.restart_count,
            group=identity.group,
            host=identity.host,
            boot_id=_boot_and_namespace(identity.boot_id),
            pid=GIVEN_UP if given_up else identity.pid,
        )
    )


def read_owner(store: ByteStore, directory: str) -> OwnerRecord | None:
    """Who writes, or wrote, into ``directory``; None if it does not say, or not readably."""
    try:
        return decode_owner(store.get(f"{directory}/{OWNER_NAME}", limit=_MAX_OWNER_BYTES))
    except (FileNotFoundError, EOFError, ValueError, DamagedCheckpointError):
        return None


def is_proved_dead(owner: OwnerRecord, identity: RunIdentity) -> bool:
    """Whether the save of ``owner`` can no longer be committed, as ``identity`` can tell.

    Either it was given up, or its run was restarted since, or its process ran on this host, since
    this boot, in this namespace of process numbers, and is gone. Anything else proves nothing.
    """
    if owner.pid == GIVEN_UP:
        return True
    same_run = bool(owner.run_id) and owner.run_id == identity.run_id
    if same_run and owner.restart_count < identity.restart_count:
        return True
    same_place = owner.host == identity.host and owner.boot_id == _boot_and_namespace(
        identity.boot_id
    )
    return bool(identity.boot_id) and same_place and not _process_exists(owner.pid)


def _boot_and_namespace(boot_id: str) -> str:
    """Two containers on one host can share its name and boot id, yet number processes apart."""
    try:
        namespace: object = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = "unknown"
    return f"{boot_id}/{namespace}"


def _process_exists(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return False
        return _answers_signals(pid)
    except OSError:
        return True
    # "pid (name) state ...": a zombie runs no more, its parent has only not asked yet.
    return status.rpartition(b")")[2].split()[:1] not in ([b"Z"], [b"X"])


def _answers_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
