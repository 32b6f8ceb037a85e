"""Which checkpoint lies at a place now: enough of it to tell it from another.

Belongs here: save ids out of the first bytes of manifests, so that a save need not read 29 MB to
see that nothing changed. Does not belong here: reading a checkpoint (``open_manifest``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dcp_engine.format.digest import xxh3_128_hex
from dcp_engine.format.names import MANIFEST_NAME, parse_rank_manifest_name
from dcp_engine.storage import ByteStore, ReadRange

__all__ = [
    "RankManifest",
    "complete_set",
    "present_checkpoint",
    "present_save_id",
    "rank_manifests",
]

_HEAD_BYTES = 512
_HEAD = re.compile(
    rb'\{"format":"dcp_engine","version":"[0-9.]{1,24}","save_id":"([0-9a-f]{32})",'
    rb'"world_size":([0-9]{1,7}),'
)


@dataclass(frozen=True, kw_only=True)
class RankManifest:
    """One rank's manifest of a collective-free save. ``save_id`` is the token of all ranks."""

    name: str
    rank: int
    save_id: str
    world_size: int | None


def present_save_id(store: ByteStore, name: str = MANIFEST_NAME) -> str | None:
    """The save id in manifest ``name``, or None if there is none.

    A manifest that cannot be read as one still is something there: it is named by its digest,
    ``unreadable:<32 hex>``, so that it can be told from another and be overwritten.
    """
    return _identify(store, name)[0]


def _identify(store: ByteStore, name: str) -> tuple[str | None, int | None]:
    try:
        size = store.size(name)
        head = bytearray(min(size, _HEAD_BYTES))
        if head:
            store.read(name, [ReadRange(0, memoryview(head))])
        match = _HEAD.match(head)
        if match is not None:
            return match.group(1).decode(), int(match.group(2))
        return f"unreadable:{xxh3_128_hex(store.get(name))}", None
    except FileNotFoundError:
        return None, None


def rank_manifests(store: ByteStore) -> list[RankManifest]:
    """The manifests of a collective-free save that lie there, complete or not, by rank."""
    found: list[RankManifest] = []
    for file in store.list("manifest-rank"):
        rank = parse_rank_manifest_name(file.name)
        if rank is None:
            continue
        save_id, world_size = _identify(store, file.name)
        if save_id is not None:
            found.append(
                RankManifest(name=file.name, rank=rank, save_id=save_id, world_size=world_size)
            )
    return sorted(found, key=lambda manifest: manifest.rank)


def complete_set(manifests: list[RankManifest]) -> str | None:
    """The save id that all ranks' manifests carry; None if some are missing or differ."""
    if not manifests:
        return None
    first = manifests[0]
    ranks = [manifest.rank for manifest in manifests if manifest.save_id == first.save_id]
    whole = first.world_size is not None and ranks == list(range(first.world_size))
    return first.save_id if whole and len(ranks) == len(manifests) else None


def present_checkpoint(store: ByteStore) -> str | None:
    """The save id of the committed checkpoint at ``store``: of its manifest, or of a complete set
    of ranks' manifests; None if there is neither."""
    return present_save_id(store) or complete_set(rank_manifests(store))
