"""What the ranks of an operation send each other, as bytes.

Belongs here: the structs and their encoding. Does not belong here: when they are sent.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from dcp_engine.coordination.failures import FailureRecord
from dcp_engine.coordination.interface import OperationKind

__all__ = ["Event", "FailureVerdict", "Heading", "Report", "decode", "encode"]


class Heading(msgspec.Struct, frozen=True, array_like=True):
    """Which operation a message belongs to."""

    number: int
    kind: OperationKind
    checkpoint: str
    coordinator: int

    def describe(self) -> str:
        """For messages: ``save 3 of 'step-7' (coordinator 0)``."""
        return f"{self.kind} {self.number} of {self.checkpoint!r} (coordinator {self.coordinator})"


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What ``local`` returned on one rank."""

    heading: Heading
    step: int
    """Counts the steps of the operation from 0."""
    phase: str
    payload: bytes


class Event(msgspec.Struct, frozen=True, array_like=True):
    """What the coordinator tells all ranks. Ticks say that it lives, and where its last verdict
    is: a rank that was slow to count its report may have missed it."""

    kind: Literal["tick", "verdict", "failure"]
    step: int = -1
    """Of the verdict, or of the last one before the tick; -1 if there was none."""
    common: bytes = b""
    has_answers: bool = False
    """Each rank has an answer of its own under ``OperationKeys.answer``."""
    last_verdict: int = 0
    """Of a tick: the number of the event that was the last verdict."""


class FailureVerdict(msgspec.Struct, frozen=True, array_like=True):
    """Why the operation failed, the same for all ranks."""

    records: list[FailureRecord]
    message: str | None = None
    kind: str | None = None
    phase: str = ""
    """Where the coordinator was; empty where it could not say."""


_Message = TypeVar("_Message", bound=msgspec.Struct)


def encode(message: msgspec.Struct) -> bytes:
    """Bytes of any message of this module."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: type[_Message]) -> _Message:
    """The message of that kind; raises ``msgspec.DecodeError`` if it is none."""
    return msgspec.msgpack.decode(data, type=kind)
