"""Names of the keys in the store.

Belongs here: every key that the engine writes, and nothing else. All of them live under
``dcp_engine/<group>/``: those of the handshake beside the sessions, all others under
``<session>/<generation>/``, so that neither an earlier run on the same store nor another group
can be mistaken for this one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STORE_NAME", "HandshakeKeys", "OperationKeys", "group_prefix", "session_prefix"]

STORE_NAME = "dcp_engine/name"
"""Holds a name for the prefixes of the job's store, where torch can copy no store (2.6). It lies
under these prefixes; all other keys are then under the name."""


def group_prefix(group: str) -> str:
    """Everything that one process group writes."""
    return f"dcp_engine/{group}"


def session_prefix(group: str, session: str, generation: int) -> str:
    """Everything that one generation of one session writes."""
    return f"{group_prefix(group)}/{session}/{generation}"


@dataclass(frozen=True)
class HandshakeKeys:
    """Keys by which the ranks of a group agree on a session."""

    prefix: str

    def hello(self, rank: int) -> str:
        """What a rank says first; an earlier run may have left one behind."""
        return f"{self.prefix}/hello/{rank}"

    def welcome(self, nonce: str) -> str:
        """The leader's answer to one nonce. Fresh, because the nonce is random."""
        return f"{self.prefix}/welcome/{nonce}"

    def joined(self, session: str) -> str:
        """Counts the ranks that were welcomed, then those that left the handshake."""
        return f"{self.prefix}/{session}/joined"

    def go(self, session: str) -> str:
        """The leader's verdict on the handshake."""
        return f"{self.prefix}/{session}/go"


@dataclass(frozen=True)
class OperationKeys:
    """Keys of one numbered operation."""

    prefix: str

    @property
    def tally(self) -> str:
        """Reports, failures and events so far (``words.Tally``)."""
        return f"{self.prefix}/c"

    def pulse(self, rank: int) -> str:
        """Heartbeat of a rank, alarm to it (``words.Pulse``)."""
        return f"{self.prefix}/b/{rank}"

    def report(self, rank: int) -> str:
        """The latest report of a rank. Used again in each step."""
        return f"{self.prefix}/r/{rank}"

    def answer(self, rank: int) -> str:
        """The latest answer that is for one rank alone. Used again in each step."""
        return f"{self.prefix}/p/{rank}"

    def event(self, index: int) -> str:
        """The coordinator's events, counted from 1."""
        return f"{self.prefix}/e/{index}"

    @property
    def first_event(self) -> str:
        """Index of the first event that has not been removed, written when the coordinator
        leaves."""
        return f"{self.prefix}/low"

    @property
    def failures(self) -> str:
        """Counts failures before they are published."""
        return f"{self.prefix}/fc"

    def failure(self, index: int) -> str:
        """Failures in the order in which they were announced, counted from 1."""
        return f"{self.prefix}/fail/{index}"

    @property
    def outcome(self) -> str:
        """How the operation failed: written once, by ``compare_set``."""
        return f"{self.prefix}/f"

    @property
    def decision(self) -> str:
        """How the save ends: written once, by ``compare_set``."""
        return f"{self.prefix}/d"

    @property
    def leavers(self) -> str:
        """Counts the ranks that closed the operation; the last one removes the shared keys."""
        return f"{self.prefix}/bye"

    @property
    def shared(self) -> tuple[str, ...]:
        """Those that are there at most once in an operation."""
        return (
            self.first_event,
            self.tally,
            self.failures,
            self.outcome,
            self.decision,
            self.leavers,
        )
