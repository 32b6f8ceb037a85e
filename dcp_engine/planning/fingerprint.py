"""16 bytes that stand for a local plan: equal if and only if the global plan would not change.

Belongs here: what goes into the digest, which is everything that a plan decides from. Does not
belong here: keeping plans (``cache``) and comparing values (``replicas``).
"""

from __future__ import annotations

import msgspec
import numpy as np
import xxhash

from dcp_engine.planning.columns import LocalPlan
from dcp_engine.planning.merge import table_digest

__all__ = ["DIGEST_BYTES", "Options", "fingerprint"]

DIGEST_BYTES = 16

Options = dict[str, str | int | float | bool | None]
"""What else the plan depends on, by name: planner options, files per rank, coordinator, world
size. Values of other types have no one encoding."""


def fingerprint(plan: LocalPlan, options: Options) -> bytes:
    """xxh3-128 over names, kinds, dtypes, shapes, owners, boxes, aliases, objects, nesting and
    ``options`` of one rank."""
    state = xxhash.xxh3_128()
    tensors, chunks, objects = plan.tensors, plan.chunks, plan.objects
    state.update(table_digest(tensors))
    for array in (
        tensors.owners,
        plan.aliases,
        chunks.tensor,
        chunks.offsets,
        chunks.sizes,
        objects.kinds,
        objects.owners,
    ):
        state.update(f"{array.dtype.str}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).data)
    # Lengths are part of msgpack, so that nothing can slide from one field into the next.
    state.update(msgspec.msgpack.encode([objects.names, plan.containers, sorted(options.items())]))
    return state.digest()
