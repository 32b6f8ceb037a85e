"""A state dict as one rank's offer: columns, source tensors, encoded objects, value digests.

Runs on the calling rank alone; refuses by name whatever could not be loaded again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dcp_engine.collector import collector_paused
from dcp_engine.default_planner import DefaultSavePlanner
from dcp_engine.format.nesting import encode_nesting
from dcp_engine.format.object_codec import EncodedObject, encode_object
from dcp_engine.planning.collective_free import own_share
from dcp_engine.planning.local import LocalSource, make_local_plan
from dcp_engine.saver.compare import digest_replicas
from dcp_engine.staging.versions import outer_tensors
from dcp_engine.state.adapters import GroupRanks, describe_leaves
from dcp_engine.state.aliases import find_aliases
from dcp_engine.state.flatten import FlatState, Leaf, Path, flatten, resolve_stateful
from dcp_engine.state.values import ObjectValue, TensorValue, Value

__all__ = ["PrepareState", "PreparedState", "prepare"]


@dataclass(frozen=True, kw_only=True)
class PreparedState:
    """What one rank brings to a save."""

    source: LocalSource
    """The local plan, and the tensors that its chunk rows stand for."""
    objects: Mapping[str, EncodedObject]
    compared: Mapping[str, int]
    """64-bit digests of the replicated values that are compared between ranks; empty on one rank
    alone."""
    outer: Sequence[tuple[str, torch.Tensor]] = ()
    """The sharded tensors and wrapper subclasses themselves, by key: what a copy in the background
    has to watch beside ``source.tensors``."""


PrepareState = Callable[[], PreparedState]
"""Prepares when a save asks for it: what it raises is a failure of this rank, which all hear of."""


@collector_paused()
def prepare(
    state_dict: Mapping[str, Any],
    *,
    planner: DefaultSavePlanner,
    group: GroupRanks,
    strict_replicas: bool,
    own_share_only: bool = False,
    compare: bool = True,
) -> PreparedState:
    """Describe, encode and digest everything this rank holds.

    With ``own_share_only`` (collective-free saves) what another rank writes is left out. Without
    ``compare`` nothing is digested, for whoever does that later, of a copy.
    """
    resolved, _ = resolve_stateful(state_dict)
    flat = flatten(resolved, flatten_state_dict=planner.flatten_state_dict)
    described = describe_leaves(
        flat.leaves, group=group, flatten_sharded_tensors=planner.flatten_sharded_tensors
    )
    nesting = _nesting(flat, described)
    values = [value for _, parts in described for value in parts]
    if own_share_only:
        values = own_share(values, rank=group.rank)
    tensors = [value for value in values if isinstance(value, TensorValue)]
    objects = {
        value.fqn: encode_object(value.value, fqn=value.fqn)
        for value in values
        if isinstance(value, ObjectValue)
    }
    source = make_local_plan(values, find_aliases(tensors), nesting, rank=group.rank)
    return PreparedState(
        source=source,
        objects=objects,
        compared={}
        if not compare or group.ranks is None or len(group.ranks) == 1
        else digest_replicas(values, objects, strict=strict_replicas),
        outer=outer_tensors(flat.leaves),
    )


def _nesting(flat: FlatState, described: Sequence[tuple[Leaf, Sequence[Value]]]) -> bytes:
    """Where every stored name lies; a wrapper subclass counts as a dict of its parts."""
    if all(len(values) == 1 and values[0].fqn is leaf.fqn for leaf, values in described):
        return encode_nesting(flat.mappings, flat.containers)
    paths: dict[str, Path] = {}
    containers: dict[Path, str] = dict(flat.containers)
    for leaf, values in described:
        for value in values:
            if value.fqn == leaf.fqn:
                paths[value.fqn] = leaf.path
            else:
                containers[leaf.path] = "dict"
                paths[value.fqn] = (*leaf.path, value.fqn[len(leaf.fqn) + 1 :])
    return encode_nesting(paths, containers)
