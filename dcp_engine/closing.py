"""Objects that own what they need until they are closed.

Belongs here: that they are context managers. Does not belong here: what any of them owns.
"""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self

__all__ = ["Closing"]


class Closing(abc.ABC):
    """A context manager that closes at the end of the block."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release what is held. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
