"""What a parent pickles for its worker.

Belongs here: pickling, with errors at the call that name the object, and what the worker is told
of the main module. Does not belong here: loading (``main_module``).
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from dcp_engine.errors import UsageError
from dcp_engine.executors.process.protocol import MainModule

__all__ = ["dumps", "main_module"]

_DEPTH = 8


def dumps(value: Any) -> bytes:
    """Pickle ``value`` for a worker process, which reads it with ``loads``.

    Raises:
        UsageError: it cannot be pickled, or not loaded elsewhere; names the part of ``value`` that
            is to blame, and its type.
    """
    try:
        return _dump(value)
    except Exception as error:
        path, culprit, reason = _culprit(value, error)
        raise UsageError(
            f"{path or 'the value'} (a {_type_name(culprit)}) cannot be sent to a worker process: "
            f"{type(reason).__name__}: {reason}",
            hint="make it picklable, or use a thread instead of a worker process",
        ) from error


def main_module() -> MainModule:
    """This process's main module, as far as a file of Python stands for it."""
    main = sys.modules.get("__main__")
    path: object = getattr(main, "__file__", None)
    spec = getattr(main, "__spec__", None)
    # A name in angle brackets stands for standard input; an archive is no file of Python.
    if not isinstance(path, str) or not os.path.isfile(path) or path.endswith(".pyz"):
        path = None
    return MainModule(
        path=None if path is None else os.path.abspath(path),
        package=None if spec is None else spec.parent,
    )


class _Pickler(pickle.Pickler):
    """Refuses what would not be found at the other end."""

    def __init__(self, file: io.BytesIO, main: MainModule) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._main_is_lost = main.path is None

    def reducer_override(self, value: Any) -> Any:
        if self._main_is_lost and getattr(value, "__module__", None) == "__main__":
            raise pickle.PicklingError(
                f"{_type_name(value if isinstance(value, type) else type(value))} is defined in "
                "the main module, which has no file here (an interactive session, python -c); "
                "put it into a module"
            )
        return NotImplemented


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, main_module()).dump(value)
    return buffer.getvalue()


def _culprit(value: Any, error: Exception) -> tuple[str, Any, Exception]:
    """The innermost part of ``value`` that cannot be pickled: path, the part, and why."""
    path = ""
    for _ in range(_DEPTH):
        for step, part in _parts(value):
            try:
                _dump(part)
            except Exception as reason:
                path, value, error = path + step, part, reason
                break
        else:
            break
    return path, value, error


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield f".{field.name}", getattr(value, field.name)
    elif not isinstance(value, type) and isinstance(getattr(value, "__dict__", None), dict):
        yield from ((f".{name}", part) for name, part in vars(value).items())


def _type_name(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
