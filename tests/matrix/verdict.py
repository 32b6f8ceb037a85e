"""What has to come of a case, and what of that did not.

Belongs here: judging reports. Does not belong here: making them (``in_ranks``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.matrix.cases import RAISING, Case
from tests.matrix.strike import fired

__all__ = ["complaints"]

Report = Mapping[str, Any]

EXITS = {"keyboard": "KeyboardInterrupt", "exit": "SystemExit"}
RAISED = {"rank_failed", "io_error"}
"""Kinds of what was injected, and of the errors that the engine makes of a store's."""
OLD, NEW = 0.0, 1.0
"""What a checkpoint is made of, as the difference to what was saved before the case."""


def complaints(
    case: Case,
    control: str,
    during: Sequence[Report | None],
    afterwards: Sequence[Report],
) -> list[str]:
    """Everything about the case that is not as promised.

    Args:
        control: directory of the strikes.
        during: what each rank saw of the failing operation; None for one that was killed.
        afterwards: what each rank found then.
    """
    struck, first = fired(control, "fault"), fired(control, "first")
    if not struck:
        seen = [report for report in during if report is not None]
        return ["the fault was never reached", *(f"seen: {report['text']}" for report in seen)]
    found: list[str] = []
    for rank, report in enumerate(during):
        if report is not None:
            found += [f"rank {rank}: {text}" for text in _of_one(case, rank, report, struck, first)]
    found += list(_of_all(case, during, afterwards, struck))
    return found


def _of_one(
    case: Case, rank: int, report: Report, struck: list[int], first: list[int]
) -> Iterator[str]:
    site, raised, text = case.site, report["raised"], report["text"]
    more = report["left over"]
    if site.operation.startswith("async") and more == {"socket": 1}:
        more = {}  # two operations overlapped: one connection more is kept for the next
    if more and not _keeps_descriptor(case, rank in struck):
        yield f"left over {more}"
    if rank in struck and case.fault in EXITS and not site.in_worker:
        if raised != EXITS[case.fault]:
            yield f"raised {raised or 'nothing'}, not {EXITS[case.fault]}: {text}"
    elif rank in struck and case.fault in EXITS and site.in_worker:
        # In this process it would be raised again, at once and without waiting for the other
        # ranks; out of a worker it comes as this rank's failure.
        if raised != "CheckpointException" or rank not in report["ranks"]:
            yield f"raised {raised or 'nothing'}: {text}"
    elif _is_harmless(case) and not site.first:
        doubt = case.fault == "kill" and (not case.dies or _store_died(case, struck))
        if raised and not (doubt and report["kind"] == "commit_in_doubt"):
            yield f"raised {raised}, though all was over: {text}"
    elif raised == "CheckpointException":
        yield from _of_verdict(case, rank, report, struck, first)
    elif not _may_raise(case, raised, rank in struck):
        yield f"raised {raised or 'nothing'}: {text}"


def _of_verdict(
    case: Case, rank: int, report: Report, struck: list[int], first: list[int]
) -> Iterator[str]:
    site, text = case.site, report["text"]
    named = first if site.first and _is_harmless(case) else struck
    if _store_died(case, struck) and not (_is_harmless(case) and report["ranks"]):
        named = []  # nor may the verdict on what failed before have come through
    if _all_are_late(case) and set(report["ranks"]) < set(named) and report["ranks"]:
        named = report["ranks"]  # the first to say so stopped the others
    worker_died = rank in struck and case.fault == "kill" and not case.dies
    if worker_died and rank in report["ranks"] and set(report["ranks"]) < set(named):
        named = report["ranks"]  # what its worker knew of the others is gone with it
    if report["ranks"] != named:
        yield f"named {report['ranks']}, not {named}: {text}"
    late = site.first and _is_harmless(case)  # it had failed, and its parent knows of what
    kinds = _kinds(case, struck) | ({"worker_died"} if worker_died and not late else set())
    if report["kind"] not in kinds:
        yield f"kind {report['kind']}, not of {kinds}: {text}"
    if report["kind"] in RAISED and "injected" not in text:
        yield f"does not say what was raised: {text}"


def _is_harmless(case: Case) -> bool:
    """The fault changes nothing about the outcome, but on the rank that it strikes."""
    if case.site.phase == "closing":
        return case.fault in RAISING and case.fault not in EXITS
    return case.site.phase in ("failed", "over")


def _keeps_descriptor(case: Case, struck: bool) -> bool:
    """The store was kept from closing what it had opened."""
    return struck and (case.site.method, case.when) in (("abort", "before"), ("create", "after"))


def _may_raise(case: Case, raised: str, struck: bool) -> bool:
    """Whether a rank may see no ``CheckpointException``."""
    site = case.site
    if raised:
        return site.outside and struck
    # Alone there is nobody who would not wait for a commit that is late; and of a manifest that
    # has its name it does not matter what the store said.
    late = case.world_size == 1 and case.fault == "hang" and site.commit == "decided"
    late |= _all_are_late(case)  # and then nobody is
    # A worker may die with its work done: its parent finds the commit.
    late |= site.in_worker and case.fault == "kill" and site.commit == "decided"
    took_place = site.method == "replace" and case.when == "after"
    return late or (took_place and case.fault in ("exception", "unpicklable"))


def _all_are_late(case: Case) -> bool:
    """All ranks hang where none of them waits for another."""
    apart = case.site.outside or case.site.phase == "closing"
    return case.fault == "hang" and apart and len(case.ranks) == case.world_size


def _store_died(case: Case, struck: list[int]) -> bool:
    return case.dies and case.host is not None and case.host in struck


def _kinds(case: Case, struck: list[int]) -> set[str]:
    kinds = {"commit_in_doubt"} if case.site.commit == "decided" else set()
    if _store_died(case, struck):
        kinds.add("commit_in_doubt")
    if (case.site.first and _is_harmless(case)) or case.fault in RAISING:
        return kinds | RAISED | ({"store_lost"} if _store_died(case, struck) else set())
    if case.fault == "hang":
        return kinds | {"timeout"}
    if not case.dies:
        return kinds | {"worker_died"}
    if _store_died(case, struck):
        return kinds | {"store_lost"}
    return kinds | {"timeout" if case.site.outside else "stalled"}


def _of_all(
    case: Case,
    during: Sequence[Report | None],
    afterwards: Sequence[Report],
    struck: list[int],
) -> Iterator[str]:
    report = afterwards[0]
    survivors = [seen for seen in during if seen is not None]
    before = survivors[0]["value"] if survivors else 1.0
    allowed = [OLD] if case.site.operation == "load" else _content(case)
    if case.site.operation != "load" and _all_are_late(case):
        allowed = [OLD, NEW]
    values = [[value - before for value in seen["then"]] for seen in afterwards]
    if not all(value == values[0] and value in [[a] for a in allowed] for value in values):
        yield f"loads {values} afterwards, not {allowed}"
    if any(seen["last"] != [before + 2] for seen in afterwards):
        yield f"the next save is not what loads: {[seen['last'] for seen in afterwards]}"
    names = [name[:5] for name in report["files"]]
    if names != ["data-", "manif"] and not _may_leave(case, during, struck):
        yield f"left {report['files']}"
    if [name[:5] for name in report["pruned"]] != ["data-", "manif"]:
        yield f"the next save and prune left {report['pruned']}"


def _content(case: Case) -> list[float]:
    return {"before": [OLD], "decided": [OLD, NEW], "after": [NEW]}[case.site.commit]


def _may_leave(case: Case, during: Sequence[Report | None], struck: list[int]) -> bool:
    """A rank that was killed, or hung while the others gave up, leaves what it wrote; a save in
    doubt leaves all; a clean-up that failed leaves what it was to remove."""
    return (
        case.fault in ("hang", "kill")
        or case.site.phase in ("failed", "over")
        or case.site.commit == "decided"
        or case.site.method == "abort"
        or any(seen is not None and seen["kind"] == "commit_in_doubt" for seen in during)
    )
