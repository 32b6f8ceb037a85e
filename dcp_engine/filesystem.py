"""``FileSystemWriter`` and ``FileSystemReader`` under the name of torch's module of them.

They are ``storage_backends.filesystem``'s, imported when they are first looked at: the engine
knows no backend by name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage_backends.filesystem import FileSystemReader, FileSystemWriter

__all__ = ["FileSystemReader", "FileSystemWriter"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("storage_backends.filesystem"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
