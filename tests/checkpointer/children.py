"""What the children of the tests run; importable there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from dcp_engine.checkpointer import CheckpointWriter, CheckpointWriterConfig, RankInfo, WriterHook


def leave_mark(directory: str, name: str, text: str = "") -> None:
    """Say that something happened, by a file in ``directory``."""
    (Path(directory) / name).write_text(text)


def set_up(directory: str, text: str) -> None:
    """A ``subprocess_init_fn``."""
    leave_mark(directory, "initialized", f"{text} {os.getpid()}")


def fail_to_set_up() -> None:
    """Another."""
    raise ValueError("the child cannot be set up")


def never_be_set_up() -> None:
    """Another."""
    time.sleep(600)


class Told(WriterHook):
    """Leaves the keyword arguments; fails, ends or kills the child where they say so."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        leave_mark(self._directory, "pre_commit", repr(kwargs))
        if kwargs.get("fail"):
            raise RuntimeError(f"asked to fail: {kwargs['fail']}")
        if kwargs.get("unpicklable"):
            raise Unpicklable(lambda: 0)
        if kwargs.get("die"):
            os._exit(7)

    def post_commit(self, path: str, **kwargs: Any) -> None:
        leave_mark(self._directory, "post_commit", repr(kwargs))


class Unpicklable(Exception):
    """Cannot come over as what it is."""


def hooked_writer(rank_info: RankInfo, directory: str) -> CheckpointWriter:
    """A ``checkpoint_writer_init_fn``."""
    return CheckpointWriter(CheckpointWriterConfig(), rank_info, commit_hook=Told(directory))


class OwnWriter:
    """A writer of another origin: no checkpoint, but what it sees and does to it."""

    def __init__(self, directory: str, hang: bool) -> None:
        self._directory = directory
        self._hang = hang

    def write(self, path: str, state_dict: dict[str, Any], **kwargs: Any) -> None:
        tensor = state_dict["w"]
        leave_mark(self._directory, path, f"{type(tensor).__name__} {tensor.tolist()}")
        tensor.mul_(-1)
        if kwargs.get("sleep"):
            time.sleep(kwargs["sleep"])

    def close(self) -> None:
        leave_mark(self._directory, "closed")
        if self._hang:
            time.sleep(600)


def own_writer(rank_info: RankInfo, directory: str, hang: bool = False) -> Any:
    """A ``checkpoint_writer_init_fn``."""
    torch.set_num_threads(1)
    return OwnWriter(directory, hang)
