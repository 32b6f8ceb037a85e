"""Which leaves are shared, and which are every rank's own.

In this layer a value that is not sharded belongs to the rank that holds it, marked ``PerRank`` or
not. Belongs here: that rule. Does not belong here: what ``PerRank`` means (``planning``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from dcp_engine.state.adapters.torch_types import (
    has_checkpoint_methods,
    is_dtensor,
    is_sharded_tensor,
)
from dcp_engine.state.adapters.wrapper import is_wrapper, open_wrapper
from dcp_engine.state.flatten import Leaf, flatten, resolve_stateful, unflatten
from dcp_engine.state.per_rank import PerRank

__all__ = ["MarkedState", "is_shared", "shared_names"]


def is_shared(value: Any) -> bool:
    """Whether ``value`` is a part of something that all ranks hold together: a ``DTensor`` (a
    replicated one, too), a ``ShardedTensor``, a value with the ``_Checkpointable`` methods, or a
    wrapper subclass around one."""
    if is_dtensor(value) or is_sharded_tensor(value) or has_checkpoint_methods(value):
        return True
    return is_wrapper(value) and any(is_shared(v) for v in open_wrapper(value).inner.values())


def shared_names(leaves: Collection[Leaf]) -> frozenset[str]:
    """The fully qualified names of the shared ones."""
    return frozenset(leaf.fqn for leaf in leaves if is_shared(leaf.value))


class MarkedState(Mapping[str, Any]):
    """A state dict whose unshared leaves are marked ``PerRank``.

    Nothing is looked at before the save asks, in a step of its own, so that what is wrong with
    one rank's state is heard of on all ranks.

    Args:
        state: gives the state dict; called once.
        shared: names of leaves that are shared, whatever they look like now.
    """

    def __init__(
        self, state: Callable[[], Mapping[str, Any]], shared: Collection[str] = ()
    ) -> None:
        self._state = state
        self._shared = frozenset(shared)
        self._made: dict[str, Any] | None = None

    def __getitem__(self, key: str) -> Any:
        return self._marked()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._marked())

    def __len__(self) -> int:
        return len(self._marked())

    def _marked(self) -> dict[str, Any]:
        if self._made is None:
            self._made = _mark(self._state(), self._shared)
        return self._made


def _mark(state_dict: Mapping[str, Any], shared: frozenset[str]) -> dict[str, Any]:
    resolved, _ = resolve_stateful(state_dict)
    flat = flatten(resolved)
    values = {
        leaf.fqn: leaf.value
        if not leaf.per_rank and (leaf.fqn in shared or is_shared(leaf.value))
        else PerRank(leaf.value)
        for leaf in flat.leaves
    }
    return unflatten(values, flat.mappings, flat.containers)
