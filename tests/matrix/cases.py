"""The matrix: every combination of a call, a fault, and the ranks that it strikes.

Belongs here: which combinations make sense, and picking a sample. Does not belong here: running
them (``in_ranks``, ``run``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from tests.matrix.pairwise import pairwise
from tests.matrix.sites import SITES, Site

__all__ = ["FAULTS", "OPERATIONS", "PARTS", "RAISING", "Case", "full_matrix", "part_of", "sample"]

FAULTS = ("exception", "unpicklable", "keyboard", "exit", "own base", "hang", "kill")
RAISING = FAULTS[:5]
ONE_BY_ONE = ("exception", "keyboard", "own base")
OPERATIONS = ("save", "load", "async thread", "async process")
PARTS = 8
"""Into which the whole matrix of an operation can be split, to be run at different times."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell."""

    site: Site
    world_size: int
    """1: the rank saves and loads with ``no_dist``."""
    coordinator: int
    subset: str
    """``"one"`` (not the coordinator), ``"coordinator"``, ``"all"``."""
    fault: str
    when: str
    host: int | None = None
    """The rank that hosts the store; None: none of them does."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Where the fault strikes, if the call is made there."""
        if self.subset == "all":
            return tuple(range(self.world_size))
        if self.subset == "coordinator":
            return (self.coordinator,)
        return (max(rank for rank in range(self.world_size) if rank != self.coordinator),)

    @property
    def dies(self) -> bool:
        """Ranks die, not only their workers."""
        return self.fault == "kill" and not self.site.in_worker

    @property
    def first_ranks(self) -> tuple[int, ...]:
        """Where the failure strikes that a call of the clean-up follows."""
        method = self.site.first.split()[0].partition(".")[2]
        return (self.coordinator,) if method in ("commit_columns", "finish") else self.ranks

    def __str__(self) -> str:
        ranks = "no_dist" if self.world_size == 1 else f"{self.world_size} ranks"
        host = "" if self.host is None else f", store on {self.host}"
        return (
            f"{self.site.label}: {self.fault} {self.when} on {self.subset} of {ranks}, "
            f"coordinator {self.coordinator}{host}"
        )


def full_matrix(operations: Iterable[str] = OPERATIONS) -> list[Case]:
    """All cells of these operations."""
    return [case for site in SITES if site.operation in operations for case in _cells(site)]


def _cells(site: Site) -> Iterable[Case]:
    places = [(1, 0), *product((2, 4), ("first", "last"))]
    whens = ("before", "after", *(["future"] if site.futures else []))
    for (size, chief), subset, fault, when in product(
        places, ("one", "coordinator", "all"), FAULTS, whens
    ):
        coordinator = size - 1 if chief == "last" else 0
        if size == 1 and (subset != "coordinator" or site.who == "others" or not site.alone):
            continue
        if (
            site.who != "all"
            and subset != {"coordinator": "coordinator", "others": "one"}[site.who]
        ):
            continue
        if fault in ("hang", "kill") and when == "future" and site.futures is False:
            continue
        hosts: list[int | None] = [None]
        # Where the store is matters only to who survives.
        if fault == "kill" and not site.in_worker and size > 1 and subset != "all":
            hosts.append(0)
        for host in hosts:
            yield Case(
                site=site,
                world_size=size,
                coordinator=coordinator,
                subset=subset,
                fault=fault,
                when=when,
                host=host,
            )


def part_of(cases: Sequence[Case], number: int) -> list[Case]:
    """One part, counted from 1: of all calls, faults and ranks a share."""
    return list(cases[number - 1 :: PARTS])


def sample(cases: Iterable[Case]) -> list[Case]:
    """Cells such that all pairs of properties that occur in ``cases`` together occur in them.

    Every call meets the faults of ``ONE_BY_ONE``. With the others calls are told apart by the phase
    of the operation only: a hang or a death is silence for the other ranks, wherever it comes from,
    and each costs seconds; what cannot be pickled goes the way of an exception, and ``SystemExit``
    that of ``KeyboardInterrupt``.
    """
    # Of cells that are as good, what costs least is taken: the first.
    cost = {"hang": 1, "kill": 2}
    return pairwise(sorted(cases, key=lambda case: cost.get(case.fault, 0)), _properties)


def _properties(case: Case) -> Mapping[str, object]:
    site = case.site
    phase = f"{site.operation}/{site.path} {site.phase}"
    return {
        "call": site.label if case.fault in ONE_BY_ONE else phase,
        "fault": case.fault,
        "when": case.when,
        "subset": case.subset,
        "world_size": case.world_size,
        "coordinator": case.coordinator,
        "host": case.host,
    }
