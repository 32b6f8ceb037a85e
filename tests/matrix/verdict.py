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
        return ["the fault was never reached"]
    found: list[str] = []
    for rank, report in enumerate(during):
        if report is not None:
            found += [f"rank {rank}: {text}" for text in _of_one(case, rank, report, struck, first)]
    found += list(_of_all(case, during, afterwards, struck))
    return found


def _of_one(
    case: Case, rank: int, report: Report, struck: list[int], first: list[int]
) -> Iterator[str]:
    site = case.site
    if more := report["left over"]:
        yield f"left over {more}"
    if rank in struck and case.fault in EXITS:
        if report["raised"] != EXITS[case.fault]:
            yield f"raised {report['raised'] or 'nothing'}, not {EXITS[case.fault]}"
        return
    if site.is_tidying and not site.first:
        if report["raised"]:
            yield f"raised {report['raised']}, though all was over: {report['text']}"
        return
    if report["raised"] != "CheckpointException":
        # Alone there is nobody who would not wait for a commit that is late.
        if not (case.world_size == 1 and case.fault == "hang" and site.commit == "decided"):
            yield f"raised {report['raised'] or 'nothing'}: {report['text']}"
        return
    named = first if site.first else struck
    if _store_died(case, struck) and not site.is_tidying:
        named = []
    if report["ranks"] != named:
        yield f"named {report['ranks']}, not {named}: {report['text']}"
    if report["kind"] not in (kinds := _kinds(case, struck)):
        yield f"kind {report['kind']}, not of {kinds}: {report['text']}"
    if (site.first or case.fault in RAISING) and "injected" not in report["text"]:
        yield f"does not say what was raised: {report['text']}"


def _store_died(case: Case, struck: list[int]) -> bool:
    return case.fault == "kill" and case.host is not None and case.host in struck


def _kinds(case: Case, struck: list[int]) -> set[str]:
    kinds = {"commit_in_doubt"} if case.site.commit == "decided" else set()
    if case.site.first or case.fault in RAISING:
        # Those of the errors that the engine makes of a store's.
        return kinds | {"rank_failed", "io_error"}
    if case.fault == "hang":
        return kinds | {"timeout"}
    return kinds | ({"store_lost", "commit_in_doubt"} if _store_died(case, struck) else {"stalled"})


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
        or case.site.is_tidying
        or any(seen is not None and seen["kind"] == "commit_in_doubt" for seen in during)
    )
