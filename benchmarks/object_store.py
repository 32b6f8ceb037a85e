"""Loads from a medium as slow as an object store: how many streams are used, and how well.

Ours and torch's DCP in one run, over stores with the same latency of a request and the same pace
of a stream. The medium below is memory, so that nothing but latency, pace and the readers count.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch

import dcp_engine
from benchmarks.io_state import many_small, model_state, state_bytes, tensors_of
from benchmarks.report import machine, markdown_table, number, write_json
from benchmarks.throttled_fs import ThrottledFileSystem
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.fsspec import FsspecReader
from storage_backends.sharded_reader import INFLIGHT_PER_THREAD, ShardedReader
from storage_backends.testing.throttled import ThrottledByteStore

__all__ = ["add_arguments", "main"]

TARGET = 0.8
"""Share of streams x bandwidth that a load must reach."""
OURS, OURS_FSSPEC, DCP = "dcp_engine, ByteStore", "dcp_engine, fsspec", "torch DCP, fsspec"
COLUMNS = (
    "state",
    "streams",
    "way",
    "seconds",
    "MB/s",
    "of streams x pace",
    "requests",
    "streams used",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--size", type=int, default=1024, help="MiB of state (1024)")
    parser.add_argument("--latency", type=float, default=20.0, help="ms a request (20)")
    parser.add_argument("--bandwidth", type=float, default=100.0, help="MB/s a stream (100)")
    parser.add_argument("--streams", default="1,4,8,16", help="allowed streams (1,4,8,16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ours (3); of DCP 1")
    parser.add_argument("--small", type=int, default=20_000, help="tensors of 1 KiB (20000)")
    parser.add_argument("--quick", action="store_true", help="128 MiB, 4 streams, 1 round")
    parser.add_argument("--without-dcp", action="store_true", help="ours only")
    parser.add_argument("--memory", default="/dev/shm", help="a directory in memory (/dev/shm)")
    parser.add_argument("--json", default="object_store.json", help="where to write all numbers")


@dataclass(frozen=True, kw_only=True)
class Medium:
    """What is throttled, and how."""

    latency: float
    bandwidth: float
    streams: int

    @property
    def ideal(self) -> float:
        """Bytes a second of all streams."""
        return self.streams * self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to load one state."""

    state: str
    streams: int
    way: str
    seconds: float
    low: float
    high: float
    nbytes: int
    share: float
    requests: int
    streams_used: int


Load = Callable[[], tuple[int, int]]
"""Loads once; returns the requests made and the streams used."""


def main(options: argparse.Namespace) -> int:
    """Run, print and write the results. Returns 1 if a target is missed."""
    size, rounds = options.size << 20, options.rounds
    streams = [int(text) for text in options.streams.split(",")]
    small = options.small
    if options.quick:
        size, rounds, streams, small = 128 << 20, 1, [4], 2_000
    about = machine()
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(
        f"medium: {options.latency:g} ms a request, {options.bandwidth:g} MB/s a stream; "
        f"rounds: {rounds}, of DCP 1\n"
    )
    rows: list[Row] = []
    states: dict[str, Callable[[], dict[str, Any]]] = {
        f"model, {size >> 20} MiB": lambda: model_state(size),
        f"{small} x 1 KiB": lambda: many_small(small),
    }
    with tempfile.TemporaryDirectory(dir=options.memory) as directory:
        for at, (name, make) in enumerate(states.items()):
            state = make()
            places = _Places(Path(directory) / f"ours{at}", Path(directory) / f"dcp{at}")
            places.save(state, with_dcp=not options.without_dcp)
            # DCP reads with one stream whatever it may use: measured once, it says all.
            for count in streams if at == 0 else streams[-1:]:
                without_dcp = options.without_dcp or count != streams[-1]
                medium = Medium(
                    latency=options.latency / 1e3, bandwidth=options.bandwidth * 1e6, streams=count
                )
                for way, load in _ways(places, state, medium, without_dcp):
                    rows.append(_measure(name, way, load, state, medium, rounds))
                    print(_line(rows[-1]), flush=True)
    print("\n" + markdown_table(COLUMNS, [_cells(row) for row in rows]) + "\n")
    passed = True
    for row in rows:
        if row.way == OURS and row.state.startswith("model"):
            kept = row.share >= TARGET and row.streams_used == row.streams
            passed = passed and kept
            print(
                f"{'pass' if kept else 'MISS'}  {row.streams} streams: {number(row.share)} of "
                f"streams x pace (at least {TARGET}), {row.streams_used} streams used"
            )
    write_json(
        options.json,
        {
            "machine": about,
            "latency": options.latency,
            "bandwidth": options.bandwidth,
            "rows": [asdict(row) for row in rows],
        },
    )
    return 0 if passed else 1


class _Places:
    """One state, saved by both."""

    def __init__(self, ours: Path, dcp: Path) -> None:
        self.ours = ours
        self.dcp = dcp

    def save(self, state: dict[str, Any], *, with_dcp: bool) -> None:
        dcp_engine.save(state, checkpoint_id=self.ours, no_dist=True)
        if with_dcp:
            torch_dcp().save(state, checkpoint_id=self.dcp, no_dist=True)


def torch_dcp() -> Any:
    """torch's package; by name, because nothing of ours may depend on it."""
    return importlib.import_module("torch.distributed.checkpoint")


def _ways(
    places: _Places, state: dict[str, Any], medium: Medium, without_dcp: bool
) -> Iterator[tuple[str, Load]]:
    fsspec.register_implementation("throttled", ThrottledFileSystem, clobber=True)
    limits = {
        "latency": medium.latency,
        "bandwidth": medium.bandwidth,
        "streams": medium.streams,
    }

    def ours() -> tuple[int, int]:
        store = ThrottledByteStore(FileSystemStore(places.ours), **limits)
        reader = ShardedReader(
            lambda _: store,
            places.ours,
            thread_count=medium.streams,
            max_inflight_bytes=medium.streams * INFLIGHT_PER_THREAD,
        )
        dcp_engine.load(state, storage_reader=reader, no_dist=True)
        return store.requests, store.peak_streams

    def ours_fsspec() -> tuple[int, int]:
        fs = ThrottledFileSystem(**limits)
        reader = FsspecReader(f"throttled://{places.ours}", fs=fs, streams=medium.streams)
        dcp_engine.load(state, storage_reader=reader, no_dist=True)
        return fs.requests, fs.peak_streams

    def dcp() -> tuple[int, int]:
        theirs = importlib.import_module("torch.distributed.checkpoint._fsspec_filesystem")
        reader = theirs.FsspecReader(f"throttled://{places.dcp}", **limits)
        torch_dcp().load(state, storage_reader=reader, no_dist=True)
        return reader.fs.fs.requests, reader.fs.fs.peak_streams

    yield OURS, ours
    yield OURS_FSSPEC, ours_fsspec
    if not without_dcp:
        yield DCP, dcp


def _measure(
    name: str, way: str, load: Load, state: dict[str, Any], medium: Medium, rounds: int
) -> Row:
    seconds: list[float] = []
    requests = used = 0
    wanted = [tensor.clone() for tensor in tensors_of(state)]
    for _ in range(1 if way == DCP else rounds):
        for tensor in tensors_of(state):
            tensor.zero_()
        begin = time.perf_counter()
        requests, used = load()
        seconds.append(time.perf_counter() - begin)
        pairs = zip(tensors_of(state), wanted, strict=True)
        if not all(torch.equal(_bits(found), _bits(tensor)) for found, tensor in pairs):
            raise RuntimeError(f"{way} loaded other bytes than were saved")
    median = statistics.median(seconds)
    nbytes = state_bytes(state)
    return Row(
        state=name,
        streams=medium.streams,
        way=way,
        seconds=median,
        low=min(seconds),
        high=max(seconds),
        nbytes=nbytes,
        share=nbytes / median / medium.ideal,
        requests=requests,
        streams_used=used,
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _cells(row: Row) -> list[str]:
    return [
        row.state,
        str(row.streams),
        row.way,
        number(row.seconds),
        number(row.nbytes / row.seconds / 1e6),
        number(row.share),
        f"{row.requests:,}",
        str(row.streams_used),
    ]


def _line(row: Row) -> str:
    return f"{row.state}, {row.streams} streams, {row.way}: {number(row.seconds)} s"
