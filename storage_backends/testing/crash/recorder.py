"""Watching a directory: every operation that the process does below it, in order.

Belongs here: turning calls of the operating system into the operations of a record, under one
lock, so that the record has one order whatever the number of threads. Does not belong here:
which functions are watched (``interception``).

That nothing is missed is checked, not believed: with ``verify=True`` the tree that follows from
the record is compared with the real one before each operation and at the end.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

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
    Step,
    Sync,
    SyncAll,
    SyncFailed,
    Truncate,
    Unlink,
    Write,
)
from storage_backends.testing.crash.persistence import DiskAtPosition

__all__ = ["DeadThread", "Fault", "RecordError", "Recorder", "image_of", "require_explained"]

T = TypeVar("T")
Fault = Callable[[str], OSError | None]
"""Asked before each operation, by its kind (``write``, ``sync``, ``rename`` ...): the error with
which it fails, undone, or None."""

Where = str | bytes | os.PathLike[str] | os.PathLike[bytes] | int


class RecordError(Exception):
    """Something happened to the directory that the record does not hold, or cannot say."""


class DeadThread(OSError):
    """What a thread gets that is played dead: nothing of it reaches the system any more, so that
    not even its failing is in the record. A fault may return it, too."""


def image_of(root: str | os.PathLike[str]) -> Image:
    """The tree below ``root`` as it is now."""
    files: dict[str, bytes] = {}
    directories: set[str] = set()
    for path, below, names in os.walk(root):
        relative = os.path.relpath(path, root)
        prefix = "" if relative == "." else f"{relative}/"
        directories.update(f"{prefix}{name}" for name in below)
        for name in names:
            files[f"{prefix}{name}"] = Path(path, name).read_bytes()
    return Image(files=files, directories=frozenset(directories))


def require_explained(record: Record, root: str | os.PathLike[str]) -> None:
    """Raise ``RecordError`` unless ``record`` explains what is below ``root``, byte for byte."""
    disk = DiskAtPosition(record)
    for step in record.steps:
        disk.advance(step.operation)
    _compare(disk, root)


def _compare(disk: DiskAtPosition, root: str | os.PathLike[str]) -> None:
    expected, found = disk.whole(), image_of(root)
    if expected.digest == found.digest:
        return
    changed = {
        name
        for name in {*expected.files, *found.files}
        if expected.files.get(name) != found.files.get(name)
    }
    raise RecordError(
        f"the record does not explain {sorted(changed)[:5]} and directories "
        f"{sorted(expected.directories ^ found.directories)[:5]} of {root}"
    )


class Recorder:
    """What happens below ``root``, from now on; ``interception.recording`` feeds it.

    Args:
        root: a directory that exists. What is in it now counts as durable.
        before: called before each operation and before each file that is opened, in the thread
            that does it, outside the lock: where a scheduler lets others have their turn.
        fault: see ``Fault``.
        verify: compare record and directory at every operation; slow.
        tell: called with each step when it is done, before the program goes on.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        before: Callable[[], None] | None = None,
        fault: Fault | None = None,
        verify: bool = False,
        tell: Callable[[Step], None] | None = None,
    ) -> None:
        self.root = os.path.realpath(root)
        self._before = before
        self._fault = fault
        self._tell = tell
        self._lock = threading.RLock()
        self._steps: list[Step] = []
        self._nodes: dict[tuple[int, int], int] = {}
        self._count = 0
        self._refused: set[str] = set()
        self._files: dict[int, bytes] = {}
        self._entries: dict[tuple[int, str], int] = {}
        self._take_inventory()
        self._mirror = DiskAtPosition(self.record()) if verify else None

    # What it holds

    def record(self) -> Record:
        """The record so far."""
        with self._lock:
            return Record(
                files=dict(self._files), entries=dict(self._entries), steps=tuple(self._steps)
            )

    def mark(self, text: str) -> None:
        """Note where the program is."""
        with self._lock:
            self._add(Mark(text))

    def set_fault(self, fault: Fault) -> None:
        """From now on, ``fault`` decides which operations fail."""
        with self._lock:
            self._fault = fault

    def refuse(self, actor: str) -> None:
        """From now on every operation of that thread fails: it is dead, and must not tidy up."""
        with self._lock:
            self._refused.add(actor)

    def verify(self) -> None:
        """Raise ``RecordError`` unless the record explains the directory byte for byte."""
        with self._lock:
            require_explained(self.record(), self.root)

    def record_before(self) -> Record:
        """The directory as it was, without what happened since."""
        return Record(files=dict(self._files), entries=dict(self._entries), steps=())

    def _take_inventory(self) -> None:
        self._number(os.stat(self.root))
        waiting = [(self.root, ROOT)]
        while waiting:
            path, directory = waiting.pop()
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                status = entry.stat(follow_symlinks=False)
                known = self._nodes.get((status.st_dev, status.st_ino))
                node = self._number(status) if known is None else known
                self._entries[(directory, entry.name)] = node
                if stat.S_ISDIR(status.st_mode):
                    waiting.append((entry.path, node))
                elif stat.S_ISREG(status.st_mode):
                    self._files[node] = Path(entry.path).read_bytes()
                else:
                    raise RecordError(f"{entry.path} is neither a file nor a directory")

    def _number(self, status: os.stat_result) -> int:
        """A new node: an inode's number may be that of one that is gone."""
        node = self._nodes[(status.st_dev, status.st_ino)] = self._count
        self._count += 1
        return node

    # What interception asks and tells

    def pause(self) -> None:
        """Let the scheduler decide who goes on."""
        if self._before is not None:
            self._before()

    @contextmanager
    def _operation(self, kind: str) -> Iterator[None]:
        """One operation, alone."""
        self.pause()
        with self._lock:
            if threading.current_thread().name in self._refused:
                raise DeadThread("this thread is dead")
            if self._mirror is not None:
                _compare(self._mirror, self.root)
            error = None if self._fault is None else self._fault(kind)
            if error is not None:
                raise error
            yield

    def _add(self, operation: Operation) -> None:
        step = Step(operation, threading.current_thread().name)
        self._steps.append(step)
        if self._tell is not None:
            self._tell(step)
        if self._mirror is not None:
            self._mirror.advance(operation)

    def node_of(self, descriptor: int) -> int | None:
        """The node that an open descriptor is of; None for what is not below the root."""
        status = os.fstat(descriptor)
        with self._lock:  # what another thread is just making has its number then
            return self._nodes.get((status.st_dev, status.st_ino))

    def place_of(self, path: Where, directory: int | None) -> tuple[int, str] | None:
        """Node of the parent, and last part, of ``path``; None for what is not below the root."""
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        parent, name = os.path.split(text.rstrip("/"))
        try:
            if directory is not None and not os.path.isabs(text):
                status = os.stat(parent or ".", dir_fd=directory)
            else:
                status = os.stat(parent or ".")
        except OSError:
            return None  # the call itself will say so
        with self._lock:
            node = self._nodes.get((status.st_dev, status.st_ino))
        return None if node is None else (node, name)

    def opened(
        self, path: Where, flags: int, directory: int | None, call: Callable[[], int]
    ) -> int:
        """A file is opened for writing."""
        place = self.place_of(path, directory)
        if place is None or isinstance(path, int):
            return call()
        temporary = getattr(os, "O_TMPFILE", 0)
        if temporary and flags & temporary == temporary:
            return call()  # has no name; linking it would be an error below
        with self._operation("create" if flags & os.O_CREAT else "open"):
            if flags & (os.O_SYNC | os.O_DSYNC):
                raise RecordError(f"{os.fsdecode(path)} is opened for synchronous writes")
            before = _status(path, directory)
            descriptor = call()
            status = os.fstat(descriptor)
            if before is None:
                self._add(Create(*place, self._number(status)))
            elif flags & os.O_TRUNC and before.st_size:
                self._add(Truncate(self._known(status), 0))
            return descriptor

    def _known(self, status: os.stat_result) -> int:
        node = self._nodes.get((status.st_dev, status.st_ino))
        if node is None:
            raise RecordError("an inode that the record does not know is changed")
        return node

    def wrote(
        self, descriptor: int, offset: int | None, data: bytes, call: Callable[[], int]
    ) -> int:
        """Bytes are written: at ``offset``, or (None) where the descriptor stands."""
        node = self.node_of(descriptor)
        if node is None:
            return call()
        with self._operation("write"):
            if offset is None:
                status = os.fstat(descriptor)
                offset = os.lseek(descriptor, 0, os.SEEK_CUR)
                if _appends(descriptor):
                    offset = status.st_size
            done = call()
            if done:
                self._add(Write(node, offset, data[:done]))
            return done

    def truncated(self, descriptor: int, size: int, call: Callable[[], None]) -> None:
        """A file gets another size."""
        node = self.node_of(descriptor)
        if node is None:
            call()
            return
        with self._operation("truncate"):
            call()
            self._add(Truncate(node, size))

    def synced(self, descriptor: int, call: Callable[[], None]) -> None:
        """``fsync``, of a file or a directory."""
        node = self.node_of(descriptor)
        if node is None:
            call()
            return
        try:
            with self._operation("sync"):
                call()
                self._add(Sync(node))
        except DeadThread:
            raise
        except OSError:
            with self._lock:
                self._add(SyncFailed(node))
            raise

    def synced_all(self, call: Callable[[], None]) -> None:
        """``sync``."""
        with self._operation("sync"):
            call()
            self._add(SyncAll())

    def made_directory(self, path: Where, directory: int | None, call: Callable[[], None]) -> None:
        """``mkdir``."""
        place = self.place_of(path, directory)
        if place is None:
            call()
            return
        with self._operation("mkdir"):
            call()
            status = _status(path, directory)
            if status is None:
                raise RecordError(f"{path!r} was made and is not there")
            self._add(MakeDirectory(*place, self._number(status)))

    def removed(
        self, path: Where, directory: int | None, is_directory: bool, call: Callable[[], None]
    ) -> None:
        """``unlink`` or ``rmdir``."""
        place = self.place_of(path, directory)
        if place is None:
            call()
            return
        with self._operation("rmdir" if is_directory else "unlink"):
            call()
            self._add(RemoveDirectory(*place) if is_directory else Unlink(*place))

    def renamed(
        self,
        source: Where,
        target: Where,
        directory: int | None,
        to_directory: int | None,
        call: Callable[[], None],
    ) -> None:
        """``rename`` or ``replace``."""
        place = self.place_of(source, directory)
        to = self.place_of(target, to_directory)
        if place is None and to is None:
            call()
            return
        if place is None or to is None:
            call()  # raises where a parent is missing
            raise RecordError(f"{source!r} was moved to {target!r}, over the border of {self.root}")
        with self._operation("rename"):
            call()
            self._add(Rename(*place, *to))

    def linked(
        self,
        source: Where,
        target: Where,
        directory: int | None,
        to_directory: int | None,
        call: Callable[[], None],
    ) -> None:
        """``link``."""
        to = self.place_of(target, to_directory)
        if to is None:
            call()
            return
        with self._operation("link"):
            call()
            status = _status(target, to_directory)
            if status is None:
                raise RecordError(f"{target!r} was linked and is not there")
            self._add(Link(*to, self._known(status)))

    def refuse_unknown(self, what: str, path: Where, directory: int | None = None) -> None:
        """For calls that the record has no word for."""
        place = self.place_of(path, directory) if not isinstance(path, int) else None
        if place is not None or (isinstance(path, int) and self.node_of(path) is not None):
            raise RecordError(f"{what} below {self.root} cannot be recorded")


def _status(path: Where, directory: int | None) -> os.stat_result | None:
    try:
        return os.stat(path, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _appends(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND)
