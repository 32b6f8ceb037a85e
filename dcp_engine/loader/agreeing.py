"""Per-rank values that are the same on all ranks that saved them, told by their digests.

Another number of ranks can load those as if they were replicated. Belongs here: which names that
holds for. Does not belong here: reading digests (the reader), and what becomes of the others
(``per_rank=``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from dcp_engine.format.manifest import Manifest, StoredObject, StoredTensor

__all__ = ["DigestsOf", "agreeing_names"]

DigestsOf = Callable[[int, int], bytes]
"""The digests of the blocks of the chunk that begins in a data file (row of the manifest's) at a
byte of its data section."""

_Place = tuple[int, int]
"""Row of the manifest's data files, and start."""
_Kind = tuple[object, ...]
"""All that the manifest says of a value but where it is: equal on ranks that may agree."""


def agreeing_names(
    manifest: Manifest, names: Iterable[str], digests_of: DigestsOf
) -> frozenset[str]:
    """Those among ``names`` that every rank saved a value of, and all the same one: in type,
    shape, size and digests.

    Digests are read rank by rank, and no further than to the last difference. Equal digests of
    equal sizes are taken for equal bytes: 64 bits for each block guard against accidents, not
    against whoever forges a checkpoint (who could as well forge the values).
    """
    open_questions = {
        name: places for name in names if (places := _places_if_alike(manifest, name)) is not None
    }
    agreed = {name for name, places in open_questions.items() if not places[0]}
    for name in agreed:
        del open_questions[name]
    first = {
        name: [digests_of(*place) for place in places[0]]
        for name, places in open_questions.items()
        if len(places) > 1
    }
    for rank in range(1, manifest.world_size):
        for name, places in list(open_questions.items()):
            if [digests_of(*place) for place in places[rank]] != first[name]:
                del open_questions[name]
    return frozenset(agreed | open_questions.keys())


def _places_if_alike(manifest: Manifest, name: str) -> list[list[_Place]] | None:
    """By rank, where its value's bytes are; None if the manifest tells a difference already, or
    the name is not one of per-rank values."""
    if name in manifest.tensors or name in manifest.objects:
        return None
    tensors: Mapping[int, StoredTensor] = manifest.per_rank_tensors.get(name, {})
    objects: Mapping[int, StoredObject] = manifest.per_rank_objects.get(name, {})
    if tensors and objects:
        return None
    described = (
        [_of_tensor(tensor) for _, tensor in sorted(tensors.items())]
        if tensors
        else [_of_object(stored) for _, stored in sorted(objects.items())]
    )
    if len(described) != manifest.world_size or not _all_equal([kind for kind, _ in described]):
        return None
    return [places for _, places in described]


def _of_tensor(stored: StoredTensor) -> tuple[_Kind, list[_Place]]:
    if 0 in stored.shape:
        return (stored.dtype, stored.shape), []
    chunks = stored.chunks
    boxes = (chunks.offsets.tobytes(), chunks.sizes.tobytes())
    places = zip(chunks.file.tolist(), chunks.start.tolist(), strict=True)
    return (stored.dtype, stored.shape, *boxes), list(places)


def _of_object(stored: StoredObject) -> tuple[_Kind, list[_Place]]:
    kind = (stored.pickled, stored.inline, stored.nbytes)
    there = stored.inline is None and stored.nbytes > 0
    return kind, [(stored.file, stored.start)] if there else []


def _all_equal(kinds: Sequence[_Kind]) -> bool:
    return all(kind == kinds[0] for kind in kinds)
