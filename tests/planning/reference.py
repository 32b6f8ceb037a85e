"""A plain, slow planner: loops over ranks, tensors, boxes and elements. The tests compare the
columnar planner with it; it shares no code with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dcp_engine.state.values import EntryKind, TensorValue, Value

Element = tuple[int, ...]
BoxKey = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass
class ReferencePlan:
    """What has to be true of any global plan for these values."""

    names: list[tuple[str, int]]
    """Name and owner (-1: all), in order of first appearance."""
    held: dict[tuple[str, int], dict[BoxKey, list[int]]]
    """Of every tensor, its distinct boxes and who holds each."""
    objects: dict[tuple[str, int], list[int]]


class Refused(Exception):
    def __init__(self, kind: str, name: str) -> None:
        super().__init__(kind, name)
        self.kind = kind
        self.name = name


def plan(ranks: Sequence[Sequence[Value]]) -> ReferencePlan:
    """Merge the ranks' values, or say why they do not fit together."""
    seen: dict[str, tuple[object, ...]] = {}
    for values in ranks:
        for value in values:
            facts: tuple[object, ...] = ("object", value.kind)
            if isinstance(value, TensorValue):
                facts = ("tensor", value.kind)
                if value.kind is not EntryKind.PER_RANK:
                    facts += (value.dtype, tuple(value.shape))
            if seen.setdefault(value.fqn, facts) != facts:
                raise Refused("plan_divergence", value.fqn)
    held: dict[tuple[str, int], dict[BoxKey, list[int]]] = {}
    shapes: dict[tuple[str, int], tuple[int, ...]] = {}
    objects: dict[tuple[str, int], list[int]] = {}
    for rank, values in enumerate(ranks):
        for value in values:
            key = (value.fqn, rank if value.kind is EntryKind.PER_RANK else -1)
            if not isinstance(value, TensorValue):
                objects.setdefault(key, []).append(rank)
                continue
            shapes[key] = tuple(value.shape)
            boxes = held.setdefault(key, {})
            for box in value.boxes:
                holders = boxes.setdefault((box.offsets, box.sizes), [])
                if rank not in holders:
                    holders.append(rank)
    for key, boxes in held.items():
        covered: dict[Element, int] = {}
        for offsets, sizes in boxes:
            for element in elements(offsets, sizes):
                covered[element] = covered.get(element, 0) + 1
        whole = set(elements((0,) * len(shapes[key]), shapes[key]))
        if set(covered) - whole or any(count > 1 for count in covered.values()):
            raise Refused("plan_overlap", key[0])
        if set(covered) != whole:
            raise Refused("plan_gap", key[0])
    order = list(dict.fromkeys(name for name, _ in held))
    names = [key for name in order for key in sorted(k for k in held if k[0] == name)]
    return ReferencePlan(names=names, held=held, objects=objects)


def elements(offsets: Iterable[int], sizes: Iterable[int]) -> Iterable[Element]:
    return itertools.product(*(range(o, o + s) for o, s in zip(offsets, sizes, strict=True)))
