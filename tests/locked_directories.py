"""Directories that may not be read, for tests that may run as root, whom no mode keeps out."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

__all__ = ["lock"]


def lock(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Refuse to open anything called one of ``names``, as the kernel does without permission."""
    real = os.open

    def refuse(path: Any, *args: Any, **options: Any) -> int:
        if os.path.basename(path) in names:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
