"""The contenders of the I/O benchmark: ways to save and load one state dict.

Belongs here: one small class per way, all with the same three methods. Does not belong here:
clocks and cases.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as torch_dcp  # noqa: TID251

import dcp_engine
from benchmarks.io_state import tensors_of
from dcp_engine.loader.options import SharedReads

__all__ = [
    "Dcp",
    "Ours",
    "Raw",
    "Safetensors",
    "TorchSave",
    "Way",
    "default_threads",
    "drop_cache",
    "remove",
]

_PART = 4 << 20
_BUFFERS = 1024


class Way(Protocol):
    """Saves into and loads from a directory. ``path`` need not exist before ``save``."""

    name: str

    def save(self, state: dict[str, Any], path: str) -> None: ...

    def load(self, state: dict[str, Any], path: str) -> None: ...


def default_threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def drop_cache(path: str) -> None:
    """Have the kernel forget the (clean) pages of all files below ``path``."""
    for root, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


class Ours:
    """``dcp_engine.save`` and ``load``.

    ``bytes_read`` is what the last load says that all ranks read together.
    """

    def __init__(
        self,
        *,
        fsync: bool = True,
        verify: bool = True,
        shared_reads: SharedReads = "auto",
        name: str = "ours",
    ) -> None:
        self.name = name
        self._fsync = fsync
        self._verify = verify
        self.shared_reads = shared_reads
        self.bytes_read: int | None = None

    def save(self, state: dict[str, Any], path: str) -> None:
        writer = dcp_engine.FileSystemWriter(path, sync_files=self._fsync)
        dcp_engine.save(state, storage_writer=writer)

    def load(self, state: dict[str, Any], path: str) -> None:
        reader = dcp_engine.FileSystemReader(path, verify_digests=self._verify)
        report = dcp_engine.load(state, storage_reader=reader, shared_reads=self.shared_reads)
        self.bytes_read = report.bytes_read


class Raw:
    """The floor: ``pwritev`` straight from the tensors' memory into one file a rank, ``preadv``
    straight back in threads, with one fsync. One thread writes: the kernel lets one at a time
    write to a file, and more of them were slower here."""

    def __init__(self, *, fsync: bool = True, threads: int | None = None, rank: int = 0) -> None:
        self.name = "raw floor"
        self._fsync = fsync
        self._threads = threads or default_threads()
        self._file = f"rank{rank}.bin"

    def save(self, state: dict[str, Any], path: str) -> None:
        os.makedirs(path, exist_ok=True)
        descriptor = os.open(f"{path}/{self._file}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for offset, views in _batches(tensors_of(state)):
                _all(os.pwritev, descriptor, views, offset)
            if self._fsync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def load(self, state: dict[str, Any], path: str) -> None:
        descriptor = os.open(f"{path}/{self._file}", os.O_RDONLY)
        try:
            with ThreadPoolExecutor(self._threads) as pool:
                batches = list(_batches(tensors_of(state)))
                list(pool.map(lambda b: _all(os.preadv, descriptor, b[1], b[0]), batches))
        finally:
            os.close(descriptor)


def _batches(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, list[memoryview]]]:
    offset = begin = held = 0
    views: list[memoryview] = []
    for tensor in tensors:
        if not tensor.nbytes:
            continue
        array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        view = memoryview(array).cast("B")
        for at in range(0, tensor.nbytes, _PART):
            part = view[at : at + _PART]
            views.append(part)
            held += part.nbytes
            offset += part.nbytes
            if held >= _PART or len(views) == _BUFFERS:
                yield begin, views
                begin, held, views = offset, 0, []
    if views:
        yield begin, views


def _all(call: Any, descriptor: int, views: list[memoryview], offset: int) -> None:
    total = sum(view.nbytes for view in views)
    done = call(descriptor, views, offset)
    while done < total:  # rare: cut off what is done and go on
        rest, skip = [], done
        for view in views:
            if skip < view.nbytes:
                rest.append(view[skip:])
            skip = max(0, skip - view.nbytes)
        done += call(descriptor, rest, offset + done)


class Dcp:
    """torch's DCP, with its defaults or with its best settings for one machine."""

    def __init__(self, *, fsync: bool = True, best: bool = False) -> None:
        self.name = "DCP best" if best else "DCP"
        self._fsync = fsync
        self._threads = default_threads() if best else 1

    def save(self, state: dict[str, Any], path: str) -> None:
        writer = torch_dcp.FileSystemWriter(
            path, sync_files=self._fsync, thread_count=self._threads, overwrite=True
        )
        torch_dcp.save(state, storage_writer=writer)

    def load(self, state: dict[str, Any], path: str) -> None:
        torch_dcp.load(state, storage_reader=torch_dcp.FileSystemReader(path))


class TorchSave:
    """``torch.save`` of one file, and ``torch.load(mmap=True)`` copied into place."""

    def __init__(self, *, fsync: bool = True) -> None:
        self.name = "torch.save"
        self._fsync = fsync

    def save(self, state: dict[str, Any], path: str) -> None:
        os.makedirs(path, exist_ok=True)
        with open(f"{path}/state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            if self._fsync:
                os.fsync(file.fileno())

    def load(self, state: dict[str, Any], path: str) -> None:
        found = torch.load(f"{path}/state.pt", mmap=True, weights_only=True)
        for target, source in zip(tensors_of(state), tensors_of(found), strict=True):
            target.copy_(source)


class Safetensors:
    """The safetensors library: ``save_file``, and ``safe_open`` copied into place."""

    def __init__(self, *, fsync: bool = True) -> None:
        self.name = "safetensors"
        self._fsync = fsync

    def save(self, state: dict[str, Any], path: str) -> None:
        from safetensors.torch import save_file

        os.makedirs(path, exist_ok=True)
        name = f"{path}/state.safetensors"
        flat = {f"{i:06d}": tensor for i, tensor in enumerate(tensors_of(state))}
        save_file(flat, name)
        if self._fsync:
            descriptor = os.open(name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def load(self, state: dict[str, Any], path: str) -> None:
        from safetensors import safe_open

        with safe_open(f"{path}/state.safetensors", "pt") as file:
            for i, target in enumerate(tensors_of(state)):
                target.copy_(file.get_tensor(f"{i:06d}"))


def remove(path: str) -> None:
    """Remove a checkpoint, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
