"""What a reader may get, by what the program has been told so far.

Belongs here: the promises "committed or absent" and "committed means durable" as functions of
marks. Marks are ``returned:<label>``, ``failed:<label>`` (it raised, so nothing of it may count)
and ``doubt:<label>`` (it raised ``commit_in_doubt``). Does not belong here: any I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Rule", "always", "one_after_another", "one_of_several", "one_save", "shares"]

Rule = Callable[[Sequence[str]], frozenset[str]]
"""The words that are right after the marks so far."""


def _told(marks: Sequence[str], word: str) -> list[str]:
    return [mark.partition(":")[2] for mark in marks if mark.startswith(f"{word}:")]


def one_save(before: str, after: str) -> Rule:
    """One save of ``after`` over ``before``: either, until it returned or failed."""

    def rule(marks: Sequence[str]) -> frozenset[str]:
        if _told(marks, "returned"):
            return frozenset({after})
        if _told(marks, "failed"):
            return frozenset({before})
        return frozenset({before, after})

    return rule


def one_of_several(before: str, labels: Sequence[str]) -> Rule:
    """Saves of all of ``labels`` at once, over ``before``: one of those that did not fail, and
    ``before`` only until the first returned."""

    def rule(marks: Sequence[str]) -> frozenset[str]:
        failed = _told(marks, "failed")
        allowed = {label for label in labels if label not in failed}
        if not _told(marks, "returned"):
            allowed.add(before)
        return frozenset(allowed)

    return rule


def one_after_another(labels: Sequence[str]) -> Rule:
    """Saves that each wait for the one before: nothing older than the last that returned."""

    def rule(marks: Sequence[str]) -> frozenset[str]:
        returned = [labels.index(label) for label in _told(marks, "returned")]
        return frozenset(labels[max(returned, default=0) :])

    return rule


def shares(before: str, after: str, ranks: int) -> Rule:
    """Ranks that do not talk: ``before`` or ``after``, which is there when all have returned."""

    def rule(marks: Sequence[str]) -> frozenset[str]:
        if len(_told(marks, "returned")) == ranks:
            return frozenset({after})
        return frozenset({before, after})

    return rule


def always(label: str) -> Rule:
    """One checkpoint, whatever happens."""

    def rule(marks: Sequence[str]) -> frozenset[str]:
        return frozenset({label})

    return rule
