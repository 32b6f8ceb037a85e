"""Which replicated values are held by the same ranks, remembered with a plan.

Where ranks hold different keys (pipeline stages, an object that the coordinator alone has), one
digest a rank cannot tell whether they agree, and their tables of digests have to travel. Once
they have, every rank knows which of its keys are held by the same ranks, and from then on sends
one digest for each such class. Belongs here: finding classes, digesting and comparing by them. Does
not belong here: which values are compared (``saver``), and the comparison key by key
(``replicas``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import xxhash

__all__ = ["Classes", "classify", "same_in_all_classes", "summarise_by_class"]

_ID_BYTES = 8
_CLASS_BYTES = 2
_DIGEST_BYTES = 8
_MOST = 1 << (8 * _CLASS_BYTES)


class Classes(msgspec.Struct, frozen=True, array_like=True):
    """The classes of one rank's keys."""

    id: bytes
    """Of the whole classification: the same on all ranks that took part in it."""
    keys: bytes
    """Digest of the keys that were classified."""
    of_keys: list[int]
    """Per key, sorted, its class."""


@dataclass(frozen=True)
class _Group:
    """Ranks with the same keys."""

    keys: tuple[str, ...]
    ranks: list[int]


def classify(keys_of_ranks: Sequence[Collection[str]]) -> list[Classes] | None:
    """The classes, rank by rank; None if there are too many to be worth it."""
    groups: dict[tuple[str, ...], _Group] = {}
    for rank, keys in enumerate(keys_of_ranks):
        ordered = tuple(sorted(keys))
        groups.setdefault(ordered, _Group(ordered, [])).ranks.append(rank)
    holders: dict[str, int] = {}
    for number, group in enumerate(groups.values()):
        for key in group.keys:
            holders[key] = holders.get(key, 0) | 1 << number
    numbers: dict[int, int] = {}
    for held_by in holders.values():
        numbers.setdefault(held_by, len(numbers))
    if len(numbers) > _MOST:
        return None
    content = msgspec.msgpack.encode([(group.keys, group.ranks) for group in groups.values()])
    id_ = xxhash.xxh3_64_digest(content)
    found: dict[int, Classes] = {}
    for group in groups.values():
        classes = Classes(
            id=id_,
            keys=_digest_keys(group.keys),
            of_keys=[numbers[holders[key]] for key in group.keys],
        )
        found.update(dict.fromkeys(group.ranks, classes))
    return [found[rank] for rank in range(len(keys_of_ranks))]


def summarise_by_class(compared: Mapping[str, int], classes: Classes) -> bytes | None:
    """What a rank sends of its table of 64-bit digests: 8 bytes, and 10 for each class. None if
    these are not the keys that were classified."""
    keys = sorted(compared)
    if _digest_keys(keys) != classes.keys:
        return None
    digests: dict[int, xxhash.xxh3_64] = {}
    for key, of_key in zip(keys, classes.of_keys, strict=True):
        state = digests.setdefault(of_key, xxhash.xxh3_64())
        state.update(compared[key].to_bytes(8, "little"))
    return classes.id + b"".join(
        of_key.to_bytes(_CLASS_BYTES, "little") + digests[of_key].digest()
        for of_key in sorted(digests)
    )


def same_in_all_classes(summaries: Sequence[bytes]) -> bool:
    """Whether ranks that ``summarise_by_class`` hold the same values wherever they hold the same
    keys; False too if they were not classified together."""
    seen: dict[bytes, bytes] = {}
    for summary in dict.fromkeys(summaries):
        if summary[:_ID_BYTES] != summaries[0][:_ID_BYTES]:
            return False
        step = _CLASS_BYTES + _DIGEST_BYTES
        for at in range(_ID_BYTES, len(summary), step):
            of_key = summary[at : at + _CLASS_BYTES]
            digest = summary[at + _CLASS_BYTES : at + step]
            if seen.setdefault(of_key, digest) != digest:
                return False
    return True


def _digest_keys(keys: Sequence[str]) -> bytes:
    return xxhash.xxh3_128_digest(msgspec.msgpack.encode(list(keys)))
