"""Checkpointers with sensible parts.

Belongs here: choosing the parts' arguments. Whoever wants other parts makes them and hands them to
``SyncCheckpointer`` or ``AsyncCheckpointer``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dcp_engine.checkpointer.barriers import Barrier, barrier_class, create_barrier_from_config
from dcp_engine.checkpointer.checkpoint_process import CheckpointProcess
from dcp_engine.checkpointer.checkpoint_reader import CheckpointReader
from dcp_engine.checkpointer.checkpoint_writer import (
    CheckpointWriter,
    CheckpointWriterConfig,
    WriterHook,
)
from dcp_engine.checkpointer.checkpointer import AsyncCheckpointer, SyncCheckpointer
from dcp_engine.checkpointer.config import CheckpointerConfig
from dcp_engine.checkpointer.staging import DefaultStager
from dcp_engine.checkpointer.types import RankInfo
from dcp_engine.registry import BackendRegistry

__all__ = [
    "default_subprocess_init_fn",
    "default_writer_init_fn",
    "make_async_checkpointer",
    "make_sync_checkpointer",
]


def default_subprocess_init_fn(*_: Any) -> None:
    """Nothing to do."""


def default_writer_init_fn(
    rank_info: RankInfo,
    config: CheckpointWriterConfig | None = None,
    barrier_class: type[Barrier] | None = None,
    barrier_args: dict[str, Any] | None = None,
) -> CheckpointWriter:
    """A writer, made in the child.

    Args:
        rank_info: the child's parent among its like.
        config: how long to wait.
        barrier_class, barrier_args: its barrier, if it needs one.
    """
    barrier = None
    if barrier_class is not None:
        barrier = barrier_class.from_config(barrier_args or {}, rank_info)
    return CheckpointWriter(
        config=config if config is not None else CheckpointWriterConfig(),
        rank_info=rank_info,
        barrier=barrier,
    )


def make_sync_checkpointer(
    config: CheckpointerConfig | None = None,
    rank_info: RankInfo | None = None,
    commit_hook: WriterHook | None = None,
) -> SyncCheckpointer:
    """A checkpointer that saves while the caller waits.

    Args:
        config: options of the parts.
        rank_info: by default that of ``torch.distributed``, or of one rank alone where it is not
            initialized.
        commit_hook: called around every commit.

    Example::

        with make_sync_checkpointer() as checkpointer:
            checkpointer.save("/checkpoints/step-1000", {"model": model.state_dict()})
    """
    config = config if config is not None else CheckpointerConfig()
    rank_info = rank_info if rank_info is not None else _default_rank_info()
    # One registry, so that the reader finds what the writer put into memory.
    registry = BackendRegistry()
    return SyncCheckpointer(
        writer=CheckpointWriter(
            config=config.writer_config,
            rank_info=rank_info,
            barrier=create_barrier_from_config(config.barrier_config, rank_info),
            commit_hook=commit_hook,
            registry=registry,
        ),
        reader=CheckpointReader(rank_info=rank_info, registry=registry),
    )


def make_async_checkpointer(
    config: CheckpointerConfig | None = None,
    rank_info: RankInfo | None = None,
    subprocess_init_fn: Callable[..., Any] = default_subprocess_init_fn,
    subprocess_init_args: tuple[Any, ...] = (),
    checkpoint_writer_init_fn: Callable[..., CheckpointWriter] = default_writer_init_fn,
    checkpoint_writer_init_args: dict[str, Any] | None = None,
) -> AsyncCheckpointer:
    """A checkpointer that copies the state and has a process write the copy.

    In a job with ``torch.distributed`` nothing needs to be said: the processes that write commit
    over its store. Without it, ranks that write together need ``config.barrier_config`` of type
    ``"tcp_store"``.

    Args:
        config: options of the parts.
        rank_info: by default that of ``torch.distributed``, or of one rank alone where it is not
            initialized.
        subprocess_init_fn, subprocess_init_args: called first in the child.
        checkpoint_writer_init_fn, checkpoint_writer_init_args: make the child's writer. The
            default one is given ``config.writer_config`` and ``config.barrier_config``; one of
            your own gets ``rank_info`` and the arguments.

    Example::

        with make_async_checkpointer() as checkpointer:
            staged, written = checkpointer.save(path, {"model": model.state_dict()})
            staged.result()   # the model may change
            written.result()  # the checkpoint is committed
    """
    config = config if config is not None else CheckpointerConfig()
    rank_info = rank_info if rank_info is not None else _default_rank_info()
    arguments = dict(checkpoint_writer_init_args or {})
    if checkpoint_writer_init_fn is default_writer_init_fn:
        arguments = {**_default_writer_args(config), **arguments}
    return AsyncCheckpointer(
        checkpoint_stager=DefaultStager(config.staging_config),
        checkpoint_process=CheckpointProcess(
            rank_info=rank_info,
            config=config.process_config,
            subprocess_init_fn=subprocess_init_fn,
            subprocess_init_args=subprocess_init_args,
            checkpoint_writer_init_fn=checkpoint_writer_init_fn,
            checkpoint_writer_init_args=arguments,
        ),
        reader=CheckpointReader(rank_info=rank_info),
    )


def _default_writer_args(config: CheckpointerConfig) -> dict[str, Any]:
    """The barrier's class, not its name: it is imported in the child, and so registered there."""
    arguments: dict[str, Any] = {"config": config.writer_config}
    if config.barrier_config.barrier_type is not None:
        arguments["barrier_class"] = barrier_class(config.barrier_config.barrier_type)
        arguments["barrier_args"] = config.barrier_config.barrier_args
    return arguments


def _default_rank_info() -> RankInfo:
    if dist.is_available() and dist.is_initialized():
        return RankInfo(global_rank=dist.get_rank(), global_world_size=dist.get_world_size())
    return RankInfo(global_rank=0, global_world_size=1)
