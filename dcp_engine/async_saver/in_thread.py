"""A save in this process, off the calling thread."""

from __future__ import annotations

from collections.abc import Callable

from dcp_engine.async_saver.job import SaveJob
from dcp_engine.async_saver.response import Progress
from dcp_engine.async_saver.watched import WatchedOperation
from dcp_engine.async_saver.worker_group import stay_out_of_group
from dcp_engine.metadata import Metadata
from dcp_engine.native_storage import ColumnarWriter
from dcp_engine.saver.save import ColumnContent, ItemContent, begin_save, carry_out

__all__ = ["THREAD_NICE", "save_here"]

THREAD_NICE = 5
"""Less than a worker's: a thread that waits for a processor may hold the interpreter's lock, which
the training then waits for too. It does so for a twentieth of the time that it works. At 5 it gets
a quarter of a processor that the training wants."""


def save_here(
    job: SaveJob,
    content: ColumnContent | ItemContent,
    *,
    tell: Callable[[Progress], None],
    total: int,
    beside_workers: bool,
    beside_training: bool,
    nice: int,
) -> Metadata:
    """Save ``content``.

    Args:
        tell: told how far it is.
        total: bytes of the state on this rank.
        beside_workers: the other ranks save by worker processes, which ask this one first whether
            it joins their group.
        beside_training: nobody waits for it; else it takes all processors.
        nice: beside training, by how much threads that only write give way to others.
    """
    writer = job.writer

    def look(phase: str) -> None:
        written = writer.bytes_written if isinstance(writer, ColumnarWriter) else 0
        tell(Progress(phase=phase, bytes_done=written, bytes_total=total))

    with begin_save(
        job.session,
        checkpoint_id=job.checkpoint_id,
        writer=writer,
        options=job.options,
        number=job.number,
    ) as operation:
        if beside_workers and operation.world_size > 1:
            stay_out_of_group(operation)
        return carry_out(
            WatchedOperation(operation, look),
            content,
            checkpoint_id=job.checkpoint_id,
            writer=writer,
            identity=job.session.identity,
            rank=job.group.rank,
            world_size=job.world_size,
            memory=job.memory,
            options=job.options,
            beside_training=beside_training,
            nice=nice,
        ).metadata
