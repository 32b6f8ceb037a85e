"""The values of a load that are not tensors: which stored bytes, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from dcp_engine.errors import StateMismatchError
from dcp_engine.format.manifest import Manifest, StoredObject
from dcp_engine.format.object_codec import decode_object, encode_object
from dcp_engine.loader.destination import Path
from dcp_engine.loader.options import LoadOptions
from dcp_engine.planning.load_plan import stored_names
from dcp_engine.planning.missing_keys import missing_key
from dcp_engine.state.values import ObjectValue

__all__ = ["ObjectRequest", "WantedObject", "choose_object"]

Fetch = Callable[[StoredObject], bytes]
"""Returns the verified bytes of a stored object."""


@dataclass(frozen=True, kw_only=True)
class ObjectRequest:
    """One object that the destination asks for. ``path`` is where it goes, or None for the
    context of a wrapper subclass, which must equal the stored one and goes nowhere."""

    value: ObjectValue
    path: Path | None


@dataclass(frozen=True, kw_only=True)
class WantedObject:
    """One request with the stored object, or with every rank's, that answers it."""

    request: ObjectRequest
    stored: tuple[StoredObject, ...]
    as_list: bool

    def read(self, fetch: Fetch, *, checkpoint: str, allow_pickle: bool) -> object:
        """The value to put in place; for a context, None after the comparison."""
        fqn = self.request.value.fqn
        if self.request.path is None:
            self._compare_context(fetch, checkpoint)
            return None
        values = [
            decode_object(
                fetch(stored),
                stored.pickled,
                fqn=fqn,
                checkpoint=checkpoint,
                allow_pickle=allow_pickle,
            )
            for stored in self.stored
        ]
        return values if self.as_list else values[0]

    def _compare_context(self, fetch: Fetch, checkpoint: str) -> None:
        fqn = self.request.value.fqn
        own = encode_object(self.request.value.value, fqn=fqn)
        if own.pickled == self.stored[0].pickled and own.data == fetch(self.stored[0]):
            return
        raise StateMismatchError(
            "the destination is another tensor subclass, or one with another context, than what "
            "was saved",
            kind="type_mismatch",
            checkpoint=checkpoint,
            tensor=fqn.rpartition(".")[0],
            hint="build the destination as the saved tensor was built",
        )


def choose_object(
    request: ObjectRequest,
    manifest: Manifest,
    *,
    rank: int,
    world_size: int,
    options: LoadOptions,
    allow_partial: bool,
    checkpoint: str,
    agreeing: Collection[str] = (),
) -> WantedObject | None:
    """The stored object for ``request``; None if it is to be skipped.

    ``agreeing``: names of per-rank values that are the same on all ranks that saved them.

    Raises ``StateMismatchError`` with kind ``missing_key``, ``type_mismatch`` or
    ``world_size_mismatch``.
    """
    fqn = request.value.fqn
    if (stored := manifest.objects.get(fqn)) is not None:
        return WantedObject(request=request, stored=(stored,), as_list=False)
    by_rank = manifest.per_rank_objects.get(fqn)
    same_world = world_size == manifest.world_size
    if by_rank is not None and same_world and rank in by_rank:
        return WantedObject(request=request, stored=(by_rank[rank],), as_list=False)
    if by_rank is not None and not same_world and fqn in agreeing:
        return WantedObject(request=request, stored=(by_rank[min(by_rank)],), as_list=False)
    if by_rank is not None and not same_world:
        if options.per_rank == "list":
            ordered = tuple(by_rank[r] for r in sorted(by_rank))
            return WantedObject(request=request, stored=ordered, as_list=True)
        if options.per_rank == "skip":
            return None
        raise StateMismatchError(
            f"the value is one of each rank's own, saved by {manifest.world_size} ranks "
            f"({len(by_rank)} of them hold it), and this job has {world_size}",
            kind="world_size_mismatch",
            checkpoint=checkpoint,
            tensor=fqn,
            rank=rank,
            hint='load with per_rank="skip" to keep what is there, or per_rank="list" to get all',
        )
    if fqn in manifest.tensors or fqn in manifest.per_rank_tensors:
        raise StateMismatchError(
            f"the checkpoint holds a tensor, the state dict a {type(request.value.value).__name__}",
            kind="type_mismatch",
            checkpoint=checkpoint,
            tensor=fqn,
            rank=rank,
            hint="put a tensor of that shape into the state dict to load it",
        )
    if allow_partial:
        return None
    raise missing_key(
        request.value, stored_names(manifest), rank=rank, for_this_rank=by_rank is not None
    ).with_context(checkpoint=checkpoint)
