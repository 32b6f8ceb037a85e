"""What a commit has taken the place of, and its removal.

Belongs here: which data a committed save removes, and in which order. Does not belong here: proofs
that an owner is dead (``garbage``), clean-up on request (``prune``).
"""

from __future__ import annotations

from collections.abc import Sequence

from dcp_engine.format.names import OWNER_NAME
from dcp_engine.native_storage import SaveTicket
from dcp_engine.storage import ByteStore
from storage_backends.garbage import DataDirectory, data_directories, is_proved_dead, read_owner
from storage_backends.present import present_save_id, rank_manifests

__all__ = ["remove_directory_files", "remove_replaced_data"]


def remove_replaced_data(store: ByteStore, ticket: SaveTicket, observed: str | None) -> None:
    """Remove the data of save ``observed``, whose place ``ticket``'s save has taken, and orphans
    whose owner is provably dead."""
    # What saves without collectives left here, complete or not, is hidden by our manifest.
    names = [manifest.name for manifest in rank_manifests(store)]
    found = data_directories(store.list("data-"))
    garbage = [directory for directory in found if _is_garbage(store, directory, ticket, observed)]
    # Last of all: who was dead when judged commits nothing after this look at the manifest.
    if present_save_id(store) != ticket.save_id:
        return  # another save was committed meanwhile, and cleans up
    store.delete(names)
    for directory in garbage:
        remove_directory_files(store, [file.name for file in directory.files])


def remove_directory_files(store: ByteStore, names: Sequence[str]) -> None:
    """Remove a data directory's files, the owner record last: a clean-up that is interrupted
    leaves something that the next one can still judge."""
    ordered = sorted(names, key=lambda name: (name.endswith(f"/{OWNER_NAME}"), name))
    store.delete(ordered)


def _is_garbage(
    store: ByteStore, directory: DataDirectory, ticket: SaveTicket, observed: str | None
) -> bool:
    if directory.save_id == ticket.save_id or directory.unreadable:
        return False
    if directory.save_id == observed:
        return not ticket.keep_replaced
    owner = read_owner(store, directory.name)
    return owner is not None and is_proved_dead(owner, ticket.identity)
