"""What the I/O table is judged by.

Belongs here: every target, as a function of the measured cases. Does not belong here: measuring.
A target whose case was not run is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.io_case import BLOCK_BYTES, FLOOR, Case
from benchmarks.io_cases import (
    LOAD_SMALL,
    LOAD_WARM,
    PEAK,
    RANGE,
    SAVE_DISK,
    SAVE_FSYNC,
    SAVE_SMALL,
    SAVE_TMPFS,
    UNVERIFIED,
)
from benchmarks.io_rank_cases import (
    COLUMNS_OF_2,
    GRID,
    READ_RATIO,
    REPLICAS,
    ROWS_OF_1,
    ROWS_OF_4,
    WIDE_COLUMNS,
    cold_name,
    save_name,
)
from benchmarks.measure import processor_ratio, ratio
from benchmarks.report import Target

__all__ = ["io_targets"]

OF_FLOOR: tuple[tuple[str, str, float], ...] = (
    (SAVE_FSYNC, "ours", 0.95),
    (SAVE_DISK, "ours", 0.85),
    (SAVE_TMPFS, "ours", 0.85),
    (save_name(2), "ours", 0.9),
    (save_name(4), "ours", 0.9),
    (LOAD_WARM, "ours", 0.6),
    (LOAD_WARM, UNVERIFIED, 0.85),
    (cold_name(2), "ours", 0.85),
    (cold_name(4), "ours", 0.85),
    (ROWS_OF_4, "ours", 0.5),
    (ROWS_OF_1, "ours", 0.5),
    (COLUMNS_OF_2, "ours", 0.3),
    (WIDE_COLUMNS, "ours", 0.3),
)
"""Case, column, the least share of the raw floor's speed."""

ROWS = {
    "ours, once": 1.02,
    "ours, once, no digests": 1.02,
    "ours, direct, no digests": 1.02,
    "ours, direct": 1.15,
}
BLOCKS = {
    "ours, once": 1.1,
    "ours, once, no digests": 1.1,
    "ours, direct, no digests": 1.1,
}
"""With columns, "direct" with digests on is reported, not judged."""
BYTES_READ: Mapping[str, Mapping[str, float]] = {
    ROWS_OF_4: ROWS,
    ROWS_OF_1: ROWS,
    COLUMNS_OF_2: BLOCKS,
    WIDE_COLUMNS: BLOCKS,
    GRID: BLOCKS,
    REPLICAS: {"ours, once": 1.1},
}
"""Bytes that the job reads, of those it needs, at most."""

PROCESSOR = ((SAVE_FSYNC, 1.5), (LOAD_WARM, 1.5))
SMALL = ((SAVE_SMALL, 10.0), (LOAD_SMALL, 8.0))
"""Microseconds a tensor."""
BUDGET_MIB = 256.0


def io_targets(cases: Sequence[Case]) -> Iterator[Target]:
    """Judge what was run, in the order of the table."""
    found = {case.name: case for case in cases}
    for name, column, least in OF_FLOOR:
        if name in found:
            share = ratio(found[name].columns, column, FLOOR)
            text = f"{name}, {column}, of the raw floor"
            yield Target(text=text, measured=share, limit=least, at_least=True)
    if LOAD_WARM in found:
        faster = ratio(found[LOAD_WARM].columns, "ours", "DCP")
        text = f"{LOAD_WARM}, ours, times as fast as DCP"
        yield Target(text=text, measured=faster, limit=2.5, at_least=True)
    for name, most in PROCESSOR:
        if name in found:
            used = processor_ratio(found[name].columns, "ours", FLOOR)
            yield Target(text=f"{name}, processor time of the floor's", measured=used, limit=most)
    for name, limits in BYTES_READ.items():
        if name in found:
            for column, most in limits.items():
                read = found[name].counts[column][READ_RATIO]
                text = f"{name}, {column}, {READ_RATIO}"
                yield Target(text=text, measured=read, limit=most)
    yield from _small(found)


def _small(found: Mapping[str, Case]) -> Iterator[Target]:
    for name, most in SMALL:
        if name in found:
            case = found[name]
            each = case.columns["ours"].wall.median / case.tensors * 1e6
            yield Target(text=f"{name}, a tensor", measured=each, limit=most, unit="us")
    if SAVE_SMALL in found:
        size = found[SAVE_SMALL].counts["ours"]["bytes on disk / payload"]
        yield Target(text=f"{SAVE_SMALL}, size on disk of payload", measured=size, limit=1.2)
    if RANGE in found:
        case = found[RANGE]
        took = case.columns["ours"].wall.median * 1e3
        yield Target(text=RANGE, measured=took, limit=20.0, unit="ms")
        beyond = case.counts["ours"]["bytes beyond the range"]
        text = f"{RANGE}, bytes read beyond the range"
        yield Target(text=text, measured=beyond, limit=2.0 * BLOCK_BYTES, unit="B")
    if PEAK in found:
        for what, mib in found[PEAK].counts["ours"].items():
            text = f"{PEAK}, {what}"
            yield Target(text=text, measured=mib, limit=BUDGET_MIB, unit="MiB")
