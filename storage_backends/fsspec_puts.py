"""Small objects that appear at once, on each kind of fsspec file system.

Belongs here: storing one whole, over another or only where there is none. Does not belong here:
retries and errors (``fsspec_store``); each call here is one attempt.
"""

from __future__ import annotations

import inspect
import io
import logging
from collections.abc import Mapping
from typing import Any

from fsspec.implementations.memory import MemoryFile

from storage_backends.fsspec_paths import can_rename_if_absent, rename, rename_if_absent
from storage_backends.fsspec_traits import Traits
from storage_backends.retry import causes, service_code

__all__ = [
    "Renaming",
    "creates_if_absent",
    "put_object",
    "put_over",
    "put_s3_object",
    "replaces_if_same",
    "tag_of",
]

logger = logging.getLogger(__name__)


def creates_if_absent(kind: type, traits: Traits) -> bool:
    """Whether file systems of that class can store what is not there yet, and let one of several
    callers win."""
    if not traits.writable:
        return False
    if not traits.whole_puts:
        return can_rename_if_absent(kind)
    if kind.__module__ in ("s3fs.core", "fsspec.implementations.memory", "obstore.fsspec"):
        return True
    method = getattr(kind, "_pipe_file", None)
    return method is not None and "mode" in inspect.signature(method).parameters


def put_object(fs: Any, path: str, data: bytes, *, if_absent: bool) -> None:
    """Store an object, by one request. With ``if_absent``, ``FileExistsError`` if it is there."""
    module = type(fs).__module__
    if module == "s3fs.core":
        put_s3_object(fs, path, data, if_absent=if_absent)
    elif not if_absent:
        fs.pipe_file(path, data)
    elif module == "fsspec.implementations.memory":
        # What it offers looks first and writes then; of several threads all would win.
        made = MemoryFile(fs, path, data)
        if fs.store.setdefault(path, made) is not made:
            raise FileExistsError(path)
    elif module == "obstore.fsspec":
        _create_by_obstore(fs, path, data)
    else:
        fs.pipe_file(path, data, mode="create")


def put_s3_object(
    fs: Any, path: str, data: bytes, *, if_absent: bool = False, tag: str | None = None
) -> None:
    """``put_object`` through s3fs; with ``tag``, only over the object that has this entity tag."""
    condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": tag} if tag is not None else {}
    try:
        _call_put_object(fs, path, data, condition)
    except Exception as error:
        # s3fs translates some of these, by the words of AWS.
        codes = {service_code(each) for each in causes(error)}
        if condition and codes & {"PreconditionFailed", "412"}:
            raise FileExistsError(path) from error
        if not (condition and codes & {"NotImplemented", "501"}):
            raise
        logger.info("%s takes no conditions; storing without", type(fs).__name__)
        _call_put_object(fs, path, data, {})


def _call_put_object(fs: Any, path: str, data: bytes, condition: Mapping[str, str]) -> None:
    bucket, key, _ = fs.split_path(path)
    # A file object shares the memory of bytes, and is sent in pieces that let others run.
    fs.call_s3("put_object", Bucket=bucket, Key=key, Body=io.BytesIO(data), **condition)


def replaces_if_same(kind: type) -> bool:
    """Whether ``tag_of`` and ``put_over`` work."""
    return kind.__module__ in ("s3fs.core", "obstore.fsspec")


def tag_of(fs: Any, path: str) -> str:
    """The entity tag of an object."""
    info = fs.info(path)
    if info["type"] == "directory":
        raise FileNotFoundError(path)
    return str(info.get("ETag") or info.get("e_tag") or "")


def put_over(fs: Any, path: str, data: bytes, tag: str) -> None:
    """Store an object over the one of ``tag``, or ``FileExistsError`` if that is not there now."""
    try:
        if type(fs).__module__ == "s3fs.core":
            put_s3_object(fs, path, data, tag=tag)
        else:
            bucket, key = fs._split_path(path)
            fs._construct_store(bucket).put(key, data, mode={"e_tag": tag})
    except Exception as error:
        is_gone = isinstance(error, FileNotFoundError)
        if is_gone or type(error).__name__ == "PreconditionError":
            raise FileExistsError(path) from error
        raise


def _create_by_obstore(fs: Any, path: str, data: bytes) -> None:
    """Past its fsspec face, which forgets the mode."""
    bucket, key = fs._split_path(path)
    try:
        fs._construct_store(bucket).put(key, data, mode="create")
    except Exception as error:
        if type(error).__name__ == "AlreadyExistsError":
            raise FileExistsError(path) from error
        raise


class Renaming:
    """The same for a file server: a temporary file that takes the name. ``write`` and
    ``take_name`` may each be repeated after a failure.

    Args:
        temporary: a name that nobody else uses.
    """

    def __init__(self, temporary: str, path: str, data: bytes, *, if_absent: bool) -> None:
        self._temporary = temporary
        self._path = path
        self._data = data
        self._rename = rename_if_absent if if_absent else rename
        self._tried = False

    def write(self, fs: Any) -> None:
        """Write the temporary file."""
        with fs.open(self._temporary, "wb") as file:
            file.write(self._data)
        written = fs.info(self._temporary)["size"]
        if written != len(self._data):
            raise ConnectionError(f"{len(self._data)} bytes were sent, and {written} are there")

    def take_name(self, fs: Any) -> None:
        """Give it its name."""
        again, self._tried = self._tried, True
        try:
            self._rename(fs, self._temporary, self._path)
        except FileNotFoundError:
            # Nobody but an earlier attempt, its answer lost, can have renamed it.
            if not (again and fs.exists(self._path)):
                raise
