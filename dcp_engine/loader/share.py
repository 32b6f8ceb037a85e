"""The step ``share``: all ranks come to one plan of who reads what for whom.

Belongs here: that step, and what follows from it for this rank. Does not belong here: the
decision (``planning.shared_reads``), bytes (``shared_reads``).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dcp_engine.coordination.data_group import DataGroup
from dcp_engine.coordination.interface import Decision, Operation, Session
from dcp_engine.format.manifest import Manifest
from dcp_engine.loader.shared_reads import BUDGET_BYTES, read_shared
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.planning.load_plan import LoadSource
from dcp_engine.planning.shared_interests import interests_of
from dcp_engine.planning.shared_reads import RankShare, plan_shared_reads, slab_bytes_for
from dcp_engine.planning.shared_wire import (
    decode_interests,
    decode_share,
    encode_interests,
    encode_share,
)

__all__ = ["Part", "agree_on_share"]

_NOTHING = b"-"
"""Common answer: nobody hands anything on."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """This rank's part of the reading."""

    share: RankShare
    store: Any
    """c10d's, for the connections of this load."""
    slab_bytes: int

    def read(
        self,
        reader: ColumnarReader,
        manifest: Manifest,
        source: LoadSource,
        operation: Operation,
        open_groups: ExitStack,
    ) -> int:
        """Read it, and hand on and take what is shared; in a step of ``operation``.

        The connections stay open until ``open_groups`` is left. Returns the number of bytes read.
        """
        group = open_groups.enter_context(
            DataGroup(
                self.store,
                rank=operation.rank,
                world_size=operation.world_size,
                check=operation.check,
            )
        )
        return read_shared(
            reader,
            manifest,
            source,
            self.share,
            group,
            rank=operation.rank,
            slab_bytes=self.slab_bytes,
            check=operation.check,
        )


def agree_on_share(
    operation: Operation, session: Session, manifest: Manifest, source: LoadSource
) -> Part | None:
    """Run the step on this rank. None where no rank hands anything on: all read for themselves."""
    slab_bytes = slab_bytes_for(
        world_size=operation.world_size, block_size=manifest.block_size, budget=BUDGET_BYTES
    )

    stores: list[Any] = []

    def tell() -> bytes:
        store = session.data_store(operation.number) if dist.is_gloo_available() else None
        if store is None:
            return b""
        stores.append(store)
        return encode_interests(interests_of(source.columns))

    def divide(messages: list[bytes]) -> Decision:
        if not all(messages):
            return Decision(common=_NOTHING)
        shares = plan_shared_reads(
            [decode_interests(message) for message in messages],
            block_size=manifest.block_size,
            slab_bytes=slab_bytes,
            round_bytes=BUDGET_BYTES // 2,  # two rounds at a time
        )
        if not any(len(share.rows) for share in shares):
            return Decision(common=_NOTHING)
        return Decision(per_rank=[encode_share(share) for share in shares])

    common, own = operation.step("share", tell, divide)
    if common == _NOTHING:
        return None
    return Part(share=decode_share(own), store=stores[0], slab_bytes=slab_bytes)
