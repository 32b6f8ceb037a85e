"""What a load did: returned by ``load``, on every rank its own."""

from __future__ import annotations

from dataclasses import dataclass

from dcp_engine.loader.latest import Latest

__all__ = ["LoadReport"]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The outcome of one load on this rank."""

    save_id: str | None
    """Which save was read (None where a reader of another origin does not say)."""
    latest: Latest | None = None
    """Which checkpoint ``latest_in`` led to, and what it passed over."""
    missing: tuple[str, ...] = ()
    """Keys of the state dict that the checkpoint does not hold (partial loads only)."""
    skipped: tuple[str, ...] = ()
    """Keys of values of their own that another number of ranks saved, and that were left as they
    are (``per_rank="skip"``)."""
    unexpected: tuple[str, ...] = ()
    """Keys of the checkpoint that the state dict did not ask for."""
    bytes_read: int | None = None
    """Bytes of tensor data that all ranks together read (None where unknown)."""
