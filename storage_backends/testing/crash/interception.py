"""Standing between a program and the operating system while a recorder watches.

Belongs here: which functions of ``os`` and ``io`` are replaced for that time, and by what. Does
not belong here: what is recorded (``recorder``).

Writes that go past these functions (a C library with descriptors of its own, a mapped file) are
not seen; a recorder that verifies finds that out.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from storage_backends.testing.crash.recorder import Recorder, Where

__all__ = ["intercepting", "recording"]

Bytes = bytes | bytearray | memoryview

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """While this is open, what any thread of this process does below the recorder's root goes
    through the recorder. One at a time."""
    with intercepting(recorder):
        yield recorder
    recorder.verify()


@contextmanager
def intercepting(recorder: Recorder) -> Iterator[None]:
    """The same where the record of this process does not explain the directory: others write
    there, too."""
    with ExitStack() as stack:
        for module, name, replacement in _replacements(recorder):
            original = getattr(module, name)
            stack.callback(setattr, module, name, original)
            setattr(module, name, replacement)
        yield


def _replacements(recorder: Recorder) -> list[tuple[Any, str, Callable[..., Any]]]:
    calls = _Calls(recorder)
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (os, "open", calls.open),
        (os, "write", calls.write),
        (os, "writev", calls.writev),
        (os, "pwrite", calls.pwrite),
        (os, "pwritev", calls.pwritev),
        (os, "ftruncate", calls.ftruncate),
        (os, "truncate", calls.truncate),
        (os, "fsync", calls.fsync),
        (os, "fdatasync", calls.fdatasync),
        (os, "sync", calls.sync),
        (os, "mkdir", calls.mkdir),
        (os, "rmdir", calls.rmdir),
        (os, "unlink", calls.unlink),
        (os, "remove", calls.remove),
        (os, "rename", calls.rename),
        (os, "replace", calls.replace),
        (os, "link", calls.link),
        (io, "open", calls.open_stream),
        (builtins, "open", calls.open_stream),
    ]
    # The record has no word for these.
    replaced += [(os, name, calls.refused(name)) for name in ("symlink", "mkfifo", "mknod")]
    replaced += [
        (os, name, calls.refused(name))
        for name in ("posix_fallocate", "sendfile", "copy_file_range", "splice")
        if hasattr(os, name)
    ]
    return replaced


class _Calls:
    """The replacements, each with the signature of what it replaces."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._os = {
            name: getattr(os, name)
            for name in dir(os)
            if callable(getattr(os, name)) and not name.startswith("_")
        }
        self._io_open = io.open

    def open(self, path: Where, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def call() -> int:
            descriptor: int = self._os["open"](path, flags, mode, dir_fd=dir_fd)
            return descriptor

        if not flags & _WRITING:
            self._recorder.pause()
            return call()
        return self._recorder.opened(path, flags, dir_fd, call)

    def write(self, fd: int, data: Bytes, /) -> int:
        return self._recorder.wrote(fd, None, bytes(data), lambda: self._os["write"](fd, data))

    def writev(self, fd: int, buffers: Sequence[Bytes], /) -> int:
        joined = b"".join(buffers)
        return self._recorder.wrote(fd, None, joined, lambda: self._os["writev"](fd, buffers))

    def pwrite(self, fd: int, data: Bytes, offset: int, /) -> int:
        return self._recorder.wrote(
            fd, offset, bytes(data), lambda: self._os["pwrite"](fd, data, offset)
        )

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int, flags: int = 0, /) -> int:
        joined = b"".join(buffers)
        return self._recorder.wrote(
            fd, offset, joined, lambda: self._os["pwritev"](fd, buffers, offset, flags)
        )

    def ftruncate(self, fd: int, length: int, /) -> None:
        self._recorder.truncated(fd, length, lambda: self._os["ftruncate"](fd, length))

    def truncate(self, path: Where, length: int) -> None:
        descriptor = path if isinstance(path, int) else self._os["open"](path, os.O_WRONLY)
        try:
            self.ftruncate(descriptor, length)
        finally:
            if not isinstance(path, int):
                os.close(descriptor)

    def fsync(self, fd: Any) -> None:
        self._recorder.synced(_number(fd), lambda: self._os["fsync"](fd))

    def fdatasync(self, fd: Any) -> None:
        # Size and bytes are what the model knows of a file.
        self._recorder.synced(_number(fd), lambda: self._os["fdatasync"](fd))

    def sync(self) -> None:
        self._recorder.synced_all(self._os["sync"])

    def mkdir(self, path: Where, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._recorder.made_directory(
            path, dir_fd, lambda: self._os["mkdir"](path, mode, dir_fd=dir_fd)
        )

    def rmdir(self, path: Where, *, dir_fd: int | None = None) -> None:
        self._recorder.removed(path, dir_fd, True, lambda: self._os["rmdir"](path, dir_fd=dir_fd))

    def unlink(self, path: Where, *, dir_fd: int | None = None) -> None:
        self._recorder.removed(path, dir_fd, False, lambda: self._os["unlink"](path, dir_fd=dir_fd))

    def remove(self, path: Where, *, dir_fd: int | None = None) -> None:
        self.unlink(path, dir_fd=dir_fd)

    def rename(
        self,
        src: Where,
        dst: Where,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
    ) -> None:
        self._recorder.renamed(
            src,
            dst,
            src_dir_fd,
            dst_dir_fd,
            lambda: self._os["rename"](src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd),
        )

    def replace(
        self,
        src: Where,
        dst: Where,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
    ) -> None:
        self.rename(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    def link(
        self,
        src: Where,
        dst: Where,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        def call() -> None:
            self._os["link"](
                src,
                dst,
                src_dir_fd=src_dir_fd,
                dst_dir_fd=dst_dir_fd,
                follow_symlinks=follow_symlinks,
            )

        self._recorder.linked(src, dst, src_dir_fd, dst_dir_fd, call)

    def refused(self, name: str) -> Callable[..., Any]:
        """``os.<name>``, which must not touch what is recorded."""
        original = self._os[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            for value in args[:2]:
                if isinstance(value, str | bytes | os.PathLike | int):
                    self._recorder.refuse_unknown(name, value, kwargs.get("dir_fd"))
            return original(*args, **kwargs)

        return call

    def open_stream(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Callable[[str, int], int] | None = None,
    ) -> IO[Any]:
        """``open``: in C it calls the system itself, so a file that is written is put together
        here, from a raw file that goes through the functions above."""
        plain = (mode, buffering, encoding, errors, newline, closefd, opener)
        if not set(mode) & set("wax+") or isinstance(file, int) or opener is not None:
            opened: IO[Any] = self._io_open(file, *plain)
            return opened
        if self._recorder.place_of(file, None) is None:
            outside: IO[Any] = self._io_open(file, *plain)
            return outside
        raw_mode = "".join(letter for letter in mode if letter in "wax+r")
        raw = _RawFile(file, raw_mode, opener=lambda path, flags: os.open(path, flags, 0o666))
        if buffering == 0:
            return raw
        size = io.DEFAULT_BUFFER_SIZE if buffering < 2 else buffering
        buffered: Any = (
            io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        )
        if "b" in mode:
            stream: IO[Any] = buffered
            return stream
        return io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)


class _RawFile(io.FileIO):
    """Writes through ``os.write``, where it is seen."""

    def write(self, data: Any, /) -> int:
        return os.write(self.fileno(), data)

    def truncate(self, size: int | None = None, /) -> int:
        to = self.tell() if size is None else size
        os.ftruncate(self.fileno(), to)
        return to


def _number(descriptor: Any) -> int:
    return descriptor if isinstance(descriptor, int) else int(descriptor.fileno())
