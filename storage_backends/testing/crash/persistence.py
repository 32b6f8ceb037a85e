"""What may be on the disk after a crash: the persistence model.

The weakest that POSIX and the usual Linux file systems (ext4 with ordered and with writeback
journal, xfs, btrfs) allow together, so that what holds here holds on each of them:

* Bytes of a file reach the disk in any order, each block of 4096 alone, until ``fsync`` of that
  file returned: then all of them are there, and its size. A block that did not arrive inside the
  size that did reads as zeros.
* Entries of a directory (create, link, unlink, rename, mkdir, rmdir) reach the disk in any order,
  each alone, until ``fsync`` of the directory returned; a rename moves as one. ``fsync`` of a file
  does not make its name durable.
* After ``fsync`` failed, what it should have made durable may be lost whatever is synced later.
* Nothing else promises anything: not closing a file, not ``sync_file_range``, not time.

Belongs here: following a record, and the choices at each of its positions. Does not belong here:
recording (``recorder``), and judging what a choice leaves (``explorer``).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from storage_backends.testing.crash.operations import (
    ROOT,
    Create,
    Image,
    Link,
    MakeDirectory,
    Mark,
    Operation,
    Record,
    RemoveDirectory,
    Rename,
    Sync,
    SyncAll,
    SyncFailed,
    Truncate,
    Unlink,
    Write,
)

__all__ = ["BLOCK", "Bounds", "DiskAtPosition", "choices"]

BLOCK = 4096
"""Bytes that reach the disk together or not at all."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How many choices are made at one position of a record."""

    power_fails: bool = True
    """False: only the program dies, and all that it did arrives."""
    exhaustive: int = 6
    """Up to so many pending units, every subset of them is tried; 2 to the power of it."""
    pairs: int = 10
    """Up to so many, every pair is lost, too."""
    random: int = 16
    """Subsets drawn at random, where not all are tried."""


@dataclass(frozen=True)
class _Entries:
    """Changes of directory entries that happen at once."""

    at: int
    changes: tuple[tuple[int, str, int | None], ...]

    def concerns(self, node: int) -> bool:
        return any(directory == node for directory, _, _ in self.changes)


@dataclass(frozen=True)
class _Block:
    """Bytes of one block of a file."""

    at: int
    node: int
    offset: int
    data: bytes

    def concerns(self, node: int) -> bool:
        return self.node == node


@dataclass(frozen=True)
class _Size:
    """The size of a file: at least so much, or, ``cut``, just so much."""

    at: int
    node: int
    size: int
    cut: bool

    def concerns(self, node: int) -> bool:
        return self.node == node


_Unit = _Entries | _Block | _Size


class DiskAtPosition:
    """A disk that follows a record: what is durable, and the units that are not yet.

    ``advance`` goes one step on; ``pending`` counts the units; ``image`` is the disk on which only
    the chosen ones have arrived.
    """

    def __init__(self, record: Record) -> None:
        self._entries: dict[tuple[int, str], tuple[int | None, int]] = {
            place: (node, -1) for place, node in record.entries.items()
        }
        self._files: dict[int, bytes] = dict(record.files)
        # With everything arrived: what a rename moves is what is there by now.
        self._now: dict[tuple[int, str], int] = dict(record.entries)
        self._directories = {ROOT} | {
            node for node in record.entries.values() if node not in record.files
        }
        self._units: list[_Unit] = []
        self._lost: list[_Unit] = []
        """Whose ``fsync`` failed."""
        self._at = 0

    @property
    def pending(self) -> int:
        """Units of which each may or may not have arrived."""
        return len(self._units) + len(self._lost)

    def advance(self, operation: Operation) -> None:
        """Follow one step."""
        at = self._at
        self._at += 1
        match operation:
            case Sync(node):
                self._settle(lambda unit: unit.concerns(node))
            case SyncAll():
                self._settle(lambda unit: True)
            case SyncFailed(node):
                self._lost += [unit for unit in self._units if unit.concerns(node)]
                self._units = [unit for unit in self._units if not unit.concerns(node)]
            case Write(node, offset, data):
                self._units += _blocks(at, node, offset, data)
                self._units.append(_Size(at, node, offset + len(data), False))
            case Truncate(node, size):
                self._units.append(_Size(at, node, size, True))
            case Mark():
                pass
            case _:
                self._units.append(_Entries(at, self._changes(operation)))

    def _changes(self, operation: Operation) -> tuple[tuple[int, str, int | None], ...]:
        match operation:
            case Create(directory, name, node):
                self._files[node] = b""
                changes: list[tuple[int, str, int | None]] = [(directory, name, node)]
            case MakeDirectory(directory, name, node):
                self._directories.add(node)
                changes = [(directory, name, node)]
            case Link(directory, name, node):
                changes = [(directory, name, node)]
            case Unlink(directory, name) | RemoveDirectory(directory, name):
                changes = [(directory, name, None)]
            case Rename(directory, name, to_directory, to_name):
                moved = self._now[(directory, name)]
                changes = [(directory, name, None), (to_directory, to_name, moved)]
            case _:
                raise TypeError(f"{type(operation).__name__} changes no directory")
        for directory, name, changed in changes:
            if changed is None:
                self._now.pop((directory, name), None)
            else:
                self._now[(directory, name)] = changed
        return tuple(changes)

    def _settle(self, is_durable: Callable[[_Unit], bool]) -> None:
        durable = [unit for unit in self._units if is_durable(unit)]
        self._units = [unit for unit in self._units if not is_durable(unit)]
        self._entries, self._files = self._applied(durable)
        # Bytes that were lost and written again are durable by the second time.
        self._lost = [unit for unit in self._lost if not any(_covers(d, unit) for d in durable)]

    def _applied(
        self, units: Iterable[_Unit]
    ) -> tuple[dict[tuple[int, str], tuple[int | None, int]], dict[int, bytes]]:
        """Entries and files with ``units``, in the order in which they were done, on them."""
        entries = dict(self._entries)
        files = dict(self._files)
        touched: dict[int, bytearray] = {}
        for unit in units:
            if isinstance(unit, _Entries):
                for directory, name, node in unit.changes:
                    # What is durable may be younger: a rename was synced with the other directory.
                    if entries.get((directory, name), (None, -1))[1] < unit.at:
                        entries[(directory, name)] = (node, unit.at)
                continue
            content = touched.get(unit.node)
            if content is None:
                content = touched[unit.node] = bytearray(files.get(unit.node, b""))
            if isinstance(unit, _Size):
                if unit.cut:
                    del content[unit.size :]
                _extend(content, unit.size)
            else:
                end = unit.offset + len(unit.data)
                _extend(content, end)
                content[unit.offset : end] = unit.data
        files.update((node, bytes(content)) for node, content in touched.items())
        return entries, files

    def image(self, kept: Collection[int]) -> Image:
        """The tree when of the pending units only those with the numbers ``kept`` arrived."""
        units = sorted(self._units + self._lost, key=lambda unit: unit.at)
        entries, files = self._applied(units[number] for number in sorted(kept))
        below: dict[int, list[tuple[str, int]]] = {}
        for (directory, name), (node, _) in entries.items():
            if node is not None:
                below.setdefault(directory, []).append((name, node))
        found: dict[str, bytes] = {}
        directories: set[str] = set()
        waiting = [("", ROOT)]
        while waiting:
            path, directory = waiting.pop()
            for name, node in below.get(directory, ()):
                full = f"{path}{name}"
                if node in self._directories:
                    directories.add(full)
                    waiting.append((f"{full}/", node))
                else:
                    found[full] = files.get(node, b"")
        return Image(files=found, directories=frozenset(directories))

    def whole(self) -> Image:
        """The tree as the running system sees it: every unit arrived."""
        return self.image(range(self.pending))


def _covers(durable: _Unit, lost: _Unit) -> bool:
    if not (isinstance(durable, _Block) and isinstance(lost, _Block)):
        return False
    return (
        durable.node == lost.node
        and durable.offset <= lost.offset
        and durable.offset + len(durable.data) >= lost.offset + len(lost.data)
    )


def _blocks(at: int, node: int, offset: int, data: bytes) -> Iterator[_Block]:
    begin = 0
    while begin < len(data):
        end = min(len(data), begin + BLOCK - (offset + begin) % BLOCK)
        yield _Block(at, node, offset + begin, data[begin:end])
        begin = end


def _extend(content: bytearray, size: int) -> None:
    if len(content) < size:
        content.extend(bytes(size - len(content)))


def choices(units: int, bounds: Bounds, generator: random.Random) -> Iterator[frozenset[int]]:
    """Which of ``units`` pending units arrived: each choice once, the whole and nothing first."""
    everything = frozenset(range(units))
    tried: set[frozenset[int]] = set()
    for kept in _candidates(units, everything, bounds, generator):
        if kept not in tried:
            tried.add(kept)
            yield kept


def _candidates(
    units: int, everything: frozenset[int], bounds: Bounds, generator: random.Random
) -> Iterator[frozenset[int]]:
    yield everything
    if not bounds.power_fails:
        return
    yield frozenset()
    if units <= bounds.exhaustive:
        for count in range(units + 1):
            yield from map(frozenset, itertools.combinations(range(units), count))
        return
    for unit in range(units):
        yield frozenset(range(unit))  # in order, and cut short
        yield frozenset(range(unit, units))  # the younger without the older
        yield everything - {unit}
        yield frozenset({unit})
    if units <= bounds.pairs:
        for pair in itertools.combinations(range(units), 2):
            yield everything - set(pair)
    for _ in range(bounds.random):
        yield frozenset(unit for unit in range(units) if generator.random() < 0.5)
