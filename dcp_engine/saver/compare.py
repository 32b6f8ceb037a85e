"""Do the ranks hold the same values under their replicated keys? Asked, told and refused here.

Belongs here: digesting values, the step ``compare``, and what a difference leads to. Does not
belong here: which values are compared (``prepare``, ``item_based``), and the comparison itself
(``planning.replicas``).
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import torch

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.errors import InvalidPlanError
from dcp_engine.format.digest import digest_value
from dcp_engine.format.object_codec import EncodedObject
from dcp_engine.planning.local import LocalSource
from dcp_engine.planning.replica_classes import Classes, classify
from dcp_engine.planning.replicas import compare_details
from dcp_engine.state.adapters.memory import as_integers
from dcp_engine.state.values import EntryKind, ObjectValue, Value

__all__ = [
    "COMPARED_BYTES",
    "ReplicasDifferWarning",
    "compare_replicas",
    "digest_replicas",
    "digest_source",
]

COMPARED_BYTES = 1 << 20
"""Replicated tensors up to this many bytes are compared between ranks on every save."""


class ReplicasDifferWarning(UserWarning):
    """Ranks hold different values under one replicated key; one of them was stored."""


def digest_replicas(
    values: Sequence[Value], objects: Mapping[str, EncodedObject], *, strict: bool
) -> dict[str, int]:
    """64-bit digests, by name, of the replicated values among ``values`` that are compared: with
    ``strict`` all of them, else objects and small tensors. Objects that are not in ``objects``
    are left out."""
    digests: dict[str, int] = {}
    for value in values:
        if value.kind is not EntryKind.REPLICATED:
            continue
        if isinstance(value, ObjectValue):
            if value.fqn in objects:
                digests[value.fqn] = digest_value(objects[value.fqn].data)
        elif value.tensors:
            tensor = value.tensors[0]
            if strict or tensor.numel() * tensor.element_size() <= COMPARED_BYTES:
                digests[value.fqn] = digest_value(_bytes_of(tensor))
    return digests


def digest_source(
    source: LocalSource, objects: Mapping[str, EncodedObject], *, strict: bool
) -> dict[str, int]:
    """What ``digest_replicas`` returns, of columns. Tensors without elements are left out: they
    have one value."""
    digests = {
        name: digest_value(objects[name].data)
        for name in source.replicated_objects
        if name in objects
    }
    kinds = source.plan.tensors.kinds[source.plan.chunks.tensor]
    for row in np.flatnonzero(kinds == EntryKind.REPLICATED).tolist():
        tensor = source.tensors[row]
        if strict or tensor.nbytes <= COMPARED_BYTES:
            digests[source.names[row]] = digest_value(_bytes_of(tensor))
    return digests


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        # A tenth of the time below, which counts for thousands of small tensors.
        array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        return memoryview(array).cast("B")
    flat = as_integers(tensor.detach().cpu()).contiguous().reshape(-1)
    # A single element may have any stride, which a view as bytes would refuse.
    flat = flat.as_strided(flat.shape, (1,)).view(torch.uint8)
    return memoryview(flat.numpy().data)


def compare_replicas(
    operation: Operation, compared: Mapping[str, int], *, strict: bool, checkpoint: str
) -> Classes | None:
    """Find out which replicated values differ, and on which ranks; on every rank of the save.

    Returns how this rank may digest the same keys next time, so that one digest for each class
    of them is enough to tell.

    Warns ``ReplicasDifferWarning``, or with ``strict`` raises
    ``InvalidPlanError(kind="replicas_differ")`` on the coordinator, and so on all ranks.
    """

    def decide(messages: list[bytes]) -> Decision:
        tables = [msgspec.msgpack.decode(m, type=dict[str, int]) for m in messages]
        comparison = compare_details(tables)
        if comparison.differing and strict:
            raise InvalidPlanError(
                "ranks hold different values under one replicated key: " + comparison.describe(),
                kind="replicas_differ",
                checkpoint=checkpoint,
                tensor=next(iter(comparison.differing)),
                hint="make the ranks agree, or wrap rank-local values in PerRank",
            )
        classes = classify(tables)
        return Decision(
            common=msgspec.msgpack.encode(comparison.describe()),
            per_rank=None if classes is None else [msgspec.msgpack.encode(own) for own in classes],
        )

    common, own = operation.step("compare", lambda: msgspec.msgpack.encode(dict(compared)), decide)
    text = msgspec.msgpack.decode(common, type=str)
    if text:
        warnings.warn(
            f"saving {checkpoint}: ranks hold different values under one replicated key, and only "
            f"one is stored: {text}. Make the ranks agree, or wrap rank-local values in PerRank",
            ReplicasDifferWarning,
            stacklevel=2,
        )
    return msgspec.msgpack.decode(own, type=Classes) if own else None
