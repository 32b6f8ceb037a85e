"""The kit for whoever writes a storage backend.

Doubles that fail (``FaultyByteStore``, ``FaultyStorageWriter``, ``FaultyStorageReader``), that
count (``RecordingByteStore``) and that are slow (``ThrottledByteStore``), and contracts: pytest
classes to derive from (``ByteStoreContract``, ``StorageWriterContract``,
``StorageReaderContract``). Only the contracts need pytest, so nothing is imported before it is
asked for. How to use them: ``docs/extending.md``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage_backends.testing.contracts.byte_store import ByteStoreContract
    from storage_backends.testing.contracts.medium import Medium
    from storage_backends.testing.contracts.reader import StorageReaderContract
    from storage_backends.testing.contracts.writer import StorageWriterContract
    from storage_backends.testing.faulty import (
        Delay,
        Fail,
        Fault,
        FaultyByteStore,
        FlipBit,
        Hang,
        LoseReply,
        ShortWrite,
        StaleListing,
        TornWrite,
        disk_full,
    )
    from storage_backends.testing.faulty_calls import (
        CallFault,
        FaultyStorageReader,
        FaultyStorageWriter,
        faulty_reader,
        faulty_writer,
    )
    from storage_backends.testing.recording import RecordedCall, RecordingByteStore
    from storage_backends.testing.throttled import ThrottledByteStore
    from storage_backends.testing.wrapping import WrappingByteStore

__all__ = [
    "ByteStoreContract",
    "CallFault",
    "Delay",
    "Fail",
    "Fault",
    "FaultyByteStore",
    "FaultyStorageReader",
    "FaultyStorageWriter",
    "FlipBit",
    "Hang",
    "LoseReply",
    "Medium",
    "RecordedCall",
    "RecordingByteStore",
    "ShortWrite",
    "StaleListing",
    "StorageReaderContract",
    "StorageWriterContract",
    "ThrottledByteStore",
    "TornWrite",
    "WrappingByteStore",
    "disk_full",
    "faulty_reader",
    "faulty_writer",
]

_FAULTS = (
    "Delay Fail Fault FaultyByteStore FlipBit Hang LoseReply ShortWrite StaleListing TornWrite "
    "disk_full"
)
_CALLS = "CallFault FaultyStorageReader FaultyStorageWriter faulty_reader faulty_writer"
_MODULES = {
    "ByteStoreContract": "contracts.byte_store",
    "Medium": "contracts.medium",
    "StorageReaderContract": "contracts.reader",
    "StorageWriterContract": "contracts.writer",
    **dict.fromkeys(_FAULTS.split(), "faulty"),
    **dict.fromkeys(_CALLS.split(), "faulty_calls"),
    "RecordedCall": "recording",
    "RecordingByteStore": "recording",
    "ThrottledByteStore": "throttled",
    "WrappingByteStore": "wrapping",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
